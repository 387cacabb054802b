"""Mixing weights of the residual streams: manifold-constrained hyper-connections (spec 3)."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import expect_shape


def stream_mix(
    x: mx.array, fn: mx.array, base: mx.array, scale: mx.array, norm_eps: float, hc_eps: float, iterations: int
) -> tuple[mx.array, mx.array, mx.array]:
    """How a sublayer collapses the streams, and how its result is expanded into them.

    Args:
        x: residual streams, [..., N, D], any float type.
        fn: [(2 + N) * N, N * D], float32; base: [(2 + N) * N]; scale: [3].
        iterations: Sinkhorn iterations; the first one is the softmax and a column step.

    Returns:
        pre [..., N], post [..., N], comb [..., N, N] with comb[source, destination], all float32.
    """
    N, D = x.shape[-2:]
    expect_shape("stream_mix", "fn", fn, ((2 + N) * N, N * D))
    expect_shape("stream_mix", "base", base, ((2 + N) * N,))
    expect_shape("stream_mix", "scale", scale, (3,))
    return stream_mix_reference(x, fn, base, scale, norm_eps, hc_eps, iterations)


def stream_mix_reference(
    x: mx.array, fn: mx.array, base: mx.array, scale: mx.array, norm_eps: float, hc_eps: float, iterations: int
) -> tuple[mx.array, mx.array, mx.array]:
    N = x.shape[-2]
    m = _project(x, fn, norm_eps)
    pre = mx.sigmoid(m[..., :N] * scale[0] + base[:N]) + hc_eps
    post = 2 * mx.sigmoid(m[..., N : 2 * N] * scale[1] + base[N : 2 * N])
    comb = (m[..., 2 * N :] * scale[2] + base[2 * N :]).reshape(*m.shape[:-1], N, N)
    comb = mx.softmax(comb, axis=-1) + hc_eps
    comb = comb / (comb.sum(axis=-2, keepdims=True) + hc_eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(axis=-1, keepdims=True) + hc_eps)
        comb = comb / (comb.sum(axis=-2, keepdims=True) + hc_eps)
    return pre, post, comb


def stream_head_mix(
    x: mx.array, fn: mx.array, base: mx.array, scale: mx.array, norm_eps: float, hc_eps: float
) -> mx.array:
    """Weights of the last collapse, before the head (spec 3.3).

    Args:
        x: residual streams, [..., N, D], any float type.
        fn: [N, N * D], float32; base: [N]; scale: [1].

    Returns:
        pre [..., N], float32.
    """
    N, D = x.shape[-2:]
    expect_shape("stream_head_mix", "fn", fn, (N, N * D))
    expect_shape("stream_head_mix", "base", base, (N,))
    expect_shape("stream_head_mix", "scale", scale, (1,))
    return stream_head_mix_reference(x, fn, base, scale, norm_eps, hc_eps)


def stream_head_mix_reference(
    x: mx.array, fn: mx.array, base: mx.array, scale: mx.array, norm_eps: float, hc_eps: float
) -> mx.array:
    return mx.sigmoid(_project(x, fn, norm_eps) * scale + base) + hc_eps


def _project(x: mx.array, fn: mx.array, norm_eps: float) -> mx.array:
    f = x.astype(mx.float32).flatten(-2)  # stream-major: index n * D + d
    return (f @ fn.T) * mx.rsqrt(f.square().mean(axis=-1, keepdims=True) + norm_eps)
