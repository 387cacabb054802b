"""project_f32 against a product in float64."""

from __future__ import annotations

import sys

import mlx.core as mx
import pytest
from support import FLOATS, dtype_name, expect_match, expect_refused, normal, run, sizes, wide

from metal_kernels import project_f32


@FLOATS
@pytest.mark.parametrize("weight_dtype", [mx.float32, mx.bfloat16], ids=lambda d: f"weight-{dtype_name(d)}")
@sizes("T K M", (1, 1, 1), (5, 67, 24), (3, 1031, 5), (33, 300, 7))
def test_float32_sums_of_any_type(T: int, K: int, M: int, dtype: mx.Dtype, weight_dtype: mx.Dtype) -> None:
    """The products of two bfloat16 numbers are exact in float32: only the sum has an error."""
    x, weight = normal(T, K, dtype=dtype), normal(M, K, dtype=weight_dtype)
    expect_match(run(project_f32, x, weight), wide(x) @ wide(weight).T, mx.float32)


@pytest.mark.parametrize("shape", [(67,), (5, 67), (2, 5, 67)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    x, weight = normal(*shape, dtype=mx.bfloat16), normal(24, 67, dtype=mx.bfloat16)
    expect_match(run(project_f32, x, weight), wide(x) @ wide(weight).T, mx.float32)


@pytest.mark.parametrize("M", [1, 6, 7, 8, 14, 20])
def test_weight_in_parts_of_seven_rows(M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = normal(5, 67, dtype=mx.bfloat16), normal(M, 67, dtype=mx.bfloat16)
    whole = project_f32(x, weight)
    monkeypatch.setattr(sys.modules["metal_kernels.project_f32"], "_ROWS", 7)
    found = run(project_f32, x, weight)
    expect_match(found, wide(x) @ wide(weight).T, mx.float32)
    expect_match(found, wide(whole), mx.float32)


def test_a_row_of_a_batch_equals_that_row_alone() -> None:
    x, weight = normal(3, 5, 67), normal(24, 67)
    together = wide(project_f32(x, weight))
    for b in range(3):
        expect_match(project_f32(x[b : b + 1], weight), together[b : b + 1], mx.float32)


def test_refuses_a_weight_of_another_shape() -> None:
    expect_refused("weight", project_f32, normal(5, 67), normal(24, 66))
    expect_refused("weight", project_f32, normal(5, 67), normal(67))
    expect_refused("weight", project_f32, normal(5, 67), normal(2, 24, 67))
