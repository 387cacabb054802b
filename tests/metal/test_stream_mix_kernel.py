"""The kernels of stream_mix and stream_head_mix against their references."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import Session, emulate
from support import FLOATS, expect_equal, expect_match, generator, normal, run, sizes, wide

from metal_kernels import KernelError, kernels, stream_head_mix, stream_mix
from metal_kernels.stream_mix import stream_head_mix_reference, stream_mix_reference

pytestmark = pytest.mark.usefixtures("emulated")

EPS, ITERATIONS = (1e-6, 1e-6), 20
# One slice of columns and several, a last slice of any length, tiles of tokens that are not full, arrays of fewer
# than 8 elements.
SHAPES = sizes("T N D", (1, 4, 67), (6, 4, 67), (3, 3, 20), (9, 5, 33), (2, 1, 300), (4, 2, 64), (1, 4, 1), (1, 1, 5))


def weights(N: int, D: int) -> tuple[mx.array, mx.array, mx.array]:
    """fn, base and scale; the projection of normalised streams is about 1 in size."""
    return normal((2 + N) * N, N * D, scale=(N * D) ** -0.5), normal((2 + N) * N), mx.array([0.7, -1.3, 1.9])


def head_weights(N: int, D: int) -> tuple[mx.array, mx.array, mx.array]:
    return normal(N, N * D, scale=(N * D) ** -0.5), normal(N), mx.array([1.7])


def slow_weights(N: int, D: int) -> tuple[mx.array, mx.array, mx.array]:
    """Mixing weights that each further iteration moves: what lies below the diagonal is next to nothing."""
    fn, base, scale = weights(N, D)
    comb = np.where(np.tri(N, k=-1) > 0, -30.0, 0.0) + 0.1 * generator().standard_normal((N, N))
    return fn * 0.01, mx.concatenate([base[: 2 * N], mx.array(comb.ravel().astype(np.float32))]), scale


def expect_reference(x: mx.array, *args: Any) -> tuple[mx.array, ...]:
    found: tuple[mx.array, ...] = run(stream_mix, x, *args)
    for one, expected in zip(found, stream_mix_reference(x, *args), strict=True):
        expect_match(one, wide(expected), mx.float32)
    return found


def launched(session: Session) -> list[tuple[str, int]]:
    """Every launch, with its number of threadgroups, all of them whole."""
    for d in session.dispatches:
        assert all(whole % part == 0 for whole, part in zip(d.grid, d.threadgroup, strict=True))
        assert math.prod(d.threadgroup) <= 256 and d.threadgroup_bytes <= 128
    return [(d.kernel, math.prod(d.grid) // math.prod(d.threadgroup)) for d in session.dispatches]


@SHAPES
def test_stream_mix(T: int, N: int, D: int) -> None:
    expect_reference(normal(T, N, D), *weights(N, D), *EPS, ITERATIONS)


@FLOATS
@sizes("T N D", (1, 4, 67), (6, 4, 67))
def test_types_of_the_streams(T: int, N: int, D: int, dtype: mx.Dtype) -> None:
    expect_reference(normal(T, N, D, dtype=dtype), *weights(N, D), *EPS, ITERATIONS)


@pytest.mark.parametrize(
    "changes", [{"contract": True}, {"ftz": True}, {"alignment": 4}], ids=["contract", "ftz", "alignment"]
)
def test_as_a_gpu_may_run_it(changes: dict[str, Any]) -> None:
    x, args = normal(6, 4, 67), (*weights(4, 67), *EPS, ITERATIONS)
    with emulate(**changes):
        expect_reference(x, *args)
        head = (*head_weights(4, 67), *EPS)
        expect_match(stream_head_mix(x, *head), wide(stream_head_mix_reference(x, *head)), mx.float32)


@sizes("T", (1,), (6,))
def test_size_of_the_model(T: int) -> None:
    """Every weight is read once for a tile of four tokens.

    Against float64: sums of slices are closer to it than the reference, which adds 16384 products in a row.
    """
    x, (fn, base, scale) = normal(T, 4, 4096, dtype=mx.bfloat16), weights(4, 4096)
    X, W, s, b = wide(x).reshape(T, -1), wide(fn), wide(scale), wide(base)
    m = X @ W.T / np.sqrt(np.square(X).mean(axis=1, keepdims=True) + EPS[0])
    C = (m[:, 8:] * s[2] + b[8:]).reshape(T, 4, 4)
    C = np.exp(C) / np.exp(C).sum(axis=2, keepdims=True) + EPS[1]
    for axis in (1, *(2, 1) * (ITERATIONS - 1)):
        C = C / (C.sum(axis=axis, keepdims=True) + EPS[1])
    gates = 1 / (1 + np.exp(-(m[:, :8] * np.repeat(s[:2], 4) + b[:8])))

    with emulate(counters=True) as session:
        pre, post, comb = stream_mix(x, fn, base, scale, *EPS, ITERATIONS)
    expect_match(pre, gates[:, :4] + EPS[1], mx.float32)
    expect_match(post, 2 * gates[:, 4:], mx.float32)
    expect_match(comb, C, mx.float32)
    tiles = -(-T // 4)
    assert launched(session) == [("stream_project", 128 * tiles), ("stream_mix", T)]
    assert session.dispatches[0].traffic["fn"].read_bytes == tiles * fn.nbytes


@pytest.mark.parametrize("iterations", [1, 2, 19, 20, 21])
def test_number_of_sinkhorn_iterations(iterations: int) -> None:
    x, arrays = normal(3, 4, 67), slow_weights(4, 67)
    comb = {n: stream_mix_reference(x, *arrays, *EPS, n)[2] for n in (iterations - 1, iterations, iterations + 1)}
    assert mx.abs(comb[iterations + 1] - comb[iterations]).max() > 1e-3, "these weights cannot tell the numbers apart"
    assert iterations == 1 or mx.abs(comb[iterations - 1] - comb[iterations]).max() > 1e-3
    expect_reference(x, *arrays, *EPS, iterations)


def test_first_index_of_comb_is_the_source() -> None:
    fn, base, scale = weights(4, 67)
    base[8:] = 0.0
    base[8 + 4 * 1 + 3] = 5.0  # stream 1 goes to stream 3
    _, _, comb = expect_reference(normal(6, 4, 67), fn * 0, base, scale, *EPS, 1)
    assert (comb[:, 1, 3] > comb[:, 3, 1] + 0.2).all()
    np.testing.assert_allclose(wide(comb).sum(axis=1), 1, atol=1e-5)


def test_every_eps_is_in_its_place() -> None:
    """With large ones: in pre but not in post, on every element after the softmax, and in every denominator."""
    expect_reference(normal(6, 4, 67, scale=0.5), *weights(4, 67), 0.3, 0.05, ITERATIONS)


def test_extreme_logits_give_finite_weights() -> None:
    x, (fn, base, scale) = normal(6, 4, 67), weights(4, 67)
    args = (fn, base * 200, scale, *EPS, ITERATIONS)
    for found, expected in zip(run(stream_mix, x, *args), stream_mix_reference(x, *args), strict=True):
        np.testing.assert_allclose(wide(found), wide(expected), rtol=2e-3, atol=1e-6)


def test_a_token_does_not_depend_on_the_others() -> None:
    x, args = normal(2, 3, 4, 67, dtype=mx.bfloat16), (*weights(4, 67), *EPS, ITERATIONS)
    alone = [stream_mix(x[b : b + 1, t : t + 1], *args) for b in range(2) for t in range(3)]
    for i, found in enumerate(stream_mix(x, *args)):
        expect_equal(found, mx.concatenate([one[i] for one in alone]).reshape(found.shape))


def test_nan_stays_in_its_token() -> None:
    x, args = normal(6, 4, 67), (*weights(4, 67), *EPS, ITERATIONS)
    x[4, 3, 66] = float("nan")
    for found in run(stream_mix, x, *args):
        lost = np.isnan(wide(found)).reshape(6, -1)
        assert lost[4].all() and not np.delete(lost, 4, axis=0).any()


def test_streams_that_are_not_contiguous() -> None:
    x, args = normal(4, 6, 67), (*weights(4, 67), *EPS, ITERATIONS)
    found = stream_mix(x.swapaxes(0, 1), *args)
    for one, expected in zip(found, stream_mix(mx.contiguous(x.swapaxes(0, 1)), *args), strict=True):
        expect_equal(one, expected)


def test_what_is_not_covered() -> None:
    six, (x, arrays) = (normal(2, 6, 20), *weights(6, 20)), (normal(2, 4, 20), weights(4, 20))
    with pytest.raises(KernelError, match="stream_mix: the kernel covers at most 5 streams and at least 1 iteration"):
        stream_mix(*six, *EPS, ITERATIONS)
    with pytest.raises(KernelError, match="at least 1 iteration"):
        stream_mix(x, *arrays, *EPS, 0)
    with pytest.raises(KernelError, match="stream_head_mix: the kernel covers at most 5 streams"):
        stream_head_mix(normal(2, 6, 20), *head_weights(6, 20), *EPS)
    with kernels("auto"):
        for found, expected in zip(stream_mix(*six, *EPS, 20), stream_mix_reference(*six, *EPS, 20), strict=True):
            expect_equal(found, expected)


# --- before the head --------------------------------------------------------------------------------


@FLOATS
@sizes("T N D", (1, 4, 67), (6, 4, 67))
def test_stream_head_mix(T: int, N: int, D: int, dtype: mx.Dtype) -> None:
    x, args = normal(T, N, D, dtype=dtype), (*head_weights(N, D), *EPS)
    expect_match(run(stream_head_mix, x, *args), wide(stream_head_mix_reference(x, *args)), mx.float32)


@sizes("T N D", (3, 3, 20), (9, 5, 33), (2, 1, 5))
def test_head_of_other_sizes(T: int, N: int, D: int) -> None:
    x, args = normal(T, N, D), (*head_weights(N, D), 0.3, 0.05)
    expect_match(run(stream_head_mix, x, *args), wide(stream_head_mix_reference(x, *args)), mx.float32)


def test_head_of_the_size_of_the_model() -> None:
    x, (fn, base, scale) = normal(1, 4, 4096, dtype=mx.bfloat16), head_weights(4, 4096)
    X = wide(x).reshape(1, -1)
    m = X @ wide(fn).T / np.sqrt(np.square(X).mean() + EPS[0])
    expected = 1 / (1 + np.exp(-(m * wide(scale) + wide(base)))) + EPS[1]
    with emulate(counters=True) as session:
        expect_match(stream_head_mix(x, fn, base, scale, *EPS), expected, mx.float32)
    assert session.dispatches[0].traffic["fn"].read_bytes == fn.nbytes
    assert launched(session) == [("stream_project", 128), ("stream_head_mix", 1)]


def test_head_of_a_token_does_not_depend_on_the_others() -> None:
    x, args = normal(2, 3, 4, 67, dtype=mx.bfloat16), (*head_weights(4, 67), *EPS)
    found = run(stream_head_mix, x, *args)
    for b in range(2):
        for t in range(3):
            expect_equal(stream_head_mix(x[b : b + 1, t : t + 1], *args), found[b : b + 1, t : t + 1])
