"""The kernel of stream_expand against its reference."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import emulate
from support import FLOATS, expect_equal, expect_match, expect_same, normal, rounded, run, sizes, wide

from metal_kernels import stream_expand
from metal_kernels.stream_expand import stream_expand_reference

pytestmark = pytest.mark.usefixtures("emulated")


def arrays(*lead: int, N: int, D: int, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, ...]:
    x, y = normal(*lead, N, D, dtype=dtype), normal(*lead, D, dtype=dtype)
    return x, y, normal(*lead, N), normal(*lead, N, N)


@FLOATS
@sizes("B T N D", (1, 1, 4, 67), (2, 3, 4, 67))
def test_stream_expand(B: int, T: int, N: int, D: int, dtype: mx.Dtype) -> None:
    args = arrays(B, T, N=N, D=D, dtype=dtype)
    expect_match(run(stream_expand, *args), wide(stream_expand_reference(*args)), dtype)


@sizes("T N D", (5, 3, 300), (2, 1, 257), (3, 5, 32), (1, 2, 3), (1, 1, 1))
def test_other_sizes(T: int, N: int, D: int) -> None:
    """Threadgroups that reach beyond the last element, and arrays of fewer than 8."""
    args = arrays(T, N=N, D=D)
    expect_match(run(stream_expand, *args), wide(stream_expand_reference(*args)), mx.float32)


@pytest.mark.parametrize(
    "changes", [{"contract": True}, {"ftz": True}, {"alignment": 4}], ids=["contract", "ftz", "alignment"]
)
def test_as_a_gpu_may_run_it(changes: dict[str, Any]) -> None:
    args = arrays(2, 3, N=4, D=67)
    with emulate(**changes):
        expect_match(stream_expand(*args), wide(stream_expand_reference(*args)), mx.float32)


def test_size_of_the_model() -> None:
    """Streams and result are read once."""
    args = arrays(2, N=4, D=4096, dtype=mx.bfloat16)
    with emulate(counters=True) as session:
        expect_match(stream_expand(*args), wide(stream_expand_reference(*args)), mx.bfloat16)
    (launch,) = session.dispatches
    assert (launch.grid, launch.threadgroup, launch.threadgroup_bytes) == ((4096, 2, 1), (256, 1, 1), 0)
    for name, array in zip("xy", args, strict=False):
        assert launch.traffic[name].read_bytes == array.nbytes


def test_first_index_of_comb_is_the_source() -> None:
    x, y, post, comb = arrays(2, N=4, D=67)
    comb = mx.zeros_like(comb)
    comb[1, 1, 3] = 1.0  # stream 1 goes to stream 3
    expected = np.zeros((2, 4, 67))
    expected[1, 3] = wide(x)[1, 1]
    expect_same(run(stream_expand, x, y, mx.zeros_like(post), comb), expected)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_rounded_once(dtype: mx.Dtype) -> None:
    args = arrays(2, 3, N=4, D=67, dtype=dtype)
    x, y, post, comb = (wide(a) for a in args)
    expected = rounded(np.einsum("btjk,btjd->btkd", comb, x) + post[..., None] * y[..., None, :], dtype)
    expect_same(run(stream_expand, *args), expected, share=0.01)


def test_a_token_does_not_depend_on_the_others() -> None:
    x, y, post, comb = arrays(2, 3, N=4, D=67, dtype=mx.bfloat16)
    together = stream_expand(x, y, post, comb)
    for b in range(2):
        for t in range(3):
            at = (slice(b, b + 1), slice(t, t + 1))
            expect_equal(stream_expand(x[at], y[at], post[at], comb[at]), together[at])


def test_nan_stays_in_its_column() -> None:
    args = arrays(5, N=3, D=300)
    args[0][3, 1, 299] = float("nan")
    lost = np.isnan(wide(stream_expand(*args)))
    assert lost[3, :, 299].all() and lost.sum() == 3
