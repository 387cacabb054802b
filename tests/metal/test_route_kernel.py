"""The kernels of route and route_hash against their references."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import emulate
from support import expect_equal, expect_match, generator, normal, run, sizes, wide

from metal_kernels import KernelError, kernels, route, route_hash
from metal_kernels.route import MAX_CHOSEN, route_hash_reference, route_reference

pytestmark = pytest.mark.usefixtures("emulated")

SCALE = 1.5
GPU = pytest.mark.parametrize(
    "changes", [{"contract": True}, {"ftz": True}, {"alignment": 4}], ids=["contract", "ftz", "alignment"]
)


def by_expert(ids: mx.array, weights: mx.array, E: int) -> np.ndarray:
    """Weights [T, E], NaN where an expert is not chosen; each may be chosen once."""
    assert (ids.dtype, weights.dtype) == (mx.int32, mx.float32) and ids.shape == weights.shape
    i, w = np.array(ids).reshape(-1, ids.shape[-1]), wide(weights).reshape(-1, ids.shape[-1])
    assert ((i >= 0) & (i < E)).all() and all(len(set(row)) == len(row) for row in i)
    out = np.full((len(i), E), np.nan)
    np.put_along_axis(out, i, w, axis=-1)
    return out


def expect_routed(logits: mx.array, bias: mx.array, k: int) -> None:
    """The chosen experts as a set, and the weight of each."""
    E = logits.shape[-1]
    found = by_expert(*run(route, logits, bias, k, SCALE), E)
    expected = by_expert(*route_reference(logits, bias, k, SCALE), E)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, rtol=5e-6)


def in_table(experts: mx.array) -> tuple[mx.array, mx.array]:
    """A table with each token's experts in a row, under rows of others, and the numbers of the rows."""
    rows = experts.reshape(-1, experts.shape[-1])
    T = rows.shape[0]
    table = mx.concatenate([mx.zeros_like(rows), rows[::-1]]).astype(mx.int32)
    return table, (2 * T - 1 - mx.arange(T)).reshape(experts.shape[:-1])


def expect_weights(logits: mx.array, experts: mx.array) -> None:
    table, ids = in_table(experts)
    _, expected = route_hash_reference(logits, table, ids, SCALE)
    chosen, found = run(route_hash, logits, table, ids, SCALE)
    expect_equal(chosen, experts.astype(mx.int32))
    expect_match(found, wide(expected), mx.float32)
    np.testing.assert_allclose(wide(found), wide(expected), rtol=5e-6)


@sizes("T E k", (1, 1, 1), (1, 7, 7), (5, 67, 6), (9, 33, 1), (3, 40, MAX_CHOSEN), (2, 384, 8))
def test_route(T: int, E: int, k: int) -> None:
    """Lanes without an expert, arrays of fewer than 8 elements, threadgroups that are not full."""
    expect_routed(normal(T, E, scale=3), normal(E), k)


@sizes("T", (1,), (9,))
def test_size_of_the_model(T: int) -> None:
    """Logits are read once, in one launch."""
    logits, bias = normal(T, 256, scale=3), normal(256)
    with emulate(counters=True) as session:
        expect_routed(logits, bias, 6)
    launch = session.dispatches[0]
    assert (launch.grid, launch.threadgroup, launch.threadgroup_bytes) == ((32, T, 1), (32, 8, 1), 0)
    assert launch.traffic["logits"].read_bytes == logits.nbytes


@GPU
def test_as_a_gpu_may_run_it(changes: dict[str, Any]) -> None:
    logits, ids = normal(5, 67, scale=3), mx.array(generator().integers(0, 67, (5, 6)).astype(np.int32))
    with emulate(**changes):
        expect_routed(logits, normal(67), 6)
        expect_weights(logits, ids)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=str)
def test_any_leading_shape(lead: tuple[int, ...]) -> None:
    logits = normal(*lead, 67)
    ids, weights = route(logits, normal(67), 6, SCALE)
    assert ids.shape == weights.shape == (*lead, 6)
    expect_routed(logits, normal(67), 6)
    expect_weights(logits, ids)


def test_of_equal_experts_those_with_the_lower_ids() -> None:
    """Few different numbers, so that most places are decided by id; they come in order of their sums."""
    logits, bias = mx.round(normal(9, 67, scale=1.5)), mx.round(normal(67, scale=0.7))
    ids, _ = run(route, logits, bias, 6, SCALE)
    for z, found in zip(wide(logits), np.array(ids), strict=True):
        sums = np.sqrt(np.logaddexp(0, z)).astype(np.float32) + wide(bias).astype(np.float32)
        np.testing.assert_array_equal(found, np.argsort(-np.round(sums, 4), kind="stable")[:6])


def test_all_equal() -> None:
    ids, weights = run(route, mx.zeros((2, 67)), mx.full((67,), -3.0), 6, SCALE)
    np.testing.assert_array_equal(np.array(ids), np.tile(np.arange(6), (2, 1)))
    np.testing.assert_allclose(wide(weights), SCALE / 6, rtol=5e-6)


def test_bias_decides_the_choice_and_not_the_weights() -> None:
    bias = mx.zeros(67)
    bias[mx.array([3, 64])] = 100.0
    bias[5] = -100.0
    expect_routed(normal(5, 67), bias, 6)
    expect_routed(normal(5, 67), normal(67) - 50, 6)
    expect_routed(normal(5, 67), normal(67, scale=1e30), 6)


def test_logits_of_any_size() -> None:
    """Where e^z overflows, where it is next to nothing, and around -20, where the formula changes."""
    logits = mx.concatenate([normal(9, 40, scale=60), normal(9, 20) - 20, mx.full((9, 7), 88.8)], axis=1)
    logits = logits + normal(9, 67, scale=0.1)
    expect_routed(logits, mx.zeros(67), 6)
    expect_routed(-mx.abs(logits), mx.zeros(67), 6)
    # Without the weights of very different size, each would be lost in the relative error of the whole.
    one = mx.linspace(-170, 100, 3000).reshape(-1, 1)
    z = mx.concatenate([one, one + 0.5], axis=1)
    expect_weights(z, mx.broadcast_to(mx.array([0, 1]), z.shape))


def test_every_place_has_an_expert_whatever_the_logits_are() -> None:
    logits, bias = normal(5, 67), normal(67)
    logits[0] = float("nan")
    logits[1, 7:60] = float("nan")
    logits[2] = -mx.inf
    logits[3, 4] = mx.inf
    bias[9] = float("nan")
    ids, weights = run(route, logits, bias, 6, SCALE)
    assert by_expert(ids, mx.nan_to_num(weights), 67).shape == (5, 67)
    assert 9 not in np.array(ids[1:]) and not set(range(7, 60)) & set(np.array(ids[1]).tolist())
    assert 4 in np.array(ids[3])


def test_a_token_does_not_depend_on_the_others() -> None:
    logits, bias = normal(2, 5, 67), normal(67)
    ids, weights = route(logits, bias, 6, SCALE)
    for b in range(2):
        for t in range(5):
            i, w = route(logits[b, t], bias, 6, SCALE)
            expect_equal(i, ids[b, t])
            expect_equal(w, weights[b, t])
            alone = route_hash(logits[b, t], *in_table(ids[b, t]), SCALE)
            for one, all_of_them in zip(alone, route_hash(logits, *in_table(ids), SCALE), strict=True):
                expect_equal(one, all_of_them[b, t])


def test_what_is_not_covered() -> None:
    logits, bias = normal(2, 67), normal(67)
    table, ids = in_table(mx.array(generator().integers(0, 67, (2, 33))))
    with pytest.raises(KernelError, match="route: the kernel covers at most 32 of the experts"):
        route(logits, bias, 33, SCALE)
    with pytest.raises(KernelError, match="route: the kernel covers at most 32 of the experts"):
        route(logits[:, :5], bias[:5], 6, SCALE)
    with pytest.raises(KernelError, match="route_hash: the kernel covers at most 32 experts"):
        route_hash(logits, table, ids, SCALE)
    with pytest.raises(KernelError, match="in a table of int32"):
        route_hash(logits, table[:, :6].astype(mx.int64), ids, SCALE)
    with kernels("auto"):
        expect_equal(route(logits, bias, 33, SCALE)[1], route_reference(logits, bias, 33, SCALE)[1])
        found, expected = (op(logits, table, ids, SCALE)[1] for op in (route_hash, route_hash_reference))
        expect_equal(found, expected)


# --- by token id ------------------------------------------------------------------------------------


@sizes("T E A", (1, 1, 1), (1, 7, 7), (5, 67, 6), (9, 256, 6), (3, 40, MAX_CHOSEN))
def test_route_hash(T: int, E: int, A: int) -> None:
    expect_weights(normal(T, E, scale=3), mx.array(generator().integers(0, E, (T, A)).astype(np.int32)))


def test_only_the_chosen_logits_are_read() -> None:
    logits, ids = normal(9, 256), mx.array(generator().integers(0, 256, (9, 6)).astype(np.int32))
    with emulate(counters=True) as session:
        expect_weights(logits, ids)
    launch = session.dispatches[0]
    assert (launch.grid, launch.threadgroup, launch.threadgroup_bytes) == ((32, 9, 1), (32, 8, 1), 0)
    assert launch.traffic["logits"].read_bytes == launch.traffic["table"].read_bytes == ids.size * 4


@pytest.mark.parametrize("dtype", [mx.int32, mx.int64, mx.uint32, mx.uint16], ids=str)
def test_ids_of_another_integer_type(dtype: mx.Dtype) -> None:
    """An expert that comes twice is two terms."""
    logits, (table, ids) = normal(2, 67), in_table(mx.array([[4, 4, 66, 4, 0, 2], [3, 3, 3, 3, 3, 3]]))
    for found, expected in zip(
        run(route_hash, logits, table, ids.astype(dtype), SCALE), route_hash(logits, table, ids, SCALE), strict=True
    ):
        expect_equal(found, expected)
    expect_weights(logits, table[ids])
