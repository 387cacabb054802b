"""The kernel of compress against its reference."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import emulate
from support import (
    FLOATS,
    compress,
    compress_reference,
    expect_equal,
    expect_match,
    expect_same,
    normal,
    rotation,
    run,
    sizes,
    wide,
)

from metal_kernels import KernelError, kernels
from metal_kernels import compress as compress_tokens
from metal_kernels.compress import MAX_THREADS
from metal_kernels.compress import compress_reference as compress_tokens_reference

pytestmark = pytest.mark.usefixtures("emulated")

EPS = 1e-6
GPU = pytest.mark.parametrize(
    "changes", [{"contract": True}, {"ftz": True}, {"alignment": 4}], ids=["contract", "ftz", "alignment"]
)


def arrays(B: int, S: int, M: int, K: int, P: int) -> tuple[mx.array, ...]:
    """Channels of different size; gates that prefer one candidate; the first group lacks half of its candidates."""
    size = np.array([1, 1e-5, 1e-5, 1e-5, 1, 1, 1e-5, 1e-5])[np.arange(K) // 32 % 8].astype(np.float32)
    gate = normal(B, S, M, K, scale=2)
    gate[:, 0, : M // 2] = -mx.inf
    return normal(B, S, M, K), gate, normal(K) * mx.array(size), *rotation(np.arange(S) * 4 + 7, P // 2)


def expect_rows(found: mx.array, args: tuple[mx.array, ...], dtype: mx.Dtype, quant: str, eps: float = EPS) -> None:
    """What is on a grid: the same numbers, but for those that lie next to a tie."""
    expected = wide(compress_reference(*args, eps, dtype, quant))
    still = {"none": 0, "fp8": found.shape[-1] - 2 * args[3].shape[-1], "fp4": found.shape[-1]}[quant]
    expect_same(found[..., :still], expected[..., :still], share=0.002)
    expect_match(found[..., still:], expected[..., still:], dtype)


@FLOATS
@pytest.mark.parametrize(("quant", "K", "P"), [("none", 70, 6), ("fp8", 138, 10), ("fp4", 128, 64)])
@sizes("B S M", (2, 3, 8))
def test_compress(B: int, S: int, M: int, K: int, P: int, quant: str, dtype: mx.Dtype) -> None:
    args = arrays(B, S, M, K, P)
    expect_rows(run(compress, *args, EPS, dtype, quant), args, dtype, quant)


@sizes(
    "B S M K P",
    (1, 1, 1, 2, 2),
    (1, 1, 3, 4, 2),
    (2, 2, 2, 2, 2),
    (1, 2, 5, 2 * MAX_THREADS + 6, 10),
    (1, 2, 8, 64, 64),
)
def test_other_sizes(B: int, S: int, M: int, K: int, P: int) -> None:
    """Threads without a pair of channels and with two, arrays of fewer than 8 elements, one candidate."""
    args = arrays(B, S, M, K, P)
    expect_rows(run(compress, *args, EPS, mx.float32, "none"), args, mx.float32, "none")


@sizes("B S M K P", (1, 5, 8, 32, 6), (2, 3, 8, 64, 2), (1, 3, 3, 256, 64))
def test_other_sizes_of_index_keys(B: int, S: int, M: int, K: int, P: int) -> None:
    args = arrays(B, S, M, K, P)
    expect_rows(run(compress, *args, EPS, mx.float32, "fp4"), args, mx.float32, "fp4")


@FLOATS
@pytest.mark.parametrize(("quant", "K"), [("fp8", 326), ("fp4", 256)])
def test_the_same_bits_where_pooling_and_norm_are_exact(quant: str, K: int, dtype: mx.Dtype) -> None:
    """One candidate has all the weight, and a row of ones has norm 1, so that what is rounded are the weights."""
    sign = mx.where(normal(1, 3, 1, K) < 0, -1.0, 1.0)
    size = np.ldexp(1.0, np.arange(K) // 64 * 5 - 15).astype(np.float32)
    turn = mx.array(np.array([[1, 0, -1], [0, 1, 0], [-1, 0, 0]], np.float32))
    args = (sign, normal(1, 3, 1, K), normal(K) * mx.array(size), turn, 1 - mx.abs(turn), 0.0, dtype, quant)
    expect_equal(run(compress, *args), compress_reference(*args))


@GPU
@pytest.mark.parametrize(("quant", "K", "P"), [("fp8", 138, 10), ("fp4", 128, 64)])
def test_as_a_gpu_may_run_it(quant: str, K: int, P: int, changes: dict[str, Any]) -> None:
    args = arrays(1, 5, 8, K, P)
    with emulate(**changes):
        expect_rows(compress(*args, EPS, mx.float32, quant), args, mx.float32, quant)


@pytest.mark.parametrize(
    ("M", "K", "quant", "threads"), [(8, 512, "fp8", 256), (128, 512, "fp8", 256), (8, 128, "fp4", 64)]
)
def test_size_of_the_model(M: int, K: int, quant: str, threads: int) -> None:
    """Candidates are read once, gates twice, in one launch."""
    args = arrays(1, 2, M, K, 64)
    args = (*args[:2], args[2].astype(mx.bfloat16), *args[3:])
    with emulate(counters=True) as session:
        expect_rows(compress(*args, EPS, mx.bfloat16, quant), args, mx.bfloat16, quant)
    (launch,) = session.dispatches
    assert (launch.grid, launch.threadgroup, launch.threadgroup_bytes) == ((threads, 2, 1), (threads, 1, 1), 4 * K)
    assert launch.traffic["tokens"].read_bytes == args[0].nbytes + 2 * args[1].nbytes


@sizes("n S", (8, 1), (20, 3))
@pytest.mark.parametrize("start", [4, 7, 0])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(("quant", "K"), [("fp8", 134), ("fp4", 128)])
def test_overlapping_groups_of_tokens_that_go_round(
    n: int, S: int, start: int, before: bool, quant: str, K: int
) -> None:
    """As a decode step has them in a ring, beside columns of others."""
    args = (
        normal(2, n, 4 * K + 5),
        normal(4, 2 * K),
        normal(K),
        *rotation(np.arange(S) * 4, 3),
        EPS,
        mx.bfloat16,
        quant,
    )
    place = {"kv": 3, "gate": 3 + 2 * K, "start": start, "before": before}
    found, expected = run(compress_tokens, *args, **place), wide(compress_tokens_reference(*args, **place))
    still = K - 6 if quant == "fp8" else K
    expect_same(found[..., :still], expected[..., :still], share=0.005)
    expect_match(found[..., still:], expected[..., still:], mx.bfloat16)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_rounded_after_pooling_after_the_norm_and_after_the_rotation(dtype: mx.Dtype) -> None:
    args = (*arrays(2, 9, 8, 138, 64), EPS, dtype, "none")
    expect_same(run(compress, *args), wide(compress_reference(*args)), share=0.005)


def test_a_gate_of_minus_infinity_leaves_its_candidate_out() -> None:
    """Whatever its value is."""
    kv, gate, *rest = arrays(2, 3, 8, 70, 6)
    found = compress(kv, gate, *rest, EPS, mx.float32, "fp8")
    kv[:, 0, :4] = 3e38
    expect_equal(compress(kv, gate, *rest, EPS, mx.float32, "fp8"), found)
    gate[:, 0, 5:] = -mx.inf  # one is left
    args = (kv, gate, *rest)
    expect_rows(run(compress, *args, EPS, mx.float32, "fp8"), args, mx.float32, "fp8")


def test_large_gates_do_not_overflow() -> None:
    """Also if those of the next channel are small."""
    kv, gate, *rest = arrays(1, 3, 8, 70, 6)
    for shift in (mx.array(5000), mx.array(-5000), 5000 * (mx.arange(70) % 3)):
        args = (kv, gate + shift, *rest)
        expect_rows(run(compress, *args, EPS, mx.float32, "none"), args, mx.float32, "none")


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_eps_is_inside_the_root(eps: float) -> None:
    kv, *rest = arrays(1, 3, 8, 70, 6)
    args = (kv * 1e-3, *rest)
    expect_rows(run(compress, *args, eps, mx.float32, "fp8"), args, mx.float32, "fp8", eps)


@pytest.mark.parametrize(("quant", "K"), [("fp8", 134), ("fp4", 128)])
def test_a_row_of_a_batch_equals_that_row_alone(quant: str, K: int) -> None:
    kv, gate, weight, cos, sin = arrays(2, 3, 8, K, 6)
    together = compress(kv, gate, weight, cos, sin, EPS, mx.bfloat16, quant)
    for b in range(2):
        for s in range(3):
            at, row = (slice(b, b + 1), slice(s, s + 1)), slice(s, s + 1)
            alone = compress(kv[at], gate[at], weight, cos[row], sin[row], EPS, mx.bfloat16, quant)
            expect_equal(alone, together[at])


def test_nan_stays_in_its_row() -> None:
    kv, *rest = arrays(1, 5, 8, 134, 6)
    kv[0, 3, 7, 130] = float("nan")
    lost = np.isnan(wide(compress(kv, *rest, EPS, mx.float32, "fp8")))
    assert lost[0, 3].all() and lost.sum() == 134


def test_candidates_that_are_not_contiguous() -> None:
    kv, gate, weight, cos, sin = arrays(1, 3, 8, 140, 6)
    halves = (kv[..., 70:], gate[..., :70], weight[:70], cos, sin)
    whole = tuple(mx.contiguous(a) for a in halves)
    expect_equal(compress(*halves, EPS, mx.float32, "fp8"), compress(*whole, EPS, mx.float32, "fp8"))


def test_what_is_not_covered() -> None:
    odd, twelfths = (
        (*arrays(1, 2, 8, 67, 6), EPS, mx.float32, "none"),
        (*arrays(1, 2, 8, 96, 6), EPS, mx.float32, "fp4"),
    )
    with pytest.raises(KernelError, match="compress: the kernel covers a number of channels that is even"):
        compress(*odd)
    with pytest.raises(KernelError, match="compress: the kernel covers a number of channels that is a power of two"):
        compress(*twelfths)
    with kernels("auto"):
        expect_equal(compress(*odd), compress_reference(*odd))
        expect_equal(compress(*twelfths), compress_reference(*twelfths))
