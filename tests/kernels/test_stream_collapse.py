"""stream_collapse: weighted sum of the streams, then the norm of the sublayer."""

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
    norm_expected,
    normal,
    rounded,
    run,
    sizes,
    wide,
)

from metal_kernels import stream_collapse

EPS = 1e-6


def collapse_expected(x: mx.array, pre: mx.array, weight: mx.array) -> np.ndarray:
    total = sum(wide(pre)[..., n, None] * wide(x)[..., n, :] for n in range(x.shape[-2]))
    return norm_expected(rounded(total, x.dtype), wide(weight), EPS)


@FLOATS
@sizes("B T N D", (1, 1, 4, 67), (1, 5, 4, 67), (2, 3, 5, 20), (2, 7, 1, 300))
def test_stream_collapse(B: int, T: int, N: int, D: int, dtype: mx.Dtype) -> None:
    x, pre, weight = normal(B, T, N, D, dtype=dtype), normal(B, T, N), normal(D)
    expect_match(run(stream_collapse, x, pre, weight, EPS), collapse_expected(x, pre, weight), dtype)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_rounded_before_and_after_the_norm(dtype: mx.Dtype) -> None:
    x, pre, weight = normal(9, 4, 301, dtype=dtype), normal(9, 4), normal(301)
    expected = rounded(collapse_expected(x, pre, weight), dtype)
    expect_same(run(stream_collapse, x, pre, weight, EPS), expected, share=0.01)


def test_eps_is_inside_the_root() -> None:
    x, pre, weight = normal(3, 4, 67, scale=1e-3), normal(3, 4), normal(67)
    expect_match(run(stream_collapse, x, pre, weight, EPS), collapse_expected(x, pre, weight), mx.float32)


def test_a_row_of_a_batch_equals_that_row_alone() -> None:
    x, pre, weight = normal(3, 5, 4, 67, dtype=mx.bfloat16), normal(3, 5, 4), normal(67)
    together = stream_collapse(x, pre, weight, EPS)
    for b in range(3):
        expect_equal(stream_collapse(x[b : b + 1], pre[b : b + 1], weight, EPS), together[b : b + 1])


def test_refuses_other_shapes() -> None:
    x, pre, weight = normal(5, 4, 67), normal(5, 4), normal(67)
    expect_refused("pre", stream_collapse, x, pre[:, :3], weight, EPS)
    expect_refused("pre", stream_collapse, x, pre[:1], weight, EPS)
    expect_refused("pre", stream_collapse, x, pre[None], weight, EPS)
    expect_refused("weight", stream_collapse, x, pre, weight[:-1], EPS)
