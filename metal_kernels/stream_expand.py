"""The result of a sublayer -> new residual streams."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import expect_shape


def stream_expand(x: mx.array, y: mx.array, post: mx.array, comb: mx.array) -> mx.array:
    """x'[k] = post[k] * y + sum over j of comb[j, k] * x[j] (spec 3.2).

    Args:
        x: residual streams, [..., N, D], any float type.
        y: result of the sublayer, [..., D].
        post: [..., N], float32; comb: [..., N, N], float32, first index is the source stream.

    Returns:
        [..., N, D] in the type of x; float32 inside.
    """
    N, D = x.shape[-2:]
    expect_shape("stream_expand", "y", y, (*x.shape[:-2], D))
    expect_shape("stream_expand", "post", post, x.shape[:-1])
    expect_shape("stream_expand", "comb", comb, (*x.shape[:-2], N, N))
    return stream_expand_reference(x, y, post, comb)


def stream_expand_reference(x: mx.array, y: mx.array, post: mx.array, comb: mx.array) -> mx.array:
    mixed = comb.swapaxes(-1, -2) @ x.astype(mx.float32)
    return (mixed + post[..., None] * y.astype(mx.float32)[..., None, :]).astype(x.dtype)
