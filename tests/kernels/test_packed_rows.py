"""Packed rows and index keys hold what the round trips give, bit for bit, in the documented layout."""

from __future__ import annotations

import importlib

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    E2M1,
    E4M3,
    expect_equal,
    expect_refused,
    fp4_expected,
    fp8_expected,
    normal,
    rotation,
    rounded,
    run,
    wide,
)

from metal_kernels import index_scores, packed_rows, sparse_attention
from metal_kernels.latents import fp8_except_rotated
from metal_kernels.packed_rows import key_bytes, pack_keys, pack_rows, row_bytes, unpack_keys, unpack_rows
from metal_kernels.round_trip import fp4_round_trip_reference

# The bits of every bfloat16 that is neither infinite nor NaN.
FINITE = np.arange(2**16, dtype=np.uint32)[(np.arange(2**16) & 0x7F80) != 0x7F80].astype(np.uint16)


@pytest.fixture(params=["cpu", "gpu"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two ways to make numbers of codes; the one for GPUs is computed on the CPU here."""
    if request.param == "gpu":
        monkeypatch.setattr(packed_rows.mx, "default_device", lambda: mx.gpu)
    return request.param


def bfloat16(bits: np.ndarray) -> mx.array:
    return mx.array(bits.astype(np.uint16)).view(mx.bfloat16)


def expect_rows(x: mx.array, rotated: int) -> None:
    K = x.shape[-1]
    packed = pack_rows(x, rotated)
    assert (packed.dtype, packed.shape[-1]) == (mx.uint8, row_bytes(K, rotated))
    back = unpack_rows(packed, K, rotated)
    assert back.dtype == mx.float32
    expect_equal(back.astype(mx.bfloat16), fp8_except_rotated(x, rotated))
    expect_equal(back.astype(mx.bfloat16).astype(mx.float32), back)
    if mx.isfinite(back).all():  # the round trip itself takes the largest numbers to infinity
        again = pack_rows(back.astype(mx.bfloat16), rotated)
        expect_equal(unpack_rows(again, K, rotated), back)


def expect_keys(x: mx.array) -> None:
    J = x.shape[-1]
    packed = pack_keys(x)
    assert (packed.dtype, packed.shape[-1]) == (mx.uint8, key_bytes(J))
    back = unpack_keys(packed, J)
    expect_equal(back.astype(mx.bfloat16), fp4_round_trip_reference(x))
    if mx.isfinite(back).all():
        expect_equal(unpack_keys(pack_keys(back.astype(mx.bfloat16)), J), back)


def test_sizes() -> None:
    assert row_bytes(512, 64) == 584 == 448 + 128 + 7 + 1
    assert key_bytes(128) == 68 == 64 + 4
    assert [row_bytes(70, 6), row_bytes(128, 64), row_bytes(66, 2)] == [80, 200, 72]
    assert [key_bytes(32), key_bytes(64), key_bytes(256)] == [20, 36, 136]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("K", "P"), [(512, 64), (70, 6), (192, 64), (64, 0)])
def test_rows(K: int, P: int) -> None:
    expect_rows(normal(2, 5, K, dtype=mx.bfloat16), P)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("J", [32, 64, 128])
def test_keys(J: int) -> None:
    expect_keys(normal(2, 5, J, dtype=mx.bfloat16))


@pytest.mark.usefixtures("way")
def test_layout_of_a_row() -> None:
    """Against a reading of the bytes with ml_dtypes, and against arithmetic written out in numpy."""
    x = normal(3, 512, dtype=mx.bfloat16, scale=7.0)
    packed = np.array(pack_rows(x, 64))
    codes = packed[:, :448].copy().view(ml_dtypes.float8_e4m3fn).astype(np.float64).reshape(3, 7, 64)
    scales = packed[:, 576:583].copy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    np.testing.assert_array_equal((codes * scales[..., None]).reshape(3, 448), fp8_expected(wide(x)[:, :448], 64))
    turned = packed[:, 448:576].copy().view(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_array_equal(turned, wide(x)[:, 448:])
    assert (packed[:, 583] == 0).all()


@pytest.mark.usefixtures("way")
def test_layout_of_a_key() -> None:
    x = normal(3, 128, dtype=mx.bfloat16, scale=7.0)
    packed = np.array(pack_keys(x))
    nibbles = np.stack([packed[:, :64] & 15, packed[:, :64] >> 4], -1).reshape(3, 4, 32)
    values = np.where(nibbles & 8, -1.0, 1.0) * E2M1[nibbles & 7]
    scales = packed[:, 64:].copy().view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    np.testing.assert_array_equal((values * scales[..., None]).reshape(3, 128), fp4_expected(wide(x)))


@pytest.mark.usefixtures("way")
def test_every_code() -> None:
    """Each number of the formats, both signs of zero too, at the smallest, a middle and the largest scale."""
    e4m3 = np.concatenate([E4M3, -E4M3])
    for exponent in (-22, 0, 118):
        blocks = np.pad(np.resize(e4m3, (5, 63)), ((0, 0), (1, 0)), constant_values=448.0)
        expect_rows(bfloat16(_bits(np.ldexp(blocks, exponent))), 0)
    e2m1 = np.concatenate([E2M1, -E2M1])
    for exponent in (-126, 0, 125):
        expect_keys(bfloat16(_bits(np.ldexp(np.concatenate([e2m1, e2m1])[None], exponent))))


def _bits(values: np.ndarray) -> np.ndarray:
    exact = values.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(exact.astype(np.float64), values)
    return exact.view(np.uint16)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_numbers(data: st.DataObject) -> None:
    """Blocks of any finite numbers, subnormals and both zeros among them; some saturate the round trip itself."""
    low = data.draw(st.integers(0, 250))
    high = data.draw(st.integers(low, min(low + 12, 254)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    exponents = rng.integers(low, high + 1, (3, 128)) * (rng.random((3, 128)) > 0.2)
    bits = rng.integers(0, 2, (3, 128)) << 15 | exponents << 7 | rng.integers(0, 128, (3, 128))
    expect_rows(bfloat16(bits), 64)
    expect_rows(bfloat16(bits), 0)
    expect_keys(bfloat16(bits))


def test_all_finite_numbers() -> None:
    """Every finite bfloat16, each beside others of its size."""
    x = bfloat16(FINITE.reshape(-1, 64))
    expect_rows(x, 0)
    expect_keys(x)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_broken_block_is_nan_and_others_are_not(broken: float) -> None:
    x = np.array(normal(1, 192).astype(mx.float32))
    x[0, 70] = x[0, 130] = broken
    x = mx.array(x).astype(mx.bfloat16)
    found = wide(unpack_rows(pack_rows(x, 64), 192, 64))
    expected = rounded(wide(fp8_except_rotated(x, 64)), mx.bfloat16)
    assert np.isnan(found[0, 64:128]).all()
    np.testing.assert_array_equal(found[0, :64], expected[0, :64])
    np.testing.assert_array_equal(found[0, 128:], wide(x)[0, 128:])  # not rounded: infinity stays
    found = wide(unpack_keys(pack_keys(x), 192))
    assert np.isnan(found[0, 64:96]).all() and np.isnan(found[0, 128:160]).all()
    assert np.isfinite(found[0, :64]).all() and np.isfinite(found[0, 96:128]).all()
    assert np.array(pack_rows(x, 64))[0, 192 + 64 + 1] == 255


def test_refusals() -> None:
    expect_refused("x", pack_rows, normal(2, 128), 64)
    expect_refused("x", pack_rows, normal(2, 100, dtype=mx.bfloat16), 64)
    expect_refused("x", pack_keys, normal(2, 128, dtype=mx.float16))
    expect_refused("x", pack_keys, normal(2, 48, dtype=mx.bfloat16))


# --- the references that read them ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["window", "all", "picked"])
@pytest.mark.parametrize("T", [1, 6])
def test_sparse_attention(T: int, kind: str) -> None:
    """The bits that the same numbers in bfloat16 give."""
    window, rows = (normal(2, n, 140, dtype=mx.bfloat16) for n in (8 + T, 14))
    packed = [pack_rows(window, 12), None if kind == "window" else pack_rows(rows, 12)]
    plain = [a if a is None else unpack_rows(a, 140, 12).astype(mx.bfloat16) for a in packed]
    picks = mx.array([[[3, -1, 0, 12]] * T] * 2) if kind == "picked" else None
    q, sink, turns = normal(2, T, 5, 140, dtype=mx.bfloat16, scale=2), normal(5), rotation(np.arange(T) + 50, 6)

    def attend(window: mx.array, rows: mx.array | None) -> mx.array:
        sizes = {"position": 50, "ratio": 4, "window_size": 9}
        found: mx.array = run(sparse_attention, q, window, rows, picks, sink, *turns, **sizes)
        return found

    expect_equal(attend(*packed), attend(*plain))


@pytest.mark.parametrize("work", [32 << 20, 4 * 2 * 3 * 5 * 7], ids=["at-once", "in-parts"])
def test_index_scores(work: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("metal_kernels.index_scores"), "_WORK_BYTES", work)
    q, w, keys = (
        normal(2, 3, 5, 64, dtype=mx.bfloat16),
        normal(2, 3, 5),
        pack_keys(normal(2, 33, 64, dtype=mx.bfloat16)),
    )
    expect_equal(run(index_scores, q, w, keys), index_scores(q, w, unpack_keys(keys, 64).astype(mx.bfloat16)))


def test_reading_refusals() -> None:
    q, keys = normal(1, 2, 3, 48, dtype=mx.bfloat16), mx.zeros((1, 5, 28), mx.uint8)
    expect_refused("q", index_scores, q, normal(1, 2, 3), keys)
    expect_refused("keys", index_scores, normal(1, 2, 3, 64), normal(1, 2, 3), keys)
