"""Kernels that write and read packed rows: key_row, compress, index_scores, sparse_attention."""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import Session, emulate
from support import (
    compress,
    compress_reference,
    expect_equal,
    expect_match,
    expect_same,
    key_row,
    key_row_reference,
    normal,
    rotation,
    run,
    sizes,
    wide,
)

from metal_kernels import KernelError, index_scores, kernels, sparse_attention
from metal_kernels.index_scores import index_scores_reference
from metal_kernels.packed_rows import pack_keys, pack_rows, unpack_keys, unpack_rows

pytestmark = pytest.mark.usefixtures("emulated")

EPS, BF16 = 1e-6, mx.bfloat16
NAN = float("nan")
GPU = pytest.mark.parametrize(
    "changes", [{"contract": True}, {"ftz": True}, {"alignment": 8}], ids=["contract", "ftz", "alignment"]
)


def blockwise(K: int) -> mx.array:
    """Channels whose blocks of 32 differ much in size, so that a scale of another block gives other numbers."""
    size = np.array([1, 1e-5, 1e-5, 1e-5, 1, 1, 1e-5, 1e-5])[np.arange(K) // 32 % 8]
    return mx.array(size.astype(np.float32))


def quarter_turns(T: int) -> tuple[mx.array, mx.array]:
    """Exact rotations of three pairs."""
    turn = mx.array(np.resize(np.array([[1, 0, -1], [0, 1, 0], [-1, 0, 0]], np.float32), (T, 3)))
    return turn, 1 - mx.abs(turn)


# --- writing ----------------------------------------------------------------------------------------


def expect_packed(found: mx.array, expected: mx.array, K: int, P: int) -> None:
    """The same numbers but for those beside a tie, in the same bytes where they are the same."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    values, others = unpack_rows(found, K, P), unpack_rows(expected, K, P)
    expect_same(values[..., : K - P], wide(others)[..., : K - P], share=0.002)
    expect_match(values[..., K - P :].astype(BF16), wide(others)[..., K - P :], BF16)
    expect_same(found[..., K + P :], np.array(expected[..., K + P :]).astype(float), share=0.01)


@sizes("B T K P", (2, 3, 138, 10), (1, 9, 512, 64), (1, 1, 66, 2), (1, 8, 64, 0), (1, 2, 192, 128))
def test_key_row(B: int, T: int, K: int, P: int) -> None:
    kv = (normal(B, T, K) * blockwise(K)).astype(BF16)
    args = (kv, normal(K), *rotation(np.arange(T) + 7, P // 2), EPS, True, True)
    expect_packed(run(key_row, *args), key_row_reference(*args), K, P)


@GPU
def test_key_row_as_a_gpu_may_run_it(changes: dict[str, Any]) -> None:
    args = (normal(2, 5, 138, dtype=BF16), normal(138), *rotation(5, 5), EPS, True, True)
    with emulate(**changes):
        expect_packed(key_row(*args), key_row_reference(*args), 138, 10)


def test_key_row_has_the_same_bytes_where_the_norm_is_exact() -> None:
    """Sizes of all codes and scales: rows of ones have norm 1, so that what is rounded are the weights."""
    sign = mx.where(normal(1, 3, 326) < 0, -1.0, 1.0).astype(BF16)
    size = np.ldexp(1.0, np.arange(326) // 64 * 5 - 15 - np.arange(326) % 18).astype(np.float32)
    args = (sign, normal(326) * mx.array(size), *quarter_turns(3), 0.0, True, True)
    expect_equal(run(key_row, *args), key_row_reference(*args))


def test_key_row_of_the_model() -> None:
    """A row is read once and its 584 bytes are written once, in one launch."""
    args = (normal(1, 17, 512, dtype=BF16), normal(512), *rotation(17, 32), EPS, True, True)
    with emulate(counters=True) as session:
        expect_packed(key_row(*args), key_row_reference(*args), 512, 64)
    (launch,) = session.dispatches
    written = launch.traffic["out"]
    assert written.write_bytes == written.write_distinct == 17 * 584
    assert launch.traffic["kv"].read_bytes == 17 * 1024


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_a_broken_row_is_nan(value: float) -> None:
    kv = normal(1, 5, 134, dtype=BF16)
    kv[0, 3, 130] = value
    args = (kv, normal(134), *rotation(5, 3), EPS, True, True)
    found = run(key_row, *args)
    expected = key_row_reference(*args)
    for part in (slice(128), slice(128 + 12, None)):  # between them is NaN, of any sign
        expect_equal(found[..., part], expected[..., part])
    values = wide(unpack_rows(found, 134, 6))
    assert not np.isfinite(values[0, 3, 130]) and np.isfinite(np.delete(values, 3, axis=1)).all()


@pytest.mark.parametrize(("quant", "K", "P"), [("fp8", 138, 10), ("fp4", 32, 6), ("fp4", 64, 6), ("fp4", 128, 64)])
@pytest.mark.parametrize("changes", [{}, {"contract": True}, {"ftz": True}, {"alignment": 4}], ids=str)
def test_compress(quant: str, K: int, P: int, changes: dict[str, Any]) -> None:
    args = (normal(2, 3, 8, K), normal(2, 3, 8, K), normal(K) * blockwise(K), *rotation(3, P // 2), EPS, BF16, quant)
    with emulate(**changes):
        found, expected = run(compress, *args, True), compress_reference(*args, True)
    if quant == "fp8":
        expect_packed(found, expected, K, P)
    else:
        expect_same(unpack_keys(found, K), wide(unpack_keys(expected, K)), share=0.002)
        expect_same(found[..., K // 2 :], np.array(expected[..., K // 2 :]).astype(float))


@pytest.mark.parametrize(("quant", "K"), [("fp8", 326), ("fp4", 256)])
def test_compress_has_the_same_bytes_where_pooling_and_norm_are_exact(quant: str, K: int) -> None:
    sign = mx.where(normal(1, 3, 1, K) < 0, -1.0, 1.0)
    size = np.ldexp(1.0, np.arange(K) // 64 * 5 - 15 - np.arange(K) % 7).astype(np.float32)
    args = (sign, normal(1, 3, 1, K), normal(K) * mx.array(size), *quarter_turns(3), 0.0, BF16, quant, True)
    expect_equal(run(compress, *args), compress_reference(*args))


@pytest.mark.parametrize(("quant", "K", "size"), [("fp8", 512, 584), ("fp4", 128, 68)])
def test_compress_of_the_model(quant: str, K: int, size: int) -> None:
    args = (normal(1, 2, 8, K), normal(1, 2, 8, K), normal(K), *rotation(2, 32), EPS, BF16, quant, True)
    with emulate(counters=True) as session:
        assert compress(*args).shape == (1, 2, size)
    assert session.dispatches[0].traffic["out"].write_bytes == 2 * size


def test_a_broken_key_is_nan() -> None:
    kv = normal(1, 3, 8, 128)
    kv[0, 1, 2, 77] = NAN
    args = (kv, normal(1, 3, 8, 128), normal(128), *rotation(3, 32), EPS, BF16, "fp4", True)
    found = run(compress, *args)
    expect_equal(found[:, 1], compress_reference(*args)[:, 1])
    lost = np.isnan(wide(unpack_keys(found, 128)))
    assert lost[0, 1].all() and lost.sum() == 128


@pytest.mark.parametrize(("dtype", "rounded"), [(mx.float16, True), (BF16, False)])
def test_what_would_lose_bits_is_not_packed(dtype: mx.Dtype, rounded: bool) -> None:
    with pytest.raises(KernelError, match="latents: kv: expected rounded rows of bfloat16 to pack, found"):
        key_row(normal(1, 2, 70, dtype=dtype), normal(70), *rotation(2, 3), EPS, rounded, True)
    with pytest.raises(KernelError, match="compress: dtype: expected rounded rows of bfloat16 to pack, found"):
        quant = "fp8" if rounded else "none"
        compress(normal(1, 2, 4, 70), normal(1, 2, 4, 70), normal(70), *rotation(2, 3), EPS, dtype, quant, True)


# --- reading ----------------------------------------------------------------------------------------


@sizes(
    "B T I J S", (1, 1, 1, 32, 1), (2, 3, 5, 64, 33), (1, 2, 16, 96, 131), (2, 1, 65, 32, 129), (1, 1, 64, 128, 200)
)  # fmt: skip
@pytest.mark.parametrize("changes", [{}, {"ftz": True}, {"alignment": 4}], ids=str)
def test_index_scores(B: int, T: int, I: int, J: int, S: int, changes: dict[str, Any]) -> None:
    """The bits that the same numbers in bfloat16 give."""
    q, w = normal(B, T, I, J, dtype=BF16), normal(B, T, I)
    packed = pack_keys((normal(B, S, J) * blockwise(J)).astype(BF16))
    with emulate(**changes):
        found = run(index_scores, q, w, packed)
        expect_equal(found, index_scores(q, w, unpack_keys(packed, J).astype(BF16)))
    expect_match(found, wide(index_scores_reference(q, w, packed)), mx.float32)


def test_index_scores_of_the_model() -> None:
    """Codes and scales are read once for each query."""
    packed = pack_keys(normal(1, 200, 128, dtype=BF16))
    with emulate(counters=True) as session:
        index_scores(normal(1, 2, 64, 128, dtype=BF16), normal(1, 2, 64), packed)
    traffic = session.dispatches[0].traffic["keys"]
    assert traffic.read_distinct == packed.nbytes == 200 * 68
    assert traffic.read_by_group == 2 * packed.nbytes


def test_a_broken_key_scores_nan() -> None:
    keys = normal(1, 70, 64, dtype=BF16)
    keys[0, 41, 17] = NAN
    lost = np.isnan(wide(index_scores(normal(1, 3, 5, 64, dtype=BF16), normal(1, 3, 5), pack_keys(keys))))
    assert lost[0, :, 41].all() and lost.sum() == 3


class Case:
    """A call of sparse_attention with rows in both layouts."""

    def __init__(
        self, T: int, position: int, kind: str, H: int = 5, K: int = 140, P: int = 12, W: int = 9, top: int = 7
    ) -> None:
        count = 0 if kind == "window" else (position + T) // 4
        window, rows = normal(2, min(position, W - 1) + T, K, dtype=BF16), normal(2, max(count, 1), K, dtype=BF16)
        self.K, self.P, self.window = K, P, pack_rows((window * blockwise(K)).astype(BF16), P)
        self.rows = pack_rows((rows * blockwise(K)).astype(BF16), P) if count else None
        chosen = mx.argsort(normal(2, T, max(count, 1)), axis=-1)[..., :top].astype(mx.int32)
        last = (position + mx.arange(T) + 1) // 4
        self.picks = mx.where(chosen < last[:, None], chosen, -1) if count and kind == "picked" else None
        self.q, self.sink = normal(2, T, H, K, dtype=BF16, scale=2), normal(H)
        self.rotation = rotation(np.arange(position, position + T), P // 2)
        self.keywords = {"position": position, "ratio": 4, "window_size": W}

    def packed(self) -> mx.array:
        rest = (self.picks, self.sink, *self.rotation)
        return run(sparse_attention, self.q, self.window, self.rows, *rest, **self.keywords)

    def unpacked(self) -> mx.array:
        window, rows = (
            None if a is None else unpack_rows(a, self.K, self.P).astype(BF16) for a in (self.window, self.rows)
        )
        rest = (self.picks, self.sink, *self.rotation)
        return sparse_attention(self.q, window, rows, *rest, **self.keywords)


@pytest.fixture(params=[False, True], ids=["one-split", "splits"])
def splits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        for name, value in {"_SPLIT_KEYS": 5, "_TILE_ROWS": 4}.items():
            monkeypatch.setattr(sys.modules["metal_kernels.sparse_attention"], name, value)


@pytest.mark.usefixtures("splits")
@pytest.mark.parametrize("kind", ["window", "all", "picked"])
@sizes("T position", (1, 0), (1, 50), (6, 17), (12, 0))
def test_sparse_attention(T: int, position: int, kind: str) -> None:
    """The bits that the same numbers in bfloat16 give."""
    c = Case(T, position, kind)
    expect_equal(c.packed(), c.unpacked())


@sizes("H K P", (1, 64, 0), (3, 68, 4), (33, 128, 64), (2, 576, 64))
def test_heads_and_widths(H: int, K: int, P: int) -> None:
    c = Case(2, 30, "picked", H=H, K=K, P=P)
    expect_equal(c.packed(), c.unpacked())


@GPU
def test_sparse_attention_as_a_gpu_may_run_it(changes: dict[str, Any]) -> None:
    c = Case(3, 50, "picked")
    with emulate(**changes):
        expect_equal(c.packed(), c.unpacked())


def test_sparse_attention_of_the_model() -> None:
    """Of a picked row 583 bytes are read, once for 32 of the 64 heads; of other rows nothing."""
    c = Case(1, 2100, "picked", H=64, K=512, P=64, W=128, top=20)
    with emulate(counters=True, repeat=False) as session:
        found = c.packed()
    expect_equal(found, c.unpacked())
    traffic = session.dispatches[0].traffic
    seen = int((np.array(c.picks) >= 0).sum())
    assert traffic["rows"].read_distinct == seen * 583
    assert traffic["window"].read_distinct == 2 * 128 * 583
    assert traffic["rows"].read_by_group == 2 * seen * 583


def test_only_what_is_seen_is_read() -> None:
    """Rows of open groups and rows that were not picked may hold anything."""
    c = Case(2, 50, "picked")
    found, seen = c.packed(), np.unique(np.array(c.picks))
    for r in range(c.rows.shape[1]):
        if r not in seen:
            c.rows[:, r] = 255
    expect_equal(c.packed(), found)


def test_a_broken_row_is_seen() -> None:
    c = Case(1, 50, "all")
    c.window[0, 4] = pack_rows(mx.full((140,), NAN, BF16), 12)
    lost = np.isnan(wide(c.packed()))
    assert lost[0].all() and not lost[1].any()


def test_what_is_not_covered(emulated: Session) -> None:
    c = Case(1, 20, "all", P=6, K=70)
    with pytest.raises(KernelError, match="sparse_attention: the kernel covers an even head width, and rows"):
        c.packed()
    with kernels("auto"):
        expect_equal(c.packed(), c.unpacked())
    assert not emulated.dispatches


def test_layouts_are_not_mixed() -> None:
    c = Case(1, 20, "all")
    with pytest.raises(KernelError, match="sparse_attention: rows: expected shape"):
        sparse_attention(
            c.q, c.window, unpack_rows(c.rows, 140, 12).astype(BF16), None, c.sink, *c.rotation, **c.keywords
        )
