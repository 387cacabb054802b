"""The kernel of stream_collapse against its reference."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import emulate
from support import FLOATS, expect_equal, expect_match, expect_same, norm_expected, normal, rounded, run, sizes, wide

from metal_kernels import stream_collapse
from metal_kernels.stream_collapse import THREADS, stream_collapse_reference

pytestmark = pytest.mark.usefixtures("emulated")

EPS = 1e-6


def arrays(*lead: int, N: int, D: int, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array, mx.array]:
    return normal(*lead, N, D, dtype=dtype), normal(*lead, N), normal(D)


@FLOATS
@sizes("B T N D", (1, 1, 4, 67), (2, 3, 4, 67))
def test_stream_collapse(B: int, T: int, N: int, D: int, dtype: mx.Dtype) -> None:
    args = (*arrays(B, T, N=N, D=D, dtype=dtype), EPS)
    expect_match(run(stream_collapse, *args), wide(stream_collapse_reference(*args)), dtype)


@sizes("T N D", (5, 3, 300), (2, 4, THREADS + 1), (2, 1, 3 * THREADS - 40), (3, 5, 32), (1, 2, 3), (1, 1, 1))
def test_other_sizes(T: int, N: int, D: int) -> None:
    """Threads without an element and with several, and arrays of fewer than 8."""
    args = (*arrays(T, N=N, D=D), EPS)
    expect_match(run(stream_collapse, *args), wide(stream_collapse_reference(*args)), mx.float32)


@pytest.mark.parametrize(
    "changes", [{"contract": True}, {"ftz": True}, {"alignment": 4}], ids=["contract", "ftz", "alignment"]
)
def test_as_a_gpu_may_run_it(changes: dict[str, Any]) -> None:
    args = (*arrays(2, 3, N=4, D=67), EPS)
    with emulate(**changes):
        expect_match(stream_collapse(*args), wide(stream_collapse_reference(*args)), mx.float32)


def test_size_of_the_model() -> None:
    """Streams are read once."""
    x, pre, weight = arrays(2, N=4, D=4096, dtype=mx.bfloat16)
    weight = weight.astype(mx.bfloat16)
    expected = stream_collapse_reference(x, pre, weight, EPS)
    with emulate(counters=True) as session:
        expect_match(stream_collapse(x, pre, weight, EPS), wide(expected), mx.bfloat16)
    (launch,) = session.dispatches
    assert (launch.grid, launch.threadgroup, launch.threadgroup_bytes) == ((512, 2, 1), (512, 1, 1), 64)
    assert launch.traffic["x"].read_bytes == x.nbytes


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_rounded_before_and_after_the_norm(dtype: mx.Dtype) -> None:
    x, pre, weight = arrays(9, N=4, D=67, dtype=dtype)
    total = rounded(np.einsum("tn,tnd->td", wide(pre), wide(x)), dtype)
    expected = rounded(norm_expected(total, wide(weight), EPS), dtype)
    expect_same(run(stream_collapse, x, pre, weight, EPS), expected, share=0.01)


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_eps_is_inside_the_root(eps: float) -> None:
    x, pre, weight = arrays(2, N=4, D=67)
    args = (x * 1e-3, pre, weight, eps)
    expect_match(run(stream_collapse, *args), wide(stream_collapse_reference(*args)), mx.float32)


def test_a_token_does_not_depend_on_the_others() -> None:
    x, pre, weight = arrays(2, 3, N=4, D=67, dtype=mx.bfloat16)
    together = stream_collapse(x, pre, weight, EPS)
    for b in range(2):
        for t in range(3):
            at = (slice(b, b + 1), slice(t, t + 1))
            expect_equal(stream_collapse(x[at], pre[at], weight, EPS), together[at])


def test_nan_stays_in_its_token() -> None:
    x, pre, weight = arrays(5, N=3, D=300)
    x[3, 1, 299] = float("nan")
    lost = np.isnan(wide(stream_collapse(x, pre, weight, EPS)))
    assert lost[3].all() and lost.sum() == 300
