"""rope against pairs rotated one by one."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from support import (
    FLOATS,
    expect_equal,
    expect_match,
    expect_refused,
    expect_same,
    normal,
    rope_expected,
    rotation,
    run,
    sizes,
    wide,
)

from metal_kernels import rope

# K - P still dimensions, P rotated ones: some of each, a single pair, all.
SHAPES = sizes("B T H K P", (1, 1, 1, 2, 2), (1, 5, 3, 67, 6), (2, 5, 3, 20, 20), (2, 7, 1, 9, 2), (1, 33, 5, 70, 64))


@FLOATS
@SHAPES
def test_heads(B: int, T: int, H: int, K: int, P: int, dtype: mx.Dtype) -> None:
    x, (cos, sin) = normal(B, T, H, K, dtype=dtype), rotation(T, P // 2)
    expected = rope_expected(wide(x), cos, sin, dtype)
    found = run(rope, x, cos, sin)
    expect_match(found, expected, dtype)
    expect_same(found[..., : K - P], wide(x)[..., : K - P])


@FLOATS
@SHAPES
def test_rows(B: int, T: int, H: int, K: int, P: int, dtype: mx.Dtype) -> None:
    x, (cos, sin) = normal(B, T, K, dtype=dtype), rotation(T, P // 2)
    expect_match(run(rope, x, cos, sin), rope_expected(wide(x), cos, sin, dtype), dtype)


def test_interleaved_pairs_of_the_last_dimensions() -> None:
    """A quarter turn tells which dimensions form a pair, and in which direction they turn."""
    x = mx.arange(1, 8).astype(mx.float32).reshape(1, 1, 7)
    cos, sin = mx.zeros((1, 2)), mx.ones((1, 2))
    expect_same(run(rope, x, cos, sin), np.array([[[1, 2, 3, -5, 4, -7, 6]]]))


def test_each_token_has_its_own_angles() -> None:
    x, (cos, sin) = normal(1, 5, 3, 8), rotation(np.array([3, 0, 1000, 7, 1]), 4)
    found = run(rope, x, cos, sin)
    for t in range(5):
        expect_equal(rope(x[:, t : t + 1], cos[t : t + 1], sin[t : t + 1]), found[:, t : t + 1])


def test_negative_sine_rotates_back() -> None:
    x, (cos, sin) = normal(2, 5, 3, 67), rotation(5, 8)
    expect_match(run(rope, rope(x, cos, sin), cos, -sin), wide(x), mx.float32)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_rounded_once(dtype: mx.Dtype) -> None:
    x, (cos, sin) = normal(2, 33, 3, 64, dtype=dtype), rotation(33, 32)
    expect_same(run(rope, x, cos, sin), rope_expected(wide(x), cos, sin, dtype), share=0.01)


def test_a_row_of_a_batch_equals_that_row_alone() -> None:
    x, (cos, sin) = normal(3, 5, 4, 67, dtype=mx.bfloat16), rotation(5, 8)
    together = rope(x, cos, sin)
    for b in range(3):
        expect_equal(rope(x[b : b + 1], cos, sin), together[b : b + 1])


def test_refuses_other_shapes() -> None:
    x, (cos, sin) = normal(1, 5, 3, 67), rotation(5, 4)
    expect_refused("cos", rope, x, cos[:4], sin[:4])
    expect_refused("cos", rope, x, cos[0], sin[0])
    expect_refused("sin", rope, x, cos, sin[:, :3])
    expect_refused("sin", rope, x, cos, sin[:4])
