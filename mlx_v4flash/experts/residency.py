"""Which expert of a layer is in which slot. Numbers alone: no arrays, no files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .eviction import Eviction


class Residency:
    """The table of one layer.

    A slot is free, loading or resident. What is loading becomes resident with `loaded`, or free with `give_up_loading`;
    an exception at any point between leaves it loading, so nobody takes bytes for an expert that are not its own.

    Args:
        slots: how many, numbered from 0.
        eviction: chooses which resident expert to give up.
    """

    def __init__(self, slots: int, eviction: Eviction) -> None:
        self.slots = slots
        self.resident: dict[int, int] = {}
        self.loading: dict[int, int] = {}
        self.evictions = 0
        self._free = list(range(slots - 1, -1, -1))
        self._eviction = eviction

    def use(self, experts: Sequence[int]) -> None:
        """Note that a call uses these distinct experts."""
        self._eviction.use(experts)

    def missing(self, experts: Iterable[int]) -> list[int]:
        return [e for e in experts if e not in self.resident]

    def claim(self, experts: Sequence[int], keep: Iterable[int]) -> dict[int, int]:
        """Slots for distinct experts that are not resident; they are loading from now on.

        Args:
            keep: resident experts that must stay.

        Raises:
            ValueError: there are not as many slots that are free or hold something that may go.
        """
        kept = set(keep)
        may_go = self.resident.keys() - kept
        if len(experts) > len(self._free) + len(may_go):
            raise ValueError(f"{len(experts)} experts into {len(self._free)} free and {len(may_go)} other slots")
        claimed = {}
        for expert in experts:
            if not self._free:
                victim = self._eviction.victim(may_go)
                may_go.remove(victim)
                self._free.append(self.resident.pop(victim))
                self.evictions += 1
            claimed[expert] = self.loading[expert] = self._free.pop()
        return claimed

    def loaded(self, expert: int) -> None:
        self.resident[expert] = self.loading.pop(expert)

    def give_up_loading(self) -> None:
        """Nothing is loading any more. Slots that an interrupted call has lost track of are free, too."""
        self.loading.clear()
        self._free = sorted(set(range(self.slots)).difference(self.resident.values()), reverse=True)
