"""The functions of rounding.metal against the references of both round trips, bit by bit."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from emulator import emulate, metal_kernel
from support import E2M1, E4M3, generator

from metal_kernels import _dispatch
from metal_kernels.round_trip import fp4_round_trip_reference, fp8_round_trip_reference

pytestmark = pytest.mark.usefixtures("emulation")

BODY = """
const size_t at = thread_position_in_grid.y * 64 + 2 * thread_index_in_simdgroup;
const float2 y = {}(float2(x[at], x[at + 1]));
out[at] = y.x;
out[at + 1] = y.y;
"""
HEADER = _dispatch.source("rounding")

BOTH = pytest.mark.parametrize(
    ("function", "reference", "grid"),
    [
        ("fp8_round_trip", lambda x: fp8_round_trip_reference(x, 64), E4M3),
        ("fp4_round_trip", fp4_round_trip_reference, E2M1),
    ],
    ids=["fp8", "fp4"],
)
Reference = Callable[[mx.array], mx.array]


def kernel(function: str, x: np.ndarray) -> np.ndarray:
    """Blocks [n, 64] of float32, rounded by a function of the header; two blocks of FP4 to a row."""
    run = metal_kernel(function, ["x"], ["out"], BODY.replace("{}", function), header=HEADER)
    (out,) = run(
        inputs=[mx.array(x)], grid=(32, len(x), 1), threadgroup=(32, 1, 1), output_shapes=[x.shape],
        output_dtypes=[mx.float32],
    )  # fmt: skip
    return np.array(out)


def expect_bits(function: str, reference: Reference, x: np.ndarray) -> None:
    x = x.reshape(-1, 64).astype(np.float32)
    found, expected = kernel(function, x), np.array(reference(mx.array(x)))
    other = (found.view(np.uint32) != expected.view(np.uint32)) & ~(np.isnan(found) & np.isnan(expected))
    at = np.argwhere(other)
    assert not other.any(), (
        f"{other.sum()} differ, first {x[tuple(at[0])]!r} in a block with {abs(x[at[0][0]]).max()!r}"
    )


def scattered(rows: int, lowest: int, highest: int) -> np.ndarray:
    """Blocks whose numbers have any exponent in a range of 14 below that of their block."""
    top = generator().integers(lowest, highest, (rows, 2)).repeat(32, axis=1)
    exponents = top - generator().integers(0, 14, (rows, 64))
    return np.ldexp(generator().uniform(-1, 1, (rows, 64)), exponents).astype(np.float32)


@BOTH
def test_any_bits(function: str, reference: Reference, grid: np.ndarray) -> None:
    """Numbers of every size at once, with infinity and NaN among them."""
    bits = generator().integers(0, 2**32, (300, 64), dtype=np.uint32)
    expect_bits(function, reference, bits.view(np.float32))


@BOTH
def test_blocks_of_any_size(function: str, reference: Reference, grid: np.ndarray) -> None:
    """From subnormal numbers to the largest ones."""
    with np.errstate(over="ignore"):
        expect_bits(function, reference, scattered(600, -148, 129))


@BOTH
@pytest.mark.parametrize("power", [-40, -22, -1, 0, 60])
def test_every_number_tie_and_neighbour(function: str, reference: Reference, grid: np.ndarray, power: int) -> None:
    values = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2]).astype(np.float32)
    values = np.concatenate([values, np.nextafter(values, np.float32(1e9)), np.nextafter(values, np.float32(-1e9))])
    values = np.clip(np.concatenate([values, -values]), -grid[-1], grid[-1])
    values = np.pad(values, (0, -len(values) % 31)).reshape(-1, 31)
    blocks = np.concatenate([np.full((len(values), 1), grid[-1]), values], axis=1)
    blocks = np.pad(blocks, ((0, len(blocks) % 2), (0, 0)))
    expect_bits(function, reference, np.ldexp(blocks, power))


@BOTH
def test_largest_number_around_every_change_of_the_scale(function: str, reference: Reference, grid: np.ndarray) -> None:
    x = scattered(3 * 240, -20, -10)
    largest = np.ldexp(grid[-1], np.arange(-126, 114)).astype(np.float32)
    x[:, 0] = np.concatenate([largest, np.nextafter(largest, np.float32(0)), np.nextafter(largest, np.float32(np.inf))])
    x[:, 1:] *= x[:, :1]
    x[:, 33] = -x[:, 0]
    expect_bits(function, reference, x)


@BOTH
def test_around_the_floor_and_zeros(function: str, reference: Reference, grid: np.ndarray) -> None:
    floor = 1e-4 if function == "fp8_round_trip" else 6 * 2.0**-126
    sizes = np.array([0, 1e-3, 0.3, 0.999999, 1, 1.0000002, 1.2, 2, 5])[:, None]
    x = generator().uniform(-1, 1, (9, 64)) * sizes * floor
    x[:, 3], x[:, 40] = sizes[:, 0] * floor, -sizes[:, 0] * floor
    x[:, 5] = -0.0
    expect_bits(function, reference, x)


@BOTH
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan], ids=str)
def test_infinity_and_nan(function: str, reference: Reference, grid: np.ndarray, bad: float) -> None:
    x = scattered(3, -5, 5)
    x[1, 37], x[1, 40], x[1, 41] = bad, 0, -0.0
    expect_bits(function, reference, x)


@BOTH
def test_where_denormals_are_flushed_and_products_fused(function: str, reference: Reference, grid: np.ndarray) -> None:
    """The same bits; FP4 needs numbers that are not next to nothing."""
    x = scattered(200, -148, 129) if function == "fp8_round_trip" else scattered(200, -100, 129)
    x = np.nan_to_num(x)
    with emulate(ftz=True, contract=True):
        expect_bits(function, reference, x)


def test_flushing_matters_only_to_the_smallest_blocks_of_fp4() -> None:
    x = np.ldexp(generator().uniform(-1, 1, (400, 64)), generator().integers(-130, -118, (400, 1))).astype(np.float32)
    with emulate(ftz=True):
        found = kernel("fp4_round_trip", x)
    expected = np.array(fp4_round_trip_reference(mx.array(x)))
    other = found != expected
    largest = np.abs(x).reshape(-1, 32).max(axis=1)
    assert other.any() and largest[other.reshape(-1, 32).any(axis=1)].max() < 2.0**-122
    flushed = np.minimum(np.abs(x), np.where(expected == 0, np.inf, np.abs(expected))) < 2.0**-126
    assert not (other & ~flushed).any(), "a number differs although neither it nor its result is subnormal"
