"""Which resident expert of a layer is given up for another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol


class Eviction(Protocol):
    """Of one layer."""

    def use(self, experts: Sequence[int]) -> None:
        """A call used these."""

    def victim(self, candidates: Iterable[int]) -> int:
        """Which resident expert to give up."""


class LRU:
    """The one whose last use is longest ago."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}
        self._calls = 0

    def use(self, experts: Sequence[int]) -> None:
        self._calls += 1
        self._last.update(dict.fromkeys(experts, self._calls))

    def victim(self, candidates: Iterable[int]) -> int:
        return min(candidates, key=lambda e: (self._last.get(e, 0), e))
