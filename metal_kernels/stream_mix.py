"""Mixing weights of the residual streams: manifold-constrained hyper-connections (spec 3)."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import expect_shape, kernel, scalar, use_kernel

# A threadgroup of the projection owns so many columns of fn, each of its simdgroups so many of its rows. At N = 4 the
# 24 rows and the sum of squares are five simdgroups, and 128 threadgroups share the columns.
COLUMNS = 128
ROWS = 5
# Tokens that a threadgroup takes at once, if there is more than one.
TILE = 4
# The matrix that mixes the streams is one element per lane.
MAX_STREAMS = 5


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
    if not use_kernel(
        "stream_mix",
        covers=N <= MAX_STREAMS and iterations >= 1,
        limit=f"at most {MAX_STREAMS} streams and at least 1 iteration",
    ):
        return stream_mix_reference(x, fn, base, scale, norm_eps, hc_eps, iterations)
    T, lead = x.size // (N * D), x.shape[:-2]
    partial = _partial_products(x, fn)
    threads = _threads(fn.shape[0])
    inputs = ("partial", "base", "scale", "norm_eps", "hc_eps")
    pre, post, comb = kernel("stream_mix", inputs, ("pre", "post", "comb"))(
        inputs=[partial, base, scale, scalar(norm_eps), scalar(hc_eps)],
        template=[
            ("N", N), ("M", fn.shape[0]), ("K", N * D), ("SLICES", partial.shape[-1]), ("ROWS", ROWS),
            ("ITERATIONS", iterations),
        ],
        grid=(threads, T, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(*lead, N), (*lead, N), (*lead, N, N)],
        output_dtypes=[mx.float32] * 3,
    )  # fmt: skip
    return pre, post, comb


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
    limit = f"at most {MAX_STREAMS} streams"
    if not use_kernel("stream_head_mix", covers=N <= MAX_STREAMS, limit=limit):
        return stream_head_mix_reference(x, fn, base, scale, norm_eps, hc_eps)
    partial = _partial_products(x, fn)
    inputs = ("partial", "base", "scale", "norm_eps", "hc_eps")
    (pre,) = kernel("stream_head_mix", inputs, ("pre",))(
        inputs=[partial, base, scale, scalar(norm_eps), scalar(hc_eps)],
        template=[("N", N), ("K", N * D), ("SLICES", partial.shape[-1])],
        grid=(32, x.size // (N * D), 1),
        threadgroup=(32, 1, 1),
        output_shapes=[x.shape[:-1]],
        output_dtypes=[mx.float32],
    )
    return pre


def stream_head_mix_reference(
    x: mx.array, fn: mx.array, base: mx.array, scale: mx.array, norm_eps: float, hc_eps: float
) -> mx.array:
    return mx.sigmoid(_project(x, fn, norm_eps) * scale + base) + hc_eps


def _project(x: mx.array, fn: mx.array, norm_eps: float) -> mx.array:
    f = x.astype(mx.float32).flatten(-2)  # stream-major: index n * D + d
    return (f @ fn.T) * mx.rsqrt(f.square().mean(axis=-1, keepdims=True) + norm_eps)


def _partial_products(x: mx.array, fn: mx.array) -> mx.array:
    """fn times the streams, and the streams' squares, summed over slices of the columns: [T, M + 1, slices]."""
    M, K = fn.shape
    T, slices, threads = x.size // K, -(-K // COLUMNS), _threads(M)
    tokens = 1 if T == 1 else TILE
    (partial,) = kernel("stream_project", ("x", "fn"), ("partial",))(
        inputs=[x.reshape(T, K), fn],
        template=[("TOKENS", tokens), ("M", M), ("K", K), ("COLUMNS", COLUMNS), ("ROWS", ROWS)],
        grid=(threads, slices, -(-T // tokens)),
        threadgroup=(threads, 1, 1),
        output_shapes=[(T, M + 1, slices)],
        output_dtypes=[mx.float32],
    )
    return partial


def _threads(M: int) -> int:
    """A simdgroup for every ROWS of the M rows of fn and the row of squares."""
    return 32 * -(-(M + 1) // ROWS)
