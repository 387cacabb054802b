"""The kernel of latents against its reference: first the row of the window, then the latent."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import emulate
from support import (
    FLOATS,
    expect_equal,
    expect_match,
    expect_same,
    key_row,
    key_row_reference,
    normal,
    rotation,
    run,
    sizes,
    wide,
)

from metal_kernels import KernelError, kernels, latents
from metal_kernels.latents import latents_reference

pytestmark = pytest.mark.usefixtures("emulated")

EPS = 1e-6
GPU = pytest.mark.parametrize(
    "changes", [{"contract": True}, {"ftz": True}, {"alignment": 4}], ids=["contract", "ftz", "alignment"]
)


def arrays(B: int, T: int, K: int, P: int, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, ...]:
    """Rows whose runs of 32 differ much in size, so that a scale for another block gives other numbers."""
    size = np.array([1, 1e-5, 1e-5, 1e-5, 1, 1, 1e-5, 1e-5])[np.arange(K) // 32 % 8]
    kv = (normal(B, T, K) * mx.array(size.astype(np.float32))).astype(dtype)
    return kv, normal(K), *rotation(np.arange(T) + 7, P // 2)


def expect_row(found: mx.array, args: tuple[mx.array, ...], eps: float = EPS) -> None:
    """With the round trip: the same numbers, but for those that lie next to a tie."""
    expected, still = wide(key_row_reference(*args, eps, True)), found.shape[-1] - 2 * args[2].shape[-1]
    expect_same(found[..., :still], expected[..., :still], share=0.001)
    expect_match(found[..., still:], expected[..., still:], found.dtype)


@FLOATS
@sizes("B T K P", (2, 3, 138, 10), (1, 9, 512, 64))
def test_with_round_trip(B: int, T: int, K: int, P: int, dtype: mx.Dtype) -> None:
    args = arrays(B, T, K, P, dtype)
    expect_row(run(key_row, *args, EPS, True), args)


@FLOATS
def test_without_round_trip(dtype: mx.Dtype) -> None:
    args = (*arrays(2, 5, 138, 10, dtype), EPS, False)
    expect_match(run(key_row, *args), wide(key_row_reference(*args)), dtype)


@sizes("B T K P", (1, 1, 2, 2), (1, 1, 4, 2), (1, 3, 6, 6), (3, 11, 20, 2), (1, 2, 66, 64))
def test_other_sizes(B: int, T: int, K: int, P: int) -> None:
    """Lanes without a pair, arrays of fewer than 8 elements, threadgroups that are not full."""
    args = (*arrays(B, T, K, P), EPS, False)
    expect_match(run(key_row, *args), wide(key_row_reference(*args)), mx.float32)


@sizes("B T K P", (1, 1, 66, 2), (1, 8, 64, 64), (1, 2, 192, 128))
def test_other_sizes_with_round_trip(B: int, T: int, K: int, P: int) -> None:
    args = arrays(B, T, K, P)
    expect_row(run(key_row, *args, EPS, True), args)


@FLOATS
def test_the_same_bits_where_the_norm_is_exact(dtype: mx.Dtype) -> None:
    """Rows of ones have norm 1, so that what is rounded are the weights; and quarter turns are exact."""
    sign = mx.where(normal(1, 3, 326) < 0, -1.0, 1.0).astype(dtype)
    size = np.ldexp(1.0, np.arange(326) // 64 * 5 - 15).astype(np.float32)
    turn = mx.array(np.array([[1, 0, -1], [0, 1, 0], [-1, 0, 0]], np.float32))
    args = (sign, normal(326) * mx.array(size), turn, 1 - mx.abs(turn), 0.0, True)
    expect_equal(run(key_row, *args), key_row_reference(*args))


@GPU
def test_as_a_gpu_may_run_it(changes: dict[str, Any]) -> None:
    args = arrays(2, 5, 138, 10)
    with emulate(**changes):
        expect_row(key_row(*args, EPS, True), args)


@sizes("T", (1,), (17,))
def test_size_of_the_model(T: int) -> None:
    """A row is read once, in one launch."""
    args = arrays(1, T, 512, 64, mx.bfloat16)
    args = (args[0], args[1].astype(mx.bfloat16), *args[2:])
    with emulate(counters=True) as session:
        expect_row(key_row(*args, EPS, True), args)
    (launch,) = session.dispatches
    assert (launch.grid, launch.threadgroup, launch.threadgroup_bytes) == ((32, 2 * T, 1), (32, 2, 1), 0)
    assert launch.traffic["kv"].read_bytes == args[0].nbytes == launch.traffic["out"].write_bytes


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_eps_is_inside_the_root(eps: float) -> None:
    kv, *rest = arrays(1, 3, 70, 6)
    expect_row(run(key_row, kv * 1e-3, *rest, eps, True), (kv * 1e-3, *rest), eps)


def test_a_row_of_a_batch_equals_that_row_alone() -> None:
    kv, weight, cos, sin = arrays(2, 5, 70, 6, mx.bfloat16)
    together = key_row(kv, weight, cos, sin, EPS, True)
    for b in range(2):
        for t in range(5):
            at = (slice(b, b + 1), slice(t, t + 1))
            expect_equal(key_row(kv[at], weight, cos[at[1]], sin[at[1]], EPS, True), together[at])


def test_nan_stays_in_its_row() -> None:
    kv, *rest = arrays(1, 5, 134, 6)
    kv[0, 3, 130] = float("nan")
    lost = np.isnan(wide(key_row(kv, *rest, EPS, True)))
    assert lost[0, 3].all() and lost.sum() == 134


def test_rows_that_are_not_contiguous() -> None:
    kv, *rest = arrays(3, 4, 70, 6)
    turned = kv.swapaxes(0, 1)[:, :3]
    cos, sin = (a[:3] for a in rest[1:])
    found = key_row(turned, rest[0], cos, sin, EPS, True)
    expect_equal(found, key_row(mx.contiguous(turned), rest[0], cos, sin, EPS, True))


def test_what_is_not_covered() -> None:
    args = (*arrays(1, 2, 67, 6), EPS, False)
    with pytest.raises(KernelError, match="latents: the kernel covers an even number of dimensions"):
        key_row(*args)
    with kernels("auto"):
        expect_equal(key_row(*args), key_row_reference(*args))


def pair(B: int, T: int, Q: int, dtype: mx.Dtype) -> tuple[mx.array, ...]:
    q, kv = normal(B, T, Q, dtype=dtype), normal(B, T, 70, dtype=dtype)
    return q, kv, normal(Q), normal(70), *rotation(T, 3), EPS, False


@FLOATS
@sizes("B T Q", (1, 1, 1024), (2, 3, 66), (1, 1, 2), (1, 2, 4096), (3, 5, 130))
def test_latent(B: int, T: int, Q: int, dtype: mx.Dtype) -> None:
    args = pair(B, T, Q, dtype)
    for found, expected in zip(run(latents, *args), latents_reference(*args), strict=True):
        expect_match(found, wide(expected), dtype)


@GPU
def test_latent_as_a_gpu_may_run_it(changes: dict[str, Any]) -> None:
    args = pair(2, 3, 66, mx.float32)
    with emulate(**changes):
        expect_match(latents(*args)[0], wide(latents_reference(*args)[0]), mx.float32)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_latent_is_rounded_once(dtype: mx.Dtype) -> None:
    args = pair(3, 7, 258, dtype)
    expect_same(run(latents, *args)[0], wide(latents_reference(*args)[0]), share=0.002)


def test_latent_with_nan_stays_alone() -> None:
    q, *rest = pair(1, 3, 66, mx.float32)
    q[0, 1, 7] = float("nan")
    latent, row = latents(q, *rest)
    lost = np.isnan(wide(latent))
    assert lost[0, 1].all() and lost.sum() == 66 and np.isfinite(wide(row)).all()
