"""query_rope: norm of each head without weight, then rotation."""

from __future__ import annotations

import mlx.core as mx
import pytest
from support import (
    FLOATS,
    expect_equal,
    expect_match,
    expect_refused,
    expect_same,
    norm_expected,
    normal,
    rope_expected,
    rotation,
    rounded,
    run,
    sizes,
    wide,
)

from metal_kernels import query_rope

EPS = 1e-6
SHAPES = sizes("B T H K P", (1, 1, 1, 4, 4), (1, 5, 3, 67, 6), (2, 7, 5, 20, 2), (2, 3, 4, 130, 64))


@FLOATS
@SHAPES
def test_query_rope(B: int, T: int, H: int, K: int, P: int, dtype: mx.Dtype) -> None:
    # Heads of different size: a norm over more than one head would show.
    q = (normal(B, T, H, K) * mx.arange(1, H + 1)[:, None]).astype(dtype)
    cos, sin = rotation(T, P // 2)
    expected = rope_expected(rounded(norm_expected(wide(q), 1, EPS), dtype), cos, sin, dtype)
    expect_match(run(query_rope, q, cos, sin, EPS), expected, dtype)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_rounded_after_the_norm_and_after_the_rotation(dtype: mx.Dtype) -> None:
    q, (cos, sin) = normal(2, 7, 5, 64, dtype=dtype), rotation(7, 32)
    expected = rope_expected(rounded(norm_expected(wide(q), 1, EPS), dtype), cos, sin, dtype)
    expect_same(run(query_rope, q, cos, sin, EPS), expected, share=0.01)


def test_eps_is_inside_the_root() -> None:
    q, (cos, sin) = normal(1, 3, 2, 20, scale=1e-3), rotation(3, 3)
    expected = rope_expected(norm_expected(wide(q), 1, 1e-6), cos, sin, mx.float32)
    expect_match(run(query_rope, q, cos, sin, 1e-6), expected, mx.float32)


def test_a_row_of_a_batch_equals_that_row_alone() -> None:
    q, (cos, sin) = normal(3, 5, 4, 20, dtype=mx.bfloat16), rotation(5, 3)
    together = query_rope(q, cos, sin, EPS)
    for b in range(3):
        expect_equal(query_rope(q[b : b + 1], cos, sin, EPS), together[b : b + 1])


def test_refuses_other_shapes() -> None:
    q, (cos, sin) = normal(1, 5, 3, 20), rotation(5, 4)
    expect_refused("cos", query_rope, q, cos[:4], sin, EPS)
    expect_refused("sin", query_rope, q, cos, sin[:4], EPS)
    expect_refused("sin", query_rope, q, cos, sin[:, :3], EPS)
