"""A matrix product whose result stays in float32."""

from __future__ import annotations

import math

import mlx.core as mx

from ._dispatch import expect_shape, kernel, use_kernel

# Rows of the weight widened at a time: the head has 129,280, and its float32 copy would take 2 GB.
_ROWS = 16384

# The kernel reads the weight once for every TILE tokens, which pays for few of them; MLX's product is for more.
MAX_TOKENS = 16
TILE = 4
# Rows of the weight for each simdgroup, and the simdgroups of a threadgroup.
ROWS = 4
SIMDGROUPS = 8
# From this many rows on there are simdgroups enough without sharing the columns of a row.
MANY_ROWS = 8192


def project_f32(x: mx.array, weight: mx.array) -> mx.array:
    """x @ weight.T with both sides widened to float32 (head, router, compressor; spec 2).

    Args:
        x: [..., K]; weight: [M, K]; any float types.

    Returns:
        [..., M], float32.
    """
    expect_shape("project_f32", "weight", weight, (weight.shape[0], x.shape[-1]))
    M, K = weight.shape
    T = math.prod(x.shape[:-1])
    covers = 1 <= T <= MAX_TOKENS and K % 8 == 0
    if not use_kernel("project_f32", covers=covers, limit=f"up to {MAX_TOKENS} tokens, columns divisible by 8"):
        return project_f32_reference(x, weight)
    tokens = 1 if T == 1 else TILE
    shares = 1 if M >= MANY_ROWS else SIMDGROUPS
    slots = SIMDGROUPS // shares
    groups = -(-M // (ROWS * slots)) * -(-T // tokens)
    (y,) = kernel("project_f32", ("x", "weight"), ("y",))(
        inputs=[x.reshape(T, K), weight],
        template=[
            ("Elem", x.dtype), ("Weight", weight.dtype), ("M", M), ("K", K), ("ROWS", ROWS), ("TOKENS", tokens),
            ("SHARES", shares), ("SLOTS", slots),
        ],
        grid=(32, shares, slots * groups),
        threadgroup=(32, shares, slots),
        output_shapes=[(*x.shape[:-1], M)],
        output_dtypes=[mx.float32],
    )  # fmt: skip
    return y


def project_f32_reference(x: mx.array, weight: mx.array) -> mx.array:
    x = x.astype(mx.float32)
    parts = [weight[i : i + _ROWS] for i in range(0, weight.shape[0], _ROWS)]
    y = [x @ part.astype(mx.float32).T for part in parts]
    return y[0] if len(y) == 1 else mx.concatenate(y, axis=-1)
