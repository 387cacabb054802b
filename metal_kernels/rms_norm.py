"""Root-mean-square norm, a part of other ops."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import expect_shape


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
    # In float32 as a whole: MLX's norm of bfloat16 rounds once more, before the weight.
    w = None if weight is None else weight.astype(mx.float32)
    return mx.fast.rms_norm(x.astype(mx.float32), w, eps).astype(x.dtype)
