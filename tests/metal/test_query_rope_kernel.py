"""The kernel of query_rope against its reference."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import emulate
from support import FLOATS, expect_equal, expect_match, expect_same, normal, rotation, run, sizes, wide

from metal_kernels import KernelError, kernels, query_rope
from metal_kernels.query_rope import query_rope_reference

pytestmark = pytest.mark.usefixtures("emulated")

EPS = 1e-6
GPU = pytest.mark.parametrize(
    "changes", [{"contract": True}, {"ftz": True}, {"alignment": 4}], ids=["contract", "ftz", "alignment"]
)


def arrays(B: int, T: int, H: int, K: int, P: int, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, ...]:
    """Heads of different size: a norm over more than one head would show."""
    q = (normal(B, T, H, K) * mx.arange(1, H + 1)[:, None]).astype(dtype)
    return q, *rotation(np.arange(T) + 7, P // 2)


@FLOATS
@sizes("B T H K P", (2, 3, 5, 70, 6), (2, 3, 4, 130, 64))
def test_query_rope(B: int, T: int, H: int, K: int, P: int, dtype: mx.Dtype) -> None:
    args = (*arrays(B, T, H, K, P, dtype), EPS)
    expect_match(run(query_rope, *args), wide(query_rope_reference(*args)), dtype)


@sizes("B T H K P", (1, 1, 1, 2, 2), (1, 1, 1, 4, 4), (1, 3, 1, 6, 2), (2, 7, 5, 20, 2), (1, 2, 8, 64, 64))
def test_other_sizes(B: int, T: int, H: int, K: int, P: int) -> None:
    """Lanes without a pair, arrays of fewer than 8 elements, threadgroups that are not full."""
    args = (*arrays(B, T, H, K, P), EPS)
    expect_match(run(query_rope, *args), wide(query_rope_reference(*args)), mx.float32)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_rounded_after_the_norm_and_after_the_rotation(dtype: mx.Dtype) -> None:
    args = (*arrays(2, 7, 5, 130, 64, dtype), EPS)
    expect_same(run(query_rope, *args), wide(query_rope_reference(*args)), share=0.002)


@GPU
def test_as_a_gpu_may_run_it(changes: dict[str, Any]) -> None:
    args = (*arrays(2, 3, 5, 70, 6), EPS)
    with emulate(**changes):
        expect_match(query_rope(*args), wide(query_rope_reference(*args)), mx.float32)


def test_size_of_the_model() -> None:
    """Heads are read once, in one launch."""
    args = (*arrays(1, 2, 64, 512, 64, mx.bfloat16), EPS)
    with emulate(counters=True) as session:
        expect_match(query_rope(*args), wide(query_rope_reference(*args)), mx.bfloat16)
    (launch,) = session.dispatches
    assert (launch.grid, launch.threadgroup, launch.threadgroup_bytes) == ((32, 128, 1), (32, 8, 1), 0)
    assert launch.traffic["q"].read_bytes == args[0].nbytes == launch.traffic["out"].write_bytes


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_eps_is_inside_the_root(eps: float) -> None:
    q, cos, sin = arrays(1, 3, 2, 20, 6)
    args = (q * 1e-3, cos, sin, eps)
    expect_match(run(query_rope, *args), wide(query_rope_reference(*args)), mx.float32)


def test_a_token_of_a_batch_equals_that_token_alone() -> None:
    q, cos, sin = arrays(2, 3, 5, 70, 6, mx.bfloat16)
    together = query_rope(q, cos, sin, EPS)
    for b in range(2):
        for t in range(3):
            at = (slice(b, b + 1), slice(t, t + 1))
            expect_equal(query_rope(q[at], cos[at[1]], sin[at[1]], EPS), together[at])


def test_nan_stays_in_its_head() -> None:
    q, cos, sin = arrays(1, 2, 5, 70, 6)
    q[0, 1, 3, 69] = float("nan")
    lost = np.isnan(wide(query_rope(q, cos, sin, EPS)))
    assert lost[0, 1, 3].all() and lost.sum() == 70


def test_heads_that_are_not_contiguous() -> None:
    q, cos, sin = arrays(1, 3, 5, 70, 6)
    turned = mx.contiguous(q.swapaxes(1, 2)).swapaxes(1, 2)
    expect_equal(query_rope(turned, cos, sin, EPS), query_rope(q, cos, sin, EPS))


def test_what_is_not_covered() -> None:
    args = (*arrays(1, 2, 3, 67, 6), EPS)
    with pytest.raises(KernelError, match="query_rope: the kernel covers an even number of dimensions"):
        query_rope(*args)
    with kernels("auto"):
        expect_equal(query_rope(*args), query_rope_reference(*args))
