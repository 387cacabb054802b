"""Routed experts of a model in memory and on disk: what is where, and how it gets there."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from ..errors import ExpertReadError
from .eviction import LRU, Eviction
from .pool import Record, Shapes, SlotRange, allocate, record_bytes, share
from .products import SORT_FROM
from .readers import Files
from .residency import Residency
from .source import Source, open_all
from .statistics import LayerCounts, Statistics
from .work import Work

# Slots of the staging range. Prefill uses halves of it in turn; calls of fewer than SORT_FROM pairs may need all.
STAGING = SORT_FROM
THREADS = 4
# A disk that gives no record for so long counts as gone. One that spins up, or is shared, takes less.
TIMEOUT_S = 60.0
# What a shrinking pool gives up at least, so that it does not happen at every step.
_SHRINK_SHARE = 0.1
# Results of a layer that may be unfinished at once.
_NOTED = 8


class User(Protocol):
    """Whoever keeps arrays of the ranges, as `StreamedExperts` does."""

    def release(self) -> None:
        """Let go of them; `bind` follows."""

    def bind(self) -> None:
        """Take those that the store has now."""


@dataclass
class Loads:
    """Reads and copies under way by name, all begun at once; `experts` are loading in the layer's own slots."""

    layer: int
    experts: list[int]
    futures: dict[Future[float], str]
    begun_s: float


class ExpertStore:
    """Memory of every layer's experts, and the threads that fill it.

    Nothing is written that an unfinished graph reads: results of calls are kept until the next write to their slots,
    and waited for then. Usually they are finished by that time, and the wait is none.

    Args:
        slots: of each layer; as many as there are experts hold the layer whole.
        staging: slots that layers of the same shapes share, for calls that need more experts than their layer has.
        eviction: makes the policy of one layer.
        threads: that read.
        timeout_s: a record that takes longer than this, from the end of the one before, counts as lost.
    """

    def __init__(
        self,
        source: Source,
        slots: Sequence[int],
        experts: int,
        *,
        staging: int | None = None,
        eviction: Callable[[], Eviction] = LRU,
        files: Files | None = None,
        threads: int = THREADS,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._staging_slots = min(experts, STAGING) if staging is None else staging
        self.experts, self.source, self._eviction, self.timeout_s = experts, source, eviction, timeout_s
        self.records = [record_bytes(shapes) for shapes in source.shapes]
        self.users: weakref.WeakSet[User] = weakref.WeakSet()
        self._slots = list(slots)
        self._allocate()
        self._complete = True
        self.statistics = Statistics([LayerCounts() for _ in slots])
        self._routes: dict[int, np.ndarray] = {}
        self._known: dict[int, np.ndarray] = {}
        self._staged: dict[int, Loads] = {}
        self._ahead: dict[int, Loads] = {}
        self._reading: dict[int | None, list[mx.array]] = {}
        self._broken = False
        self._files = files or Files("pread")
        open_all(self._files, source.paths)
        self._threads, self._work = threads, Work(threads)
        weakref.finalize(self, self._files.close)

    def _allocate(self) -> None:
        slots = self._slots
        self.whole = [n >= self.experts for n in slots]
        shapes, layouts = self.source.shapes, list[Shapes]()
        for layer, whole in enumerate(self.whole):
            if not whole and shapes[layer] not in layouts:
                layouts.append(shapes[layer])
        ranges = allocate([*shapes, *layouts], [*slots, *[self._staging_slots] * len(layouts)])
        self.ranges = ranges[: len(slots)]
        staging = ranges[len(slots) :]
        self.staging = [None if w else staging[layouts.index(s)] for w, s in zip(self.whole, shapes, strict=True)]
        self.tables = [Residency(n, self._eviction()) for n in slots]

    def shrink(self, nbytes: int, least: int) -> int:
        """Give up slots, between passes. What they held is forgotten, and read again when it is needed.

        Args:
            nbytes: to give up, at least; a tenth of the pool if that is more.
            least: slots that each layer keeps.

        Returns:
            Bytes given up: fewer, or none, if every layer is at its least or all are held whole.
        """
        held, before = self._slots, self._bytes_of(self._slots)
        if all(self.whole):
            return 0
        left = before - max(nbytes, int(_SHRINK_SHARE * before))
        slots = share(max(left, 0), self.records, least, self.experts - 1)
        if sum(slots) >= sum(held):
            return 0
        self.abandon()
        self.settle()
        for layer in list(self._reading):
            self.await_readers(layer)
        self._slots, self._complete = slots, False
        for user in self.users:
            user.release()
        self.ranges, self.staging = [], []  # before new ones are made: there may be no room for both
        mx.clear_cache()
        self._complete_pool()
        return before - self._bytes_of(slots)

    def _complete_pool(self) -> None:
        """Make what an interrupted `shrink` left unmade."""
        if self._complete:
            return
        self._allocate()
        for user in self.users:
            user.bind()
        self._complete = True

    def _bytes_of(self, slots: Sequence[int]) -> int:
        return sum(n * record for n, record in zip(slots, self.records, strict=True))

    @property
    def whole_bytes(self) -> int:
        """Of the layers that are held whole."""
        return self.experts * sum(r for r, whole in zip(self.records, self.whole, strict=True) if whole)

    def load_whole(self, progress: Callable[[int], None] | None = None) -> None:
        """Read the layers that are held whole.

        Args:
            progress: called with bytes done.

        Raises:
            ExpertReadError, CheckpointError: a record cannot be read or be right.
        """
        done = 0
        for layer in (n for n, whole in enumerate(self.whole) if whole):
            try:
                self.finish(self._load(layer, list(range(self.experts)), in_order=True))
            except BaseException:
                self.abandon()
                raise
            done += self.experts * self.records[layer]
            if progress is not None:
                progress(done)
        self.statistics = Statistics([LayerCounts() for _ in self.ranges])

    def route_by_token(self, tables: dict[int, np.ndarray]) -> None:
        """Say which layers choose experts by token id: their tables [V, A]."""
        self._routes = tables

    @contextmanager
    def step(self, ids: mx.array) -> Iterator[None]:
        """One forward pass of the tokens [B, T]: experts that follow from them begin to load at once."""
        try:
            self.settle()
            self._complete_pool()
            self.statistics.tokens += ids.size
            streamed = {layer: table for layer, table in self._routes.items() if not self.whole[layer]}
            if streamed:
                tokens = np.array(ids).reshape(-1)  # waits, if they are the result of a pass under way
                for layer, table in streamed.items():
                    self._known[layer] = chosen = table[tokens]
                    distinct = np.unique(chosen).tolist()
                    if chosen.size < SORT_FROM and len(distinct) <= self.tables[layer].slots:
                        self._staged[layer] = self.stage(layer, distinct)
            yield
        except BaseException:
            self.abandon()
            raise
        finally:
            self._known.clear()
            self._staged.clear()

    def known(self, layer: int) -> np.ndarray | None:
        """Numbers of the chosen experts [T, A], if they follow from the tokens of this pass."""
        return self._known.pop(layer, None)

    def chosen(self, *ids: mx.array) -> list[np.ndarray]:
        """The same, from the device: the one wait of a streamed layer."""
        self.statistics.syncs += 1
        mx.eval(ids)
        return [np.array(some) for some in ids]

    def stage(self, layer: int, distinct: list[int]) -> Loads:
        """Begin to load those of the experts that the layer's own slots do not hold; all of them will stay there."""
        if layer in self._staged:
            return self._staged.pop(layer)
        self.settle()
        missing = self.count(layer, distinct)
        return self._load(layer, missing, keep=distinct)

    def prefetch(self, layer: int, experts: list[int]) -> None:
        """Begin to load experts that the next call of a layer will need, as far as one can guess."""
        missing = self.tables[layer].missing(experts)
        if missing and len(experts) <= self.tables[layer].slots and layer not in self._ahead:
            self.tables[layer].use(missing)
            self._ahead[layer] = self._load(layer, missing, keep=experts)
            self.statistics.prefetched += len(missing)

    def count(self, layer: int, distinct: list[int]) -> list[int]:
        """Note that a call uses these experts; those that the layer's slots do not hold, guesses included by now."""
        ahead = self._ahead.pop(layer, None)
        if ahead is not None:
            self.finish(ahead)
            self.statistics.prefetched_used += len(set(ahead.experts).intersection(distinct))
        table, counts = self.tables[layer], self.statistics.layers[layer]
        missing = table.missing(distinct)
        table.use(distinct)
        counts.used += len(distinct)
        counts.hits += len(distinct) - len(missing)
        return missing

    def stage_apart(self, layer: int, experts: list[int], first: int) -> Loads:
        """Begin to bring experts into the staging range, one slot each from `first` on: from disk or a slot."""
        staging, table = self._staging_of(layer), self.tables[layer]
        self.await_readers(None)
        jobs: list[tuple[Callable[..., float], tuple[object, ...]]] = []
        for slot, expert in enumerate(experts, first):
            target = staging.record(slot)
            held = table.resident.get(expert)
            if held is None:
                jobs.append((self._read, (layer, expert, target)))
                self.statistics.records += 1
            else:
                jobs.append((_copy, (self.ranges[layer].record(held), target)))
        return self._begin(layer, [], jobs)

    def seed(self, layer: int, staged: dict[int, int], keep: Sequence[int]) -> Loads:
        """Begin to copy experts from the staging range to the layer's own slots, which give up others.

        Args:
            staged: slots in the staging range, by expert.
            keep: resident experts that must stay.
        """
        self.await_readers(layer)
        own, staging = self.ranges[layer], self._staging_of(layer)
        claimed = self._claim(layer, list(staged), keep)
        jobs = [(_copy, (staging.record(staged[e]), own.record(slot))) for e, slot in claimed.items()]
        return self._begin(layer, list(staged), jobs)

    def finish(self, loads: Loads) -> None:
        """Wait until they are done.

        Raises:
            ExpertReadError, CheckpointError: the first thing that went wrong.
        """
        begun = time.perf_counter()
        ended = [done_s for future, name in loads.futures.items() if (done_s := self._result(future, name))]
        for expert in loads.experts:
            self.tables[loads.layer].loaded(expert)
        if ended:
            self.statistics.wait_s += time.perf_counter() - begun
            self.statistics.disk_s += max(ended) - loads.begun_s

    def reads(self, layer: int | None, *results: mx.array) -> None:
        """Note results that are computed from a layer's slots, or from the staging range (None)."""
        noted = self._reading.setdefault(layer, [])
        noted.extend(results)
        if len(noted) > _NOTED:  # they are of earlier tokens, and finished
            mx.eval(noted[:-_NOTED])
            del noted[:-_NOTED]

    def await_readers(self, layer: int | None) -> None:
        """Wait for what was noted, so that the slots may be written."""
        mx.eval(self._reading.get(layer, []))  # an interrupted wait forgets none of them
        self._reading.pop(layer, None)

    def abandon(self) -> None:
        """After an exception: nothing that is loading counts as loaded, and what has not begun never begins."""
        self._broken = True
        self._known.clear()
        self._staged.clear()
        self._ahead.clear()
        self._work.give_up()

    def close(self) -> None:
        """End the threads and close the files."""
        self.abandon()
        self._work.close()
        self._files.close()

    def settle(self) -> None:
        """After `abandon`: wait for reads that could not be stopped, then free their slots.

        Raises:
            ExpertReadError: one of them does not end.
        """
        if not self._broken:
            return
        self._work.give_up()  # again: `abandon` may have been interrupted, too
        late = self._work.unfinished(self.timeout_s)
        if late is not None:
            raise self._lost(late)
        for table in self.tables:
            table.give_up_loading()
        self._broken = False

    def _staging_of(self, layer: int) -> SlotRange:
        staging = self.staging[layer]
        assert staging is not None, "a layer that is held whole stages nothing"
        return staging

    def _load(self, layer: int, missing: list[int], keep: Sequence[int] = (), in_order: bool = False) -> Loads:
        if not missing:
            return Loads(layer, [], {}, 0.0)
        self.await_readers(layer)
        own = self.ranges[layer]
        claimed = self._claim(layer, missing, keep)
        assert not in_order or all(e == slot for e, slot in claimed.items())
        # Threads that would have no record to read take a piece of one.
        pieces = self.source.pieces if len(missing) < 2 * self._threads else ("",)
        jobs = [
            (self._read, (layer, e, record, piece))
            for e, record in ((e, own.record(slot)) for e, slot in claimed.items())
            for piece in pieces
        ]
        self.statistics.records += len(missing)
        return self._begin(layer, missing, jobs)

    def _claim(self, layer: int, experts: Sequence[int], keep: Sequence[int]) -> dict[int, int]:
        table = self.tables[layer]
        before = table.evictions
        claimed = table.claim(experts, keep)
        self.statistics.layers[layer].evictions += table.evictions - before
        return claimed

    def _begin(
        self, layer: int, experts: list[int], jobs: Sequence[tuple[Callable[..., float], tuple[object, ...]]]
    ) -> Loads:
        loads = Loads(layer, experts, {}, time.perf_counter())
        for job, arguments in jobs:
            name = f"layers.{layer}, expert {arguments[1]}" if job == self._read else f"layers.{layer}"
            loads.futures[self._work.submit(name, job, *arguments)] = name
        return loads

    def _result(self, future: Future[float], name: str) -> float:
        try:
            return future.result(self.timeout_s)
        except NotYet:
            raise self._lost(name) from None

    def _lost(self, name: str) -> ExpertReadError:
        return ExpertReadError(
            f"{name}: {self.source.paths[0]}: expected a record within {self.timeout_s:g} s, found none\n"
            "hint: check the disk and its connection; requests work again when it answers"
        )

    def _read(self, layer: int, expert: int, into: Record, piece: str = "") -> float:
        """By a thread of the pool; the time when it was done."""
        nbytes = self.source.read(layer, expert, into, self._files, piece)
        self.statistics.add_read(nbytes)
        return time.perf_counter()


def _copy(source: Record, target: Record) -> float:
    """By a thread of the pool; 0, since the disk had no part in it."""
    for name, values in source.items():
        np.copyto(target[name], values)
    return 0.0
