"""The result of a sublayer -> new residual streams."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import expect_shape, kernel, use_kernel, without_kernel

THREADS = 256


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
    if not use_kernel("stream_expand"):
        return without_kernel(stream_expand_reference, x, y, post, comb)
    threads = min(THREADS, -(-D // 32) * 32)
    (out,) = kernel("stream_expand", ("x", "y", "post", "comb"), ("out",))(
        inputs=[x, y, post, comb],
        template=[("Elem", x.dtype), ("N", N), ("D", D)],
        grid=(-(-D // threads) * threads, x.size // (N * D), 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )
    return out


def stream_expand_reference(x: mx.array, y: mx.array, post: mx.array, comb: mx.array) -> mx.array:
    mixed = comb.swapaxes(-1, -2) @ x.astype(mx.float32)
    return (mixed + post[..., None] * y.astype(mx.float32)[..., None, :]).astype(x.dtype)
