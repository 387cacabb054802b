"""One run of the command line: load, prefill, decode, and what it took."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_lm.generate import GenerationResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.console import Console

import metal_kernels

from .chat import Chat
from .engine import stream_generate
from .events import Event, Usage
from .loading import load
from .memory import peak_bytes
from .model import Model
from .progress import bar
from .sampling import SamplingParams
from .terminal import on_interrupt


@dataclass
class Run:
    """A loaded model and the figures of its last answer."""

    model: Model
    tokenizer: TokenizerWrapper
    load_s: float
    load_bytes: int
    folder: str = ""
    finish_reason: str = "none"
    last: GenerationResponse | None = field(default=None, repr=False)
    usage: Usage | None = None

    @classmethod
    def load(
        cls, folder: str | Path, *, revision: str | None, cache_quant: bool, activation_quant: bool, **options: Any
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
                simulate_cache_quant=cache_quant,
                quantize_activations=activation_quant,
                progress=count,
                **options,
            )
        return cls(model, tokenizer, time.perf_counter() - start, size, str(folder))

    @property
    def is_base(self) -> bool:
        """Whether the model continues text rather than answers: base checkpoints have FP8 experts, or are called so."""
        return self.model.config.expert_dtype == "fp8" or "-base" in Path(self.folder).name.lower()

    def chat(self, sampling: dict[str, Any], **options: Any) -> Chat:
        """A conversation with this model.

        Args:
            sampling: replaces what is recommended for this model.
            options: of `Chat`.
        """
        chat = Chat(self.model, self.tokenizer, warn=lambda text: print(f"warning: {text}", file=sys.stderr), **options)
        chat.sampling = replace(chat.recommended, **sampling)
        return chat

    def answer(self, chat: Chat, text: str) -> Iterator[Event]:
        """Events of one answer, the figures among them. Ctrl-C ends it and keeps what there is."""
        with ExitStack() as stack, on_interrupt(chat.stop):
            chat.progress = stack.enter_context(bar("prefill", "tokens"))
            for event in chat.send(text):
                stack.close()  # the bar would share the terminal with the answer
                if isinstance(event, Usage):
                    self.usage, self.finish_reason = event, event.finish_reason
                else:
                    yield event

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

    @property
    def generated(self) -> int:
        """Tokens of the last answer."""
        if self.usage is not None:
            return self.usage.generated_tokens
        return 0 if self.last is None else self.last.generation_tokens

    def summary(self) -> dict[str, Any]:
        """Figures of the answer; tokens per second, seconds and bytes."""
        found: dict[str, Any] = {"finish_reason": self.finish_reason}
        if self.last is not None:
            found["prompt_tokens"] = self.last.prompt_tokens
            found["prefill_tokens_per_s"] = round(self.last.prompt_tps, 2)
            found["generated_tokens"] = self.last.generation_tokens
            found["decode_tokens_per_s"] = round(self.last.generation_tps, 2)
        if self.usage is not None:
            new = self.usage.prompt_tokens - self.usage.cached_tokens
            found["prompt_tokens"] = self.usage.prompt_tokens
            found["prefill_tokens_per_s"] = round(new / max(self.usage.prefill_s, 1e-9), 2)
            found["generated_tokens"] = self.usage.generated_tokens
            found["decode_tokens_per_s"] = round(self.usage.generated_tokens / max(self.usage.decode_s, 1e-9), 2)
        found["load_s"] = round(self.load_s, 3)
        found["bytes_read"] = self.load_bytes
        found["peak_memory_bytes"] = peak_bytes()
        if self.model.store is not None:
            found |= self.model.store.statistics.report()
        found["ops"] = metal_kernels.active()
        return found

    def print_stats(self) -> None:
        """The summary as lines on standard error."""
        console = Console(stderr=True, highlight=False)
        whole = self.model.store is not None and all(self.model.store.whole)
        for name, value in self.summary().items():
            if name == "expert_layers" or (whole and name.startswith("expert_")):  # in JSON
                continue
            shown = f"{value:,}" if isinstance(value, int) else value
            console.print(f"{name.replace('_', ' ')}: {shown}")
        if whole:
            console.print("experts: all in memory, none streamed")
