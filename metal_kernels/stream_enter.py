"""Residual streams -> the normalised input of a sublayer or of the head, with the weights that make it."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import expect_shape, kernel, scalar, use_kernel, without_kernel
from .stream_collapse import stream_collapse_reference
from .stream_mix import stream_head_mix_reference, stream_mix_reference

# A threadgroup of the projection owns so many columns of fn, each of its simdgroups so many of its rows. At N = 4 the
# 24 rows and the sum of squares are five simdgroups, and 128 threadgroups share the columns.
COLUMNS = 128
ROWS = 5
# Tokens that a threadgroup takes at once, if there is more than one.
TILE = 4
# The matrix that mixes the streams is one element per lane.
MAX_STREAMS = 5
# One group per token, so its threads are all that hide the latency of its reads; half the limit leaves registers.
THREADS = 512


def stream_enter(
    x: mx.array, fn: mx.array, base: mx.array, scale: mx.array, weight: mx.array, norm_eps: float, hc_eps: float,
    iterations: int,
) -> tuple[mx.array, mx.array, mx.array]:  # fmt: skip
    """stream_collapse with the weights of stream_mix (spec 3.1 and 2).

    Args:
        x: residual streams, [..., N, D], any float type.
        fn: [(2 + N) * N, N * D], float32; base: [(2 + N) * N]; scale: [3].
        weight: of the norm, [D].
        norm_eps: of the statistic of the streams, and of the norm.
        iterations: Sinkhorn iterations; the first one is the softmax and a column step.

    Returns:
        Input of the sublayer [..., D] in the type of x; post [..., N] and comb [..., N, N] with comb[source,
        destination], float32.
    """
    N, D = x.shape[-2:]
    M = (2 + N) * N
    for name, array, shape in (("fn", fn, (M, N * D)), ("base", base, (M,)), ("scale", scale, (3,))):
        expect_shape("stream_enter", name, array, shape)
    expect_shape("stream_enter", "weight", weight, (D,))
    covers, limit = N <= MAX_STREAMS and iterations >= 1, f"at most {MAX_STREAMS} streams and at least 1 iteration"
    if not use_kernel("stream_enter", covers=covers, limit=limit):
        return without_kernel(stream_enter_reference, x, fn, base, scale, weight, norm_eps, hc_eps, iterations)
    lead, partial, threads = x.shape[:-2], _partial_products(x, fn), _threads(D)
    inputs = ("partial", "base", "scale", "x", "weight", "norm_eps", "hc_eps")
    y, post, comb = kernel("stream_enter", inputs, ("y", "post", "comb"), header="stream_row")(
        inputs=[partial, base, scale, x, weight, scalar(norm_eps), scalar(hc_eps)],
        template=[
            ("Elem", x.dtype), ("N", N), ("D", D), ("M", M), ("SLICES", partial.shape[-1]), ("THREADS", threads),
            ("ITERATIONS", iterations),
        ],
        grid=(threads, partial.shape[0], 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(*lead, D), (*lead, N), (*lead, N, N)],
        output_dtypes=[x.dtype, mx.float32, mx.float32],
    )  # fmt: skip
    return y, post, comb


def stream_enter_reference(
    x: mx.array, fn: mx.array, base: mx.array, scale: mx.array, weight: mx.array, norm_eps: float, hc_eps: float,
    iterations: int,
) -> tuple[mx.array, mx.array, mx.array]:  # fmt: skip
    pre, post, comb = stream_mix_reference(x, fn, base, scale, norm_eps, hc_eps, iterations)
    return stream_collapse_reference(x, pre, weight, norm_eps), post, comb


def stream_head(
    x: mx.array, fn: mx.array, base: mx.array, scale: mx.array, weight: mx.array, norm_eps: float, hc_eps: float
) -> mx.array:
    """stream_collapse with the weights of stream_head_mix: the last one, before the head (spec 3.3).

    Args:
        x: residual streams, [..., N, D], any float type.
        fn: [N, N * D], float32; base: [N]; scale: [1].
        weight: of the norm, [D].
        norm_eps: of the statistic of the streams, and of the norm.

    Returns:
        [..., D] in the type of x.
    """
    N, D = x.shape[-2:]
    for name, array, shape in (("fn", fn, (N, N * D)), ("base", base, (N,)), ("scale", scale, (1,))):
        expect_shape("stream_head", name, array, shape)
    expect_shape("stream_head", "weight", weight, (D,))
    if not use_kernel("stream_head", covers=N <= MAX_STREAMS, limit=f"at most {MAX_STREAMS} streams"):
        return without_kernel(stream_head_reference, x, fn, base, scale, weight, norm_eps, hc_eps)
    partial, threads = _partial_products(x, fn), _threads(D)
    inputs = ("partial", "base", "scale", "x", "weight", "norm_eps", "hc_eps")
    (y,) = kernel("stream_head", inputs, ("y",), header="stream_row")(
        inputs=[partial, base, scale, x, weight, scalar(norm_eps), scalar(hc_eps)],
        template=[("Elem", x.dtype), ("N", N), ("D", D), ("SLICES", partial.shape[-1]), ("THREADS", threads)],
        grid=(threads, partial.shape[0], 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(*x.shape[:-2], D)],
        output_dtypes=[x.dtype],
    )
    return y


def stream_head_reference(
    x: mx.array, fn: mx.array, base: mx.array, scale: mx.array, weight: mx.array, norm_eps: float, hc_eps: float
) -> mx.array:
    pre = stream_head_mix_reference(x, fn, base, scale, norm_eps, hc_eps)
    return stream_collapse_reference(x, pre, weight, norm_eps)


def _partial_products(x: mx.array, fn: mx.array) -> mx.array:
    """fn times the streams, and the streams' squares, summed over slices of the columns: [T, M + 1, slices]."""
    M, K = fn.shape
    T, slices, threads = x.size // K, -(-K // COLUMNS), 32 * -(-(M + 1) // ROWS)
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


def _threads(D: int) -> int:
    """Of a threadgroup that collapses a token: one for each element, in whole simdgroups, up to THREADS."""
    return min(THREADS, -(-D // 32) * 32)
