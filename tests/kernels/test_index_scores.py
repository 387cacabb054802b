"""index_scores: weighted sum over the heads of what is positive of each product."""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np
import pytest
from support import FLOATS, expect_match, expect_refused, expect_same, normal, run, sizes, wide

from metal_kernels import index_scores


def scores_expected(q: mx.array, w: mx.array, keys: mx.array) -> np.ndarray:
    Q, W, K = wide(q), wide(w), wide(keys)
    out = np.zeros((*Q.shape[:2], K.shape[1]))
    for b in range(Q.shape[0]):
        for t in range(Q.shape[1]):
            for i in range(Q.shape[2]):
                out[b, t] += W[b, t, i] * np.maximum(K[b] @ Q[b, t, i], 0)
    return out


def arrays(B: int, T: int, I: int, J: int, S: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array]:
    return normal(B, T, I, J, dtype=dtype), normal(B, T, I), normal(B, S, J, dtype=dtype)


@FLOATS
@sizes("B T I J S", (1, 1, 1, 1, 1), (1, 1, 7, 67, 130), (1, 5, 3, 20, 1), (2, 3, 5, 67, 33), (2, 7, 16, 33, 131))
def test_index_scores(B: int, T: int, I: int, J: int, S: int, dtype: mx.Dtype) -> None:
    q, w, keys = arrays(B, T, I, J, S, dtype)
    expect_match(run(index_scores, q, w, keys), scores_expected(q, w, keys), mx.float32)


def test_negative_products_are_cut_before_the_weight() -> None:
    """Heads: positive and negative product, positive and negative weight."""
    q = mx.array([[[[1.0], [1.0], [-1.0], [-1.0]]]])
    w = mx.array([[[2.0, -3.0, 5.0, -7.0]]])
    keys = mx.array([[[1.0], [-10.0]]])
    expect_same(run(index_scores, q, w, keys), np.array([[[2 - 3, 50 - 70]]], dtype=float))


@pytest.mark.parametrize("work", [1, 4 * 2 * 3 * 5 * 7])
@pytest.mark.parametrize("S", [1, 6, 7, 8, 14, 33])
def test_in_parts(work: int, S: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row, or seven rows at a time."""
    q, w, keys = arrays(2, 3, 5, 20, S, mx.bfloat16)
    whole = index_scores(q, w, keys)
    monkeypatch.setattr(sys.modules["metal_kernels.index_scores"], "_WORK_BYTES", work)
    found = run(index_scores, q, w, keys)
    expect_match(found, scores_expected(q, w, keys), mx.float32)
    expect_match(found, wide(whole), mx.float32)


def test_a_row_of_a_batch_equals_that_row_alone() -> None:
    q, w, keys = arrays(3, 5, 4, 20, 33, mx.bfloat16)
    together = wide(index_scores(q, w, keys))
    for b in range(3):
        row = slice(b, b + 1)
        expect_match(index_scores(q[row], w[row], keys[row]), together[row], mx.float32)


def test_refuses_other_shapes() -> None:
    q, w, keys = arrays(2, 3, 5, 20, 7, mx.float32)
    expect_refused("w", index_scores, q, w[:, :, :1], keys)
    expect_refused("w", index_scores, q, w[:, :1], keys)
    expect_refused("keys", index_scores, q, w, keys[:1])
    expect_refused("keys", index_scores, q, w, keys[:, :, :-1])
    expect_refused("keys", index_scores, q, w, keys[:, :, None])
