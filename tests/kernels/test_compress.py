"""compress: a softmax over the tokens of a group in every channel, then what every stored row goes through."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from support import (
    FLOATS,
    compress,
    dtype_name,
    expect_equal,
    expect_match,
    expect_refused,
    expect_same,
    fp4_expected,
    fp8_expected,
    hadamard_expected,
    norm_expected,
    normal,
    rope_expected,
    rotation,
    rounded,
    run,
    sizes,
    wide,
)

from metal_kernels import compress as compress_tokens

EPS = 1e-6
# The transform rounds after each of its steps, not once.
# Groups of 4 that overlap, groups of 128, and a group of one.
SHAPES = sizes("B S M K P", (1, 1, 8, 70, 6), (2, 5, 8, 134, 6), (2, 3, 128, 66, 2), (1, 2, 1, 130, 66))


def pool_expected(kv: mx.array, gate: mx.array) -> np.ndarray:
    """Channel by channel; a gate of minus infinity has no part in the sum."""
    value, g = wide(kv), wide(gate)
    out = np.zeros((value.shape[0], value.shape[1], value.shape[3]))
    for b, s, c in np.ndindex(out.shape):
        present = g[b, s, :, c] > -np.inf
        share = np.exp(g[b, s, present, c] - g[b, s, present, c].max())
        out[b, s, c] = (share * value[b, s, present, c]).sum() / share.sum()
    return out


def row_expected(kv, gate, weight, cos, sin, dtype):  # type: ignore[no-untyped-def]
    normed = rounded(norm_expected(rounded(pool_expected(kv, gate), dtype), wide(weight), EPS), dtype)
    return rope_expected(normed, cos, sin, dtype)


def arrays(B: int, S: int, M: int, K: int, P: int) -> tuple[mx.array, ...]:
    return normal(B, S, M, K), normal(B, S, M, K, scale=2), normal(K), *rotation(np.arange(S) * 4, P // 2)


@FLOATS
@SHAPES
def test_as_pooled(B: int, S: int, M: int, K: int, P: int, dtype: mx.Dtype) -> None:
    args = arrays(B, S, M, K, P)
    expect_match(run(compress, *args, EPS, dtype, "none"), row_expected(*args, dtype), dtype)


@FLOATS
@SHAPES
def test_rows_to_attend(B: int, S: int, M: int, K: int, P: int, dtype: mx.Dtype) -> None:
    args = arrays(B, S, M, K, P)
    found, expected = run(compress, *args, EPS, dtype, "fp8"), row_expected(*args, dtype)
    still = rounded(fp8_expected(expected[..., : K - P], 64), dtype)
    expect_same(found[..., : K - P], still, share=0.005)
    expect_match(found[..., K - P :], expected[..., K - P :], dtype)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=dtype_name)
@sizes("B S M K P", (1, 40, 8, 128, 64), (2, 70, 8, 32, 6), (1, 50, 128, 64, 2))
def test_index_keys(B: int, S: int, M: int, K: int, P: int, dtype: mx.Dtype) -> None:
    args = arrays(B, S, M, K, P)
    turned = rounded(hadamard_expected(row_expected(*args, dtype)), dtype)
    found = run(compress, *args, EPS, dtype, "fp4")
    expect_same(found, rounded(fp4_expected(turned), dtype), share=0.002)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_rounded_after_pooling_after_the_norm_and_after_the_rotation(dtype: mx.Dtype) -> None:
    args = arrays(2, 9, 8, 64, 32)
    expect_same(run(compress, *args, EPS, dtype, "none"), row_expected(*args, dtype), share=0.01)


@pytest.mark.parametrize("other", [32, 128])
def test_fp8_blocks_of_64_not_others(other: int) -> None:
    kv, gate, _, cos, sin = arrays(1, 5, 8, 256 + 6, 6)
    size = np.concatenate([np.repeat([1, 1e-5, 1e-5, 1e-5, 1, 1, 1e-5, 1e-5], 32), np.ones(6)])
    weight = mx.array(size.astype(np.float32))
    row = row_expected(kv, gate, weight, cos, sin, mx.float32)[..., :256]
    expected, wrong = fp8_expected(row, 64), fp8_expected(row, other)
    assert (expected != wrong).mean() > 0.1, "these numbers cannot tell the block sizes apart"
    found = run(compress, kv, gate, weight, cos, sin, EPS, mx.float32, "fp8")
    expect_same(found[..., :256], expected, share=0.001)


def test_fp4_blocks_are_32_wide() -> None:
    """A row with two large numbers, 32 apart: after the transform the first half is larger than the second."""
    row = np.zeros(64)
    row[0], row[32], row[1] = 800, 792, 0.35
    before = hadamard_expected(norm_expected(row, 1, EPS))
    assert (fp4_expected(before, 32) != fp4_expected(before, 64)).mean() > 0.2
    kv, gate = mx.array(row.astype(np.float32)).reshape(1, 1, 1, 64), mx.zeros((1, 1, 1, 64))
    found = run(compress, kv, gate, mx.ones(64), mx.ones((1, 1)), mx.zeros((1, 1)), EPS, mx.float32, "fp4")
    expect_same(found, fp4_expected(before, 32).reshape(1, 1, 64))


def test_softmax_is_separate_for_every_channel() -> None:
    """In every channel another token has all the weight."""
    gate = np.full((1, 1, 4, 4), -200.0)
    kv = np.arange(16.0).reshape(1, 1, 4, 4) + 1
    order = [2, 0, 3, 1]
    gate[0, 0, order, range(4)] = 200
    found = run(
        compress, mx.array(kv.astype(np.float32)), mx.array(gate.astype(np.float32)), mx.ones(4), mx.ones((1, 1)),
        mx.zeros((1, 1)), EPS, mx.float32, "none",
    )  # fmt: skip
    expect_match(found, norm_expected(kv[0, 0, order, range(4)], 1, EPS).reshape(1, 1, 4), mx.float32)


def test_first_group_has_no_group_before_it() -> None:
    """Gates of minus infinity: as if there were only the other four tokens, whatever their values are."""
    kv, gate, weight, cos, sin = arrays(2, 3, 8, 70, 6)
    gate[:, 0, :4] = -mx.inf
    found = run(compress, kv, gate, weight, cos, sin, EPS, mx.float32, "none")
    expect_match(found, row_expected(kv, gate, weight, cos, sin, mx.float32), mx.float32)
    alone = compress(kv[:, :1, 4:], gate[:, :1, 4:], weight, cos[:1], sin[:1], EPS, mx.float32, "none")
    expect_match(found[:, :1], wide(alone), mx.float32)
    kv[:, 0, :4] = 3e38
    expect_equal(compress(kv, gate, weight, cos, sin, EPS, mx.float32, "none"), found)


def test_large_gates_do_not_overflow() -> None:
    kv, gate, weight, cos, sin = arrays(1, 3, 8, 70, 6)
    found = run(compress, kv, gate + 5000, weight, cos, sin, EPS, mx.float32, "none")
    expect_match(found, row_expected(kv, gate + 5000, weight, cos, sin, mx.float32), mx.float32)


def test_each_row_has_its_own_angles() -> None:
    kv, gate, weight, cos, sin = arrays(1, 5, 8, 70, 6)
    found = compress(kv, gate, weight, cos, sin, EPS, mx.float32, "fp8")
    for s in range(5):
        row = slice(s, s + 1)
        alone = compress(kv[:, row], gate[:, row], weight, cos[row], sin[row], EPS, mx.float32, "fp8")
        expect_equal(alone, found[:, row])


@pytest.mark.parametrize("quant", ["none", "fp8", "fp4"])
def test_a_row_of_a_batch_equals_that_row_alone(quant: str) -> None:
    # All numbers of a row are FP4, and those that are not rotated FP8, so both widths are multiples of their blocks.
    kv, gate, weight, cos, sin = arrays(3, 5, 8, 128, 64)
    together = compress(kv, gate, weight, cos, sin, EPS, mx.bfloat16, quant)
    for b in range(3):
        row = slice(b, b + 1)
        expect_equal(compress(kv[row], gate[row], weight, cos, sin, EPS, mx.bfloat16, quant), together[row])


TOKENS = {"kv": 3, "gate": 3 + 2 * 70, "start": 5, "before": True}


def overlapping(B: int, n: int, S: int, K: int = 70) -> tuple[mx.array, ...]:
    """Tokens of two halves each, in groups of 4, and columns that are not theirs."""
    return normal(B, n, 4 * K + 5), normal(4, 2 * K), normal(K), *rotation(np.arange(S) * 4, 3)


def row_of(tokens: mx.array, ape: mx.array, K: int, first: int, before: bool) -> tuple[np.ndarray, np.ndarray]:
    """Values and gates of the 8 candidates of the group whose first token is in row `first`; rows go round."""
    values, gates, n = [], [], tokens.shape[1]
    for m in range(8):
        row, half = tokens[:, (first - 4 + m) % n], slice(m // 4 * K, m // 4 * K + K)
        values.append(wide(row)[:, 3:][:, half])
        gates.append(wide(row)[:, 3 + 2 * K :][:, half] + wide(ape)[m % 4, half])
        if m < 4 and not before:
            gates[-1] = np.full_like(gates[-1], -np.inf)
    return np.stack(values, 1), np.stack(gates, 1)


@sizes("n S", (20, 3), (8, 1), (16, 2))
@pytest.mark.parametrize("start", [4, 5, 0, 7])
@pytest.mark.parametrize("before", [True, False])
def test_overlapping_groups_of_tokens_that_go_round(n: int, S: int, start: int, before: bool) -> None:
    tokens, ape, weight, cos, sin = args = overlapping(2, n, S)
    found = run(compress_tokens, *args, EPS, mx.float32, "none", **{**TOKENS, "start": start, "before": before})
    rows = [row_of(tokens, ape, 70, start + 4 * s, before or s > 0) for s in range(S)]
    kv, gate = (mx.array(np.stack(part, 1).astype(np.float32)) for part in zip(*rows, strict=True))
    expect_match(found, row_expected(kv, gate, weight, cos, sin, mx.float32), mx.float32)


def test_ape_of_groups_that_do_not_overlap() -> None:
    kv, gate, *rest = arrays(2, 3, 5, 70, 6)
    ape = normal(5, 70)
    expect_equal(
        compress(kv, gate, *rest, EPS, mx.float32, "none", ape=ape),
        compress(kv, gate + ape, *rest, EPS, mx.float32, "none"),
    )


def test_refuses_other_shapes() -> None:
    tokens, ape, weight, cos, sin = overlapping(2, 12, 2)
    rest = (EPS, mx.float32, "none")
    expect_refused("ape", compress_tokens, tokens, ape[:, :-1], weight, cos, sin, *rest, **TOKENS)
    expect_refused("weight", compress_tokens, tokens, ape, weight[None], cos, sin, *rest, **TOKENS)
    expect_refused("tokens", compress_tokens, tokens[..., :280], ape, weight, cos, sin, *rest, **TOKENS)
    expect_refused("sin", compress_tokens, tokens, ape, weight, cos, sin[:1], *rest, **TOKENS)


@pytest.mark.parametrize(("quant", "K"), [("fp8", 68), ("fp4", 48)])
def test_refuses_a_part_of_a_block(quant: str, K: int) -> None:
    expect_refused("weight", compress, *arrays(2, 3, 8, K, 6), EPS, mx.float32, quant)
