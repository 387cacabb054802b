"""Experts from disk: the store beside what the file gives at that moment, plain reads, and memory maps.

    python benchmarks/streaming.py CONVERTED [--shares 10,25,50,100] [--tokens 96]

Only bytes are moved: the model is not run, so the figures are those of bookkeeping and disk. Each layer's experts are
those of an invented, skewed routing (mlx_v4flash.experts.simulation.synthetic), and every way keeps as many of them as
it has slots, by the same policy. Ways:

- limit: threads read the missing records of several tokens, none waiting for another;
- store: ExpertStore with the same reader and as many threads, waiting for each layer of each token;
- plain: the same, one record after another, through the page cache;
- map: a memory map of the file is touched where experts are missing, and faults do the rest with readahead;
- random map: the same without readahead, for the first slice alone.

Disks of shared machines change their speed from second to second. So all take turns, slice by slice of four tokens, in
an order that changes, with the file's pages dropped from the page cache before each; ratios are medians over slices.
Writes benchmarks/streaming.json.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlx_v4flash.converted import PACK, Converted
from mlx_v4flash.experts.attach import open_source
from mlx_v4flash.experts.calibration import measure
from mlx_v4flash.experts.eviction import LFU
from mlx_v4flash.experts.pool import record_bytes
from mlx_v4flash.experts.readers import READERS, Files
from mlx_v4flash.experts.residency import Residency
from mlx_v4flash.experts.simulation import synthetic
from mlx_v4flash.experts.store import ExpertStore
from mlx_v4flash.experts.trace import Trace

Passes = list[list[list[int]]]
SLICE = 4


class Way(Protocol):
    def __call__(self, passes: Passes) -> int:
        """Bring what these passes need to memory; the bytes that were read."""


class Tables:
    """What is missing at each call, by the store's own bookkeeping."""

    def __init__(self, opened: Converted, slots: int) -> None:
        self.layers = [opened.layers[f"layers.{n}.ffn.experts"].record for n in range(opened.config.num_hidden_layers)]
        self.tables = [Residency(slots, LFU()) for _ in self.layers]

    def records(self, passes: Passes) -> Iterator[tuple[int, int]]:
        """Offset and length of each record that is to be read."""
        for layers in passes:
            for table, record, experts in zip(self.tables, self.layers, layers, strict=True):
                table.use(experts)
                for expert in table.claim(table.missing(experts), experts):
                    yield record(expert)
                    table.loaded(expert)


class Limit(Tables):
    def __init__(self, opened: Converted, slots: int, reader: str, threads: int) -> None:
        super().__init__(opened, slots)
        self.file, self.threads, self.pool = READERS[reader](opened.folder / PACK), threads, ThreadPoolExecutor(threads)
        self.buffers: list[np.ndarray] = []

    def __call__(self, passes: Passes) -> int:
        records = list(self.records(passes))
        todo, longest = iter(records), max((length for _, length in records), default=0)
        self.buffers = self.buffers or [np.ones(longest, np.uint8) for _ in range(self.threads)]

        def work(memory: np.ndarray) -> None:
            while record := next(todo, None):
                self.file.read(record[0], [memory[: record[1]].data])

        list(self.pool.map(work, self.buffers))
        return sum(length for _, length in records)


class Store:
    def __init__(self, opened: Converted, slots: int, reader: str, threads: int) -> None:
        c = opened.config
        self.store = ExpertStore(
            open_source(opened), [slots] * c.num_hidden_layers, c.n_routed_experts, eviction=LFU, staging=1,
            files=Files(reader), threads=threads,
        )  # fmt: skip

    def __call__(self, passes: Passes) -> int:
        before = self.store.statistics.bytes_read
        for layers in passes:
            for layer, experts in enumerate(layers):
                self.store.finish(self.store.stage(layer, experts))
        return self.store.statistics.bytes_read - before


class Plain(Tables):
    def __init__(self, opened: Converted, slots: int, reader: str = "pread") -> None:
        super().__init__(opened, slots)
        self.file = READERS[reader](opened.folder / PACK)
        self.memory = np.ones(record_bytes(open_source(opened).shapes[0]), np.uint8)

    def __call__(self, passes: Passes) -> int:
        done = 0
        for offset, length in self.records(passes):
            self.file.read(offset, [self.memory[:length].data])
            done += length
        return done


class Map(Tables):
    def __init__(self, opened: Converted, slots: int, advice: int) -> None:
        super().__init__(opened, slots)
        with (opened.folder / PACK).open("rb") as file:
            self.view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.view.madvise(advice)

    def __call__(self, passes: Passes) -> int:
        done = 0
        for offset, length in self.records(passes):
            np.frombuffer(self.view, np.uint8, length, offset)[:: mmap.PAGESIZE].sum()
            self.view.madvise(mmap.MADV_DONTNEED, offset, length)  # so that the page cache can be dropped
            done += length
        return done


def drop(path: Path) -> None:
    """Forget the file's pages, where the system can be told to."""
    if not hasattr(os, "posix_fadvise"):
        return
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(opened: Converted, trace: Trace, slots: int) -> dict[str, Any]:
    """Bytes/s of each way in each slice."""
    path, record = opened.folder / PACK, record_bytes(open_source(opened).shapes[0])
    best = max(measure(path, record, rounds=9), key=lambda choice: choice.bytes_per_s or 0.0)
    choice = best.reader, best.threads
    ways: dict[str, Way] = {
        "limit": Limit(opened, slots, *choice),
        "store": Store(opened, slots, *choice),
        "plain": Plain(opened, slots),
        "map": Map(opened, slots, mmap.MADV_NORMAL),
    }
    speeds: dict[str, list[float]] = {name: [] for name in [*ways, "random map"]}
    slices = [trace.passes[n : n + SLICE] for n in range(0, len(trace.passes), SLICE)]
    read, used = 0, sum(len(experts) for passes in slices for layers in passes for experts in layers)
    for number, passes in enumerate(slices):
        names = list(ways)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            nbytes, seconds = timed(path, ways[name], passes)
            read += nbytes if name == "store" else 0
            if nbytes >= 2 * record:
                speeds[name].append(nbytes / seconds)
    nbytes, seconds = timed(path, Map(opened, slots, mmap.MADV_RANDOM), slices[0])
    speeds["random map"] = [nbytes / seconds]
    medians = {name: statistics.median(found) for name, found in speeds.items()}

    def ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(speeds["store"], speeds[name], strict=True))

    return {
        "reader": best.reader, "threads": best.threads, "miss_rate": read / record / used,
        "store_of_limit": ratio("limit"), "store_of_plain": ratio("plain"), "store_of_map": ratio("map"),
        "store_of_random_map": speeds["store"][0] / speeds["random map"][0], "bytes_per_s": medians,
    }  # fmt: skip


def timed(path: Path, way: Way, passes: Passes) -> tuple[int, float]:
    drop(path)
    begun = time.perf_counter()
    return way(passes), time.perf_counter() - begun


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
    parser.add_argument("--tokens", type=int, default=96)
    args = parser.parse_args()
    opened = Converted.open(args.folder)
    c = opened.config
    trace = synthetic(c.num_hidden_layers, c.n_routed_experts, c.num_experts_per_tok, args.tokens)
    long = synthetic(c.num_hidden_layers, c.n_routed_experts, c.num_experts_per_tok, 400)
    rows = []
    for share in map(int, args.shares.split(",")):
        slots = max(c.num_experts_per_tok, c.n_routed_experts * share // 100)
        # A layer that is held whole is not streamed: one slot less shows what filling it takes.
        slots = min(slots, c.n_routed_experts - 1)
        row = {"share": share, "slots": slots} | compare(opened, trace, slots)
        rows.append(row | {"bookkeeping_43_layers_s": bookkeeping(long, slots, 43)})
        print(json.dumps(rows[-1]), flush=True)
    record = record_bytes(open_source(opened).shapes[0])
    result = {"record_bytes": record, "layers": c.num_hidden_layers, "tokens": args.tokens, "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
