"""Which resident expert of a layer is given up for another."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Sequence
from typing import Protocol


class Eviction(Protocol):
    """Of one layer; experts are numbers."""

    def use(self, experts: Sequence[int]) -> None:
        """A call used these distinct experts."""

    def victim(self, candidates: Collection[int]) -> int:
        """Which resident expert to give up; fastest if `candidates` is a set. Each was used before."""


class LRU:
    """The one whose last use is longest ago; of the same call, the lowest number."""

    def __init__(self) -> None:
        self._order: dict[int, None] = {}  # oldest use first

    def use(self, experts: Sequence[int]) -> None:
        for expert in sorted(experts):
            self._order.pop(expert, None)
            self._order[expert] = None

    def victim(self, candidates: Collection[int]) -> int:
        for expert in self._order:
            if expert in candidates:
                del self._order[expert]  # so that the search stays short; a later use puts it back
                return expert
        return min(candidates)


class LFU:
    """The one used least often, where a use counts half as much after so many calls; then as `LRU`.

    Counters keep the logarithm of what they would be if new uses counted more and more instead of old ones less. So
    only the used ones change, and none overflows.

    Args:
        half_life: in calls of the layer, positive.
    """

    def __init__(self, half_life: float = 128.0) -> None:
        if not half_life > 0:
            raise ValueError(f"half_life: expected a positive number of calls, found {half_life}")
        self._half_life, self._calls = half_life, 0
        self._state: dict[int, tuple[float, int, int]] = {}  # log2 of the counter, call of the last use, expert
        self._heap: list[tuple[float, int, int]] = []  # these, and older ones that no longer hold

    def use(self, experts: Sequence[int]) -> None:
        self._calls += 1
        now = self._calls / self._half_life
        for expert in experts:
            counted = now
            if expert in self._state:
                before = self._state[expert][0]
                counted = max(before, now) + math.log2(1 + 2.0 ** -abs(now - before))
            self._state[expert] = entry = (counted, self._calls, expert)
            heapq.heappush(self._heap, entry)
        if len(self._heap) > 8 * len(self._state):
            self._rebuild()

    def victim(self, candidates: Collection[int]) -> int:
        kept, found = [], None
        while self._heap and found is None:
            entry = heapq.heappop(self._heap)
            if self._state[entry[2]] != entry:
                continue
            if entry[2] in candidates:
                found = entry[2]
            else:
                kept.append(entry)
        for entry in kept:
            heapq.heappush(self._heap, entry)
        if found is not None:
            return found
        self._rebuild()  # one that was given up is resident again without another use
        return min(candidates, key=lambda e: self._state.get(e, (-math.inf, 0, e)))

    def _rebuild(self) -> None:
        self._heap = list(self._state.values())
        heapq.heapify(self._heap)


class Belady:
    """The one whose next use is farthest away: the best there is, for one who knows the future.

    Args:
        uses: experts of every call to come.
    """

    def __init__(self, uses: Sequence[Sequence[int]]) -> None:
        self._next: dict[int, list[int]] = {}  # calls that use an expert, the next one last
        for call in range(len(uses) - 1, -1, -1):
            for expert in uses[call]:
                self._next.setdefault(expert, []).append(call)
        self._calls = 0

    def use(self, experts: Sequence[int]) -> None:
        """Raises ValueError if the future is another one."""
        for expert in experts:
            calls = self._next.get(expert)
            if not calls or calls.pop() != self._calls:
                raise ValueError(f"call {self._calls}: expert {expert} was not to be used")
        self._calls += 1

    def victim(self, candidates: Collection[int]) -> int:
        return max(candidates, key=lambda e: (self._next[e][-1] if self._next.get(e) else math.inf, -e))
