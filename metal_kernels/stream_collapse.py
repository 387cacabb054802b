"""Residual streams -> the normalised input of a sublayer."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import expect_shape
from .rms_norm import rms_norm


def stream_collapse(x: mx.array, pre: mx.array, weight: mx.array, eps: float) -> mx.array:
    """rmsnorm(sum over n of pre[n] * x[n]) (spec 3.1 and 2).

    Args:
        x: residual streams, [..., N, D], any float type.
        pre: [..., N], float32.
        weight: of the norm, [D].

    Returns:
        [..., D] in the type of x. The sum is taken in float32 and rounded before the norm.
    """
    expect_shape("stream_collapse", "pre", pre, x.shape[:-1])
    expect_shape("stream_collapse", "weight", weight, x.shape[-1:])
    return stream_collapse_reference(x, pre, weight, eps)


def stream_collapse_reference(x: mx.array, pre: mx.array, weight: mx.array, eps: float) -> mx.array:
    y = (x.astype(mx.float32) * pre[..., None]).sum(axis=-2).astype(x.dtype)
    return rms_norm(y, weight, eps)
