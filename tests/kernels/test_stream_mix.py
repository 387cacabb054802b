"""stream_mix and stream_head_mix against section 3 of the specification, step by step."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from support import FLOATS, expect_match, expect_refused, generator, normal, run, sizes, wide

from metal_kernels import stream_head_mix, stream_mix

NORM_EPS, HC_EPS, ITERATIONS = 1e-6, 1e-6, 20
SHAPES = sizes("T N D", (1, 4, 67), (5, 4, 67), (3, 3, 20), (7, 5, 33), (2, 4, 300))


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def projected(f: np.ndarray, fn: np.ndarray, norm_eps: float) -> np.ndarray:
    return fn @ f / np.sqrt((f * f).mean() + norm_eps)


def sinkhorn(C: np.ndarray, hc_eps: float, iterations: int) -> np.ndarray:
    """C[j, k]: rows are j, columns are k."""
    C = np.exp(C - C.max(axis=1, keepdims=True))
    C = C / C.sum(axis=1, keepdims=True) + hc_eps
    C = C / (C.sum(axis=0, keepdims=True) + hc_eps)
    for _ in range(iterations - 1):
        C = C / (C.sum(axis=1, keepdims=True) + hc_eps)
        C = C / (C.sum(axis=0, keepdims=True) + hc_eps)
    return C


def mix_expected(x, fn, base, scale, norm_eps, hc_eps, iterations):  # type: ignore[no-untyped-def]
    """Token by token."""
    X, W, b, s = wide(x), wide(fn), wide(base), wide(scale)
    N = X.shape[-2]
    flat = X.reshape(-1, N, X.shape[-1])
    pre, post, comb = np.zeros((len(flat), N)), np.zeros((len(flat), N)), np.zeros((len(flat), N, N))
    for t, streams in enumerate(flat):
        m = projected(np.concatenate(list(streams)), W, norm_eps)
        for n in range(N):
            pre[t, n] = sigmoid(m[n] * s[0] + b[n]) + hc_eps
            post[t, n] = 2 * sigmoid(m[N + n] * s[1] + b[N + n])
        C = np.array([[m[2 * N + N * j + k] * s[2] + b[2 * N + N * j + k] for k in range(N)] for j in range(N)])
        comb[t] = sinkhorn(C, hc_eps, iterations)
    lead = X.shape[:-2]
    return pre.reshape(*lead, N), post.reshape(*lead, N), comb.reshape(*lead, N, N)


def weights(N: int, D: int) -> tuple[mx.array, mx.array, mx.array]:
    """fn, base and scale; the projection of normalised streams is about 1 in size."""
    return normal((2 + N) * N, N * D, scale=(N * D) ** -0.5), normal((2 + N) * N), mx.array([0.7, -1.3, 1.9])


@FLOATS
@SHAPES
def test_stream_mix(T: int, N: int, D: int, dtype: mx.Dtype) -> None:
    x = normal(T, N, D, dtype=dtype)
    args = (*weights(N, D), NORM_EPS, HC_EPS, ITERATIONS)
    for found, expected in zip(run(stream_mix, x, *args), mix_expected(x, *args), strict=True):
        expect_match(found, expected, mx.float32)


def test_any_leading_shape() -> None:
    x, args = normal(2, 3, 4, 67), (*weights(4, 67), NORM_EPS, HC_EPS, ITERATIONS)
    for found, expected in zip(run(stream_mix, x, *args), mix_expected(x, *args), strict=True):
        expect_match(found, expected, mx.float32)


def slow_weights(N: int, D: int) -> tuple[mx.array, mx.array, mx.array]:
    """Mixing weights of which row sums and column sums agree only after hundreds of iterations.

    What lies below the diagonal is next to nothing, so the matrix has no scaling with equal sums, and each iteration
    moves about as much as one part in the square of its number.
    """
    fn, base, scale = weights(N, D)
    comb = np.where(np.tri(N, k=-1) > 0, -30.0, 0.0) + 0.1 * generator().standard_normal((N, N))
    return fn * 0.01, mx.concatenate([base[: 2 * N], mx.array(comb.ravel().astype(np.float32))]), scale


@pytest.mark.parametrize("iterations", [1, 2, 3, 19, 20, 21])
def test_number_of_sinkhorn_iterations_counts(iterations: int) -> None:
    x, arrays = normal(3, 4, 67), slow_weights(4, 67)
    by_number = {n: mix_expected(x, *arrays, NORM_EPS, HC_EPS, n)[2] for n in range(1, 23)}
    for other in {max(iterations - 1, 1), iterations + 1} - {iterations}:
        change = np.abs(by_number[other] - by_number[iterations]).max()
        assert change > 1e-3, f"these weights cannot tell {iterations} iterations from {other}: {change:.1e}"
    _, _, comb = run(stream_mix, x, *arrays, NORM_EPS, HC_EPS, iterations)
    expect_match(comb, by_number[iterations], mx.float32)


def test_ends_with_columns() -> None:
    """Sums over the source are 1; sums over the destination are not."""
    _, _, comb = run(stream_mix, normal(3, 4, 67), *slow_weights(4, 67), NORM_EPS, HC_EPS, 20)
    np.testing.assert_allclose(wide(comb).sum(axis=1), 1, atol=2e-6)
    assert np.abs(wide(comb).sum(axis=2) - 1).max() > 0.01


def test_first_index_of_comb_is_the_source() -> None:
    """base[2N + N * j + k] belongs to comb[j, k]: the softmax is over the destinations k of one source j."""
    N, D = 4, 5
    base = np.zeros((2 + N) * N)
    base[2 * N + N * 1 + 3] = 3.0
    _, _, comb = run(
        stream_mix, normal(1, N, D), mx.zeros(((2 + N) * N, N * D)), mx.array(base.astype(np.float32)), mx.ones(3),
        NORM_EPS, HC_EPS, 1,
    )  # fmt: skip
    C = wide(comb)[0]
    softmax = np.full((N, N), 1 / N)
    softmax[1] = np.exp([0, 0, 0, 3]) / np.exp([0, 0, 0, 3]).sum()
    np.testing.assert_allclose(C, softmax / softmax.sum(axis=0), rtol=1e-4)
    assert C[1, 3] > C[3, 1] + 0.2


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_every_eps_is_in_its_place(iterations: int) -> None:
    """With large ones: in pre but not in post, on every element after the softmax, and in every denominator."""
    x, args = normal(3, 4, 67, scale=0.5), (*weights(4, 67), 0.3, 0.05, iterations)
    for found, expected in zip(run(stream_mix, x, *args), mix_expected(x, *args), strict=True):
        expect_match(found, expected, mx.float32)


def test_one_statistic_over_all_streams() -> None:
    x, args = normal(5, 4, 67) * mx.array([[1e-3], [1.0], [30.0], [0.1]]), (*weights(4, 67), NORM_EPS, HC_EPS, 20)
    for found, expected in zip(run(stream_mix, x, *args), mix_expected(x, *args), strict=True):
        expect_match(found, expected, mx.float32)


def test_extreme_logits_give_finite_weights() -> None:
    fn, base, scale = weights(4, 67)
    args = (fn, base * 200, scale, NORM_EPS, HC_EPS, 20)
    x = normal(5, 4, 67)
    with np.errstate(over="ignore"):
        expected = mix_expected(x, *args)
    for found, want in zip(run(stream_mix, x, *args), expected, strict=True):
        assert np.isfinite(want).all()
        # float32 cannot hold weights of e^-100 beside others; what it can hold must be right.
        np.testing.assert_allclose(wide(found), want, rtol=2e-3, atol=1e-6)


def test_a_token_alone_equals_the_token_of_a_batch() -> None:
    x, args = normal(3, 4, 67, dtype=mx.bfloat16), (*weights(4, 67), NORM_EPS, HC_EPS, 20)
    together = stream_mix(x, *args)
    for t in range(3):
        for found, expected in zip(stream_mix(x[t : t + 1], *args), together, strict=True):
            expect_match(found, wide(expected)[t : t + 1], mx.float32)


def test_refuses_other_shapes() -> None:
    x, (fn, base, scale), rest = normal(5, 4, 67), weights(4, 67), (NORM_EPS, HC_EPS, 20)
    expect_refused("fn", stream_mix, x, fn[:-1], base, scale, *rest)
    expect_refused("fn", stream_mix, x, fn[:, :-1], base, scale, *rest)
    expect_refused("base", stream_mix, x, fn, base[:-1], scale, *rest)
    expect_refused("scale", stream_mix, x, fn, base, scale[:1], *rest)


# --- before the head --------------------------------------------------------------------------------


def head_expected(x, fn, base, scale, norm_eps, hc_eps):  # type: ignore[no-untyped-def]
    X, W, b, s = wide(x), wide(fn), wide(base), wide(scale)
    rows = [sigmoid(projected(np.concatenate(list(v)), W, norm_eps) * s[0] + b) + hc_eps for v in X]
    return np.array(rows)


def head_weights(N: int, D: int) -> tuple[mx.array, mx.array, mx.array]:
    return normal(N, N * D, scale=(N * D) ** -0.5), normal(N), mx.array([1.7])


@FLOATS
@SHAPES
def test_stream_head_mix(T: int, N: int, D: int, dtype: mx.Dtype) -> None:
    x, args = normal(T, N, D, dtype=dtype), (*head_weights(N, D), NORM_EPS, HC_EPS)
    expect_match(run(stream_head_mix, x, *args), head_expected(x, *args), mx.float32)


def test_head_eps_are_in_their_places() -> None:
    x, args = normal(3, 4, 67, scale=0.5), (*head_weights(4, 67), 0.3, 0.05)
    expect_match(run(stream_head_mix, x, *args), head_expected(x, *args), mx.float32)


def test_head_refuses_other_shapes() -> None:
    x, (fn, base, scale) = normal(5, 4, 67), head_weights(4, 67)
    expect_refused("fn", stream_head_mix, x, fn[:3], base, scale, NORM_EPS, HC_EPS)
    expect_refused("base", stream_head_mix, x, fn, base[:3], scale, NORM_EPS, HC_EPS)
    expect_refused("scale", stream_head_mix, x, fn, base, mx.ones(3), NORM_EPS, HC_EPS)
