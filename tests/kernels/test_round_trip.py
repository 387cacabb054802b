"""The FP8 and FP4 round trips against tables of the two formats, number by number."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from support import (
    E2M1,
    E4M3,
    FLOATS,
    expect_equal,
    expect_refused,
    expect_same,
    fp4_expected,
    fp8_expected,
    nearest,
    normal,
    rounded,
    run,
    sizes,
    wide,
)

from metal_kernels import fp4_round_trip, fp8_round_trip

BOTH = pytest.mark.parametrize(
    ("op", "expected", "grid", "block"),
    [(fp8_round_trip, fp8_expected, E4M3, 64), (fp4_round_trip, fp4_expected, E2M1, 32)],
    ids=["fp8", "fp4"],
)


def array(values: np.ndarray) -> mx.array:
    return mx.array(values.astype(np.float32))


def near(values: np.ndarray) -> np.ndarray:
    """The values, and the float32 numbers on either side of each."""
    exact = values.astype(np.float32)
    return np.concatenate([exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))])


def with_largest(values: np.ndarray, largest: float, block: int) -> np.ndarray:
    """Blocks [n, block] that hold the values and their negatives, and start with the number that fixes the scale."""
    values = np.concatenate([values, -values])
    values = np.pad(values, (0, -len(values) % (block - 1)))
    blocks = values.reshape(-1, block - 1)
    return np.concatenate([np.full((len(blocks), 1), largest), blocks], axis=1)


# --- what we compare with ---------------------------------------------------------------------------


def test_table_of_e4m3_is_that_of_torch() -> None:
    x = near(np.concatenate([E4M3, (E4M3[1:] + E4M3[:-1]) / 2]))
    x = np.concatenate([x, -x])
    x = x[np.abs(x) <= 448]
    theirs = torch.from_numpy(x).to(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(nearest(x.astype(np.float64), E4M3), theirs)


def test_table_of_e2m1_is_that_of_its_bits() -> None:
    bits = [(code >> 1, code & 1) for code in range(8)]  # exponent, mantissa
    np.testing.assert_array_equal(E2M1, [m / 2 if e == 0 else (1 + m / 2) * 2.0 ** (e - 1) for e, m in bits])


# --- any numbers ------------------------------------------------------------------------------------


@FLOATS
@sizes("T K block", (1, 32, 32), (5, 64, 64), (3, 192, 64), (7, 384, 128), (2, 60, 20))
def test_fp8(T: int, K: int, block: int, dtype: mx.Dtype) -> None:
    x = normal(T, K, dtype=dtype)
    expect_same(run(fp8_round_trip, x, block), rounded(fp8_expected(wide(x), block), dtype))


@FLOATS
@sizes("T K block", (1, 32, 32), (5, 64, 32), (3, 192, 64), (2, 60, 20))
def test_fp4(T: int, K: int, block: int, dtype: mx.Dtype) -> None:
    x = normal(T, K, dtype=dtype)
    expect_same(run(fp4_round_trip, x, block), rounded(fp4_expected(wide(x), block), dtype))


def blocks_of(width: int) -> st.SearchStrategy[np.ndarray]:
    # From the smallest normal number on: smaller ones are zero to some devices.
    numbers = st.floats(-(2.0**90), 2.0**90, width=32, allow_subnormal=False)
    return arrays.arrays(np.float32, (2, width), elements=numbers)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(x=blocks_of(128))
def test_any_floats(x: np.ndarray) -> None:
    expect_same(fp8_round_trip(mx.array(x), 64), rounded(fp8_expected(x.astype(np.float64), 64), mx.float32))
    expect_same(fp4_round_trip(mx.array(x)), rounded(fp4_expected(x.astype(np.float64)), mx.float32))


# --- rounding ---------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("power", [-6, 0, 9])
def test_every_number_tie_and_neighbour(op, expected, grid, block, power) -> None:
    """Grid numbers stay, ties go to the even mantissa, and so do those of numbers below the smallest normal one."""
    values = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2])
    x = with_largest(near(values * 2.0**power), grid[-1] * 2.0**power, block)
    x = np.clip(x, -grid[-1] * 2.0**power, grid[-1] * 2.0**power)
    found = run(op, array(x), block)
    expect_same(found, nearest(x.astype(np.float32) / 2.0**power, grid) * 2.0**power)
    expect_same(found, expected(x.astype(np.float32).astype(np.float64), block))


def test_fp4_ties() -> None:
    ties, even = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], [0, 1, 1, 2, 2, 4, 4]
    x = np.array([6, *ties, *(-t for t in ties)] + [0] * 17)
    expect_same(run(fp4_round_trip, array(x)), np.array([6, *even, *(-e for e in even)] + [0] * 17))


def test_fp8_below_the_smallest_normal_number() -> None:
    step = 2.0**-9
    x = np.array([448, 0.5, 0.50001, 1, 1.5, 2.5, 3.5, 6.5, 7.5, 8.5, -0.5, -1.5] + [0] * 52) * step
    x[0] = 448
    whole = np.array([448, 0, 1, 1, 2, 2, 4, 6, 8, 8, 0, -2] + [0] * 52) * step
    whole[0] = 448
    expect_same(run(fp8_round_trip, array(x), 64), whole)


# --- scales -----------------------------------------------------------------------------------------


@BOTH
def test_largest_number_at_a_power_of_two_times_the_range(op, expected, grid, block) -> None:
    """There the exponent changes; log2 in floating point lands on the wrong side of some of these."""
    powers = np.arange(-20, 60)
    largest = near(grid[-1] * 2.0**powers)
    x = np.concatenate([largest[:, None], largest[:, None] * normal_part(len(largest), block - 1)], axis=1)
    x = x.astype(np.float32)
    product = np.abs(x).max(axis=1) * np.float32(1 / grid[-1])
    naive = np.ceil(np.log2(product))
    _, exponents = np.frexp(product)
    assert (naive != exponents - (product == np.ldexp(0.5, exponents))).any(), "these numbers are too easy"
    expect_same(run(op, mx.array(x), block), expected(x.astype(np.float64), block))


def normal_part(rows: int, columns: int) -> np.ndarray:
    """Numbers between -1 and 1, most of them small."""
    return np.tanh(wide(normal(rows, columns, scale=0.3)))


def test_fp8_floor_of_the_largest_number() -> None:
    floor = 2.0 ** np.ceil(np.log2(1e-4 / 448))  # the scale does not get smaller than this
    x = np.zeros((4, 64))
    x[0, :3] = [3e-5, 1e-6, -5e-5]
    x[1, :3] = [9.9e-5, 2e-8, 1e-9]
    x[2, :3] = [1e-4, 3e-7, -1e-9]
    x[3, :3] = [1e-12, floor * 2.0**-9, floor * 2.0**-10]
    expected = nearest(x.astype(np.float32) / floor, E4M3) * floor
    expect_same(run(fp8_round_trip, array(x), 64), expected)


def test_fp4_floor_of_the_largest_number() -> None:
    smallest = 2.0**-126  # of normal numbers, and of scales
    x = np.zeros((3, 32))
    x[0, :4] = np.array([6, 4.75, -1.25, 2]) * smallest
    x[1, :4] = np.array([3, -2.5, 1.75, 2]) * smallest
    x[2, :4] = np.array([7, 1, -1.5, 2]) * smallest
    found = wide(run(fp4_round_trip, array(x)))
    expect = fp4_expected(x)
    normals = np.abs(expect) >= smallest  # smaller results are zero to some devices
    np.testing.assert_array_equal(found[normals], expect[normals])


@BOTH
def test_zeros(op, expected, grid, block) -> None:
    expect_same(run(op, mx.zeros((3, 2 * block)), block), np.zeros((3, 2 * block)))


# --- blocks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [32, 64, 128])
def test_fp8_block_size(block: int) -> None:
    """Runs of 32 numbers of very different size: each block size rounds them differently."""
    size = np.array([1, 1e-5, 1e-5, 1e-5, 1, 1, 1e-5, 1e-5])
    x = wide(normal(5, 256) * array(np.repeat(size, 32)))
    by_block = {b: fp8_expected(x, b) for b in (32, 64, 128)}
    for other in {32, 64, 128} - {block}:
        assert (by_block[block] != by_block[other]).mean() > 0.1, "these numbers cannot tell the block sizes apart"
    expect_same(run(fp8_round_trip, array(x), block), by_block[block])


def test_fp4_block_size_is_32_unless_told() -> None:
    x = wide(normal(5, 128) * array(np.repeat([1, 0.1, 0.01, 1], 32)))
    assert (fp4_expected(x, 32) != fp4_expected(x, 64)).mean() > 0.1
    expect_same(run(fp4_round_trip, array(x)), fp4_expected(x, 32))


@BOTH
def test_a_block_alone_equals_the_block_among_others(op, expected, grid, block) -> None:
    x = normal(2, 3, 4 * block, dtype=mx.bfloat16)
    together = op(x, block)
    for start in range(0, 4 * block, block):
        part = slice(start, start + block)
        expect_equal(op(x[1:, 2:, part], block), together[1:, 2:, part])


@BOTH
def test_a_second_round_trip_changes_nothing(op, expected, grid, block) -> None:
    once = op(normal(5, 3 * block, dtype=mx.bfloat16), block)
    expect_equal(run(op, once, block), once)


@BOTH
@pytest.mark.parametrize("bad", [np.inf, -np.inf], ids=str)
def test_infinity_stays_out_of_other_blocks(op, expected, grid, block, bad) -> None:
    x = wide(normal(3, 2 * block))
    x[1, block + 2] = bad
    found = wide(run(op, array(x), block))
    assert not np.isfinite(found[1, block + 2]), "an infinite number became a finite one"
    x, found = np.delete(x.reshape(6, block), 3, axis=0), np.delete(found.reshape(6, block), 3, axis=0)
    expect_same(array(found), expected(x, block))


@pytest.mark.parametrize(
    ("op", "expected", "block"),
    [
        pytest.param(fp8_round_trip, fp8_expected, 64, id="fp8"),
        pytest.param(fp4_round_trip, fp4_expected, 32, id="fp4"),
    ],
)  # fmt: skip
def test_nan_stays_nan(op, expected, block) -> None:
    x = wide(normal(3, 2 * block))
    x[1, block + 2] = np.nan
    found = wide(run(op, array(x), block))
    assert np.isnan(found[1, block + 2]), f"NaN became {found[1, block + 2]}"
    x, found = np.delete(x.reshape(6, block), 3, axis=0), np.delete(found.reshape(6, block), 3, axis=0)
    expect_same(array(found), expected(x, block))


@BOTH
def test_refuses_a_part_of_a_block(op, expected, grid, block) -> None:
    expect_refused("x", op, normal(3, block + 1), block)
    expect_refused("x", op, normal(3, block // 2), block)
