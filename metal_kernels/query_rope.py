"""Attention queries: norm per head, then rotation."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import expect_rotation, kernel, scalar, use_kernel, without_kernel
from .rms_norm import rms_norm_reference
from .rope import rope_reference


def query_rope(q: mx.array, cos: mx.array, sin: mx.array, eps: float) -> mx.array:
    """rope(q / sqrt(mean(q^2) + eps)) for each head, norm without weight (spec 4.1).

    Args:
        q: [B, T, H, K], any float type.
        cos, sin: [T, P/2], float32.

    Returns:
        [B, T, H, K] in the type of q.
    """
    expect_rotation("query_rope", cos, sin, q.shape[1], q.shape[-1])
    K = q.shape[-1]
    if not use_kernel("query_rope", covers=K % 2 == 0, limit="an even number of dimensions"):
        return without_kernel(query_rope_reference, q, cos, sin, eps)
    (out,) = kernel("query_rope", ("q", "cosines", "sines", "eps"), ("out",), header="row")(
        inputs=[q, cos, sin, scalar(eps)],
        template=[("Elem", q.dtype), ("H", q.shape[2]), ("K", K), ("P", 2 * cos.shape[-1])],
        grid=(32, q.size // K, 1),
        threadgroup=(32, 8, 1),
        output_shapes=[q.shape],
        output_dtypes=[q.dtype],
    )
    return out


def query_rope_reference(q: mx.array, cos: mx.array, sin: mx.array, eps: float) -> mx.array:
    return rope_reference(rms_norm_reference(q, None, eps), cos, sin)
