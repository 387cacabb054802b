"""One run of the command line: load, prefill, decode, and what it took."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.console import Console

import metal_kernels

from .engine import stream_generate
from .loading import load
from .model import Model
from .progress import bar
from .sampling import SamplingParams


@dataclass
class Run:
    """A loaded model and the figures of its last answer."""

    model: Model
    tokenizer: TokenizerWrapper
    load_s: float
    load_bytes: int
    finish_reason: str = "none"
    last: GenerationResponse | None = field(default=None, repr=False)

    @classmethod
    def load(
        cls, folder: str | Path, *, revision: str | None, dtype: str, cache_quant: bool, activation_quant: bool
    ) -> Run:
        """Load with a progress bar; options as on the command line."""
        start, size = time.perf_counter(), 0
        with bar("loading", "bytes") as progress:

            def count(done: int, total: int) -> None:
                nonlocal size
                size = done
                progress(done, total)

            model, tokenizer = load(
                folder,
                revision=revision,
                dtype=dtype,
                simulate_cache_quant=cache_quant,
                quantize_activations=activation_quant,
                progress=count,
            )
        return cls(model, tokenizer, time.perf_counter() - start, size)

    def stream(self, prompt: str, sampling: SamplingParams, **options: Any) -> Iterator[str]:
        """Pieces of the answer. Ctrl-C ends it and keeps what there is."""
        with ExitStack() as stack:
            progress = stack.enter_context(bar("prefill", "tokens"))
            try:
                for response in stream_generate(
                    self.model,
                    self.tokenizer,
                    prompt,
                    sampler=sampling.sampler(self.model.config.vocab_size),
                    prompt_progress=progress,
                    **options,
                ):
                    stack.close()  # the bar would share the terminal with the answer
                    self.last, self.finish_reason = response, response.finish_reason or "none"
                    yield response.text
            except KeyboardInterrupt:
                self.finish_reason = "interrupted"

    def summary(self) -> dict[str, Any]:
        """Figures of the answer; tokens per second, seconds and bytes."""
        found: dict[str, Any] = {"finish_reason": self.finish_reason}
        if self.last is not None:
            found["prompt_tokens"] = self.last.prompt_tokens
            found["prefill_tokens_per_s"] = round(self.last.prompt_tps, 2)
            found["generated_tokens"] = self.last.generation_tokens
            found["decode_tokens_per_s"] = round(self.last.generation_tps, 2)
        found["load_s"] = round(self.load_s, 3)
        found["bytes_read"] = self.load_bytes
        found["peak_memory_bytes"] = peak_memory_bytes()
        found["ops"] = metal_kernels.active()
        return found

    def print_stats(self) -> None:
        """The summary as lines on standard error."""
        console = Console(stderr=True, highlight=False)
        for name, value in self.summary().items():
            shown = f"{value:,}" if isinstance(value, int) else value
            console.print(f"{name.replace('_', ' ')}: {shown}")


def peak_memory_bytes() -> int:
    """The most memory this process has held so far."""
    if sys.platform == "linux":  # getrusage would start with what the parent process held
        peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The system does not count all of Metal's buffers; MLX does.
    return max(peak, mx.get_peak_memory())
