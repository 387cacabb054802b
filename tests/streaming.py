"""A model small enough to stream in tests, and what the tests of streaming do with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_v4flash.checkpoint import Checkpoint
from mlx_v4flash.converted import Converted, is_converted
from mlx_v4flash.experts.attach import Division, attach, begin, open_source
from mlx_v4flash.experts.readers import Buffers, Files
from mlx_v4flash.linear import Numerics
from mlx_v4flash.model import Model
from mlx_v4flash.tiny import TINY
from mlx_v4flash.weights import load_weights

# One layer that routes by token id, two by score.
SMALL = {
    **TINY, "num_hidden_layers": 3, "num_hash_layers": 1, "compress_ratios": [0, 4, 128], "n_routed_experts": 12,
    "num_experts_per_tok": 3, "moe_intermediate_size": 64, "hidden_size": 64,
}  # fmt: skip
PLAIN = {key: value for key, value in SMALL.items() if key not in ("quantization_config", "expert_dtype")}
LAYERS, E, A = 3, 12, 3


class Reads(Files):
    """Counts reads, and runs something before each."""

    def __init__(self, before: Callable[[], None] = lambda: None, kind: str = "pread") -> None:
        super().__init__(kind)
        self.before, self.count = before, 0

    def read(self, path: Path, offset: int, buffers: Buffers) -> None:
        self.count += 1
        self.before()
        super().read(path, offset, buffers)


def streamed(
    folder: Path, slots: list[int], files: Files | None = None, verify: bool = False, prefetch: bool = False
) -> Model:
    opened = Converted.open(folder) if is_converted(folder) else Checkpoint.open(folder)
    model = Model(opened.config, Numerics())
    store = attach(model, open_source(opened, verify), Division(slots, E), prefetch=prefetch, files=files or Reads())
    load_weights(model, opened)
    begin(model, store)
    return model


def prompt(rng: np.random.Generator, T: int, B: int = 1) -> mx.array:
    return mx.array(rng.integers(0, SMALL["vocab_size"], (B, T)))


def expect_same(model: Model, other: Model, ids: mx.array, chunk: int = 4096, steps: int = 1) -> None:
    """Logits of the prompt in chunks, and of some tokens after it, bit for bit."""
    caches = model.make_cache(), other.make_cache()
    parts = [ids[:, n : n + chunk] for n in range(0, ids.shape[1], chunk)]
    for step in range(len(parts) + steps):
        found, expected = model(parts[step], caches[0]), other(parts[step], caches[1])
        assert mx.array_equal(found, expected), f"step {step}"
        if step + 1 >= len(parts):
            parts.append(mx.argmax(found[:, -1:], axis=-1))


def fails_once(error: BaseException, after: int = 0) -> Callable[[], None]:
    left = [after + 1]

    def before() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise error

    return before
