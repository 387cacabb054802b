"""Queries of the indexer."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import expect_blocks, expect_rotation, kernel, use_kernel, without_kernel
from .rope import rope_reference
from .round_trip import FP4_BLOCK, hadamard_fp4


def index_query(q: mx.array, cos: mx.array, sin: mx.array, fp4: bool) -> mx.array:
    """Rotation, then Hadamard transform and FP4 round trip; no norm (spec 6.1).

    Args:
        q: [B, T, I, J], any float type.
        cos, sin: [T, P/2], float32.
        fp4: without it the Hadamard transform is left out as well: it cancels in the scores.

    Returns:
        [B, T, I, J] in the type of q.
    """
    expect_rotation("index_query", cos, sin, q.shape[1], q.shape[-1])
    J = q.shape[-1]
    if fp4:
        expect_blocks("index_query", "q", J, FP4_BLOCK)
    covers = J.bit_count() == 1 if fp4 else J % 2 == 0
    limit = f"a number of dimensions that is {'a power of two' if fp4 else 'even'}"
    if not use_kernel("index_query", covers=covers, limit=limit):
        return without_kernel(index_query_reference, q, cos, sin, fp4)
    (out,) = kernel("index_query", ("q", "cosines", "sines"), ("out",), header="row rounding hadamard")(
        inputs=[q, cos, sin],
        template=[("Elem", q.dtype), ("H", q.shape[2]), ("K", J), ("P", 2 * cos.shape[-1]), ("FP4", fp4)],
        grid=(32, q.size // J, 1),
        threadgroup=(32, 8, 1),
        output_shapes=[q.shape],
        output_dtypes=[q.dtype],
    )
    return out


def index_query_reference(q: mx.array, cos: mx.array, sin: mx.array, fp4: bool) -> mx.array:
    q = rope_reference(q, cos, sin)
    return hadamard_fp4(q) if fp4 else q
