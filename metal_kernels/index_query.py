"""Queries of the indexer."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import expect_rotation
from .rope import rope_reference
from .round_trip import hadamard_fp4


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
    return index_query_reference(q, cos, sin, fp4)


def index_query_reference(q: mx.array, cos: mx.array, sin: mx.array, fp4: bool) -> mx.array:
    q = rope_reference(q, cos, sin)
    return hadamard_fp4(q) if fp4 else q
