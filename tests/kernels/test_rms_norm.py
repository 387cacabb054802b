"""rms_norm against arithmetic in numpy."""

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

from metal_kernels import rms_norm

EPS = 1e-6
SHAPES = sizes("T D", (1, 1), (1, 67), (5, 67), (3, 300), (2, 1031))


@FLOATS
@SHAPES
def test_rms_norm(T: int, D: int, dtype: mx.Dtype) -> None:
    x, weight = normal(T, D, dtype=dtype), normal(D)
    expect_match(run(rms_norm, x, weight, EPS), norm_expected(wide(x), wide(weight), EPS), dtype)


@FLOATS
@SHAPES
def test_without_weight(T: int, D: int, dtype: mx.Dtype) -> None:
    x = normal(T, D, dtype=dtype)
    expect_match(run(rms_norm, x, None, EPS), norm_expected(wide(x), 1, EPS), dtype)


@pytest.mark.parametrize("shape", [(67,), (2, 3, 67), (2, 3, 5, 67)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    x, weight = normal(*shape), normal(67)
    found = run(rms_norm, x, weight, EPS)
    expect_match(found, norm_expected(wide(x), wide(weight), EPS), mx.float32)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_rounded_once_after_the_weight(dtype: mx.Dtype) -> None:
    x, weight = normal(7, 301, dtype=dtype), normal(301, dtype=dtype)
    expected = norm_expected(wide(x), wide(weight), EPS)
    expect_same(run(rms_norm, x, weight, EPS), rounded(expected, dtype), share=0.01)


@pytest.mark.parametrize("weight_dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_result_has_the_type_of_x(weight_dtype: mx.Dtype) -> None:
    x, weight = normal(3, 67), normal(67, dtype=weight_dtype)
    expect_match(run(rms_norm, x, weight, EPS), norm_expected(wide(x), wide(weight), EPS), mx.float32)


def test_eps_is_inside_the_root() -> None:
    x, weight = normal(3, 67, scale=1e-3), normal(67)  # the mean square is as large as eps
    expect_match(run(rms_norm, x, weight, 1e-6), norm_expected(wide(x), wide(weight), 1e-6), mx.float32)


def test_zeros_stay_zeros() -> None:
    expect_same(run(rms_norm, mx.zeros((2, 67)), normal(67), EPS), np.zeros((2, 67)))


def test_a_row_alone_equals_the_row_of_a_batch() -> None:
    x, weight = normal(5, 67, dtype=mx.bfloat16), normal(67)
    together = rms_norm(x, weight, EPS)
    for t in range(5):
        expect_equal(rms_norm(x[t : t + 1], weight, EPS), together[t : t + 1])


@pytest.mark.parametrize("shape", [(66,), (1,), (1, 67)], ids=str)
def test_refuses_a_weight_of_another_shape(shape: tuple[int, ...]) -> None:
    expect_refused("weight", rms_norm, mx.zeros((5, 67)), mx.zeros(shape), EPS)
