"""The kernels of expert_gate_up, expert_down and expert_down_sum against their references."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import emulate
from support import (
    BOUNDS,
    E2M1,
    E4M3,
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

from metal_kernels import ExpertWeights, KernelError, expert_down, expert_down_sum, expert_gate_up, kernels
from metal_kernels.experts import (
    MAX_CHOSEN,
    MAX_PAIRS,
    expert_down_reference,
    expert_down_sum_reference,
    expert_gate_up_reference,
)

pytestmark = pytest.mark.usefixtures("emulated")

MODES = pytest.mark.parametrize("mode", ["mxfp4", "mxfp8"])
MODES_AND_FLOATS = pytest.mark.parametrize(
    ("mode", "dtype"),
    [pytest.param(mode, dtype, id=f"{mode},{dtype_name(dtype)}") for mode in ("mxfp4", "mxfp8") for dtype in BOUNDS],
)
# Rows start at multiples of 16 bytes, which the kernels count on; so no test with less.
GPU = pytest.mark.parametrize("changes", [{"contract": True}, {"ftz": True}], ids=["contract", "ftz"])
LIMIT = 10.0


def weights(E: int, rows: int, columns: int, mode: str) -> ExpertWeights:
    weight, scales, _ = packed_weights(E, rows, columns, mode=mode)
    return ExpertWeights(weight, scales, mode)


def many_weights(E: int, rows: int, columns: int, mode: str) -> ExpertWeights:
    """Quicker to draw than `weights`; bytes without the largest codes of e4m3, so without NaN."""
    bits = 4 if mode == "mxfp4" else 8
    words = generator().integers(0, 2**32, (E, rows, columns * bits // 32), np.uint32) & 0xBFBFBFBF
    scales = generator().integers(115, 121, (E, rows, columns // 32), np.uint8)
    return ExpertWeights(mx.array(words), mx.array(scales), mode)


def integers(count: int, *shape: int) -> mx.array:
    return mx.array(generator().integers(0, count, shape).astype(np.int32))


def gate_up_arrays(E: int, T: int, P: int, D: int, F: int, mode: str, dtype: mx.Dtype = mx.float32) -> tuple[Any, ...]:
    x, w1, w3 = normal(T, D, dtype=dtype), weights(E, F, D, mode), weights(E, F, D, mode)
    return x, w1, w3, integers(T, P), integers(E, P), mx.abs(normal(P)), LIMIT, False


def down_arrays(E: int, T: int, A: int, D: int, F: int, mode: str, dtype: mx.Dtype = mx.float32) -> tuple[Any, ...]:
    return normal(T, A, F, dtype=dtype), weights(E, D, F, mode), integers(E, T, A)


# --- equal to the references ------------------------------------------------------------------------


@MODES_AND_FLOATS
def test_expert_gate_up(mode: str, dtype: mx.Dtype) -> None:
    args = gate_up_arrays(5, 7, 11, 96, 67, mode, dtype)
    expect_match(run(expert_gate_up, *args), wide(expert_gate_up_reference(*args)), dtype)


@MODES_AND_FLOATS
def test_expert_down(mode: str, dtype: mx.Dtype) -> None:
    args = normal(11, 96, dtype=dtype), weights(5, 67, 96, mode), integers(5, 11), False
    expect_match(run(expert_down, *args), wide(expert_down_reference(*args)), dtype)


@MODES_AND_FLOATS
def test_expert_down_sum(mode: str, dtype: mx.Dtype) -> None:
    """Products are rounded to the type of h; only their sum is float32, so its bound is that of the products."""
    args = down_arrays(5, 3, 6, 67, 96, mode, dtype)
    found, expected = run(expert_down_sum, *args), wide(expert_down_sum_reference(*args))
    assert found.dtype == mx.float32
    expect_match(found.astype(dtype), rounded(expected, dtype), dtype)
    expect_same(found, expected, share=1.0 if dtype == mx.float32 else 0.01)


OTHER_SIZES = sizes(
    "E T A D F", (1, 1, 1, 32, 2), (1, 1, 1, 32, 7), (2, 3, 1, 1056, 8), (3, 1, MAX_CHOSEN, 64, 9), (2, 2, 3, 2080, 5)
)


@MODES
@OTHER_SIZES
def test_other_sizes(E: int, T: int, A: int, D: int, F: int, mode: str) -> None:
    """Lanes without a block and with several, rows beyond the last, arrays of fewer than 8 elements."""
    args = gate_up_arrays(E, T, T * A, D, F, mode)
    expect_match(run(expert_gate_up, *args), wide(expert_gate_up_reference(*args)), mx.float32)
    args = down_arrays(E, T, A, F, D, mode)
    expect_match(run(expert_down_sum, *args), wide(expert_down_sum_reference(*args)), mx.float32)
    args = args[0].flatten(0, 1), args[1], args[2].flatten(), False
    expect_match(run(expert_down, *args), wide(expert_down_reference(*args)), mx.float32)


@GPU
@MODES
def test_as_a_gpu_may_run_it(changes: dict[str, Any], mode: str) -> None:
    gate_up, down = gate_up_arrays(3, 2, 5, 96, 13, mode), down_arrays(3, 2, 3, 13, 96, mode)
    with emulate(**changes):
        expect_match(expert_gate_up(*gate_up), wide(expert_gate_up_reference(*gate_up)), mx.float32)
        expect_match(expert_down_sum(*down), wide(expert_down_sum_reference(*down)), mx.float32)


# --- the formats, bit by bit ------------------------------------------------------------------------


def every_code(mode: str) -> tuple[mx.array, np.ndarray]:
    """A row with every code that is a number, first column in the low bits, and what the codes stand for."""
    positive, sign = (E2M1, 8) if mode == "mxfp4" else (E4M3, 128)
    # The 127th code of e4m3 is NaN; it has its own test.
    values = np.append(positive, np.zeros(sign - len(positive)))
    codes = np.where(np.arange(sign) < len(positive), np.arange(sign), 0)
    codes, values = np.concatenate([codes, codes | sign]), np.concatenate([values, -values])
    if mode == "mxfp4":
        codes, values = np.tile(codes, 2), np.tile(values, 2)
        codes = codes[0::2] | codes[1::2] << 4
    return mx.array(codes.astype(np.uint8)).view(mx.uint32), values


def every_weight(mode: str) -> tuple[ExpertWeights, np.ndarray]:
    """One expert whose row s has every code with scale 2^(s - 127), and the numbers, [255, columns]."""
    words, values = every_code(mode)
    scales = np.broadcast_to(np.arange(255, dtype=np.uint8)[:, None], (255, len(values) // 32))
    packed = ExpertWeights(mx.broadcast_to(words, (1, 255, words.size)), mx.array(scales)[None], mode)
    with np.errstate(over="ignore"):
        return packed, (values * 2.0 ** (np.arange(255)[:, None] - 127)).astype(np.float32)


@MODES
@pytest.mark.parametrize("ftz", [False, True], ids=["denormals", "ftz"])
def test_every_code_and_scale(mode: str, ftz: bool) -> None:
    """A column at a time; exact, and where denormals are flushed, only results that are denormal are lost."""
    packed, values = every_weight(mode)
    columns = generator().permutation(values.shape[1])[: 32 if mode == "mxfp4" else 48]
    h = mx.array(np.eye(values.shape[1], dtype=np.float32)[columns])
    expected = values[:, columns].T
    if ftz:
        expected = np.where(np.abs(expected) < 2.0**-126, 0, expected)
    with emulate(ftz=ftz):
        found = np.array(expert_down(h, packed, mx.zeros(len(columns), mx.int32), False))
    np.testing.assert_array_equal(found, expected)


def with_code(packed: ExpertWeights, at: tuple[int, int, int], code: int) -> ExpertWeights:
    raw = np.array(packed.weight.view(mx.uint8))
    raw[at] = code
    return dataclasses.replace(packed, weight=mx.array(raw).view(mx.uint32))


@pytest.mark.parametrize("code", [0x7F, 0xFF], ids=hex)
@pytest.mark.parametrize("column", [32, 33, 34, 35])
def test_nan_among_the_weights(code: int, column: int) -> None:
    packed = with_code(weights(2, 9, 64, "mxfp8"), (1, 3, column), code)
    lost = np.isnan(wide(expert_down(normal(2, 64), packed, mx.array([0, 1]), False)))
    assert lost[1, 3] and lost.sum() == 1


@pytest.mark.parametrize("which", ["w1", "w3"])
def test_nan_among_the_weights_passes_the_clamps(which: str) -> None:
    x, w1, w3, token, _, *rest = gate_up_arrays(2, 1, 2, 64, 9, "mxfp8")
    w1, w3 = (with_code(w, (1, 3, 40), 0x7F) if name == which else w for name, w in (("w1", w1), ("w3", w3)))
    lost = np.isnan(wide(expert_gate_up(x, w1, w3, token, mx.array([0, 1]), *rest)))
    assert lost[1, 3] and lost.sum() == 1


# --- what is rounded, and when ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=dtype_name)
def test_products_are_rounded_before_the_activation_and_once_after_the_weight(dtype: mx.Dtype) -> None:
    args = gate_up_arrays(3, 7, 29, 64, 96, "mxfp4", dtype)
    expect_same(run(expert_gate_up, *args), wide(expert_gate_up_reference(*args)), share=0.002)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=dtype_name)
def test_products_are_rounded_before_their_sum(dtype: mx.Dtype) -> None:
    weight, scales, values = packed_weights(3, 41, 96, mode="mxfp4")
    h, expert = normal(4, 6, 96, dtype=dtype), integers(3, 4, 6)
    products = np.einsum("tadf,taf->tad", values[np.array(expert)], wide(h))
    found = run(expert_down_sum, h, ExpertWeights(weight, scales, "mxfp4"), expert)
    expect_match(found, rounded(products, dtype).sum(axis=1), mx.float32)


@pytest.mark.parametrize("limit", [10.0, 0.5, 0.01])
def test_gate_is_clamped_from_above_only_and_up_on_both_sides(limit: float) -> None:
    """Gates from far below zero, where their exponential overflows, to far above the limit."""
    x, w1, w3, *pairs, _, _ = gate_up_arrays(3, 5, 9, 64, 41, "mxfp8")
    args = x * mx.array([[0.1], [1.0], [10.0], [100.0], [1000.0]]), w1, w3, *pairs, limit, False
    expect_match(run(expert_gate_up, *args), wide(expert_gate_up_reference(*args)), mx.float32)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_what_is_not_finite_stays_in_its_token(value: float) -> None:
    """And is the same as in the reference: the clamps keep NaN and bring infinity to the limit."""
    x, *rest = gate_up_arrays(3, 3, 7, 64, 13, "mxfp4")
    token = np.array(rest[2])
    x[1, 37] = value
    found = expert_gate_up(x, *rest)
    expect_match(found, wide(expert_gate_up_reference(x, *rest)), mx.float32)
    assert np.isfinite(wide(found)[token != 1]).all()
    h, w2, expert = down_arrays(3, 3, 2, 13, 64, "mxfp4")
    h[1, 1, 37] = value
    found = expert_down_sum(h, w2, expert)
    expect_match(found, wide(expert_down_sum_reference(h, w2, expert)), mx.float32)
    assert np.isfinite(wide(found)[[0, 2]]).all()


# --- pairs, experts, slots --------------------------------------------------------------------------


@MODES
def test_a_pair_alone_equals_the_pair_among_others(mode: str) -> None:
    x, w1, w3, token, expert, weight, *rest = gate_up_arrays(3, 5, 9, 64, 41, mode, mx.bfloat16)
    together = expert_gate_up(x, w1, w3, token, expert, weight, *rest)
    w2 = weights(3, 41, 64, mode)
    h = normal(9, 64, dtype=mx.bfloat16)
    down = expert_down(h, w2, expert, False)
    expect_match(expert_down_sum(h.reshape(9, 1, 64), w2, expert[:, None]), wide(down), mx.float32)
    for p in range(9):
        one = slice(p, p + 1)
        expect_equal(expert_gate_up(x, w1, w3, token[one], expert[one], weight[one], *rest), together[one])
        expect_equal(expert_down(h[one], w2, expert[one], False), down[one])


def test_slots_in_the_place_of_experts() -> None:
    """The same experts in another order and under other numbers, among slots that hold garbage."""
    x, w1, w3, token, expert, *rest = gate_up_arrays(4, 3, 7, 64, 13, "mxfp4")
    slot = np.array([5, 0, 6, 3])

    def pool(w: ExpertWeights) -> ExpertWeights:
        weight, scales = np.full((7, 13, 8), 0x77777777, np.uint32), np.full((7, 13, 2), 254, np.uint8)
        weight[slot], scales[slot] = np.array(w.weight), np.array(w.scales)
        return ExpertWeights(mx.array(weight), mx.array(scales), w.mode)

    found = expert_gate_up(x, pool(w1), pool(w3), token, mx.array(slot)[expert], *rest)
    expect_equal(found, expert_gate_up(x, w1, w3, token, expert, *rest))


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint32, mx.int64], ids=dtype_name)
def test_any_type_of_numbers(dtype: mx.Dtype) -> None:
    x, w1, w3, token, expert, *rest = gate_up_arrays(3, 5, 9, 64, 13, "mxfp4")
    expected = expert_gate_up(x, w1, w3, token, expert, *rest)
    expect_equal(expert_gate_up(x, w1, w3, token.astype(dtype), expert.astype(dtype), *rest), expected)


def test_the_sum_has_each_of_its_experts_once() -> None:
    """An expert named twice counts twice, and the order of experts only moves the last bits."""
    h, w2, expert = down_arrays(5, 2, 6, 13, 64, "mxfp4")
    expert[:, 3] = expert[:, 1]
    order = mx.array([4, 2, 0, 5, 1, 3])
    found = expert_down_sum(h, w2, expert)
    expect_match(expert_down_sum(h[:, order], w2, expert[:, order]), wide(found), mx.float32)
    parts = [expert_down_sum(h[:, a : a + 1], w2, expert[:, a : a + 1]) for a in range(6)]
    expect_match(found, sum(wide(part) for part in parts), mx.float32)


# --- sizes of the model, and limits -----------------------------------------------------------------


@MODES
def test_gate_up_of_the_model(mode: str) -> None:
    """Weights are read once, in pieces of 16 bytes, in one launch."""
    x, w1, w3 = normal(1, 4096, dtype=mx.bfloat16), *(many_weights(2, 2048, 4096, mode) for _ in range(2))
    args = x, w1, w3, mx.zeros(2, mx.int32), mx.array([1, 0]), mx.abs(normal(2)), LIMIT, False
    expected = wide(expert_gate_up_reference(*args))
    with emulate(counters=True, repeat=False) as session:
        expect_match(expert_gate_up(*args), expected, mx.bfloat16)
    (launch,) = session.dispatches
    assert (launch.grid, launch.threadgroup, launch.threadgroup_bytes) == ((32, 1024, 2), (32, 4, 1), 0)
    for name, w in (("1", w1), ("3", w3)):
        words, scales = launch.traffic[f"w{name}"], launch.traffic[f"s{name}"]
        assert words.read_bytes == words.read_distinct == 16 * words.read_accesses == w.weight.nbytes
        assert scales.read_bytes == scales.read_distinct == w.scales.nbytes
    assert launch.traffic["y"].write_bytes == 2 * 2048 * 2


def test_down_sum_of_the_model() -> None:
    h, w2 = normal(1, 6, 2048, dtype=mx.bfloat16), many_weights(6, 4096, 2048, "mxfp4")
    expert = mx.array([[3, 0, 5, 1, 4, 2]])
    with emulate(counters=True, repeat=False) as session:
        found = expert_down_sum(h, w2, expert)
    (launch,) = session.dispatches
    assert (launch.grid, launch.threadgroup, launch.threadgroup_bytes) == ((32, 6, 1024), (32, 6, 1), 96)
    words, scales = launch.traffic["w2"], launch.traffic["s2"]
    assert words.read_bytes == words.read_distinct == 16 * words.read_accesses == w2.weight.nbytes
    assert scales.read_bytes == scales.read_distinct == w2.scales.nbytes
    expect_match(found, wide(expert_down_sum_reference(h, w2, expert)), mx.float32)


CALLS: dict[str, Callable[[int, int, str], tuple[Callable[..., mx.array], tuple[Any, ...]]]] = {
    "gate_up": lambda T, A, mode: (expert_gate_up, gate_up_arrays(2, T, T * A, 32, 5, mode)),
    "down": lambda T, A, mode: (
        expert_down, (normal(T * A, 32), weights(2, 5, 32, mode), integers(2, T * A), False)
    ),
    "down_sum": lambda T, A, mode: (expert_down_sum, down_arrays(2, T, A, 5, 32, mode)),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_limits(name: str) -> None:
    """As many pairs as are covered; not one more, no plain weights, and no more experts in the sum."""
    A = 6
    op, args = CALLS[name](MAX_PAIRS // A, A, "mxfp4")
    reference = {expert_gate_up: expert_gate_up_reference, expert_down: expert_down_reference}
    expect_match(op(*args), wide(reference.get(op, expert_down_sum_reference)(*args)), mx.float32)
    beyond = [CALLS[name](MAX_PAIRS + 1, 1, "mxfp4")]
    if name == "down_sum":
        beyond.append(CALLS[name](1, MAX_CHOSEN + 1, "mxfp4"))
    plain = [ExpertWeights(normal(2, 5, 32)) if isinstance(a, ExpertWeights) else a for a in args]
    for refused in (*(args for _, args in beyond), plain):
        with pytest.raises(KernelError, match="the kernel covers up to"):
            op(*refused)
        with kernels("reference"):
            op(*refused)


def test_refuses_scales_of_another_shape() -> None:
    """The kernel would read past their end."""
    h, w2, expert = down_arrays(3, 2, 2, 13, 64, "mxfp4")
    short = dataclasses.replace(w2, scales=w2.scales[..., :1])
    expect_refused("w2.scales", expert_down_sum, h, short, expert)
    expect_refused("w2.scales", expert_down, h[0], short, expert[0], False)
    expect_refused("expert", expert_down_sum, h, w2, expert[:1])
    expect_refused("w2", expert_down_sum, h[..., :32], w2, expert)
    x, w1, w3, *rest = gate_up_arrays(3, 2, 3, 64, 13, "mxfp4")
    expect_refused("w1.scales", expert_gate_up, x, dataclasses.replace(w1, scales=w1.scales[:2]), w3, *rest)
    expect_refused("w3.scales", expert_gate_up, x, w1, dataclasses.replace(w3, scales=w3.scales[:, :1]), *rest)
