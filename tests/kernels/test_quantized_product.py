"""quantized_product against weights decoded from their bits."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from support import FLOATS, expect_match, expect_same, normal, packed_weights, rounded, run, sizes, wide

from metal_kernels import quantized_product

MODES = pytest.mark.parametrize("mode", ["mxfp4", "mxfp8"])


@FLOATS
@MODES
# With enough columns that a sum in a low type would show.
@sizes("M N K", (1, 1, 32), (5, 67, 96), (3, 24, 2016))
def test_float32_sums_of_any_type(M: int, N: int, K: int, mode: str, dtype: mx.Dtype) -> None:
    x, (weight, scales, values) = normal(M, K, dtype=dtype), packed_weights(N, K, mode=mode)
    expect_match(run(quantized_product, x, weight, scales, mode), wide(x) @ values.T, dtype)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
@MODES
def test_rounded_once(mode: str, dtype: mx.Dtype) -> None:
    x, (weight, scales, values) = normal(7, 288, dtype=dtype), packed_weights(67, 288, mode=mode)
    found = run(quantized_product, x, weight, scales, mode)
    expect_same(found, rounded(wide(x) @ values.T, dtype), share=0.01)


@MODES
def test_groups_have_weights_of_their_own(mode: str) -> None:
    x, (weight, scales, values) = normal(3, 5, 64), packed_weights(3, 7, 64, mode=mode)
    expect_match(run(quantized_product, x, weight, scales, mode), wide(x) @ np.swapaxes(values, 1, 2), mx.float32)


@MODES
def test_any_leading_shape(mode: str) -> None:
    weight, scales, values = packed_weights(24, 64, mode=mode)
    for shape in ((64,), (2, 64), (2, 3, 64)):
        x = normal(*shape)
        expect_match(run(quantized_product, x, weight, scales, mode), wide(x) @ values.T, mx.float32)


@MODES
def test_a_row_of_a_batch_equals_that_row_alone(mode: str) -> None:
    x, (weight, scales, _) = normal(3, 5, 64), packed_weights(24, 64, mode=mode)
    together = wide(quantized_product(x, weight, scales, mode))
    for b in range(3):
        expect_match(quantized_product(x[b : b + 1], weight, scales, mode), together[b : b + 1], mx.float32)
