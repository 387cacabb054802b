"""Residual streams -> the normalised input of a sublayer."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import expect_shape, kernel, scalar, use_kernel
from .rms_norm import rms_norm_reference

# One group per token, so its threads are all that hide the latency of its reads; half the limit leaves registers.
THREADS = 512


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
    if not use_kernel("stream_collapse"):
        return stream_collapse_reference(x, pre, weight, eps)
    N, D = x.shape[-2:]
    threads = min(THREADS, -(-D // 32) * 32)
    (y,) = kernel("stream_collapse", ("x", "pre", "weight", "eps"), ("y",))(
        inputs=[x, pre, weight, scalar(eps)],
        template=[("Elem", x.dtype), ("N", N), ("D", D), ("THREADS", threads)],
        grid=(threads, x.size // (N * D), 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(*x.shape[:-2], D)],
        output_dtypes=[x.dtype],
    )
    return y


def stream_collapse_reference(x: mx.array, pre: mx.array, weight: mx.array, eps: float) -> mx.array:
    y = (x.astype(mx.float32) * pre[..., None]).sum(axis=-2).astype(x.dtype)
    return rms_norm_reference(y, weight, eps)
