"""Streamed experts compute what resident ones compute, survive every fault, and wait no more than they must."""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import os
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from streaming import LAYERS, PLAIN, SMALL, A, E, Reads, expect_same, fails_once, prompt, streamed

from mlx_v4flash import convert as conversion
from mlx_v4flash import load_model
from mlx_v4flash.checkpoint import Checkpoint
from mlx_v4flash.cli import main
from mlx_v4flash.converted import PACK, Converted
from mlx_v4flash.engine import stream_tokens
from mlx_v4flash.errors import CheckpointError, DeviceError, ExpertReadError, RequestError, V4FlashError
from mlx_v4flash.experts import calibration
from mlx_v4flash.experts.attach import Division, attach, begin, open_source
from mlx_v4flash.experts.pool import Record, Shape, allocate, record_bytes
from mlx_v4flash.experts.readers import READERS, Files
from mlx_v4flash.experts.store import STAGING, Loads
from mlx_v4flash.linear import Numerics
from mlx_v4flash.model import Model
from mlx_v4flash.plan import make_plan, sizes_of
from mlx_v4flash.tiny import write_tiny
from mlx_v4flash.weights import load_weights


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("streaming")
    made = {
        "fp4": write_tiny(top / "fp4", SMALL, shard_bytes=100_000),
        "fp8": write_tiny(top / "fp8", {**SMALL, "moe_intermediate_size": 160}, base=True),
        "plain": write_tiny(top / "plain", PLAIN),
    }
    for name in list(made):
        target = made[f"{name} converted"] = top / f"{name} converted"
        conversion.convert(conversion.open_source(made[name], target), target)
    return made


@pytest.fixture(scope="module")
def resident(folders: dict[str, Path]) -> dict[str, Model]:
    return {name: load_model(folder, experts="resident") for name, folder in folders.items()}


FORMATS = ["fp4", "fp8", "plain", "fp4 converted", "fp8 converted", "plain converted"]


@pytest.mark.parametrize(
    ("name", "slots"),
    [(name, [A] * LAYERS) for name in FORMATS] + [("fp4", s) for s in ([5] * LAYERS, [E, A, 7], [A, E, E], [11] * 3)],
    ids=str,
)
def test_logits_are_those_of_resident_experts(
    name: str, slots: list[int], folders: dict[str, Path], resident: dict[str, Model]
) -> None:
    model, rng = streamed(folders[name], slots), np.random.default_rng(sum(slots))
    for T in (1, 2, 7, 21, 22, 60):
        expect_same(model, resident[name], prompt(rng, T))


@pytest.mark.parametrize("seed", range(4))
def test_any_lengths_chunks_and_batches(seed: int, folders: dict[str, Path], resident: dict[str, Model]) -> None:
    rng = np.random.default_rng(seed)
    model = streamed(folders["fp4"], [int(n) for n in rng.integers(A, E + 1, LAYERS)])
    for _ in range(3):
        T, B = int(rng.integers(1, 301)), int(rng.integers(1, 4))
        expect_same(model, resident["fp4"], prompt(rng, T // B + 1, B), chunk=int(rng.integers(1, 130)) + T // 5)


def test_parts_of_a_prefill_go_the_way_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Metal MLX chooses between two sums by rows and matrices of each product; the choice must be the same."""
    folder = write_tiny(tmp_path / "m", {**SMALL, "n_routed_experts": 40})
    whole, rng = load_model(folder, experts="resident"), np.random.default_rng(2)
    opened = Checkpoint.open(folder)
    parts = Model(opened.config, Numerics())
    store = attach(parts, open_source(opened), Division([3, 40, 11], 40))
    load_weights(parts, opened)
    begin(parts, store)
    together, product = set[bool](), mx.gather_qmm

    def spy(x: mx.array, w: mx.array, *args: Any, **options: Any) -> mx.array:
        together.add(options["sorted_indices"] and len(x) >= 16 and len(x) // len(w) >= 4)
        return product(x, w, *args, **options)

    monkeypatch.setattr(mx, "gather_qmm", spy)
    for T, expected in ((22, False), (50, False), (54, True), (90, True)):
        ids = prompt(rng, T)
        for model in (whole, parts):
            together.clear()
            result = model(ids)
            mx.eval(result)
            assert together == {expected}, T
        assert mx.array_equal(result, whole(ids))


@pytest.mark.parametrize("kind", READERS)
def test_readers_fill_any_range(kind: str, tmp_path: Path) -> None:
    """Starts, lengths and splits that are no multiple of a block, up to the last byte."""
    data, rng = np.random.default_rng(0).bytes(50_001), np.random.default_rng(1)
    (tmp_path / "f").write_bytes(data)
    reader = READERS[kind](tmp_path / "f")
    for _ in range(50):
        start, end = sorted(rng.integers(0, len(data) + 1, 2).tolist())
        cuts = sorted(rng.integers(0, end - start + 1, 2).tolist())
        buffers = [memoryview(bytearray(n)) for n in np.diff([0, *cuts, end - start]) if n]
        reader.read(start, buffers)
        assert b"".join(buffers) == data[start:end]
    with pytest.raises(EOFError, match="1 bytes"):
        reader.read(len(data) - 1, [memoryview(bytearray(2))])
    reader.close()


@pytest.mark.parametrize("kind", READERS)
def test_readers_read_the_same(kind: str, folders: dict[str, Path], resident: dict[str, Model]) -> None:
    rng = np.random.default_rng(1)
    for name in ("fp4", "fp4 converted"):
        expect_same(streamed(folders[name], [A] * LAYERS, Reads(kind=kind)), resident[name], prompt(rng, 30))


def test_a_short_read_is_continued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(100)))
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: whole(fd, [buffers[0][:7]], at))
    first, second = memoryview(bytearray(20)), memoryview(bytearray(30))
    READERS["pread"](tmp_path / "f").read(10, [first, second])
    assert bytes(first) + bytes(second) == bytes(range(10, 60))


def test_passes_that_are_evaluated_late(folders: dict[str, Path], resident: dict[str, Model]) -> None:
    """A slot is not written while an unfinished graph reads it."""
    model, rng = streamed(folders["fp4"], [A] * LAYERS), np.random.default_rng(3)
    prompts = [prompt(rng, T) for T in (1, 1, 2, 1, 4, 1, 30, 1, 1)]
    results = [model(ids) for ids in prompts]
    for found, ids in zip(results, prompts, strict=True):
        assert mx.array_equal(found, resident["fp4"](ids))


def test_generation_that_runs_ahead(folders: dict[str, Path], resident: dict[str, Model]) -> None:
    ids = prompt(np.random.default_rng(4), 40)[0].tolist()
    found = []
    for model in (resident["fp4"], streamed(folders["fp4 converted"], [A, 4, A])):
        found.append(list(stream_tokens(model, ids, 12, prompt_cache=model.make_cache(), prefill_chunk=16)))
    assert found[0] == found[1]
    assert len(found[0]) == 12


@pytest.mark.parametrize(("slots", "syncs"), [([A] * 3, 2), ([E, E, A], 1), ([A, E, E], 0), ([E] * 3, 0)], ids=str)
def test_one_wait_for_each_layer_that_needs_it(slots: list[int], syncs: int, folders: dict[str, Path]) -> None:
    """None for layers held whole, none for those that route by token id."""
    model = streamed(folders["fp4"], slots)
    mx.eval(model(mx.array([[5]])))
    assert model.store is not None
    assert model.store.statistics.syncs == syncs


def test_experts_known_from_tokens_are_on_their_way_before_the_first_layer(folders: dict[str, Path]) -> None:
    model, seen = streamed(folders["fp4"], [A] * LAYERS), list[set[int]]()
    assert model.store is not None
    table = model.store.tables[0]
    attention = type(model.layers[0].attn)

    class Watching(attention):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any) -> mx.array:
            seen.append(set(table.loading) | set(table.resident))
            return super().__call__(*args)

    model.layers[0].attn.__class__ = Watching
    mx.eval(model(mx.array([[9]])))
    assert seen == [set(np.array(model.layers[0].ffn.gate.tid2eid)[9].tolist())]


def test_an_expert_is_read_once_for_a_chunk(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, rng = streamed(folders["fp4 converted"], [4, 4, 5]), np.random.default_rng(5)
    assert model.store is not None
    source, reads = model.store.source, Counter[tuple[int, int, str]]()
    read = source.read

    def count(layer: int, expert: int, into: Record, files: Files, piece: str = "") -> int:
        for one in [piece] if piece else source.pieces:
            reads[layer, expert, one] += 1
        return read(layer, expert, into, files, piece)

    monkeypatch.setattr(source, "read", count)
    for T in (100, 50, 12, 1, 200):
        held = {(n, e) for n, table in enumerate(model.store.tables) for e in table.resident}
        reads.clear()
        mx.eval(model(prompt(rng, T)))
        assert set(reads.values()) <= {1}, T
        assert not {(layer, e) for layer, e, _ in reads} & held, T
    assert len(reads) == 3 * sum(E - n for n in (4, 4, 5)), "all experts are used, some of them are there"


def test_prefill_leaves_the_most_used_experts(folders: dict[str, Path]) -> None:
    model = streamed(folders["fp4"], [4] * LAYERS)
    seen: dict[int, np.ndarray] = {}
    for number, layer in enumerate(model.layers):
        layer.ffn.watch = lambda ids, n=number: seen.update({n: np.array(ids)})  # type: ignore[misc]
    mx.eval(model(prompt(np.random.default_rng(6), 150)))
    assert model.store is not None
    for number, table in enumerate(model.store.tables):
        counts = np.bincount(seen[number].ravel(), minlength=E)
        held = sorted(counts[list(table.resident)])
        assert held == sorted(counts)[-4:]


def test_guesses_change_no_result(folders: dict[str, Path], resident: dict[str, Model]) -> None:
    files, rng = Reads(), np.random.default_rng(10)
    model = streamed(folders["fp4"], [A, 4, 6], files, prefetch=True)
    for T in (1, 2, 5, 40, 1, 4, 60):
        expect_same(model, resident["fp4"], prompt(rng, T), steps=3)
    files.before = fails_once(OSError(errno.EIO, "Input/output error"), after=8)
    with pytest.raises(ExpertReadError):
        for _ in range(9):
            mx.eval(model(prompt(rng, 1)))
    expect_same(model, resident["fp4"], prompt(rng, 1), steps=9)
    assert model.store is not None
    found = model.store.statistics
    assert 0 < found.prefetched_used < found.prefetched


@pytest.mark.parametrize("T", [1, 8, 60])
@pytest.mark.parametrize("name", ["fp4", "fp4 converted"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.EIO, "Input/output error"), OSError(errno.ENXIO, "No such device")],
    ids=["EIO", "unplugged"],
)
@pytest.mark.parametrize("after", [0, 3])
def test_a_disk_that_fails_once(
    name: str, T: int, error: OSError, after: int, folders: dict[str, Path], resident: dict[str, Model]
) -> None:
    files, rng = Reads(), np.random.default_rng(T)
    model, ids = streamed(folders[name], [A, 4, A], files), prompt(rng, T)
    expect_same(model, resident[name], prompt(rng, 3))
    files.before = fails_once(error, after)
    with pytest.raises(ExpertReadError, match=r"layers\.\d, expert \d+: .*(pack|safetensors).*cannot read") as caught:
        for _ in range(4):
            mx.eval(model(ids))
            ids = (ids + 77) % 272
    assert str(error.strerror) in str(caught.value)
    expect_same(model, resident[name], ids)


@pytest.mark.parametrize("dies", [SystemExit(1), MemoryError(), KeyboardInterrupt()], ids=repr)
def test_a_reader_that_dies(dies: BaseException, folders: dict[str, Path], resident: dict[str, Model]) -> None:
    files = Reads()
    model, ids = streamed(folders["fp4"], [A] * LAYERS, files), mx.array([[1, 2]])
    files.before = fails_once(dies, after=2)
    with pytest.raises(type(dies)):
        mx.eval(model(ids))
    expect_same(model, resident["fp4"], ids)


def test_ctrl_c_while_the_model_loads_leaves_no_thread(folders: dict[str, Path]) -> None:
    before = set(threading.enumerate())
    timer = threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        streamed(folders["fp4"], [E] * LAYERS, Reads(before=lambda: time.sleep(0.05)))
    timer.join()
    deadline = time.monotonic() + 5
    while left := {t for t in threading.enumerate() if t.name.startswith("experts")} - before:
        assert time.monotonic() < deadline, left
        gc.collect()
        time.sleep(0.05)


@pytest.mark.parametrize("T", [1, 50])
def test_ctrl_c_while_experts_load(T: int, folders: dict[str, Path], resident: dict[str, Model]) -> None:
    files = Reads()
    model, ids = streamed(folders["fp4"], [A] * LAYERS, files), prompt(np.random.default_rng(7), T)
    files.before = lambda: time.sleep(0.1)
    timer = threading.Timer(0.15, lambda: signal.raise_signal(signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        mx.eval(model(ids))
    timer.join()
    files.before = lambda: None
    expect_same(model, resident["fp4"], ids)
    assert model.store is not None
    begun = time.monotonic()
    model.store.close()
    assert time.monotonic() - begun < 1


@pytest.mark.parametrize("T", [1, 40])
def test_ctrl_c_at_any_wait(
    T: int, folders: dict[str, Path], resident: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the host stops waiting for loads: no slot counts as filled that is not."""
    model, rng = streamed(folders["fp4"], [A, 4, A]), np.random.default_rng(T)
    store = model.store
    assert store is not None
    finish = store.finish
    for interrupted in range(6):
        left = [interrupted]

        def stop(loads: Loads, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            finish(loads)

        monkeypatch.setattr(store, "finish", stop)
        ids = prompt(rng, T)
        with contextlib.suppress(KeyboardInterrupt):
            mx.eval(model(ids))
        monkeypatch.setattr(store, "finish", finish)
        expect_same(model, resident["fp4"], ids)


def own_copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_is_cut(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = own_copy(folders["fp4 converted"], tmp_path / "m")
    model, pack = streamed(folder, [A] * LAYERS, Reads(kind=kind)), folder / PACK
    mx.eval(model(mx.array([[1]])))
    state, data = pack.stat(), pack.read_bytes()
    os.truncate(pack, 20_000)
    with pytest.raises(ExpertReadError, match=r"layers\.0, expert \d+: .*experts\.pack"):
        mx.eval(model(mx.array([[2, 3]])))
    with pack.open("r+b") as file:
        file.write(data)
    os.utime(pack, ns=(state.st_atime_ns, state.st_mtime_ns))
    expect_same(model, load_model(folder, experts="resident"), mx.array([[2, 3]]))


@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_is_written_to(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = own_copy(folders["fp4 converted"], tmp_path / "m")
    model, pack = streamed(folder, [A] * LAYERS, Reads(kind=kind)), folder / PACK
    mx.eval(model(mx.array([[1]])))
    data = pack.read_bytes()
    with pack.open("r+b") as file:
        file.write(data[::-1])
    os.utime(pack, (1, 1))
    with pytest.raises(ExpertReadError, match=r"experts\.pack: .*written to after the model was loaded"):
        mx.eval(model(prompt(np.random.default_rng(8), 40)))


def test_a_file_that_is_replaced_is_read_as_it_was(
    folders: dict[str, Path], resident: dict[str, Model], tmp_path: Path
) -> None:
    folder = own_copy(folders["fp4 converted"], tmp_path / "m")
    model, rng = streamed(folder, [A] * LAYERS), np.random.default_rng(9)
    (tmp_path / "other").write_bytes(bytes((folder / PACK).stat().st_size))
    (tmp_path / "other").replace(folder / PACK)
    expect_same(model, resident["fp4 converted"], prompt(rng, 50))


def test_checksums(folders: dict[str, Path], resident: dict[str, Model], tmp_path: Path) -> None:
    folder = own_copy(folders["fp4 converted"], tmp_path / "m")
    expect_same(streamed(folder, [A] * LAYERS, verify=True), resident["fp4 converted"], mx.array([[1] * 30]))
    layer = Converted.open(folder).layers["layers.1.ffn.experts"]
    with (folder / PACK).open("r+b") as file:
        for expert in range(E):
            file.seek(layer.record(expert)[0] + 100)
            file.write(b"\x99\x98")
    mx.eval(streamed(folder, [A] * LAYERS)(mx.array([[1]])))
    with pytest.raises(
        ExpertReadError, match=r"layers\.1, expert \d+: .*experts\.pack: expected checksum [0-9a-f]{8} "
    ):
        mx.eval(streamed(folder, [A] * LAYERS, verify=True)(mx.array([[1]])))
    with pytest.raises(RequestError, match="verify_reads: expected a converted folder"):
        streamed(folders["fp4"], [A] * LAYERS, verify=True)


def test_a_scale_that_is_no_number(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = own_copy(folders["fp4"], tmp_path / "m")
    tensors = Checkpoint.open(folder).tensors
    for expert in range(E):
        tensor = tensors[f"layers.2.ffn.experts.{expert}.w3.scale"]
        with tensor.path.open("r+b") as file:
            file.seek(tensor.offset)
            file.write(b"\xff")
    with pytest.raises(CheckpointError, match=r"layers\.2\.ffn\.experts\.\d+\.w3\.scale: expected a scale byte"):
        mx.eval(streamed(folder, [A] * LAYERS)(mx.array([[1]])))


def test_memory_is_divided(folders: dict[str, Path]) -> None:
    opened = Checkpoint.open(folders["fp4"])
    source = open_source(opened)
    record = record_bytes(source.shapes[0])
    sizes = sizes_of(opened.config, opened, source.shapes)
    plan = make_plan(opened.config, sizes)
    assert (plan.slots, plan.staging, plan.fits) == ([E] * LAYERS, 0, True)
    least = make_plan(opened.config, sizes, memory=plan.smallest)
    assert (least.slots, least.staging, least.fits) == ([A] * LAYERS, min(E, STAGING), True)
    assert least.total == least.smallest == least.budget
    more = make_plan(opened.config, sizes, memory=plan.smallest + record * (LAYERS + 1))
    assert more.slots == [A + 2] + [A + 1] * (LAYERS - 1)
    less = make_plan(opened.config, sizes, memory=plan.smallest - 1)
    with pytest.raises(RequestError, match=f"memory: expected at least {plan.smallest:,} bytes"):
        less.expect_fits()


def test_load_model_chooses(folders: dict[str, Path], resident: dict[str, Model]) -> None:
    assert load_model(folders["fp4"]).store is None
    whole = load_model(folders["fp4"], experts="stream")
    assert whole.store is not None
    assert all(whole.store.whole)
    expect_same(whole, resident["fp4"], mx.array([[3, 4]]))
    opened = Checkpoint.open(folders["fp4"])
    shapes = open_source(opened).shapes
    record, smallest = (
        record_bytes(shapes[0]),
        make_plan(opened.config, sizes_of(opened.config, opened, shapes)).smallest,
    )
    few = load_model(folders["fp4"], eviction="lru", memory=smallest + record * LAYERS * (4 - A))
    assert few.store is not None
    assert [table.slots for table in few.store.tables] == [4] * LAYERS
    with pytest.raises(RequestError, match="experts: expected auto, resident, stream, found 'some'"):
        load_model(folders["fp4"], experts="some")
    with pytest.raises(RequestError, match="memory: expected at least"):
        load_model(folders["fp4"], memory=smallest - 1)
    with pytest.raises(RequestError, match="eviction: expected lru or lfu, found 'fifo'"):
        load_model(folders["fp4"], experts="stream", eviction="fifo")


def test_progress_ends_with_everything(folders: dict[str, Path]) -> None:
    for name in ("fp4", "fp8 converted"):
        seen: list[tuple[int, int]] = []
        load_model(folders[name], experts="stream", progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert len({total for _, total in seen}) == 1
        assert seen[-1][0] == seen[-1][1]


def test_buffers_are_no_larger_than_the_device_allows() -> None:
    shapes = {"a": Shape((2, 3), mx.bfloat16), "b": Shape((4,), mx.uint32)}
    for limit in (1, 60, 1 << 20):
        ranges = allocate([shapes] * 3, [3, 2, 4], limit)
        assert [r.slots for r in ranges] == [3, 2, 4]
        for number, slots in enumerate(ranges, 1):
            slots.record(1)["a"][:] = 0x3F80  # 1 in bfloat16
            slots.record(1)["b"][:] = number
        for number, slots in enumerate(ranges, 1):
            assert slots.arrays["a"].sum().item() == 6
            assert slots.arrays["b"].sum(axis=1).tolist() == [0, 4 * number, *[0] * (slots.slots - 2)]


def test_memory_that_host_and_device_do_not_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    with pytest.raises(DeviceError, match=r"(?s)found a CUDA device.*--experts resident"):
        allocate([{"a": Shape((2,), mx.uint8)}], [1])


def test_readers_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_V4FLASH_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "f"
    file.write_bytes(bytes(5 << 20))
    record = calibration.LEAST_BYTES
    assert calibration.choose(file, 1000) == calibration.Choice()
    measured = calibration.measure(file, record, seconds=0.01)
    assert {(c.reader, c.threads) for c in measured} >= {(calibration.KINDS[-1], n) for n in calibration.THREADS}
    assert all(c.bytes_per_s for c in measured)
    calls = []
    monkeypatch.setattr(calibration, "measure", lambda *_: calls.append(1) or measured)
    best = max(measured, key=lambda c: c.bytes_per_s or 0)
    assert calibration.choose(file, record) == calibration.choose(file, record) == best
    assert len(calls) == 1


@pytest.mark.parametrize("experts", ["resident", "stream"])
def test_commands_stream_trace_and_count(experts: str, folders: dict[str, Path], tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    folder = folders["fp4 converted"]
    opened = Converted.open(folder)
    sizes = sizes_of(opened.config, opened, open_source(opened).shapes)
    options = ["--model", str(folder), "--experts", experts, "--trace", str(trace), "--temp", "0", "--max-tokens", "3"]
    options += ["--raw", "--json", "--verify-reads"]
    if experts == "stream":
        options += ["--memory", str(make_plan(opened.config, sizes).smallest)]
    result = CliRunner().invoke(main, ["generate", "Hello, world", *options])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout.splitlines()[-1])
    assert ("expert_hit_rate" in summary) == (experts == "stream")
    if experts == "stream":
        assert len(summary["expert_layers"]) == LAYERS
        assert 0 < summary["expert_hit_rate"] < 1
    header, *passes = [json.loads(line) for line in trace.read_text().splitlines()]
    assert header == {"format": "mlx_v4flash.trace", "version": 1, "layers": LAYERS, "experts": E, "chosen": A}
    assert passes
    for entry in passes:
        assert len(entry["experts"]) == LAYERS
        assert {len(ids) for ids in entry["experts"]} == {entry["tokens"] * A}
        assert all(0 <= i < E for ids in entry["experts"] for i in ids)


def test_errors_are_ours() -> None:
    assert issubclass(ExpertReadError, V4FlashError)
