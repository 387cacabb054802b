"""Rounding to the FP8 and FP4 grids the model was trained with (spec 6.3)."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import KernelError

FP8_MAX, FP8_FLOOR = 448.0, 1e-4
FP4_MAX, FP4_FLOOR = 6.0, 6.0 * 2.0**-126


def fp8_round_trip(x: mx.array, block: int) -> mx.array:
    """Round to e4m3 with one power-of-two scale per `block` values of the last axis.

    Args:
        x: [..., K], K a multiple of `block`, any float type.

    Returns:
        The shape and type of x.
    """
    _expect_blocks("fp8_round_trip", x, block)
    return fp8_round_trip_reference(x, block)


def fp4_round_trip(x: mx.array, block: int = 32) -> mx.array:
    """Round to e2m1 with one power-of-two scale per `block` values; as `fp8_round_trip` otherwise."""
    _expect_blocks("fp4_round_trip", x, block)
    return fp4_round_trip_reference(x, block)


def fp8_round_trip_reference(x: mx.array, block: int) -> mx.array:
    blocks, scale = _scaled(x, block, FP8_MAX, FP8_FLOOR)
    rounded = mx.from_fp8(mx.to_fp8(blocks), mx.float32)
    return (rounded * scale).reshape(x.shape).astype(x.dtype)


def fp4_round_trip_reference(x: mx.array, block: int = 32) -> mx.array:
    blocks, scale = _scaled(x, block, FP4_MAX, FP4_FLOOR)
    size = mx.abs(blocks)
    # Steps of 0.5 below 2, of 1 below 4, of 2 up to 6. mx.round takes ties to even, and so does the format.
    step = mx.where(size < 2, 0.5, mx.where(size < 4, 1.0, 2.0))
    return (mx.round(blocks / step) * step * scale).reshape(x.shape).astype(x.dtype)


def _scaled(x: mx.array, block: int, largest: float, floor: float) -> tuple[mx.array, mx.array]:
    """x / s clipped to the grid's range, and s = 2^ceil(log2(max|x| / largest)), both float32."""
    blocks = x.astype(mx.float32).reshape(*x.shape[:-1], -1, block)
    amax = mx.maximum(mx.abs(blocks).max(axis=-1, keepdims=True), floor)
    # The exponent is read from the bits: log2 in floating point may land on the wrong side of an integer.
    bits = (amax * mx.array(1 / largest, mx.float32)).view(mx.uint32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
    scale = (exponent << 23).view(mx.float32)
    return mx.clip(blocks / scale, -largest, largest), scale


def _expect_blocks(op: str, x: mx.array, block: int) -> None:
    if x.shape[-1] % block:
        raise KernelError(f"{op}: x: expected a last axis divisible by {block}, found {x.shape}")
