"""The kernel of index_query against its reference."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import emulate
from support import FLOATS, expect_equal, expect_match, expect_same, normal, rotation, run, sizes, wide

from metal_kernels import KernelError, index_query, kernels
from metal_kernels.index_query import index_query_reference

pytestmark = pytest.mark.usefixtures("emulated")

GPU = pytest.mark.parametrize(
    "changes", [{"contract": True}, {"ftz": True}, {"alignment": 4}], ids=["contract", "ftz", "alignment"]
)


def arrays(B: int, T: int, I: int, J: int, P: int, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, ...]:
    return normal(B, T, I, J, dtype=dtype), *rotation(np.arange(T) + 7, P // 2)


@FLOATS
def test_fp4(dtype: mx.Dtype) -> None:
    args = (*arrays(2, 3, 5, 128, 64, dtype), True)
    expect_same(run(index_query, *args), wide(index_query_reference(*args)), share=0.001)


@sizes("B T I J P", (1, 1, 1, 32, 2), (2, 3, 7, 64, 6), (1, 5, 3, 256, 64), (1, 3, 3, 32, 32))
def test_fp4_of_other_sizes(B: int, T: int, I: int, J: int, P: int) -> None:
    """A block in half of the lanes, and rows in several registers."""
    args = (*arrays(B, T, I, J, P), True)
    expect_same(run(index_query, *args), wide(index_query_reference(*args)), share=0.001)


@FLOATS
@sizes("J", (32,), (64,), (128,), (512,))
def test_the_same_bits_where_the_rotation_is_exact(J: int, dtype: mx.Dtype) -> None:
    """Quarter turns; the transform adds in MLX's order."""
    turn = mx.array(np.array([[1, 0, -1], [0, 1, 0], [-1, 0, 0]], np.float32))
    size = np.ldexp(1.0, np.arange(J) % 7 - 3).astype(np.float32)
    q = (normal(1, 3, 3, J) * mx.array(size)).astype(dtype)
    args = (q, turn, 1 - mx.abs(turn), True)
    expect_equal(run(index_query, *args), index_query_reference(*args))


@FLOATS
@sizes("B T I J P", (2, 3, 5, 70, 6), (1, 2, 3, 128, 64))
def test_without_fp4_it_only_rotates(B: int, T: int, I: int, J: int, P: int, dtype: mx.Dtype) -> None:
    args = (*arrays(B, T, I, J, P, dtype), False)
    expect_match(run(index_query, *args), wide(index_query_reference(*args)), dtype)


@sizes("B T I J P", (1, 1, 1, 2, 2), (1, 1, 1, 4, 2), (3, 5, 3, 16, 8))
def test_small_sizes_without_fp4(B: int, T: int, I: int, J: int, P: int) -> None:
    args = (*arrays(B, T, I, J, P), False)
    expect_match(run(index_query, *args), wide(index_query_reference(*args)), mx.float32)


@GPU
def test_as_a_gpu_may_run_it(changes: dict[str, Any]) -> None:
    args = (*arrays(2, 3, 5, 128, 64), True)
    with emulate(**changes):
        expect_same(index_query(*args), wide(index_query_reference(*args)), share=0.001)


def test_size_of_the_model() -> None:
    """Heads are read once, in one launch."""
    args = (*arrays(1, 2, 64, 128, 64, mx.bfloat16), True)
    with emulate(counters=True) as session:
        expect_same(index_query(*args), wide(index_query_reference(*args)), share=0.001)
    (launch,) = session.dispatches
    assert (launch.grid, launch.threadgroup, launch.threadgroup_bytes) == ((32, 128, 1), (32, 8, 1), 0)
    assert launch.traffic["q"].read_bytes == args[0].nbytes == launch.traffic["out"].write_bytes


@pytest.mark.parametrize("fp4", [True, False], ids=["fp4", "plain"])
def test_a_token_of_a_batch_equals_that_token_alone(fp4: bool) -> None:
    q, cos, sin = arrays(2, 3, 5, 128, 64, mx.bfloat16)
    together = index_query(q, cos, sin, fp4)
    for b in range(2):
        for t in range(3):
            at = (slice(b, b + 1), slice(t, t + 1))
            expect_equal(index_query(q[at], cos[at[1]], sin[at[1]], fp4), together[at])


def test_nan_stays_in_its_head() -> None:
    q, cos, sin = arrays(1, 2, 5, 128, 64)
    q[0, 1, 3, 69] = float("nan")
    lost = np.isnan(wide(index_query(q, cos, sin, True)))
    assert lost[0, 1, 3].all() and lost.sum() == 128


def test_heads_that_are_not_contiguous() -> None:
    q, cos, sin = arrays(1, 3, 5, 128, 64)
    turned = mx.contiguous(q.swapaxes(1, 2)).swapaxes(1, 2)
    expect_equal(index_query(turned, cos, sin, True), index_query(q, cos, sin, True))


def test_what_is_not_covered() -> None:
    odd, twelfths = (*arrays(1, 2, 3, 67, 6), False), (*arrays(1, 2, 3, 96, 6), True)
    with pytest.raises(KernelError, match="index_query: the kernel covers a number of dimensions that is even"):
        index_query(*odd)
    with pytest.raises(
        KernelError, match="index_query: the kernel covers a number of dimensions that is a power of two"
    ):
        index_query(*twelfths)
    with kernels("auto"):
        expect_equal(index_query(*odd), index_query_reference(*odd))
        expect_equal(index_query(*twelfths), index_query_reference(*twelfths))
    with pytest.raises(KernelError, match=r"^index_query: q: expected a number of values divisible by 32, found 16"):
        index_query(*arrays(1, 2, 3, 16, 6), True)
