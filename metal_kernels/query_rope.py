"""Attention queries: norm per head, then rotation."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import expect_rotation
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
    return query_rope_reference(q, cos, sin, eps)


def query_rope_reference(q: mx.array, cos: mx.array, sin: mx.array, eps: float) -> mx.array:
    return rope_reference(rms_norm_reference(q, None, eps), cos, sin)
