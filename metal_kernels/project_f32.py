"""A matrix product whose result stays in float32."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import expect_shape

# Rows of the weight widened at a time: the head has 129,280, and its float32 copy would take 2 GB.
_ROWS = 16384


def project_f32(x: mx.array, weight: mx.array) -> mx.array:
    """x @ weight.T with both sides widened to float32 (head, router, compressor; spec 2).

    Args:
        x: [..., K]; weight: [M, K]; any float types.

    Returns:
        [..., M], float32.
    """
    expect_shape("project_f32", "weight", weight, (weight.shape[0], x.shape[-1]))
    return project_f32_reference(x, weight)


def project_f32_reference(x: mx.array, weight: mx.array) -> mx.array:
    x = x.astype(mx.float32)
    parts = [weight[i : i + _ROWS] for i in range(0, weight.shape[0], _ROWS)]
    y = [x @ part.astype(mx.float32).T for part in parts]
    return y[0] if len(y) == 1 else mx.concatenate(y, axis=-1)
