"""route and route_hash against the formulas of section 7 of the specification."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from support import expect_equal, expect_match, expect_refused, generator, normal, run, sizes, wide

from metal_kernels import route, route_hash


def scores(logits: np.ndarray) -> np.ndarray:
    return np.sqrt(np.logaddexp(0, logits))


def expect_routed(logits: mx.array, bias: mx.array, k: int, scale: float) -> None:
    """The chosen experts as a set, and the weight of each."""
    ids, weights = run(route, logits, bias, k, scale)
    assert (ids.dtype, weights.dtype) == (mx.int32, mx.float32)
    lead, E = logits.shape[:-1], logits.shape[-1]
    assert ids.shape == weights.shape == (*lead, k)
    ids, weights = np.array(ids).reshape(-1, k), wide(weights).reshape(-1, k)
    for t, z in enumerate(wide(logits).reshape(-1, E)):
        s = scores(z)
        best = np.argsort(-(s + wide(bias)))[:k]
        assert set(ids[t]) == set(best), f"token {t}: expected experts {sorted(best)}, found {sorted(ids[t])}"
        np.testing.assert_allclose(weights[t], s[ids[t]] / s[best].sum() * scale, rtol=5e-6)


def expect_weights(logits: np.ndarray, ids: np.ndarray, scale: float) -> None:
    """With the experts of each token in a row of a table, and rows of others around it."""
    s = np.take_along_axis(scores(logits), ids, axis=-1)
    rows = generator().permutation(2 * ids[..., 0].size)[: ids[..., 0].size].reshape(ids.shape[:-1])
    table = generator().integers(0, logits.shape[-1], (2 * rows.size, ids.shape[-1])).astype(np.int32)
    table[rows] = ids
    args = mx.array(logits.astype(np.float32)), mx.array(table), mx.array(rows.astype(np.int32)), scale
    experts, weights = run(route_hash, *args)
    expect_equal(experts, mx.array(ids.astype(np.int32)))
    expect_match(weights, s / s.sum(axis=-1, keepdims=True) * scale, mx.float32)


@sizes("T E k", (1, 1, 1), (1, 7, 7), (5, 67, 6), (33, 256, 6), (3, 13, 1))
def test_route(T: int, E: int, k: int) -> None:
    expect_routed(normal(T, E, scale=3), normal(E), k, 1.5)


def test_any_leading_shape() -> None:
    expect_routed(normal(67), normal(67), 6, 1.5)
    expect_routed(normal(2, 3, 67), normal(67), 6, 1.5)


def test_bias_decides_the_choice_and_not_the_weights() -> None:
    """The bias brings in the two experts with the lowest scores."""
    logits = mx.arange(8).astype(mx.float32)[None]
    bias = mx.array([100.0, 100, 0, 0, 0, 0, 0, 0])
    ids, weights = run(route, logits, bias, 3, 2.5)
    assert set(np.array(ids[0])) == {0, 1, 7}
    s = scores(np.array([0.0, 1, 7]))
    np.testing.assert_allclose(wide(weights[0])[np.argsort(np.array(ids[0]))], s / s.sum() * 2.5, rtol=5e-6)


def test_bias_may_make_every_sum_negative() -> None:
    expect_routed(normal(5, 67), normal(67) - 50, 6, 1.5)


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.5])
def test_weights_sum_to_the_scale(scale: float) -> None:
    _, weights = run(route, normal(5, 67), normal(67), 6, scale)
    np.testing.assert_allclose(wide(weights).sum(axis=-1), scale, rtol=5e-6)


def test_softplus_of_large_logits() -> None:
    """e^100 is beyond float32: the score is 10 there, and nothing at -100."""
    logits = generator().choice([-100.0, -60, -1, 0, 1, 60, 100], (9, 20))
    logits[:, 0] = 100
    ids = np.array([generator().permutation(20)[:6] for _ in range(9)])
    ids[:, 0] = 0
    expect_weights(logits, ids, 1.5)
    distinct = mx.array([[-100.0, 99, 100, 40, -20, 3]])
    expect_routed(distinct, mx.zeros(6), 3, 1.5)


def test_scores_of_small_logits_keep_their_ratios() -> None:
    """Where e^z is next to nothing, 1 + e^z must not swallow it."""
    expect_weights(np.array([[-20.0, -21, -30, -40, -60, -80]]), np.arange(6)[None], 1.5)
    expect_weights(np.array([[-70.0, -80, -71, -84, -85, -86]]), np.arange(6)[None], 1.5)


@pytest.mark.parametrize("z", [-90.0, -100.0])
def test_weights_are_finite_if_all_logits_are_very_negative(z: float) -> None:
    expect_weights(np.full((2, 6), z), np.tile(np.arange(3), (2, 1)), 1.5)


# --- by token id ------------------------------------------------------------------------------------


@sizes("T E A", (1, 1, 1), (1, 7, 7), (5, 67, 6), (33, 256, 6))
def test_route_hash(T: int, E: int, A: int) -> None:
    ids = np.array([generator().permutation(E)[:A] for _ in range(T)])
    expect_weights(wide(normal(T, E, scale=3)), ids, 1.5)


def test_hash_any_leading_shape() -> None:
    expect_weights(wide(normal(2, 3, 67)), generator().integers(0, 67, (2, 3, 6)), 1.5)


def test_an_expert_twice_counts_as_two() -> None:
    """Each place has its own weight, and the sum has as many terms as there are places."""
    ids = np.array([[4, 4, 2, 4, 0, 2], [3, 3, 3, 3, 3, 3]])
    logits = wide(normal(2, 7))
    expect_weights(logits, ids, 1.5)
    table, tokens = mx.array(ids.astype(np.int32)), mx.arange(2)
    weights = wide(route_hash(mx.array(logits.astype(np.float32)), table, tokens, 1.5)[1])
    np.testing.assert_allclose(weights[1], 0.25, rtol=5e-6)


def test_hash_ids_of_another_integer_type() -> None:
    logits, table, ids = (
        normal(3, 7),
        mx.array(generator().integers(0, 7, (9, 4)).astype(np.int32)),
        mx.array([8, 0, 5]),
    )
    for found, expected in zip(
        route_hash(logits, table, ids.astype(mx.int64), 1.5), route_hash(logits, table, ids, 1.5), strict=True
    ):
        expect_equal(found, expected)


def test_a_token_alone_equals_the_token_of_a_batch() -> None:
    logits, bias = normal(5, 67), normal(67)
    ids, weights = route(logits, bias, 6, 1.5)
    for t in range(5):
        i, w = route(logits[t : t + 1], bias, 6, 1.5)
        expect_equal(i, ids[t : t + 1])
        expect_equal(w, weights[t : t + 1])
        alone, together = route_hash(logits[t], ids, mx.array(t), 1.5), route_hash(logits, ids, mx.arange(5), 1.5)
        for a, b in zip(alone, together, strict=True):
            expect_equal(a, b[t])


def test_refuses_other_shapes() -> None:
    logits, table, ids = normal(5, 67), mx.zeros((9, 6), mx.int32), mx.zeros(5, mx.int32)
    expect_refused("bias", route, logits, normal(66), 6, 1.5)
    expect_refused("bias", route, logits, normal(1), 6, 1.5)
    expect_refused("ids", route_hash, logits, table, ids[:4], 1.5)
    expect_refused("ids", route_hash, logits, table, ids[0], 1.5)
