"""index_query: rotation, Hadamard transform, FP4 round trip."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from support import (
    FLOATS,
    dtype_name,
    expect_equal,
    expect_match,
    expect_refused,
    expect_same,
    fp4_expected,
    hadamard_expected,
    normal,
    rope_expected,
    rotation,
    rounded,
    run,
    sizes,
    wide,
)

from metal_kernels import index_query

SHAPES = sizes("B T I J P", (1, 1, 1, 32, 2), (1, 5, 3, 128, 64), (2, 3, 7, 64, 6), (2, 7, 5, 32, 32))
# The transform rounds after each of its steps, not once.


def query_expected(q: mx.array, cos: mx.array, sin: mx.array) -> np.ndarray:
    turned = rounded(hadamard_expected(rope_expected(wide(q), cos, sin, q.dtype)), q.dtype)
    return rounded(fp4_expected(turned), q.dtype)


@SHAPES
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=dtype_name)
def test_fp4(B: int, T: int, I: int, J: int, P: int, dtype: mx.Dtype) -> None:
    # Enough numbers to see one percent of them change.
    q, (cos, sin) = normal(B, 40 * T, I, J, dtype=dtype), rotation(40 * T, P // 2)
    expect_same(run(index_query, q, cos, sin, True), query_expected(q, cos, sin), share=0.001)


def test_hadamard_transform_is_sylvesters_and_orthogonal() -> None:
    """One number at 5 becomes the fifth row of the matrix: its signs say which order it has."""
    q = mx.zeros((1, 1, 1, 64))
    q[..., 5] = 48.0  # 48 / 8 is on the FP4 grid
    signs = [(-1) ** (5 & j).bit_count() for j in range(64)]
    found = run(index_query, q, mx.ones((1, 1)), mx.zeros((1, 1)), True)
    expect_same(found, 6.0 * np.array(signs).reshape(1, 1, 1, 64))


def test_fp4_blocks_are_32_wide() -> None:
    """Two large numbers, 32 apart: after the transform the first half is larger than the second."""
    q = mx.zeros((1, 1, 1, 64))
    q[..., 0], q[..., 32], q[..., 1] = 800.0, 792.0, 0.35
    cos, sin = mx.ones((1, 1)), mx.zeros((1, 1))
    before = hadamard_expected(wide(q))
    assert (fp4_expected(before, 32) != fp4_expected(before, 64)).mean() > 0.2
    expect_same(run(index_query, q, cos, sin, True), fp4_expected(before, 32))


@FLOATS
@SHAPES
def test_without_fp4_it_only_rotates(B: int, T: int, I: int, J: int, P: int, dtype: mx.Dtype) -> None:
    q, (cos, sin) = normal(B, T, I, J, dtype=dtype), rotation(T, P // 2)
    expect_match(run(index_query, q, cos, sin, False), rope_expected(wide(q), cos, sin, dtype), dtype)


def test_there_is_no_norm() -> None:
    q, (cos, sin) = normal(1, 5, 3, 64), rotation(5, 3)
    expect_same(index_query(q * 4, cos, sin, True), 4 * wide(index_query(q, cos, sin, True)))


@pytest.mark.parametrize("fp4", [True, False], ids=["fp4", "plain"])
def test_a_row_of_a_batch_equals_that_row_alone(fp4: bool) -> None:
    q, (cos, sin) = normal(3, 5, 4, 32, dtype=mx.bfloat16), rotation(5, 3)
    together = index_query(q, cos, sin, fp4)
    for b in range(3):
        expect_equal(index_query(q[b : b + 1], cos, sin, fp4), together[b : b + 1])


def test_refuses_other_shapes() -> None:
    q, (cos, sin) = normal(1, 5, 3, 32), rotation(5, 4)
    expect_refused("cos", index_query, q, cos[:4], sin[:4], True)


def test_refuses_sines_of_another_shape() -> None:
    q, (cos, sin) = normal(1, 5, 3, 32), rotation(5, 4)
    expect_refused("sin", index_query, q, cos, sin[:1], True)
