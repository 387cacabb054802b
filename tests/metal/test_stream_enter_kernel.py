"""The kernels of stream_enter and stream_head against their references."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import Session, emulate
from support import FLOATS, expect_equal, expect_match, expect_same, generator, norm_expected, normal, run, sizes, wide

from metal_kernels import KernelError, kernels, stream_enter, stream_head
from metal_kernels.stream_enter import THREADS, stream_enter_reference, stream_head_reference
from metal_kernels.stream_mix import stream_head_mix_reference, stream_mix_reference

pytestmark = pytest.mark.usefixtures("emulated")

EPS, ITERATIONS = (1e-6, 1e-6), 20
# One slice of columns and several, a last slice of any length, tiles of tokens that are not full, more rows than
# simdgroups, threads without an element and with several, arrays of fewer than 8 elements.
SHAPES = sizes(
    "T N D", (1, 4, 67), (6, 4, 67), (3, 3, 20), (9, 5, 33), (2, 1, THREADS + 1), (4, 2, 64), (1, 4, 1), (1, 1, 5),
    (1, 1, 1),
)  # fmt: skip
GPU = pytest.mark.parametrize(
    "changes", [{"contract": True}, {"ftz": True}, {"alignment": 4}], ids=["contract", "ftz", "alignment"]
)


def weights(N: int, D: int) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """fn, base, scale and the norm's; the projection of normalised streams is about 1 in size."""
    fn = normal((2 + N) * N, N * D, scale=(N * D) ** -0.5)
    return fn, normal((2 + N) * N), mx.array([0.7, -1.3, 1.9]), normal(D)


def head_weights(N: int, D: int) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    return normal(N, N * D, scale=(N * D) ** -0.5), normal(N), mx.array([1.7]), normal(D)


def slow_weights(N: int, D: int) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Mixing weights that each further iteration moves: what lies below the diagonal is next to nothing."""
    fn, base, scale, weight = weights(N, D)
    comb = np.where(np.tri(N, k=-1) > 0, -30.0, 0.0) + 0.1 * generator().standard_normal((N, N))
    return fn * 0.01, mx.concatenate([base[: 2 * N], mx.array(comb.ravel().astype(np.float32))]), scale, weight


def expect_reference(x: mx.array, *args: Any) -> tuple[mx.array, ...]:
    found: tuple[mx.array, ...] = run(stream_enter, x, *args)
    for one, expected in zip(found, stream_enter_reference(x, *args), strict=True):
        expect_match(one, wide(expected), expected.dtype)
    assert found[0].dtype == x.dtype and found[1].dtype == found[2].dtype == mx.float32
    return found


def launched(session: Session) -> list[tuple[str, int]]:
    """Every launch, with its number of threadgroups, all of them whole."""
    for d in session.dispatches:
        assert all(whole % part == 0 for whole, part in zip(d.grid, d.threadgroup, strict=True))
        assert math.prod(d.threadgroup) <= THREADS and d.threadgroup_bytes <= 192
    return [(d.kernel, math.prod(d.grid) // math.prod(d.threadgroup)) for d in session.dispatches]


@SHAPES
def test_stream_enter(T: int, N: int, D: int) -> None:
    expect_reference(normal(T, N, D), *weights(N, D), *EPS, ITERATIONS)


@FLOATS
@sizes("T N D", (1, 4, 67), (6, 4, 67))
def test_types_of_the_streams(T: int, N: int, D: int, dtype: mx.Dtype) -> None:
    expect_reference(normal(T, N, D, dtype=dtype), *weights(N, D), *EPS, ITERATIONS)


def test_any_leading_shape_and_type_of_weight() -> None:
    x, (*mixing, weight) = normal(2, 3, 4, 67, dtype=mx.bfloat16), weights(4, 67)
    y, post, comb = expect_reference(x, *mixing, weight.astype(mx.bfloat16), *EPS, ITERATIONS)
    assert (y.shape, post.shape, comb.shape) == ((2, 3, 67), (2, 3, 4), (2, 3, 4, 4))


@GPU
def test_as_a_gpu_may_run_it(changes: dict[str, Any]) -> None:
    x, args = normal(6, 4, 67), (*weights(4, 67), *EPS, ITERATIONS)
    with emulate(**changes):
        expect_reference(x, *args)
        head = (*head_weights(4, 67), *EPS)
        expect_match(stream_head(x, *head), wide(stream_head_reference(x, *head)), mx.float32)


@sizes("T", (1,), (6,))
def test_size_of_the_model(T: int) -> None:
    """Every weight is read once for a tile of four tokens, the streams once by each launch.

    Against float64: sums of slices are closer to it than the reference, which adds 16384 products in a row.
    """
    x, (fn, base, scale, weight) = normal(T, 4, 4096, dtype=mx.bfloat16), weights(4, 4096)
    X, W, s, b = wide(x).reshape(T, -1), wide(fn), wide(scale), wide(base)
    m = X @ W.T / np.sqrt(np.square(X).mean(axis=1, keepdims=True) + EPS[0])
    C = (m[:, 8:] * s[2] + b[8:]).reshape(T, 4, 4)
    C = np.exp(C) / np.exp(C).sum(axis=2, keepdims=True) + EPS[1]
    for axis in (1, *(2, 1) * (ITERATIONS - 1)):
        C = C / (C.sum(axis=axis, keepdims=True) + EPS[1])
    gates = 1 / (1 + np.exp(-(m[:, :8] * np.repeat(s[:2], 4) + b[:8])))

    with emulate(counters=True) as session:
        y, post, comb = stream_enter(x, fn, base, scale, weight, *EPS, ITERATIONS)
    collapsed = np.einsum("tn,tnd->td", gates[:, :4] + EPS[1], wide(x))
    expect_match(y, norm_expected(collapsed, wide(weight), EPS[0]), mx.bfloat16)
    expect_match(post, 2 * gates[:, 4:], mx.float32)
    expect_match(comb, C, mx.float32)
    tiles = -(-T // 4)
    assert launched(session) == [("stream_project", 128 * tiles), ("stream_enter", T)]
    assert session.dispatches[0].traffic["fn"].read_bytes == tiles * fn.nbytes
    assert session.dispatches[1].traffic["x"].read_bytes == x.nbytes


@pytest.mark.parametrize("iterations", [1, 2, 19, 20, 21])
def test_number_of_sinkhorn_iterations(iterations: int) -> None:
    x, arrays = normal(3, 4, 67), slow_weights(4, 67)
    comb = {n: stream_enter_reference(x, *arrays, *EPS, n)[2] for n in (iterations - 1, iterations, iterations + 1)}
    assert mx.abs(comb[iterations + 1] - comb[iterations]).max() > 1e-3, "these weights cannot tell the numbers apart"
    assert iterations == 1 or mx.abs(comb[iterations - 1] - comb[iterations]).max() > 1e-3
    expect_reference(x, *arrays, *EPS, iterations)


def test_first_index_of_comb_is_the_source() -> None:
    fn, base, scale, weight = weights(4, 67)
    base[8:] = 0.0
    base[8 + 4 * 1 + 3] = 5.0  # stream 1 goes to stream 3
    _, _, comb = expect_reference(normal(6, 4, 67), fn * 0, base, scale, weight, *EPS, 1)
    assert (comb[:, 1, 3] > comb[:, 3, 1] + 0.2).all()
    np.testing.assert_allclose(wide(comb).sum(axis=1), 1, atol=1e-5)


def test_every_eps_is_in_its_place() -> None:
    """With large ones: in pre but not in post, on every element after the softmax, in every denominator and root."""
    x = normal(6, 4, 67, scale=0.5)
    expect_reference(x, *weights(4, 67), 0.3, 0.05, ITERATIONS)
    head = (*head_weights(4, 67), 0.3, 0.05)
    expect_match(run(stream_head, x, *head), wide(stream_head_reference(x, *head)), mx.float32)


def test_extreme_logits_give_finite_weights() -> None:
    x, (fn, base, scale, weight) = normal(6, 4, 67), weights(4, 67)
    args = (fn, base * 200, scale, weight, *EPS, ITERATIONS)
    for found, expected in zip(run(stream_enter, x, *args), stream_enter_reference(x, *args), strict=True):
        np.testing.assert_allclose(wide(found), wide(expected), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_rounded_before_and_after_the_norm(dtype: mx.Dtype) -> None:
    x, args = normal(9, 4, 301, dtype=dtype), weights(4, 301)
    pre, _, _ = stream_mix_reference(x, *args[:3], *EPS, ITERATIONS)
    total = mx.einsum("tn,tnd->td", pre, x.astype(mx.float32)).astype(dtype)
    expected = mx.array(norm_expected(wide(total), wide(args[3]), EPS[0]).astype(np.float32)).astype(dtype)
    expect_same(run(stream_enter, x, *args, *EPS, ITERATIONS)[0], wide(expected), share=0.01)


def test_a_token_does_not_depend_on_the_others() -> None:
    x, args = normal(2, 3, 4, 67, dtype=mx.bfloat16), (*weights(4, 67), *EPS, ITERATIONS)
    alone = [stream_enter(x[b : b + 1, t : t + 1], *args) for b in range(2) for t in range(3)]
    for i, found in enumerate(stream_enter(x, *args)):
        expect_equal(found, mx.concatenate([one[i] for one in alone]).reshape(found.shape))


def test_nan_stays_in_its_token() -> None:
    x = normal(5, 3, 67)
    x[3, 1, 66] = float("nan")
    for found in stream_enter(x, *weights(3, 67), *EPS, ITERATIONS):
        lost = np.isnan(wide(found).reshape(5, -1))
        assert lost[3].all() and lost.sum() == lost[3].size


def test_what_is_not_covered() -> None:
    six, (x, arrays) = (normal(2, 6, 20), *weights(6, 20)), (normal(2, 4, 20), weights(4, 20))
    with pytest.raises(KernelError, match="stream_enter: the kernel covers at most 5 streams and at least 1 iteration"):
        stream_enter(*six, *EPS, ITERATIONS)
    with pytest.raises(KernelError, match="at least 1 iteration"):
        stream_enter(x, *arrays, *EPS, 0)
    with pytest.raises(KernelError, match="stream_head: the kernel covers at most 5 streams"):
        stream_head(normal(2, 6, 20), *head_weights(6, 20), *EPS)
    with kernels("auto"):
        for found, expected in zip(stream_enter(*six, *EPS, 20), stream_enter_reference(*six, *EPS, 20), strict=True):
            expect_equal(found, expected)


# --- before the head --------------------------------------------------------------------------------


@FLOATS
@sizes("T N D", (1, 4, 67), (6, 4, 67))
def test_stream_head(T: int, N: int, D: int, dtype: mx.Dtype) -> None:
    x, args = normal(T, N, D, dtype=dtype), (*head_weights(N, D), *EPS)
    expect_match(run(stream_head, x, *args), wide(stream_head_reference(x, *args)), dtype)


@sizes("T N D", (3, 3, 20), (9, 5, 33), (2, 1, 5), (1, 1, 1), (2, 4, THREADS + 1))
def test_head_of_other_sizes(T: int, N: int, D: int) -> None:
    x, args = normal(T, N, D), (*head_weights(N, D), 0.3, 0.05)
    expect_match(run(stream_head, x, *args), wide(stream_head_reference(x, *args)), mx.float32)


def test_head_of_the_size_of_the_model() -> None:
    x, args = normal(1, 4, 4096, dtype=mx.bfloat16), (*head_weights(4, 4096), *EPS)
    pre = stream_head_mix_reference(x, *args[:3], *EPS)
    expected = norm_expected(np.einsum("tn,tnd->td", wide(pre), wide(x)), wide(args[3]), EPS[0])
    with emulate(counters=True) as session:
        expect_match(stream_head(x, *args), expected, mx.bfloat16)
    assert session.dispatches[0].traffic["fn"].read_bytes == args[0].nbytes
    assert launched(session) == [("stream_project", 128), ("stream_head", 1)]


def test_head_of_a_token_does_not_depend_on_the_others() -> None:
    x, args = normal(2, 3, 4, 67, dtype=mx.bfloat16), (*head_weights(4, 67), *EPS)
    found = run(stream_head, x, *args)
    for b in range(2):
        for t in range(3):
            expect_equal(stream_head(x[b : b + 1, t : t + 1], *args), found[b : b + 1, t : t + 1])
