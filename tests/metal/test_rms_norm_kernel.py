"""The kernel of rms_norm against its reference."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import emulate
from support import FLOATS, expect_equal, expect_match, expect_same, normal, run, sizes, wide

from metal_kernels import rms_norm
from metal_kernels.rms_norm import THREADS, rms_norm

pytestmark = pytest.mark.usefixtures("emulated")

EPS = 1e-6
GPU = pytest.mark.parametrize(
    "changes", [{"contract": True}, {"ftz": True}, {"alignment": 4}], ids=["contract", "ftz", "alignment"]
)


@FLOATS
@pytest.mark.parametrize("weighted", [True, False], ids=["weight", "plain"])
def test_rms_norm(weighted: bool, dtype: mx.Dtype) -> None:
    args = (normal(2, 3, 67, dtype=dtype), normal(67) if weighted else None, EPS)
    expect_match(run(rms_norm, *args), wide(rms_norm(*args)), dtype)


@sizes("T D", (1, 1), (3, 2), (2, 32), (3, 300), (2, THREADS + 1), (1, 3 * THREADS - 40))
def test_other_sizes(T: int, D: int) -> None:
    """Threads without an element and with several, and arrays of fewer than 8."""
    args = (normal(T, D), normal(D), EPS)
    expect_match(run(rms_norm, *args), wide(rms_norm(*args)), mx.float32)


@GPU
def test_as_a_gpu_may_run_it(changes: dict[str, Any]) -> None:
    args = (normal(5, 67), normal(67), EPS)
    with emulate(**changes):
        expect_match(rms_norm(*args), wide(rms_norm(*args)), mx.float32)


@sizes("T D", (2, 1024), (1, 4096))
def test_size_of_the_model(T: int, D: int) -> None:
    """Rows are read once, in one launch."""
    args = (normal(T, D, dtype=mx.bfloat16), normal(D, dtype=mx.bfloat16), EPS)
    with emulate(counters=True) as session:
        expect_match(rms_norm(*args), wide(rms_norm(*args)), mx.bfloat16)
    (launch,) = session.dispatches
    assert (launch.grid, launch.threadgroup, launch.threadgroup_bytes) == ((512, T, 1), (512, 1, 1), 64)
    assert launch.traffic["x"].read_bytes == args[0].nbytes == launch.traffic["y"].write_bytes


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_rounded_once_after_the_weight(dtype: mx.Dtype) -> None:
    args = (normal(9, 301, dtype=dtype), normal(301, dtype=dtype), EPS)
    expect_same(run(rms_norm, *args), wide(rms_norm(*args)), share=0.002)


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_eps_is_inside_the_root(eps: float) -> None:
    args = (normal(3, 67, scale=1e-3), normal(67), eps)
    expect_match(run(rms_norm, *args), wide(rms_norm(*args)), mx.float32)


def test_a_row_does_not_depend_on_the_others() -> None:
    x, weight = normal(2, 3, 67, dtype=mx.bfloat16), normal(67)
    together = rms_norm(x, weight, EPS)
    for b in range(2):
        for t in range(3):
            expect_equal(rms_norm(x[b, t], weight, EPS), together[b, t])


def test_zeros_stay_zeros_and_nan_stays_in_its_row() -> None:
    x = normal(5, 300)
    x[1] = 0.0
    x[3, 299] = float("nan")
    found = wide(rms_norm(x, normal(300), EPS))
    assert (found[1] == 0).all() and np.isnan(found[3]).all() and np.isnan(found).sum() == 300


def test_rows_that_are_not_contiguous() -> None:
    x, weight = normal(5, 140), normal(70)
    expect_equal(rms_norm(x[:, 70:], weight, EPS), rms_norm(mx.contiguous(x[:, 70:]), weight, EPS))
