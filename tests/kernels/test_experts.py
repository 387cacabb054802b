"""Products with the weights of chosen experts, pair by pair, with the weights decoded from their bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support import (
    BOUNDS,
    dtype_name,
    expect_equal,
    expect_match,
    expect_refused,
    expect_same,
    generator,
    normal,
    packed_weights,
    rounded,
    run,
    sizes,
    wide,
)

from metal_kernels import (
    ExpertWeights,
    KernelError,
    add_shared,
    expert_down,
    expert_down_sum,
    expert_gate_up,
    swiglu,
)
from metal_kernels.experts import AFFINE_BITS, AFFINE_GROUPS

MODES = pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "plain"])
MODES_AND_FLOATS = pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        pytest.param(mode, dtype, id=f"{mode},{dtype_name(dtype)}")
        for mode in ("mxfp4", "mxfp8", "plain")
        for dtype in BOUNDS
    ],
)
# With enough columns that a sum in a low type would show.
SIZES = sizes("E T P D F", (1, 1, 1, 32, 32), (5, 7, 11, 64, 96), (3, 2, 5, 992, 32), (2, 3, 5, 32, 992))


def silu(g: np.ndarray) -> np.ndarray:
    return g / (1 + np.exp(-g))


def random_weights(E: int, rows: int, columns: int, mode: str, dtype: mx.Dtype) -> tuple[ExpertWeights, np.ndarray]:
    """The weights of E experts in a format, and the numbers they stand for, [E, rows, columns]."""
    if mode == "plain":
        plain = normal(E, rows, columns, dtype=dtype, scale=columns**-0.5)
        return ExpertWeights(plain, None, mode), wide(plain)
    weight, scales, values = packed_weights(E, rows, columns, mode=mode)
    return ExpertWeights(weight, scales, mode), values


def shared_weights(rows: int, columns: int, mode: str, dtype: mx.Dtype) -> tuple[ExpertWeights, np.ndarray]:
    """The same of the shared expert, [rows, columns]."""
    w, values = random_weights(1, rows, columns, mode, dtype)
    return ExpertWeights(w.weight[0], None if w.scales is None else w.scales[0], mode), values[0]


def pairs(E: int, T: int, P: int) -> tuple[mx.array, mx.array, mx.array]:
    """Token, expert and weight of P pairs, in no order."""
    token, expert = generator().integers(0, T, P), generator().integers(0, E, P)
    return mx.array(token.astype(np.int32)), mx.array(expert.astype(np.int32)), mx.abs(normal(P))


def gate_up_expected(x, w1, w3, token, expert, weight, limit):  # type: ignore[no-untyped-def]
    """Pair by pair; the two products are rounded to the type of x."""
    out = []
    for t, e, w in zip(np.array(token), np.array(expert), wide(weight), strict=True):
        g, u = (rounded(m[e] @ wide(x)[t], x.dtype) for m in (w1, w3))
        out.append(w * silu(np.minimum(g, limit)) * np.clip(u, -limit, limit))
    return np.array(out)


@MODES_AND_FLOATS
@SIZES
@pytest.mark.parametrize("limit", [10.0, 0.5])
def test_expert_gate_up(E, T, P, D, F, mode, dtype, limit):  # type: ignore[no-untyped-def]
    x = normal(T, D, dtype=dtype)
    (w1, v1), (w3, v3) = (random_weights(E, F, D, mode, dtype) for _ in range(2))
    token, expert, weight = pairs(E, T, P)
    found = run(expert_gate_up, x, w1, w3, token, expert, weight, limit, False)
    expect_match(found, gate_up_expected(x, v1, v3, token, expert, weight, limit), dtype)


@MODES_AND_FLOATS
@SIZES
def test_expert_down(E, T, P, D, F, mode, dtype):  # type: ignore[no-untyped-def]
    h, (w2, v2), (_, expert, _) = normal(P, F, dtype=dtype), random_weights(E, D, F, mode, dtype), pairs(E, T, P)
    expected = np.array([v2[e] @ row for e, row in zip(np.array(expert), wide(h), strict=True)])
    expect_match(run(expert_down, h, w2, expert, False), expected, dtype)


@MODES_AND_FLOATS
@pytest.mark.parametrize("shared_mode", ["mxfp8", "plain"])
@sizes("E T A D F", (1, 1, 1, 32, 32), (5, 3, 4, 96, 64))
def test_expert_down_sum(E, T, A, D, F, mode, shared_mode, dtype):  # type: ignore[no-untyped-def]
    """Each product is rounded to the type of h, and their sum once."""
    h, (w2, v2) = normal(T * A + T, F, dtype=dtype), random_weights(E, D, F, mode, dtype)
    shared, shared_values = shared_weights(D, F, shared_mode, dtype)
    expert = generator().integers(0, E, (T, A))
    products = rounded(np.einsum("tadf,taf->tad", v2[expert], wide(h[: T * A]).reshape(T, A, F)), dtype)
    expected = products.sum(axis=1) + rounded(wide(h[T * A :]) @ shared_values.T, dtype)
    found = run(expert_down_sum, h, w2, mx.array(expert.astype(np.int32)), shared)
    expect_match(found, expected, dtype)
    if dtype != mx.float32 and shared_mode != "plain":
        expect_same(found, rounded(expected, dtype), share=0.02)


@MODES_AND_FLOATS
@pytest.mark.parametrize("shared_mode", ["mxfp8", "plain"])
def test_gate_up_of_the_shared_expert(mode, shared_mode, dtype):  # type: ignore[no-untyped-def]
    """Its rows come after the pairs, one for each token, without a weight."""
    x, (token, expert, weight) = normal(5, 64, dtype=dtype), pairs(3, 5, 9)
    (w1, _), (w3, _) = (random_weights(3, 96, 64, mode, dtype) for _ in range(2))
    (s1, v1), (s3, v3) = (shared_weights(96, 64, shared_mode, dtype) for _ in range(2))
    args = x, w1, w3, token, expert, weight, 0.5, False
    found = run(expert_gate_up, *args, (s1, s3))
    expect_equal(found[:9], expert_gate_up(*args))
    all_tokens = np.arange(5), np.zeros(5, int), mx.ones(5)
    expect_match(found[9:], gate_up_expected(x, v1[None], v3[None], *all_tokens, 0.5), dtype)


def test_sum_with_the_shared_expert() -> None:
    """In float32, and rounded once."""
    routed, shared = normal(5, 6, 67, dtype=mx.bfloat16), normal(5, 67, dtype=mx.bfloat16)
    expected = rounded(wide(routed).sum(axis=1) + wide(shared), mx.bfloat16)
    expect_same(run(add_shared, routed, shared), expected, share=0.01)


AFFINE = pytest.mark.parametrize(
    ("bits", "group_size"), [(bits, size) for bits in AFFINE_BITS for size in AFFINE_GROUPS], ids=str
)


def affine(bits: int, group_size: int, *shape: int) -> tuple[ExpertWeights, np.ndarray]:
    """Numbers in a stream of bits from the lowest on, and the values they stand for."""
    codes = generator().integers(0, 1 << bits, shape)
    stream = (codes[..., None] >> np.arange(bits) & 1).astype(np.uint8).reshape(*shape[:-1], -1)
    words = mx.array(np.packbits(stream, axis=-1, bitorder="little")).view(mx.uint32)
    scales, biases = (
        normal(*shape[:-1], shape[-1] // group_size, scale=0.1),
        normal(*shape[:-1], shape[-1] // group_size),
    )
    values = codes * wide(scales).repeat(group_size, -1) + wide(biases).repeat(group_size, -1)
    return ExpertWeights(words, scales, "affine", biases, bits, group_size), values


@AFFINE
def test_affine_weights(bits: int, group_size: int) -> None:
    w, values = affine(bits, group_size, 3, 41, 256)
    unpacked = mx.dequantize(w.weight, w.scales, w.biases, group_size=group_size, bits=bits)
    np.testing.assert_allclose(wide(unpacked), values, rtol=1e-5, atol=1e-5)
    h, (_, expert, _) = normal(7, 256), pairs(3, 5, 7)
    expected = np.array([values[e] @ row for e, row in zip(np.array(expert), wide(h), strict=True)])
    expect_match(run(expert_down, h, w, expert, False), expected, mx.float32)
    shared, v = affine(bits, group_size, 41, 256)
    found = run(expert_down_sum, normal(6, 256), w, expert[:3, None], shared)
    assert found.shape == (3, 41) and np.isfinite(wide(found)).all()
    ones = mx.concatenate([mx.zeros((3, 256)), mx.ones((3, 256))])
    expect_match(expert_down_sum(ones, w, expert[:3, None], shared), np.tile(v.sum(axis=1), (3, 1)), mx.float32)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mode": "fp3"}, "mode: expected affine or one of"),
        ({"bits": 7}, "affine weights: expected bits of"),
        ({"group_size": 16}, "affine weights: .* found 4 and 16"),
        ({"biases": None}, "w2.biases: expected them with mode affine alone"),
        ({"biases": mx.zeros((3, 41, 1))}, "w2.biases: expected shape"),
        ({"mode": "mxfp4"}, "w2.scales: expected shape"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refuses_formats_that_do_not_exist(changes: dict[str, Any], named: str) -> None:
    w, _ = affine(4, 64, 3, 41, 256)
    with pytest.raises(KernelError, match=named):
        expert_down(normal(2, 256), dataclasses.replace(w, **changes), mx.array([0, 1]), False)


def test_odd_sizes_of_plain_weights() -> None:
    x, (token, expert, weight) = normal(5, 67), pairs(3, 5, 9)
    (w1, v1), (w3, v3), (w2, v2) = (
        random_weights(3, *shape, "plain", mx.float32) for shape in ((41, 67), (41, 67), (67, 41))
    )
    h = run(expert_gate_up, x, w1, w3, token, expert, weight, 0.5, False)
    expect_match(h, gate_up_expected(x, v1, v3, token, expert, weight, 0.5), mx.float32)
    expected = np.array([v2[e] @ row for e, row in zip(np.array(expert), wide(h), strict=True)])
    expect_match(run(expert_down, h, w2, expert, False), expected, mx.float32)


@MODES_AND_FLOATS
def test_sorted_pairs_equal_unsorted_ones(mode: str, dtype: mx.Dtype) -> None:
    """With long runs of one expert, a run of one pair, and an expert nobody chose."""
    expert = mx.array([0] * 17 + [1] + [3] * 9 + [4] * 2)
    P = expert.size
    x, token, weight = normal(6, 64, dtype=dtype), mx.array(generator().integers(0, 6, P)), mx.abs(normal(P))
    (w1, _), (w3, _), (w2, _) = (
        random_weights(5, *shape, mode, dtype) for shape in ((96, 64), (96, 64), (64, 96))
    )  # fmt: skip
    plain, in_runs = (
        run(expert_gate_up, x, w1, w3, token, expert, weight, 10.0, ascending) for ascending in (False, True)
    )
    expect_match(in_runs, wide(plain), dtype)
    down, down_in_runs = (run(expert_down, plain, w2, expert, ascending) for ascending in (False, True))
    expect_match(down_in_runs, wide(down), dtype)


@MODES
def test_a_pair_alone_equals_the_pair_among_others(mode: str) -> None:
    x, (token, expert, weight) = normal(5, 64), pairs(3, 5, 9)
    (w1, _), (w3, _), (w2, _) = (
        random_weights(3, *shape, mode, mx.float32) for shape in ((32, 64), (32, 64), (64, 32))
    )
    h = expert_gate_up(x, w1, w3, token, expert, weight, 10.0, False)
    y = expert_down(h, w2, expert, False)
    for p in range(9):
        one = slice(p, p + 1)
        alone = expert_gate_up(x, w1, w3, token[one], expert[one], weight[one], 10.0, False)
        expect_match(alone, wide(h)[one], mx.float32)
        expect_match(expert_down(h[one], w2, expert[one], False), wide(y)[one], mx.float32)


def test_a_pair_twice_is_two_terms() -> None:
    """As in a row of the table by token id that names an expert twice: each has its own weight."""
    x, (w1, v1), (w3, v3) = (
        normal(2, 64),
        random_weights(3, 32, 64, "mxfp4", mx.float32),
        random_weights(3, 32, 64, "mxfp4", mx.float32),
    )
    token, expert, weight = mx.array([1, 1, 1]), mx.array([2, 2, 2]), mx.array([0.25, 1.0, 0.25])
    found = run(expert_gate_up, x, w1, w3, token, expert, weight, 10.0, True)
    expect_match(found, gate_up_expected(x, v1, v3, token, expert, weight, 10.0), mx.float32)
    expect_same(found[1], 4 * wide(found[0]))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_products_are_rounded_before_the_activation_and_once_after_the_weight(dtype: mx.Dtype) -> None:
    x, (token, expert, weight) = normal(7, 64, dtype=dtype), pairs(3, 7, 29)
    (w1, v1), (w3, v3) = (random_weights(3, 96, 64, "mxfp4", dtype) for _ in range(2))
    expected = rounded(gate_up_expected(x, v1, v3, token, expert, weight, 10.0), dtype)
    expect_same(run(expert_gate_up, x, w1, w3, token, expert, weight, 10.0, False), expected, share=0.01)


def test_refuses_other_shapes() -> None:
    x, (token, expert, weight) = normal(5, 64), pairs(3, 5, 9)
    w1, w3, w2 = (random_weights(3, *s, "mxfp4", mx.float32)[0] for s in ((32, 64), (32, 64), (64, 32)))
    expect_refused("token", expert_gate_up, x, w1, w3, token[:8], expert, weight, 10.0, False)
    expect_refused("weight", expert_gate_up, x, w1, w3, token, expert, weight[:1], 10.0, False)
    expect_refused("weight", expert_gate_up, x, w1, w3, token, expert, weight[:, None], 10.0, False)
    expect_refused("expert", expert_down, normal(9, 32), w2, expert[:8], False)
    shared, other = (shared_weights(rows, 32, "mxfp8", mx.float32)[0] for rows in (64, 32))
    expert = expert.reshape(3, 3)
    expect_refused("h", expert_down_sum, normal(9, 32), w2, expert, shared)
    expect_refused("w2", expert_down_sum, normal(12, 96), w2, expert, shared)
    expect_refused("shared w2", expert_down_sum, normal(12, 32), w2, expert, other)
    flat = expert.flatten()
    expect_refused(
        "shared w3",
        expert_gate_up,
        x,
        w1,
        w3,
        token,
        flat,
        weight,
        10.0,
        False,
        (dataclasses.replace(w1, weight=w1.weight[0], scales=w1.scales[0]), shared),
    )


@pytest.mark.parametrize("argument", ["w1", "w3", "w2"])
def test_refuses_weights_of_another_width(argument: str) -> None:
    x, h, (token, expert, weight) = normal(5, 64), normal(9, 96), pairs(3, 5, 9)
    w, other = (random_weights(3, *shape, "mxfp4", mx.float32)[0] for shape in ((32, 64), (32, 128)))
    if argument == "w2":
        expect_refused("w2", expert_down, h, w, expert, False)
    else:
        w1, w3 = (other, w) if argument == "w1" else (w, other)
        expect_refused(argument, expert_gate_up, x, w1, w3, token, expert, weight, 10.0, False)


# --- the activation ---------------------------------------------------------------------------------


def test_swiglu() -> None:
    g, u = normal(5, 67, scale=3), normal(5, 67, scale=3)
    G, U = wide(g), wide(u)
    for limit in (10.0, 1.0):
        expect_match(run(swiglu, g, u, limit), silu(np.minimum(G, limit)) * np.clip(U, -limit, limit), mx.float32)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_swiglu_is_float32_for_any_type(dtype: mx.Dtype) -> None:
    g, u = normal(5, 67, dtype=dtype, scale=3), normal(5, 67, dtype=dtype, scale=3)
    expected = silu(np.minimum(wide(g), 2.0)) * np.clip(wide(u), -2, 2)
    expect_match(run(swiglu, g, u, 2.0), expected, mx.float32)


def test_gate_is_clamped_from_above_only_and_up_on_both_sides() -> None:
    g = mx.array([-100.0, -3, -0.6, 0.4, 0.6, 3])
    one = mx.ones(6)
    expect_match(run(swiglu, g, one, 0.5), silu(np.array([-100, -3, -0.6, 0.4, 0.5, 0.5])) * 0.5, mx.float32)
    found = run(swiglu, one * 0.25, g, 0.5)
    expect_match(found, silu(0.25) * np.array([-0.5, -0.5, -0.5, 0.4, 0.5, 0.5]), mx.float32)


def test_gate_is_clamped_before_the_activation() -> None:
    """silu(0.5) = 0.31, which a clamp after it would leave alone; silu(3) = 2.86 would become 0.5."""
    found = run(swiglu, mx.array([3.0, 0.5]), mx.ones(2), 0.5)
    expect_equal(found[0], found[1])
    expect_match(found, np.full(2, 0.5 * silu(0.5)), mx.float32)
