"""The comparisons fail when they should, and the types' rounding is that of torch."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from support import (
    BOUNDS,
    FLOATS,
    dtype_name,
    expect_equal,
    expect_match,
    expect_refused,
    expect_same,
    normal,
    rounded,
    run,
    wide,
)

from metal_kernels import rms_norm

# Half a step above a number.
HALF_STEP = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}


@FLOATS
def test_rounding_is_that_of_torch(dtype: mx.Dtype) -> None:
    x = wide(normal(1000)) * 2.0 ** np.arange(-10, 10).repeat(50)
    ties = np.sign(x) * 2.0 ** np.floor(np.log2(np.abs(x))) * (1 + (2 * np.arange(1000) + 1) % 64 * HALF_STEP[dtype])
    for values in (x, ties, -ties, np.array([0.0, np.inf, -np.inf])):
        theirs = torch.from_numpy(values).to(getattr(torch, dtype_name(dtype))).double().numpy()
        np.testing.assert_array_equal(rounded(values, dtype), theirs)


@FLOATS
def test_match_allows_an_error_up_to_the_bound(dtype: mx.Dtype) -> None:
    x = normal(50, 67, dtype=dtype)
    expected = wide(x)
    expect_match(x, expected * (1 + 0.99 * BOUNDS[dtype]), dtype)
    with pytest.raises(AssertionError, match="relative error"):
        expect_match(x, expected * (1 + 1.05 * BOUNDS[dtype]), dtype)


def test_match_names_the_worst_element_and_both_values() -> None:
    expected = np.ones((3, 5))
    found = mx.ones((3, 5))
    found[1, 4] = 1.5
    with pytest.raises(AssertionError, match=r"worst at \(1, 4\): expected .*1\.0.*, found .*1\.5"):
        expect_match(found, expected, mx.float32)


def test_match_wants_the_type_and_the_shape() -> None:
    with pytest.raises(AssertionError, match=r"expected mlx\.core\.bfloat16, found mlx\.core\.float32"):
        expect_match(mx.ones(3), np.ones(3), mx.bfloat16)
    with pytest.raises(AssertionError, match="expected shape"):
        expect_match(mx.ones(3), np.ones((1, 3)), mx.float32)


@pytest.mark.parametrize("found", [[1, 2.0], [np.nan, 2], [-np.inf, 2], [np.inf, np.nan]], ids=str)
def test_match_wants_nan_and_infinity_in_the_same_places(found: list[float]) -> None:
    expect_match(mx.array([np.inf, 2.0]), np.array([np.inf, 2.0]), mx.float32)
    expect_match(mx.array([np.nan, 2.0]), np.array([np.nan, 2.0]), mx.float32)
    with pytest.raises(AssertionError, match="NaN or infinity in other places"):
        expect_match(mx.array(found), np.array([np.inf, 2.0]), mx.float32)


def test_same_allows_a_share_of_others() -> None:
    expected = np.arange(100.0)
    found = mx.array((expected + (expected == 7)).astype(np.float32))
    expect_same(found, expected, share=0.01)
    with pytest.raises(AssertionError, match=r"1 of 100 elements differ: worst at \(7,\): .*7\.0.*8\.0"):
        expect_same(found, expected)


def test_equal_compares_bits() -> None:
    expect_equal(mx.array([0.0, np.nan]), mx.array([0.0, np.nan]))
    for other in (mx.array([0.0]), mx.array([0.0, 1.0]), mx.array([-0.0, np.nan]), mx.zeros(2, mx.bfloat16)):
        with pytest.raises(AssertionError):
            expect_equal(mx.array([0.0, np.nan]), other)


def test_run_notices_different_results_and_changed_inputs() -> None:
    calls = []

    def unsteady(x: mx.array) -> mx.array:
        calls.append(x)
        return x + len(calls)

    with pytest.raises(AssertionError, match="unsteady: two runs differ"):
        run(unsteady, mx.zeros(3))

    def careless(x: mx.array) -> mx.array:
        x[0] = 1
        return mx.zeros(3)

    with pytest.raises(AssertionError, match="careless: an input of shape"):
        run(careless, mx.zeros(3))


def test_refusal_must_name_the_argument() -> None:
    arguments = (mx.zeros((2, 3)), mx.zeros(2), 1e-6)
    expect_refused("weight", rms_norm, *arguments)
    with pytest.raises(AssertionError, match="Regex"):
        expect_refused("x", rms_norm, *arguments)
