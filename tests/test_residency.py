"""The table of a layer's slots, against a plain account of what it must hold."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence

import pytest

from mlx_v4flash.experts.eviction import LRU
from mlx_v4flash.experts.residency import Residency


class Lowest:
    """Gives up the lowest number, used a moment ago or not."""

    def use(self, experts: Sequence[int]) -> None: ...

    def victim(self, candidates: Iterable[int]) -> int:
        return min(candidates)


@pytest.mark.parametrize("eviction", [Lowest, LRU])
@pytest.mark.parametrize("seed", range(20))
def test_slots_are_never_shared_and_never_lost(eviction: type, seed: int) -> None:
    draw = random.Random(seed)
    slots = draw.randint(3, 9)
    table, contents = Residency(slots, eviction()), dict[int, int]()  # slot: expert whose bytes it has
    for _ in range(200):
        call = draw.sample(range(12), draw.randint(1, 3))
        table.use(call)
        missing = table.missing(call)
        assert missing == [e for e in call if e not in contents.values()]
        claimed = table.claim(missing, call)
        assert list(claimed) == missing
        for expert, slot in claimed.items():
            contents.pop(slot, None)
            if draw.random() < 0.8:
                table.loaded(expert)
                contents[slot] = expert
        table.give_up_loading()
        assert {slot: e for e, slot in table.resident.items()} == contents
        assert not table.loading
        assert set(contents) <= set(range(slots))
        assert set(call) - set(missing) <= set(table.resident), "what the call uses stays"


def test_slots_that_an_interrupted_call_lost_come_back() -> None:
    """Ctrl-C between two lines: a slot that is in no list, or given up but not yet given."""
    table = Residency(4, LRU())
    for expert in table.claim([1, 2], ()):
        table.loaded(expert)
    table._free.pop()
    table.loading[7] = table.resident.pop(1)
    del table.loading[7]
    table.give_up_loading()
    assert table.resident == {2: 1} and sorted(table._free) == [0, 2, 3]
    assert set(table.claim([3, 4, 5], keep=[2]).values()) == {0, 2, 3}


def test_what_does_not_fit_is_refused() -> None:
    table = Residency(3, LRU())
    for expert in table.claim([1, 2], ()):
        table.loaded(expert)
    with pytest.raises(ValueError, match="3 experts into 1 free and 1 other slots"):
        table.claim([3, 4, 5], keep=[1])
    assert table.resident == {1: 0, 2: 1}
    assert set(table.claim([3, 4], keep=[1])) == {3, 4}
    assert set(table.resident) == {1}
    assert table.evictions == 1


def test_the_least_recently_used_goes() -> None:
    table = Residency(3, LRU())
    for call in ([1], [2], [3], [1]):
        table.use(call)
        for expert in table.claim(table.missing(call), call):
            table.loaded(expert)
    table.claim([4], ())
    assert set(table.resident) == {1, 3}


def test_a_token_takes_less_than_a_millisecond() -> None:
    """43 layers, 6 of 256 experts each, half of them absent; the best of several, since machines are busy."""
    draw, tables = random.Random(0), [Residency(100, LRU()) for _ in range(43)]
    calls = [[draw.sample(range(200), 6) for _ in tables] for _ in range(60)]
    times = []
    for token in calls:
        begun = time.perf_counter()
        for table, call in zip(tables, token, strict=True):
            table.use(call)
            for expert in table.claim(table.missing(call), call):
                table.loaded(expert)
        times.append(time.perf_counter() - begun)
    assert tables[0].evictions > 50
    assert sorted(times)[5] < 0.02, "far more than the millisecond it may take on a machine with nothing else to do"
    print(f"{sorted(times)[30] * 1000:.2f} ms")
