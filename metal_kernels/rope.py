"""Rotary embedding of the last dimensions, interleaved pairs."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import expect_rotation


def rope(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Rotate the last P of K dimensions: (a, b) -> (a cos - b sin, a sin + b cos) (spec 4.2).

    Pair i is made of dimensions 2i and 2i+1 of the rotated slice. Pass -sin to rotate back.

    Args:
        x: [B, T, H, K] or [B, T, K], any float type.
        cos, sin: [T, P/2], float32.

    Returns:
        The shape and type of x; the product is taken in float32.
    """
    expect_rotation("rope", cos, sin, x.shape[1], x.shape[-1])
    return rope_reference(x, cos, sin)


def rope_reference(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    still, turned = mx.split(x, [x.shape[-1] - 2 * cos.shape[-1]], axis=-1)
    if x.ndim == 4:
        cos, sin = cos[:, None], sin[:, None]
    pairs = turned.astype(mx.float32).reshape(*turned.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    turned = mx.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(turned.shape)
    return mx.concatenate([still, turned.astype(x.dtype)], axis=-1)
