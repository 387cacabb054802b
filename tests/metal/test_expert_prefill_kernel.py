"""The kernels for pairs sorted by expert against the references of expert_gate_up and expert_down."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import Session, emulate
from support import BOUNDS, dtype_name, expect_equal, expect_match, expect_same, generator, normal, run, sizes, wide
from test_experts_kernel import (
    GPU,
    LIMIT,
    MODES,
    MODES_AND_FLOATS,
    every_weight,
    integers,
    many_weights,
    weights,
    with_code,
)

from metal_kernels import ExpertWeights, KernelError, _dispatch, expert_down, expert_gate_up, kernels
from metal_kernels.experts import MAX_PAIRS, expert_down_reference, expert_gate_up_reference

pytestmark = pytest.mark.usefixtures("emulated", "chosen")

LOW = pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=dtype_name)
TILE = 32


@pytest.fixture
def chosen() -> Iterator[None]:
    with _dispatch.expert_prefill("metal"):
        yield


def of_each(*counts: int) -> mx.array:
    """Experts of the pairs: so many of expert 0, so many of expert 1, ..."""
    return mx.array(np.repeat(np.arange(len(counts), dtype=np.int32), counts))


def gate_up_arrays(
    expert: mx.array, E: int, T: int, D: int, F: int, mode: str, dtype: mx.Dtype = mx.float32
) -> tuple[Any, ...]:
    x, w1, w3 = normal(T, D, dtype=dtype), weights(E, F, D, mode), weights(E, F, D, mode)
    return x, w1, w3, integers(T, expert.size), expert, mx.abs(normal(expert.size)), LIMIT, True


def down_arrays(expert: mx.array, E: int, D: int, F: int, mode: str, dtype: mx.Dtype = mx.float32) -> tuple[Any, ...]:
    return normal(expert.size, F, dtype=dtype), weights(E, D, F, mode), expert, True


def expect_both(expert: mx.array, E: int, T: int, D: int, F: int, mode: str, dtype: mx.Dtype = mx.float32) -> None:
    args = gate_up_arrays(expert, E, T, D, F, mode, dtype)
    expect_match(run(expert_gate_up, *args), wide(expert_gate_up_reference(*args)), dtype)
    args = down_arrays(expert, E, F, D, mode, dtype)
    expect_match(run(expert_down, *args), wide(expert_down_reference(*args)), dtype)


# --- equal to the references ------------------------------------------------------------------------


@MODES_AND_FLOATS
def test_against_the_references(mode: str, dtype: mx.Dtype, emulated: Session) -> None:
    expect_both(of_each(17, 0, 40, 1, 9), 5, 7, 96, 67, mode, dtype)
    assert {d.kernel for d in emulated.dispatches} == {
        "expert_offsets", "expert_gate_up_prefill", "expert_down_prefill",
    }  # fmt: skip


@MODES
@sizes("E T P D F", (1, 1, 1, 32, 2), (1, 1, 1, 32, 7), (2, 3, 5, 1056, 8), (3, 5, 33, 64, 65), (5, 2, 34, 160, 66))
def test_other_sizes(E: int, T: int, P: int, D: int, F: int, mode: str) -> None:
    """Columns in part of a tile, rows beyond the last, arrays of fewer than 8 elements."""
    expect_both(mx.sort(integers(E, P)), E, T, D, F, mode)


@pytest.mark.parametrize(
    "counts",
    [
        (TILE,), (TILE + 1, TILE - 1), (0, 0, 2 * TILE, 0), (0, 3 * TILE + 1), (97, 0, 0), (1,) * 40, (0, 1),
        (TILE - 1, 1, TILE, TILE + 1, 0, 2 * TILE - 1, 1), (0,) * 255 + (5,), (5,) + (0,) * 255,
    ],
    ids=lambda counts: f"{sum(counts)} pairs, {len(counts)} experts, most {max(counts)}",
)  # fmt: skip
def test_any_segments(counts: tuple[int, ...]) -> None:
    """Whole tiles, tiles in part, experts without pairs at both ends and in between, all pairs of one expert."""
    expert = of_each(*counts)
    x, w1, w3 = normal(5, 32), *(many_weights(len(counts), 5, 32, "mxfp4") for _ in range(2))
    args = x, w1, w3, integers(5, expert.size), expert, mx.abs(normal(expert.size)), LIMIT, True
    expect_match(expert_gate_up(*args), wide(expert_gate_up_reference(*args)), mx.float32)
    args = normal(expert.size, 32), w1, expert, True
    expect_match(expert_down(*args), wide(expert_down_reference(*args)), mx.float32)


@GPU
def test_as_a_gpu_may_run_it(changes: dict[str, Any]) -> None:
    with emulate(**changes):
        expect_both(of_each(3, 0, 6), 3, 2, 96, 13, "mxfp8")


@MODES
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=dtype_name)
def test_every_code_and_scale(mode: str, dtype: mx.Dtype) -> None:
    """A column at a time; exact, also in a type that has fewer exponents than the weights.

    Scales with which a code is beyond float32 are left out: infinity times the zeros of the other columns is NaN.
    """
    packed, values = every_weight(mode)
    finite = np.isfinite(values).all(axis=1)
    assert finite.sum() >= 246
    columns = generator().permutation(values.shape[1])[:40]
    h = mx.array(np.eye(values.shape[1], dtype=np.float32)[columns]).astype(dtype)
    found = expert_down(h, packed, mx.zeros(len(columns), mx.int32), True)
    expected = mx.array(values[:, columns].T).astype(dtype)
    np.testing.assert_array_equal(wide(found)[:, finite], wide(expected)[:, finite])


# --- what is rounded, and what is not finite ----------------------------------------------------------


@LOW
def test_products_are_rounded_before_the_activation_and_once_after_the_weight(dtype: mx.Dtype) -> None:
    args = gate_up_arrays(of_each(11, 18, 0), 3, 7, 64, 96, "mxfp4", dtype)
    expect_same(run(expert_gate_up, *args), wide(expert_gate_up_reference(*args)), share=0.002)


@pytest.mark.parametrize("limit", [10.0, 0.5, 0.01])
def test_gate_is_clamped_from_above_only_and_up_on_both_sides(limit: float) -> None:
    """Gates from far below zero, where their exponential overflows, to far above the limit."""
    x, w1, w3, *pairs, _, _ = gate_up_arrays(of_each(3, 3, 3), 3, 5, 64, 41, "mxfp8")
    args = x * mx.array([[0.1], [1.0], [10.0], [100.0], [1000.0]]), w1, w3, *pairs, limit, True
    expect_match(run(expert_gate_up, *args), wide(expert_gate_up_reference(*args)), mx.float32)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_what_is_not_finite_stays_in_its_pair(value: float) -> None:
    """And is the same as in the reference: the clamps keep NaN and bring infinity to the limit."""
    x, *rest = gate_up_arrays(of_each(3, 0, 6), 3, 3, 64, 13, "mxfp4")
    x[1, 37] = value
    found = expert_gate_up(x, *rest)
    expect_match(found, wide(expert_gate_up_reference(x, *rest)), mx.float32)
    assert np.isfinite(wide(found)[np.array(rest[2]) != 1]).all()
    h, *more = down_arrays(of_each(3, 0, 6), 3, 13, 64, "mxfp4")
    h[4, 37] = value
    found = expert_down(h, *more)
    expect_match(found, wide(expert_down_reference(h, *more)), mx.float32)
    assert np.isfinite(np.delete(wide(found), 4, axis=0)).all()


@pytest.mark.parametrize("which", ["w1", "w3"])
@pytest.mark.parametrize("column", [32, 33, 34, 35])
def test_nan_among_the_weights(which: str, column: int) -> None:
    x, w1, w3, token, _, *rest = gate_up_arrays(of_each(1, 1), 2, 1, 64, 9, "mxfp8")
    w1, w3 = (with_code(w, (1, 3, column), 0x7F) if name == which else w for name, w in (("w1", w1), ("w3", w3)))
    lost = np.isnan(wide(expert_gate_up(x, w1, w3, token, mx.array([0, 1]), *rest)))
    assert lost[1, 3] and lost.sum() == 1


# --- pairs, experts, slots ----------------------------------------------------------------------------


@LOW
def test_a_pair_alone_equals_the_pair_among_others(dtype: mx.Dtype) -> None:
    expert = of_each(4, 35, 0, 2)
    x, w1, w3, token, _, weight, *rest = gate_up_arrays(expert, 4, 5, 96, 41, "mxfp4", dtype)
    together = expert_gate_up(x, w1, w3, token, expert, weight, *rest)
    h, w2, *_ = down_arrays(expert, 4, 41, 96, "mxfp4", dtype)
    down = expert_down(h, w2, expert, True)
    for p in (0, 3, 4, 35, 36, 38, 39, 40):
        one = slice(p, p + 1)
        expect_equal(expert_gate_up(x, w1, w3, token[one], expert[one], weight[one], *rest), together[one])
        expect_equal(expert_down(h[one], w2, expert[one], True), down[one])


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint32, mx.int64], ids=dtype_name)
def test_any_type_of_numbers(dtype: mx.Dtype) -> None:
    x, w1, w3, token, expert, *rest = gate_up_arrays(of_each(3, 0, 6), 3, 5, 64, 13, "mxfp4")
    expected = expert_gate_up(x, w1, w3, token, expert, *rest)
    expect_equal(expert_gate_up(x, w1, w3, token.astype(dtype), expert.astype(dtype), *rest), expected)


def test_slots_in_the_place_of_experts() -> None:
    """The same experts under other numbers, among slots that hold garbage."""
    x, w1, w3, token, expert, *rest = gate_up_arrays(of_each(2, 3, 0, 4), 4, 3, 64, 13, "mxfp4")
    slot = np.array([0, 3, 5, 6])

    def pool(w: ExpertWeights) -> ExpertWeights:
        weight, scales = np.full((7, 13, 8), 0x77777777, np.uint32), np.full((7, 13, 2), 254, np.uint8)
        weight[slot], scales[slot] = np.array(w.weight), np.array(w.scales)
        return ExpertWeights(mx.array(weight), mx.array(scales), w.mode)

    found = expert_gate_up(x, pool(w1), pool(w3), token, mx.array(slot)[expert], *rest)
    expect_equal(found, expert_gate_up(x, w1, w3, token, expert, *rest))


# --- sizes of the model -------------------------------------------------------------------------------


@MODES
def test_weights_are_read_once_for_a_tile_of_pairs(mode: str) -> None:
    """Columns of the model, few rows; an expert without pairs is not read. The kernels for few pairs read per pair."""
    expert, D, F = of_each(33, 0, 2), 4096, 2048
    tiles = 2 + 1
    x, w1, w3 = normal(3, D, dtype=mx.bfloat16), *(many_weights(3, 64, D, mode) for _ in range(2))
    args = x, w1, w3, integers(3, 35), expert, mx.abs(normal(35)), LIMIT, True
    h, w2 = normal(35, F, dtype=mx.bfloat16), many_weights(3, 64, F, mode)
    with emulate(counters=True, repeat=False) as session:
        found, down = expert_gate_up(*args), expert_down(h, w2, expert, True)
    expect_match(found, wide(expert_gate_up_reference(*args)), mx.bfloat16)
    expect_match(down, wide(expert_down_reference(h, w2, expert, True)), mx.bfloat16)
    offsets, gate_up, _, product = session.dispatches
    assert (offsets.grid, gate_up.grid, product.grid) == ((4, 1, 1), (256, 4, 1), (128, 4, 1))
    assert gate_up.threadgroup_bytes == product.threadgroup_bytes == (32 + 64) * (64 + 8) * 2
    for launch, name, w in ((gate_up, "1", w1), (gate_up, "3", w3), (product, "2", w2)):
        words, scales = launch.traffic[f"w{name}"], launch.traffic[f"s{name}"]
        assert words.read_bytes == 16 * words.read_accesses == tiles * w.weight.nbytes // 3
        assert words.read_distinct == 2 * w.weight.nbytes // 3
        assert scales.read_bytes == tiles * scales.read_distinct // 2 == tiles * w.scales.nbytes // 3
    assert gate_up.traffic["x"].read_bytes == 2 * 35 * D * 2
    assert product.traffic["h"].read_bytes == h.nbytes


def test_size_of_the_model() -> None:
    """All rows and columns; only bounds far off are watched, since this is a thousand million multiplications."""
    expert = mx.array([1])
    x, w1, w3 = normal(1, 4096, dtype=mx.bfloat16), *(many_weights(2, 2048, 4096, "mxfp4") for _ in range(2))
    args = x, w1, w3, mx.array([0]), expert, mx.array([0.5]), LIMIT, True
    w2 = many_weights(2, 4096, 2048, "mxfp4")
    with emulate(checked=False, repeat=False):
        found = expert_gate_up(*args)
        down = expert_down(found, w2, expert, True)
    expect_match(found, wide(expert_gate_up_reference(*args)), mx.bfloat16)
    expect_match(down, wide(expert_down_reference(found, w2, expert, True)), mx.bfloat16)


# --- when they are used -------------------------------------------------------------------------------


def names_of(args: tuple[Any, ...], sorted_experts: bool = True) -> set[str]:
    with emulate(repeat=False, checked=False) as session:
        expert_gate_up(*args[:-1], sorted_experts)
    return {d.kernel for d in session.dispatches}


def test_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    args = gate_up_arrays(of_each(3, 4), 2, 3, 32, 5, "mxfp4")
    tiled = {"expert_offsets", "expert_gate_up_prefill"}
    assert (names_of(args), names_of(args, False)) == (tiled, {"expert_gate_up"})
    with _dispatch.expert_prefill("mlx"):
        assert names_of(args) == {"expert_gate_up"}
    monkeypatch.setattr(_dispatch, "_expert_prefill", None)
    assert names_of(args) == {"expert_gate_up"}
    monkeypatch.setenv("MLX_V4FLASH_EXPERT_PREFILL", "metal")
    assert names_of(args) == tiled
    with kernels("reference"):
        assert names_of(args) == set()
    with kernels("auto"):
        monkeypatch.setattr(_dispatch, "approved", {"expert_gate_up"})
        assert names_of(args) == {"expert_gate_up"}
        monkeypatch.setattr(_dispatch, "approved", {"expert_gate_up_prefill"})
        assert names_of(args) == tiled
    monkeypatch.setenv("MLX_V4FLASH_EXPERT_PREFILL", "yes")
    with pytest.raises(KernelError, match="MLX_V4FLASH_EXPERT_PREFILL: expected mlx or metal, found 'yes'"):
        names_of(args)
    unknown = pytest.raises(KernelError, match="expert_prefill: expected mlx or metal, found 'stock'")
    with unknown, _dispatch.expert_prefill("stock"):
        pass


def test_more_pairs_than_the_other_kernels_cover() -> None:
    expert = mx.sort(integers(2, MAX_PAIRS + 1))
    expect_both(expert, 2, 3, 32, 5, "mxfp4")


def test_refuses_plain_weights() -> None:
    x, w1, w3, *rest = gate_up_arrays(of_each(3, 4), 2, 3, 32, 5, "mxfp4")
    plain, h = ExpertWeights(normal(2, 5, 32)), normal(7, 32)
    for op, args in ((expert_gate_up, (x, plain, plain, *rest)), (expert_down, (h, plain, rest[1], True))):
        with pytest.raises(KernelError, match="_prefill: the kernel covers mxfp4 or mxfp8 weights"):
            op(*args)
        with kernels("auto"):
            op(*args)
