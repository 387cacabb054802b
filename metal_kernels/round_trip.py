"""Rounding to the FP8 and FP4 grids the model was trained with (spec 6.3)."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import expect_blocks

FP8_MAX, FP8_FLOOR = 448.0, 1e-4
FP4_MAX, FP4_FLOOR = 6.0, 6.0 * 2.0**-126
FP8_BLOCK = 64
FP4_BLOCK = 32


def fp8_round_trip(x: mx.array, block: int) -> mx.array:
    """Round to e4m3 with one power-of-two scale per `block` values of the last axis.

    Args:
        x: [..., K], K a multiple of `block`, any float type.

    Returns:
        The shape and type of x.
    """
    expect_blocks("fp8_round_trip", "x", x.shape[-1], block)
    return fp8_round_trip_reference(x, block)


def fp4_round_trip(x: mx.array, block: int = FP4_BLOCK) -> mx.array:
    """Round to e2m1 with one power-of-two scale per `block` values; as `fp8_round_trip` otherwise."""
    expect_blocks("fp4_round_trip", "x", x.shape[-1], block)
    return fp4_round_trip_reference(x, block)


def fp8_round_trip_reference(x: mx.array, block: int) -> mx.array:
    blocks, scale = on_grid(x, block, FP8_MAX, FP8_FLOOR)
    rounded = mx.from_fp8(mx.to_fp8(blocks), mx.float32) * scale
    rounded = mx.where(mx.isnan(blocks), blocks, rounded)  # to_fp8 makes a number of NaN, and would hide it
    return rounded.reshape(x.shape).astype(x.dtype)


def fp4_round_trip_reference(x: mx.array, block: int = FP4_BLOCK) -> mx.array:
    blocks, scale = on_grid(x, block, FP4_MAX, FP4_FLOOR)
    size = mx.abs(blocks)
    # Steps of 0.5 below 2, of 1 below 4, of 2 up to 6. mx.round takes ties to even, and so does the format.
    step = mx.where(size < 2, 0.5, mx.where(size < 4, 1.0, 2.0))
    return (mx.round(blocks / step) * step * scale).reshape(x.shape).astype(x.dtype)


def hadamard_fp4(x: mx.array) -> mx.array:
    """Hadamard transform of the last axis, rounded to the type of x, then the FP4 round trip (spec 6.2, 6.3)."""
    return fp4_round_trip_reference(hadamard(x))


def hadamard(x: mx.array) -> mx.array:
    """Hadamard transform of the last axis, in the type of x."""
    # In float32: in bfloat16 MLX rounds after every stage of the transform, and more codes come out different.
    return mx.hadamard_transform(x.astype(mx.float32)).astype(x.dtype)


def on_grid(x: mx.array, block: int, largest: float, floor: float) -> tuple[mx.array, mx.array]:
    """x / s clipped to the grid's range, and s = 2^ceil(log2(max|x| / largest)), both float32."""
    blocks = x.astype(mx.float32).reshape(*x.shape[:-1], -1, block)
    amax = mx.maximum(mx.abs(blocks).max(axis=-1, keepdims=True), floor)
    # The exponent is read from the bits: log2 in floating point may land on the wrong side of an integer.
    bits = (amax * mx.array(1 / largest, mx.float32)).view(mx.uint32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    scale = (exponent << 23).view(mx.float32)
    return mx.clip(blocks / scale, -largest, largest), scale
