"""What a process holds, and how a model that streams keeps to what it was given."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from streaming import LAYERS, SMALL, A, E, Reads, expect_same, prompt, streamed

from mlx_v4flash import load_model, memory
from mlx_v4flash.engine import stream_tokens
from mlx_v4flash.errors import ExpertReadError, RequestError
from mlx_v4flash.experts.pool import record_bytes
from mlx_v4flash.experts.streamed import StreamedExperts
from mlx_v4flash.memory import parse_bytes
from mlx_v4flash.model import Model
from mlx_v4flash.plan import Plan
from mlx_v4flash.tiny import write_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("memory") / "fp4", SMALL)


@pytest.fixture(scope="module")
def resident(folder: Path) -> Model:
    return load_model(folder, experts="resident")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("48GB", 48 * 10**9), ("1.5 GiB", 3 << 29), ("200", 200), ("7kb", 7000), (5, 5), (None, None)],
)
def test_amounts_of_memory(text: str | int | None, nbytes: int | None) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1", -1, 0, "0", "0.1B", True, "1 XB", "4iB", 1.5])
def test_no_amounts_of_memory(text: Any) -> None:
    with pytest.raises(RequestError, match=r"memory: expected (a number of bytes|at least one byte)"):
        parse_bytes(text)


def test_memory_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    texts = {"/proc/meminfo": "MemFree: 7 kB\nMemAvailable:   99999999999 kB\n"}
    monkeypatch.setattr(memory, "_text", lambda path: texts.get(path, ""))
    monkeypatch.setattr(mx, "device_info", dict)
    plenty = memory.usable_bytes()
    assert plenty == max(total - max(total // 4, 8 << 30), total // 4)
    texts["/sys/fs/cgroup/memory.max"] = "max\n"
    assert memory.usable_bytes() == plenty
    texts["/sys/fs/cgroup/memory.max"] = f"{1 << 30}\n"
    assert memory.usable_bytes() == 1 << 28
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 1 << 27})
    assert memory.usable_bytes() == 1 << 27
    texts["/proc/meminfo"] = "MemAvailable:   1000 kB\n"
    assert memory.usable_bytes() == 1024000


def test_arrays_are_held_until_they_are_given_back() -> None:
    before = memory.held_bytes()
    array = mx.ones((64 << 20,), mx.uint8)
    mx.eval(array)
    assert memory.held_bytes() >= before + (60 << 20)
    assert memory.peak_bytes() >= memory.held_bytes() - (1 << 20)
    del array
    memory.give_back()
    assert memory.held_bytes() < before + (8 << 20)
    assert mx.get_cache_memory() == 0


def test_macos_is_asked_for_the_footprint(monkeypatch: pytest.MonkeyPatch) -> None:
    def proc_pid_rusage(pid: int, flavor: int, found: Any) -> int:
        assert (pid, flavor) == (os.getpid(), 4)
        words = ctypes.cast(found, ctypes.POINTER(ctypes.c_uint64))
        # struct rusage_info_v4: a UUID, then user and system time, wake-ups (two), page-ins, wired, resident,
        # footprint, start, end, the same of children (six), disk (two), time by kind (seven), billed and serviced
        # time, writes, the largest footprint
        for n in range(37):
            words[n] = {9: 5 << 40, 30: 6 << 40}.get(n, n)
        return 0

    class System:
        pass

    system = System()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: system)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert memory.held_bytes() == mx.get_active_memory() + mx.get_cache_memory()  # it says nothing
    system.proc_pid_rusage = proc_pid_rusage  # type: ignore[attr-defined]
    assert memory.held_bytes() == 5 << 40
    assert memory.peak_bytes() == 6 << 40


@pytest.mark.parametrize("slots", [[5] * LAYERS, [E, 7, 7]], ids=str)
def test_a_pool_shrinks_and_nothing_changes(slots: list[int], folder: Path, resident: Model) -> None:
    model, rng = streamed(folder, slots), np.random.default_rng(3)
    store = model.store
    assert store is not None
    record = record_bytes(store.source.shapes[0])
    expect_same(model, resident, prompt(rng, 30))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    freed = store.shrink(2 * record - 1, A)
    assert mx.get_peak_memory() <= before, "old and new slots at once"
    given = max(2, -(-sum(slots) // 10))  # a tenth, if that is more
    assert freed == given * record
    assert before - mx.get_active_memory() >= freed
    assert sum(table.slots for table in store.tables) == sum(slots) - given
    assert not any(store.whole)
    for T in (1, 30):
        expect_same(model, resident, prompt(rng, T))
    store.shrink(10**9, A)
    assert [table.slots for table in store.tables] == [A] * LAYERS
    assert store.shrink(1, A) == 0
    for T in (1, 30):
        expect_same(model, resident, prompt(rng, T))


def test_a_pool_shrinks_between_steps(folder: Path, resident: Model) -> None:
    """While the next step is under way, as the loop of generation has it."""
    model = streamed(folder, [7] * LAYERS)
    ids = [5, 6, 7, 8] * 5
    steps = stream_tokens(model, ids, 12, prompt_cache=model.make_cache())
    assert model.store is not None
    found = [next(steps) for _ in range(4)]
    model.store.shrink(1, A)
    found += [next(steps) for _ in range(4)]
    model.store.shrink(10**9, A)
    found += list(steps)
    assert found == list(stream_tokens(resident, ids, 12, prompt_cache=resident.make_cache()))


def test_ctrl_c_while_a_pool_shrinks(folder: Path, resident: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rng = streamed(folder, [7] * LAYERS), np.random.default_rng(5)
    store = model.store
    assert store is not None
    expect_same(model, resident, prompt(rng, 5))
    evictions = sum(layer.evictions for layer in store.statistics.layers)
    bind, left = StreamedExperts.bind, [1]

    def interrupted(experts: StreamedExperts) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        bind(experts)

    monkeypatch.setattr(StreamedExperts, "bind", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.shrink(1, A)
    monkeypatch.undo()
    for T in (1, 30):
        expect_same(model, resident, prompt(rng, T))
    assert sum(table.slots for table in store.tables) == 7 * LAYERS - 3
    assert sum(layer.evictions for layer in store.statistics.layers) >= evictions


def test_layers_that_are_all_whole_do_not_shrink(folder: Path) -> None:
    store = streamed(folder, [E] * LAYERS).store
    assert store is not None
    assert store.shrink(1, A) == 0
    assert all(store.whole)


def plan_of(budget: int) -> Plan:
    """All of it for arrays."""
    return Plan(budget, 4096, 2048, E, 1, {"process": 0, "readers": 0}, [A] * LAYERS, E, 0)


def test_freed_memory_goes_before_slots(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given_back = streamed(folder, [11] * LAYERS), list[bool]()
    monkeypatch.setattr("mlx_v4flash.engine.held_bytes", lambda: 0 if given_back else 1 << 50)
    monkeypatch.setattr("mlx_v4flash.engine.give_back", lambda: given_back.append(True))
    model.plan = plan_of(1 << 40)
    assert len(list(stream_tokens(model, [3] * 20, 3, prompt_cache=model.make_cache()))) == 3
    assert model.store is not None
    assert [table.slots for table in model.store.tables] == [11] * LAYERS


def test_growth_takes_slots_before_it_ends_the_request(
    folder: Path, resident: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = streamed(folder, [11] * LAYERS), [3] * 20
    store = model.store
    assert store is not None
    # The process holds more than these arrays; only they count here.
    monkeypatch.setattr("mlx_v4flash.engine.held_bytes", lambda: 0)
    expected = list(stream_tokens(resident, ids, 9, prompt_cache=resident.make_cache()))
    steps = stream_tokens(model, ids, 9, prompt_cache=model.make_cache())
    found = [next(steps) for _ in range(3)]
    memory.give_back()
    grown = mx.ones((10_000_000,), mx.uint8)  # another conversation, say
    mx.eval(grown)
    model.plan = plan_of(mx.get_active_memory() - 5 * record_bytes(store.source.shapes[0]))
    found += [next(steps) for _ in range(3)]
    assert A * LAYERS <= sum(table.slots for table in store.tables) <= 11 * LAYERS - 5
    assert found + list(steps) == expected
    model.plan = plan_of(1000)
    with pytest.raises(RequestError, match=r"memory: expected at most 1,000 bytes, of them 1,000 in arrays, found"):
        next(stream_tokens(model, ids, 9, prompt_cache=model.make_cache()))
    assert [table.slots for table in store.tables] == [A] * LAYERS
    model.plan = None
    assert list(stream_tokens(model, ids, 9, prompt_cache=model.make_cache())) == expected


def test_the_whole_process_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(folder, memory="8GB")
    assert len(list(stream_tokens(model, [3] * 9, 3, prompt_cache=model.make_cache()))) == 3
    monkeypatch.setattr("mlx_v4flash.engine.held_bytes", lambda: 8 * 10**9 + 1)
    with pytest.raises(RequestError, match=r"expected at most 8,000,000,000 bytes, .* found 1 more"):
        list(stream_tokens(model, [3] * 9, 3, prompt_cache=model.make_cache()))


@pytest.fixture
def back() -> Iterator[threading.Event]:
    """Set when the disk answers again; after the test it does."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("late", [1, 1000])
@pytest.mark.parametrize("T", [1, 50])
def test_a_disk_that_does_not_answer(T: int, late: int, back: threading.Event, folder: Path, resident: Model) -> None:
    """The request ends and says so, as the next one does; when the disk is back, so is the model.

    One late record is enough: it may yet be written to the slot that it was meant for, so nothing else may go there.
    """
    files, begun = Reads(), count()
    model, ids = streamed(folder, [A] * LAYERS, files), prompt(np.random.default_rng(T), T)
    assert model.store is not None
    model.store.timeout_s = 0.2
    files.before = lambda: back.wait() if next(begun) < late else None
    for _ in range(2):
        with pytest.raises(ExpertReadError, match=r"layers\.\d, expert \d+: .*expected a record within 0.2 s"):
            mx.eval(model(ids))
    back.set()
    model.store.timeout_s = 20
    expect_same(model, resident, ids)
