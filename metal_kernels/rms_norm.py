"""Root-mean-square norm."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import expect_shape, kernel, scalar, use_kernel

# Of the kernel: one group per row, so its threads are all that hide the latency of its reads.
THREADS = 512


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (spec 2).

    Args:
        x: [..., D], any float type.
        weight: [D], used as it is (no "1 + w"); None for a norm without weight.

    Returns:
        [..., D] in the type of x; float32 inside, one rounding at the end.
    """
    if weight is not None:
        expect_shape("rms_norm", "weight", weight, (x.shape[-1],))
    if not use_kernel("rms_norm"):
        return rms_norm_reference(x, weight, eps)
    D = x.shape[-1]
    threads = min(THREADS, -(-D // 32) * 32)
    (y,) = kernel("rms_norm", ("x", "weight", "eps"), ("y",))(
        # Without a weight any array takes its place: it is not read.
        inputs=[x, scalar(1.0) if weight is None else weight, scalar(eps)],
        template=[("Elem", x.dtype), ("D", D), ("THREADS", threads), ("WEIGHTED", weight is not None)],
        grid=(threads, x.size // D, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )
    return y


def rms_norm_reference(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    # In float32 as a whole: MLX's norm of bfloat16 rounds once more, before the weight.
    w = None if weight is None else weight.astype(mx.float32)
    return mx.fast.rms_norm(x.astype(mx.float32), w, eps).astype(x.dtype)
