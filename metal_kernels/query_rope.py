"""Attention queries: norm per head, then rotation."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import expect_shape
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
    expect_shape("query_rope", "cos", cos, (q.shape[1], cos.shape[-1]))
    expect_shape("query_rope", "sin", sin, cos.shape)
    return query_rope_reference(q, cos, sin, eps)


def query_rope_reference(q: mx.array, cos: mx.array, sin: mx.array, eps: float) -> mx.array:
    return rope_reference(rms_norm_reference(q, None, eps), cos, sin)
