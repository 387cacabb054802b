"""Prefill and decode speed at frontiers of context."""

from __future__ import annotations

import csv
import io
import json
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.table import Table

import metal_kernels

from . import __version__
from .cache import LayerCache
from .engine import wired
from .errors import RequestError
from .memory import peak_bytes
from .model import Model
from .sampling import expect_limits


@dataclass(frozen=True)
class Frontier:
    """Medians over rounds at one context length; *_low and *_high are the slowest and fastest round."""

    context: int
    prefill_tokens_per_s: float
    prefill_low: float
    prefill_high: float
    decode_tokens_per_s: float
    decode_low: float
    decode_high: float
    cache_bytes: int


@dataclass(frozen=True)
class Report:
    """Where it was measured, and the figures; experts: what `Statistics.report` says of streamed ones, else None."""

    machine: str
    versions: dict[str, str]
    ops: str
    chunk: int
    decode: int
    rounds: int
    peak_memory_bytes: int
    frontiers: list[Frontier]
    experts: dict[str, Any] | None = None

    def json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def table(self) -> str:
        table = Table("context", "prefill tok/s", "decode tok/s", "cache MB")
        for f in self.frontiers:
            table.add_row(
                f"{f.context:,}",
                f"{f.prefill_tokens_per_s:.1f} ({f.prefill_low:.1f} - {f.prefill_high:.1f})",
                f"{f.decode_tokens_per_s:.1f} ({f.decode_low:.1f} - {f.decode_high:.1f})",
                f"{f.cache_bytes / 1e6:.1f}",
            )
        out = io.StringIO()
        Console(file=out, width=100).print(table)
        machine = f"{self.machine}, ops: {self.ops}, {self.rounds} rounds, median (low - high)"
        return out.getvalue() + machine + self._experts()

    def _experts(self) -> str:
        found = self.experts
        if found is None:
            return ""
        rate, hidden, exposed = (found[f"expert_{n}"] for n in ("hit_rate", "disk_hidden_s", "disk_exposed_s"))
        return (
            f"\nexperts streamed: {'-' if rate is None else f'{rate:.1%}'} in memory, "
            f"{found['expert_bytes_per_token'] / 1e6:.1f} MB read per token, {hidden:.1f} s of reading hidden, "
            f"{exposed:.1f} s waited for"
        )

    def write(self, path: Path) -> None:
        """Write `path`.json with everything and `path`.csv with one line per frontier."""
        path.with_suffix(".json").write_text(self.json() + "\n", encoding="utf-8")
        with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.DictWriter(file, list(asdict(self.frontiers[0])))
            rows.writeheader()
            rows.writerows(asdict(f) for f in self.frontiers)


def measure(model: Model, contexts: list[int], *, decode: int, rounds: int, chunk: int) -> Report:
    """Prefill random tokens up to each context length, decode there, and repeat.

    The prefill speed at a frontier is that of the tokens since the frontier before it. Decoding works on a copy of
    the cache, so that the next frontier continues from the prefilled one.

    Raises:
        RequestError: a number out of its range, or a context the model does not have.
    """
    limit = model.config.max_position_embeddings - decode
    contexts = sorted(set(contexts))
    if not contexts or contexts[0] < 1 or contexts[-1] > limit:
        raise RequestError(f"frontiers: expected context lengths from 1 to {limit}, found {contexts}")
    expect_limits(decode=decode, rounds=rounds, prefill_chunk=chunk)
    prefills: dict[int, list[float]] = {c: [] for c in contexts}
    decodes: dict[int, list[float]] = {c: [] for c in contexts}
    sizes: dict[int, int] = {}
    ids = mx.random.randint(0, model.config.vocab_size, (1, contexts[-1]), key=mx.random.key(0))
    with wired(model):
        _prefill(model, model.make_cache(), ids[:, : min(chunk, 64)], chunk)  # the first pass also sets things up
        for _ in range(rounds):
            cache, done = model.make_cache(), 0
            for context in contexts:
                prefills[context].append((context - done) / _prefill(model, cache, ids[:, done:context], chunk))
                decodes[context].append(decode / _decode(model, [c.copy() for c in cache], ids[:, -1:], decode))
                sizes[context], done = sum(c.nbytes for c in cache), context
    frontiers = [Frontier(c, *_spread(prefills[c]), *_spread(decodes[c]), cache_bytes=sizes[c]) for c in contexts]
    return Report(
        machine=f"{platform.system()} {platform.machine()}, {mx.default_device()}",
        versions={
            "python": platform.python_version(),
            "mlx-v4flash": __version__,
            **{p: version(p) for p in ("mlx", "mlx-lm")},
        },
        ops=metal_kernels.active(),
        chunk=chunk,
        decode=decode,
        rounds=rounds,
        peak_memory_bytes=peak_bytes(),
        frontiers=frontiers,
        experts=None if model.store is None else model.store.statistics.report(),
    )


def _prefill(model: Model, cache: list[LayerCache], ids: mx.array, chunk: int) -> float:
    start = time.perf_counter()
    for i in range(0, ids.shape[1], chunk):
        model(ids[:, i : i + chunk], cache)  # as in generation, logits of the prompt are not computed
        mx.eval([c.state for c in cache])
    return time.perf_counter() - start


def _decode(model: Model, cache: list[LayerCache], token: mx.array, steps: int) -> float:
    """Seconds for greedy steps, each submitted before the one before it is waited for, as in generation."""
    mx.eval(model(token, cache))
    start = time.perf_counter()
    before = token
    for _ in range(steps):
        token = mx.argmax(model(token, cache)[:, -1], axis=-1, keepdims=True)
        mx.async_eval(token)
        mx.eval(before)
        before = token
    mx.eval(token)
    return time.perf_counter() - start


def _spread(rates: list[float]) -> tuple[float, float, float]:
    return round(statistics.median(rates), 3), round(min(rates), 3), round(max(rates), 3)
