"""Experts from disk: the store beside a memory map, beside plain reads, and beside what the file gives at that moment.

    python benchmarks/streaming.py CONVERTED [--shares 10,25,50,100] [--tokens 40] [--random-map]

Only bytes are moved: the model is not run, so the figures are those of bookkeeping and disk. Each layer's experts are
those of an invented, skewed routing (mlx_v4flash.experts.simulation.synthetic). Before each measurement the file's
pages are dropped from the page cache. Ways:

- store: ExpertStore with the reader and the threads that were fastest just before;
- plain: the same misses, one read after another;
- map: a memory map of the file is touched where experts are used; faults do the rest, with the system's readahead or,
  with --random-map, without.

The limit is what threads that read other places of the same file reach just before and after. Writes
benchmarks/streaming.json. The one here has a run of each map, of 15 and 20 tokens and one layer with the sizes of
V4-Flash, on two shared cores with other work on them: figures of one run, not medians.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mlx_v4flash.converted import PACK, Converted
from mlx_v4flash.experts.attach import open_source
from mlx_v4flash.experts.calibration import measure
from mlx_v4flash.experts.eviction import LFU
from mlx_v4flash.experts.pool import record_bytes
from mlx_v4flash.experts.readers import Files
from mlx_v4flash.experts.residency import Residency
from mlx_v4flash.experts.simulation import synthetic
from mlx_v4flash.experts.store import ExpertStore
from mlx_v4flash.experts.trace import Trace


def drop(path: Path) -> None:
    """Forget the file's pages."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def timed(path: Path) -> Iterator[dict[str, float]]:
    drop(path)
    found, begun = {}, time.perf_counter()
    yield found
    found["seconds"] = time.perf_counter() - begun


def limit(path: Path, record: int) -> tuple[float, str, int]:
    """Bytes/s of the fastest way to read records at random places, and which it is."""
    best = max(measure(path, record, seconds=1.0), key=lambda choice: choice.bytes_per_s or 0.0)
    return best.bytes_per_s or 0.0, best.reader, best.threads


def with_store(opened: Converted, trace: Trace, slots: int, reader: str, threads: int) -> dict[str, float]:
    """Stage every call of the trace; nothing computes."""
    source = open_source(opened)
    store = ExpertStore(
        source, [slots] * trace.layers, trace.experts, eviction=LFU, files=Files(reader), threads=threads, staging=1
    )
    with timed(source.path) as found:
        for layers in trace.passes:
            for layer, experts in enumerate(layers):
                store.finish(store.stage(layer, experts))
    found["bytes"] = float(store.statistics.bytes_read)
    found["disk_s"] = store.statistics.disk_s
    store.close()
    return found


def one_by_one(opened: Converted, trace: Trace, slots: int) -> dict[str, float]:
    """The same slots and policy; each miss is read after the one before, through the page cache."""
    source, files, done = open_source(opened), Files("pread"), 0
    tables = [Residency(slots, LFU()) for _ in range(trace.layers)]
    into = {name: np.empty(shape.shape, _numpy(shape.nbytes, shape.shape)) for name, shape in source.shapes.items()}
    with timed(source.path) as found:
        for layers in trace.passes:
            for layer, experts in enumerate(layers):
                tables[layer].use(experts)
                missing = tables[layer].missing(experts)
                for expert in tables[layer].claim(missing, experts):
                    done += source.read(layer, expert, into, files)
                    tables[layer].loaded(expert)
    files.close()
    return found | {"bytes": float(done)}


def _numpy(nbytes: int, shape: tuple[int, ...]) -> np.dtype[Any]:
    return np.dtype(f"u{nbytes // int(np.prod(shape))}")


def with_map(opened: Converted, trace: Trace, slots: int, random: bool) -> dict[str, float]:
    """Every page of an expert is touched in a map of the file; pages of those that are given up are dropped."""
    path, done = opened.folder / PACK, 0
    tables = [Residency(slots, LFU()) for _ in range(trace.layers)]
    packed = [opened.layers[f"layers.{n}.ffn.experts"] for n in range(trace.layers)]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        view.madvise(mmap.MADV_RANDOM if random else mmap.MADV_NORMAL)
        with timed(path) as found:
            for layers in trace.passes:
                for layer, experts in enumerate(layers):
                    table = tables[layer]
                    table.use(experts)
                    missing, before = table.missing(experts), dict(table.resident)
                    for expert in table.claim(missing, experts):
                        start, length = packed[layer].record(expert)
                        np.frombuffer(view, np.uint8, length, start)[:: mmap.PAGESIZE].sum()
                        done += length
                        table.loaded(expert)
                    for expert in before.keys() - table.resident.keys():
                        start, length = packed[layer].record(expert)
                        view.madvise(mmap.MADV_DONTNEED, start, length)
                        os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_DONTNEED)
    return found | {"bytes": float(done)}


def bookkeeping(trace: Trace, slots: int, layers: int) -> float:
    """Median seconds of a token in the tables of so many layers, each choosing as those of the trace do."""
    tables = [Residency(slots, LFU()) for _ in range(layers)]
    took = []
    for passes in trace.passes:
        begun = time.perf_counter()
        for number, table in enumerate(tables):
            experts = passes[number % trace.layers]
            table.use(experts)
            for expert in table.claim(table.missing(experts), experts):
                table.loaded(expert)
        took.append(time.perf_counter() - begun)
    return statistics.median(took[len(took) // 2 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shares", default="10,25,50,100", help="of the experts, in per cent")
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--random-map", action="store_true")
    args = parser.parse_args()
    opened = Converted.open(args.folder)
    c, path = opened.config, args.folder / PACK
    record = record_bytes(open_source(opened).shapes)
    trace = synthetic(c.num_hidden_layers, c.n_routed_experts, c.num_experts_per_tok, args.tokens)
    long = synthetic(c.num_hidden_layers, c.n_routed_experts, c.num_experts_per_tok, 400)
    rows = []
    for share in map(int, args.shares.split(",")):
        slots = max(c.num_experts_per_tok, c.n_routed_experts * share // 100)
        # A layer that is held whole is not streamed: one slot less shows what filling it takes.
        slots = min(slots, c.n_routed_experts - 1)
        before = limit(path, record)
        found = {"store": with_store(opened, trace, slots, *before[1:])}
        after = limit(path, record)
        found |= {"plain": one_by_one(opened, trace, slots), "map": with_map(opened, trace, slots, args.random_map)}
        top = (before[0] + after[0]) / 2
        speed = {name: f["bytes"] / f["seconds"] for name, f in found.items()}
        row = {
            "share": share,
            "slots": slots,
            "reader": before[1],
            "threads": before[2],
            "miss_rate": found["store"]["bytes"] / record / sum(len(e) for p in trace.passes for e in p),
            "limit_bytes_per_s": [before[0], after[0]],
            "bytes_per_s": speed,
            "store_of_limit": speed["store"] / top,
            "store_of_map": speed["store"] / speed["map"],
            "store_of_plain": speed["store"] / speed["plain"],
            "bookkeeping_43_layers_s": bookkeeping(long, slots, 43),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    result = {"record_bytes": record, "layers": c.num_hidden_layers, "tokens": args.tokens, "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
