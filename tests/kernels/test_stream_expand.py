"""stream_expand: the streams mixed, and the sublayer's result added to each."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from support import FLOATS, expect_equal, expect_match, expect_refused, expect_same, normal, rounded, run, sizes, wide

from metal_kernels import stream_expand


def expand_expected(x: mx.array, y: mx.array, post: mx.array, comb: mx.array) -> np.ndarray:
    X, F, p, C = wide(x), wide(y), wide(post), wide(comb)
    out = np.zeros_like(X)
    for k in range(X.shape[-2]):
        out[..., k, :] = p[..., k, None] * F
        for j in range(X.shape[-2]):
            out[..., k, :] += C[..., j, k, None] * X[..., j, :]
    return out


@FLOATS
@sizes("B T N D", (1, 1, 4, 67), (1, 5, 4, 67), (2, 3, 5, 20), (2, 7, 1, 300))
def test_stream_expand(B: int, T: int, N: int, D: int, dtype: mx.Dtype) -> None:
    x, y = normal(B, T, N, D, dtype=dtype), normal(B, T, D, dtype=dtype)
    post, comb = normal(B, T, N), normal(B, T, N, N)
    expect_match(run(stream_expand, x, y, post, comb), expand_expected(x, y, post, comb), dtype)


def test_first_index_of_comb_is_the_source() -> None:
    x, comb = normal(1, 4, 67), mx.zeros((1, 4, 4))
    comb[0, 1, 3] = 1.0  # stream 1 goes to stream 3
    found = run(stream_expand, x, mx.zeros((1, 67)), mx.zeros((1, 4)), comb)
    expected = np.zeros((1, 4, 67))
    expected[0, 3] = wide(x)[0, 1]
    expect_same(found, expected)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_rounded_once(dtype: mx.Dtype) -> None:
    x, y = normal(9, 4, 301, dtype=dtype), normal(9, 301, dtype=dtype)
    post, comb = normal(9, 4), normal(9, 4, 4)
    expected = rounded(expand_expected(x, y, post, comb), dtype)
    expect_same(run(stream_expand, x, y, post, comb), expected, share=0.01)


def test_a_row_of_a_batch_equals_that_row_alone() -> None:
    x, y = normal(3, 5, 4, 67, dtype=mx.bfloat16), normal(3, 5, 67, dtype=mx.bfloat16)
    post, comb = normal(3, 5, 4), normal(3, 5, 4, 4)
    together = stream_expand(x, y, post, comb)
    for b in range(3):
        row = slice(b, b + 1)
        expect_equal(stream_expand(x[row], y[row], post[row], comb[row]), together[row])


def test_refuses_other_shapes() -> None:
    x, y, post, comb = normal(5, 4, 67), normal(5, 67), normal(5, 4), normal(5, 4, 4)
    expect_refused("y", stream_expand, x, y[:, :1], post, comb)
    expect_refused("y", stream_expand, x, y[:1], post, comb)
    expect_refused("post", stream_expand, x, y, post[:, :3], comb)
    expect_refused("comb", stream_expand, x, y, post, comb[:, :3])
    expect_refused("comb", stream_expand, x, y, post, comb[0])
