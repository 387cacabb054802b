"""What the two narrow projections of a token become: the latent of its queries, and its row of the window."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import expect_blocks, expect_rotation, expect_shape, kernel, scalar, use_kernel, without_kernel
from .packed_rows import expect_packable, pack_rows, row_bytes
from .rms_norm import rms_norm
from .rope import rope_reference
from .round_trip import FP8_BLOCK, fp8_round_trip_reference

# Values of a latent that a lane can hold in registers: 128 of them.
MAX_LATENT = 4096
_LIMIT = f"an even number of dimensions, and latents of up to {MAX_LATENT}"


def latents(
    q: mx.array, kv: mx.array, q_weight: mx.array, kv_weight: mx.array, cos: mx.array, sin: mx.array, eps: float,
    fp8: bool, packed: bool = False,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """rmsnorm of both; of the row also the rotation of its last P dimensions and the rounding of the others (spec 4.1).

    Args:
        q: projected to the latent, [B, T, Q]; kv: to the row that is key and value in one, [B, T, K]; any float type.
        q_weight, kv_weight: of the norms, [Q] and [K].
        cos, sin: [T, P/2], float32.
        fp8: round the K - P dimensions that are not rotated to e4m3 in blocks of 64.
        packed: hand the row out as bytes; kv must be bfloat16, and fp8 set.

    Returns:
        The latent, [B, T, Q], and the row, [B, T, K], in the type of q; packed [B, T, row_bytes(K, P)], uint8.
    """
    Q, K, P = q.shape[-1], kv.shape[-1], 2 * cos.shape[-1]
    expect_shape("latents", "kv", kv, (*q.shape[:-1], K))
    expect_shape("latents", "q_weight", q_weight, (Q,))
    expect_shape("latents", "kv_weight", kv_weight, (K,))
    expect_rotation("latents", cos, sin, q.shape[1], K)
    if fp8:
        expect_blocks("latents", "kv", K - P, FP8_BLOCK)
    if packed:
        expect_packable("latents", "kv", kv.dtype, fp8)
    covers = K % 2 == 0 and Q % 2 == 0 and Q <= MAX_LATENT and q.dtype == kv.dtype
    if not use_kernel("latents", covers=covers, limit=_LIMIT):
        return without_kernel(latents_reference, q, kv, q_weight, kv_weight, cos, sin, eps, fp8, packed)
    size = row_bytes(K, P) if packed else 0
    inputs = ("q", "kv", "q_weight", "kv_weight", "cosines", "sines", "eps")
    latent, row = kernel("latents", inputs, ("latent", "out"), header="row rounding pack")(
        inputs=[q, kv, q_weight, kv_weight, cos, sin, scalar(eps)],
        template=[("Elem", kv.dtype), ("Q", Q), ("K", K), ("P", P), ("FP8", fp8), ("BYTES", size)],
        grid=(32, 2 * (kv.size // K), 1),
        threadgroup=(32, 2, 1),
        output_shapes=[q.shape, (*kv.shape[:-1], size or K)],
        output_dtypes=[q.dtype, mx.uint8 if packed else kv.dtype],
    )
    return latent, row


def latents_reference(
    q: mx.array, kv: mx.array, q_weight: mx.array, kv_weight: mx.array, cos: mx.array, sin: mx.array, eps: float,
    fp8: bool, packed: bool = False,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    row = rope_reference(rms_norm(kv, kv_weight, eps), cos, sin)
    if packed:
        row = pack_rows(row, 2 * cos.shape[-1])
    elif fp8:
        row = fp8_except_rotated(row, 2 * cos.shape[-1])
    return rms_norm(q, q_weight, eps), row


def fp8_except_rotated(row: mx.array, rotated: int) -> mx.array:
    """FP8 round trip of all but the last `rotated` dimensions."""
    still, turned = mx.split(row, [row.shape[-1] - rotated], axis=-1)
    return mx.concatenate([fp8_round_trip_reference(still, FP8_BLOCK), turned], axis=-1)
