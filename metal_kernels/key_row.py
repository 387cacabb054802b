"""The row that a token adds to the window: key and value in one."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import expect_blocks, expect_rotation, expect_shape, kernel, scalar, use_kernel
from .packed_rows import expect_packable, pack_rows, row_bytes
from .rms_norm import rms_norm_reference
from .rope import rope_reference
from .round_trip import FP8_BLOCK, fp8_round_trip_reference


def key_row(
    kv: mx.array, weight: mx.array, cos: mx.array, sin: mx.array, eps: float, fp8: bool, packed: bool = False
) -> mx.array:
    """rmsnorm, rotation of the last P dimensions, FP8 round trip of the others (spec 4.1).

    Args:
        kv: projected rows, [B, T, K], any float type.
        weight: of the norm, [K].
        cos, sin: [T, P/2], float32.
        fp8: round the K - P dimensions that are not rotated to e4m3 in blocks of 64.
        packed: hand the row out as bytes; kv must be bfloat16, and fp8 set.

    Returns:
        [B, T, K] in the type of kv; packed [B, T, row_bytes(K, P)], uint8.
    """
    expect_shape("key_row", "weight", weight, kv.shape[-1:])
    expect_rotation("key_row", cos, sin, kv.shape[1], kv.shape[-1])
    if fp8:
        expect_blocks("key_row", "kv", kv.shape[-1] - 2 * cos.shape[-1], FP8_BLOCK)
    K, P = kv.shape[-1], 2 * cos.shape[-1]
    if packed:
        expect_packable("key_row", "kv", kv.dtype, fp8)
    if not use_kernel("key_row", covers=K % 2 == 0, limit="an even number of dimensions"):
        return key_row_reference(kv, weight, cos, sin, eps, fp8, packed)
    size = row_bytes(K, P) if packed else 0
    (out,) = kernel("key_row", ("kv", "weight", "cosines", "sines", "eps"), ("out",), header="row rounding pack")(
        inputs=[kv, weight, cos, sin, scalar(eps)],
        template=[("Elem", kv.dtype), ("K", K), ("P", P), ("FP8", fp8), ("BYTES", size)],
        grid=(32, kv.size // K, 1),
        threadgroup=(32, 8, 1),
        output_shapes=[(*kv.shape[:-1], size or K)],
        output_dtypes=[mx.uint8 if packed else kv.dtype],
    )
    return out


def key_row_reference(
    kv: mx.array, weight: mx.array, cos: mx.array, sin: mx.array, eps: float, fp8: bool, packed: bool = False
) -> mx.array:
    row = rope_reference(rms_norm_reference(kv, weight, eps), cos, sin)
    if packed:
        return pack_rows(row, 2 * cos.shape[-1])
    return fp8_except_rotated(row, 2 * cos.shape[-1]) if fp8 else row


def fp8_except_rotated(row: mx.array, rotated: int) -> mx.array:
    """FP8 round trip of all but the last `rotated` dimensions."""
    still, turned = mx.split(row, [row.shape[-1] - rotated], axis=-1)
    return mx.concatenate([fp8_round_trip_reference(still, FP8_BLOCK), turned], axis=-1)
