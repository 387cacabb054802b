"""The kernel of index_scores against its reference."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import Session, emulate
from support import FLOATS, expect_equal, expect_match, expect_same, normal, run, sizes, wide

from metal_kernels import KernelError, index_scores, kernels
from metal_kernels.index_scores import index_scores_reference

pytestmark = pytest.mark.usefixtures("emulated")

GPU = pytest.mark.parametrize(
    "changes", [{"contract": True}, {"ftz": True}, {"alignment": 4}], ids=["contract", "ftz", "alignment"]
)


def arrays(B: int, T: int, I: int, J: int, S: int, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, ...]:
    return normal(B, T, I, J, dtype=dtype), normal(B, T, I), normal(B, S, J, dtype=dtype)


@FLOATS
@sizes("B T I J S", (2, 3, 5, 67, 33), (1, 2, 16, 40, 131))
def test_index_scores(B: int, T: int, I: int, J: int, S: int, dtype: mx.Dtype) -> None:
    args = arrays(B, T, I, J, S, dtype)
    expect_match(run(index_scores, *args), wide(index_scores_reference(*args)), mx.float32)


@sizes(
    "B T I J S", (1, 1, 1, 1, 1), (1, 1, 3, 2, 2), (2, 3, 8, 32, 64), (1, 1, 9, 33, 65), (1, 7, 64, 31, 15),
    (2, 1, 65, 8, 129), (1, 1, 140, 40, 17), (1, 33, 4, 16, 20),
)  # fmt: skip
def test_other_sizes(B: int, T: int, I: int, J: int, S: int) -> None:
    """Matrices and tiles that are not full, heads in several rounds, arrays of fewer than 8 elements."""
    args = arrays(B, T, I, J, S)
    expect_match(run(index_scores, *args), wide(index_scores_reference(*args)), mx.float32)


@GPU
def test_as_a_gpu_may_run_it(changes: dict[str, Any]) -> None:
    args = arrays(2, 3, 5, 67, 33)
    with emulate(**changes):
        expect_match(index_scores(*args), wide(index_scores_reference(*args)), mx.float32)


@FLOATS
def test_size_of_the_model(dtype: mx.Dtype) -> None:
    """Keys are read once for each query, whatever the number of heads; one launch."""
    args = arrays(1, 2, 64, 128, 200, dtype)
    with emulate(counters=True) as session:
        expect_match(index_scores(*args), wide(index_scores_reference(*args)), mx.float32)
    (launch,) = session.dispatches
    assert (launch.grid, launch.threadgroup, launch.threadgroup_bytes) == ((128, 4, 2), (128, 1, 1), 22528)
    assert launch.traffic["keys"].read_bytes == 2 * args[2].nbytes
    assert launch.traffic["scores"].write_bytes == 2 * 200 * 4


def test_negative_products_are_cut_before_the_weight() -> None:
    """Heads: positive and negative product, positive and negative weight."""
    q = mx.array([[[[1.0], [1.0], [-1.0], [-1.0]]]])
    w = mx.array([[[2.0, -3.0, 5.0, -7.0]]])
    keys = mx.array([[[1.0], [-10.0]]])
    expect_same(run(index_scores, q, w, keys), np.array([[[2 - 3, 50 - 70]]], dtype=float))


@FLOATS
def test_products_and_sums_are_not_rounded(dtype: mx.Dtype) -> None:
    """Whole numbers that float32 has and the low types do not; every order of adding them gives the same."""
    q, keys = (mx.round(normal(1, 2, n, 40, scale=20)).astype(dtype) for n in (9, 70))
    keys, w = keys[:, 0], mx.round(normal(1, 2, 9, scale=5))
    expected = np.einsum("bti,btis->bts", wide(w), np.maximum(np.einsum("btij,bsj->btis", wide(q), wide(keys)), 0))
    assert (abs(expected) > 4096).mean() > 0.5
    expect_same(run(index_scores, q, w, keys), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_key(value: float) -> None:
    q, w, keys = arrays(1, 3, 8, 32, 70)
    keys[0, 41, 17] = value
    expect_match(index_scores(q, w, keys), wide(index_scores_reference(q, w, keys)), mx.float32)


def test_nan_stays_in_its_query() -> None:
    q, w, keys = arrays(1, 3, 5, 40, 70)
    q[0, 1, 4, 39] = float("nan")
    lost = np.isnan(wide(index_scores(q, w, keys)))
    assert lost[0, 1].all() and lost.sum() == 70


def test_a_query_alone_equals_the_query_of_a_batch() -> None:
    q, w, keys = arrays(2, 3, 5, 40, 70, mx.bfloat16)
    together = index_scores(q, w, keys)
    for b in range(2):
        for t in range(3):
            at = (slice(b, b + 1), slice(t, t + 1))
            expect_equal(index_scores(q[at], w[at], keys[at[0]]), together[at])


def test_keys_of_a_larger_cache() -> None:
    """A part of the rows that were allocated, in a batch: not contiguous."""
    q, w, keys = arrays(2, 3, 5, 40, 33)
    more = mx.concatenate([keys, mx.full((2, 9, 40), float("nan"))], axis=1)
    expect_equal(index_scores(q, w, more[:, :33]), index_scores(q, w, keys))


def test_what_is_not_covered(emulated: Session) -> None:
    q, w, keys = arrays(1, 2, 3, 8, 5)
    args = (q, w, keys.astype(mx.bfloat16))
    with pytest.raises(KernelError, match="index_scores: the kernel covers queries and keys of one type"):
        index_scores(*args)
    with kernels("auto"):
        expect_equal(index_scores(*args), index_scores_reference(*args))
    assert not emulated.dispatches
