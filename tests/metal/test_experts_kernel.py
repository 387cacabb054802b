"""The kernels of expert_gate_up, expert_down and expert_down_sum against their references."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import emulator
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
from metal_kernels._dispatch import source
from metal_kernels.experts import (
    AFFINE_BITS,
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
    """The shared expert in the other format, as in the checkpoint."""
    shared = shared_weights(D, F, "mxfp8" if mode == "mxfp4" else "mxfp4")
    return normal(T * A + T, F, dtype=dtype), weights(E, D, F, mode), integers(E, T, A), shared


def shared_weights(rows: int, columns: int, mode: str) -> ExpertWeights:
    w = weights(1, rows, columns, mode)
    return dataclasses.replace(w, weight=w.weight[0], scales=w.scales[0])


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
    """Products are rounded to the type of h; their sum is float32 and rounded once."""
    args = down_arrays(5, 3, 6, 67, 96, mode, dtype)
    found, expected = run(expert_down_sum, *args), wide(expert_down_sum_reference(*args))
    expect_match(found, expected, dtype)
    expect_same(found, expected, share=1.0 if dtype == mx.float32 else 0.02)


@MODES_AND_FLOATS
def test_gate_up_with_the_shared_expert(mode: str, dtype: mx.Dtype) -> None:
    """In the same launch; it changes nothing for the pairs."""
    args, other = gate_up_arrays(5, 7, 11, 96, 67, mode, dtype), "mxfp8" if mode == "mxfp4" else "mxfp4"
    shared = shared_weights(67, 96, other), shared_weights(67, 96, other)
    found = run(expert_gate_up, *args, shared)
    assert found.shape == (18, 67)
    expect_match(found, wide(expert_gate_up_reference(*args, shared)), dtype)
    expect_match(found[11:], wide(expert_gate_up_reference(*args, shared)[11:]), dtype)
    expect_equal(found[:11], expert_gate_up(*args))


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
    args = args[0][: T * A], args[1], args[2].flatten(), False
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
    h, expert = normal(28, 96, dtype=dtype), integers(3, 4, 6)
    products = np.einsum("tadf,taf->tad", values[np.array(expert)], wide(h[:24]).reshape(4, 6, 96))
    shared = shared_weights(41, 96, "mxfp8")
    # Nothing but zeros from the shared expert, so that the routed sum alone is rounded at the end.
    h[24:] = 0
    found = run(expert_down_sum, h, ExpertWeights(weight, scales, "mxfp4"), expert, shared)
    expect_same(found, rounded(rounded(products, dtype).sum(axis=1), dtype), share=0.02)


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
    for row in (3, 7):  # an expert of token 1, and its shared one
        h, *rest = down_arrays(3, 3, 2, 13, 64, "mxfp4")
        h[row, 37] = value
        found = expert_down_sum(h, *rest)
        expect_match(found, wide(expert_down_sum_reference(h, *rest)), mx.float32)
        assert np.isfinite(wide(found)[[0, 2]]).all() and not np.isfinite(wide(found)[1]).all()


# --- pairs, experts, slots --------------------------------------------------------------------------


@MODES
def test_a_pair_alone_equals_the_pair_among_others(mode: str) -> None:
    x, w1, w3, token, expert, weight, *rest = gate_up_arrays(3, 5, 9, 64, 41, mode, mx.bfloat16)
    together = expert_gate_up(x, w1, w3, token, expert, weight, *rest)
    w2 = weights(3, 41, 64, mode)
    h = normal(9, 64, dtype=mx.bfloat16)
    down = expert_down(h, w2, expert, False)
    with_shared, shared = mx.concatenate([h, mx.zeros_like(h)]), shared_weights(41, 64, "mxfp8")
    expect_equal(expert_down_sum(with_shared, w2, expert[:, None], shared), down)
    for p in range(9):
        one = slice(p, p + 1)
        expect_equal(expert_gate_up(x, w1, w3, token[one], expert[one], weight[one], *rest), together[one])
        expect_equal(expert_down(h[one], w2, expert[one], False), down[one])


def test_slots_in_the_place_of_experts() -> None:
    """The chosen experts in another order and under other numbers, in fewer slots, one of them with garbage."""
    x, w1, w3, token, _, *rest = gate_up_arrays(9, 3, 7, 64, 13, "mxfp4")
    expert = mx.array([7, 2, 7, 0, 2, 0, 7])
    held, slot = [7, 0, 2], {7: 3, 0: 0, 2: 1}
    slots = mx.array([slot[int(e)] for e in np.array(expert)])

    def pool(w: ExpertWeights) -> ExpertWeights:
        rows, columns = w.weight.shape[1:]
        weight = np.full((4, rows, columns), 0x77777777, np.uint32)
        scales = np.full((4, *w.scales.shape[1:]), 254, np.uint8)
        for e in held:
            weight[slot[e]], scales[slot[e]] = np.array(w.weight[e]), np.array(w.scales[e])
        return ExpertWeights(mx.array(weight), mx.array(scales), w.mode)

    found = expert_gate_up(x, pool(w1), pool(w3), token, slots, *rest)
    expect_equal(found, expert_gate_up(x, w1, w3, token, expert, *rest))
    w2, shared, h = weights(9, 41, 32, "mxfp4"), shared_weights(41, 32, "mxfp8"), normal(8, 32)
    found = expert_down_sum(h, pool(w2), slots[None], shared)
    expect_equal(found, expert_down_sum(h, w2, expert[None], shared))
    expect_equal(expert_down(h[:7], pool(w2), slots, False), expert_down(h[:7], w2, expert, False))


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint32, mx.int64], ids=dtype_name)
def test_any_type_of_numbers(dtype: mx.Dtype) -> None:
    x, w1, w3, token, expert, *rest = gate_up_arrays(3, 5, 9, 64, 13, "mxfp4")
    expected = expert_gate_up(x, w1, w3, token, expert, *rest)
    expect_equal(expert_gate_up(x, w1, w3, token.astype(dtype), expert.astype(dtype), *rest), expected)


def test_the_sum_has_each_of_its_experts_once() -> None:
    """An expert named twice counts twice, and the order of experts only moves the last bits."""
    h, w2, expert, shared = down_arrays(5, 1, 6, 13, 64, "mxfp4")
    expert[:, 3] = expert[:, 1]
    order = mx.array([4, 2, 0, 5, 1, 3])
    found = expert_down_sum(h, w2, expert, shared)
    moved = mx.concatenate([h[order], h[6:]])
    expect_match(expert_down_sum(moved, w2, expert[:, order], shared), wide(found), mx.float32)
    parts = [wide(expert_down(h[a : a + 1], w2, expert[0, a : a + 1], False)) for a in range(6)]
    one = dataclasses.replace(shared, weight=shared.weight[None], scales=shared.scales[None])
    parts.append(wide(expert_down(h[6:], one, mx.array([0]), False)))
    expect_match(found, sum(parts), mx.float32)


# --- affine weights, and nvfp4 ----------------------------------------------------------------------

AFFINE = pytest.mark.parametrize(
    ("bits", "group_size"), [*((bits, 32) for bits in AFFINE_BITS), (3, 64), (3, 128), (8, 64), (8, 128)], ids=str
)


def affine(bits: int, group_size: int, *shape: int, dtype: mx.Dtype = mx.float32) -> ExpertWeights:
    """Packed by MLX, so that every layout is its own."""
    packed = mx.quantize(normal(*shape, dtype=dtype), group_size=group_size, bits=bits)
    return ExpertWeights(packed[0], packed[1], "affine", packed[2], bits, group_size)


@AFFINE
def test_every_bit_of_affine_weights(bits: int, group_size: int) -> None:
    """A column at a time, with a scale of one and a bias of zero: exactly the number that was packed."""
    w = affine(bits, group_size, 2, 13, 256)
    one = dataclasses.replace(w, scales=mx.ones_like(w.scales), biases=mx.zeros_like(w.biases))
    numbers = mx.dequantize(one.weight, one.scales, one.biases, group_size=group_size, bits=bits)
    columns = mx.array(generator().permutation(256)[:96])
    found = expert_down(mx.eye(256)[columns], one, mx.full((96,), 1), False)
    np.testing.assert_array_equal(np.array(found), np.array(numbers[1].T[columns]))
    assert wide(numbers).max() == 2**bits - 1 and wide(numbers).min() == 0


@AFFINE
def test_affine_weights(bits: int, group_size: int) -> None:
    h, w = normal(5, 256) + 1, affine(bits, group_size, 3, 13, 256)
    args = h, w, integers(3, 5), False
    expect_match(run(expert_down, *args), wide(expert_down_reference(*args)), mx.float32)


@pytest.mark.parametrize(
    ("dtype", "scale_dtype"), [*((d, d) for d in BOUNDS), (mx.bfloat16, mx.float32)], ids=dtype_name
)
def test_types_of_affine_scales(dtype: mx.Dtype, scale_dtype: mx.Dtype) -> None:
    """Beside a shared expert of another format, and the other way round."""
    x, w1, w3 = normal(2, 64, dtype=dtype), *(affine(4, 64, 3, 13, 64, dtype=scale_dtype) for _ in range(2))
    shared = shared_weights(13, 64, "mxfp8"), shared_weights(13, 64, "mxfp8")
    args = x, w1, w3, integers(2, 5), integers(3, 5), mx.abs(normal(5)), LIMIT, False, shared
    expect_match(run(expert_gate_up, *args), wide(expert_gate_up_reference(*args)), dtype)
    h, w2, expert, _ = down_arrays(3, 2, 3, 13, 64, "mxfp4", dtype)
    down = h, w2, expert, affine(6, 32, 13, 64, dtype=scale_dtype)
    expect_match(run(expert_down_sum, *down), wide(expert_down_sum_reference(*down)), dtype)


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=dtype_name)
def test_nvfp4(dtype: mx.Dtype) -> None:
    """Each half of a block has a scale of its own."""
    words, scales = mx.quantize(normal(3, 13, 96) * mx.exp(normal(3, 13, 96)), mode="nvfp4")
    args = normal(5, 96, dtype=dtype), ExpertWeights(words, scales, "nvfp4"), integers(3, 5), False
    expect_match(run(expert_down, *args), wide(expert_down_reference(*args)), dtype)


@GPU
def test_affine_as_a_gpu_may_run_it(changes: dict[str, Any]) -> None:
    args = normal(5, 128), affine(3, 64, 3, 13, 128), integers(3, 5), False
    with emulate(**changes):
        expect_match(expert_down(*args), wide(expert_down_reference(*args)), mx.float32)


def test_affine_formats_that_are_not_covered() -> None:
    w1, w3, x = affine(4, 64, 3, 13, 64), affine(3, 64, 3, 13, 64), normal(2, 64)
    args = integers(2, 5), integers(3, 5), mx.abs(normal(5)), LIMIT, False
    with pytest.raises(KernelError, match="the kernel covers"):
        expert_gate_up(x, w1, w3, *args)
    mixed = dataclasses.replace(w1, biases=w1.biases.astype(mx.bfloat16))
    with pytest.raises(KernelError, match="the kernel covers"):
        expert_down(x, mixed, mx.array([0, 1]), False)


# --- scales and offsets at their ends ---------------------------------------------------------------


@MODES
def test_scale_of_all_ones_is_infinity_and_of_zeros_is_the_smallest(mode: str) -> None:
    """As MLX reads 255; a number that is zero has no product with it."""
    codes = {"mxfp4": 0x22222222, "mxfp8": 0x38383838}[mode]  # ones
    bits = 4 if mode == "mxfp4" else 8
    words = mx.full((1, 3, 64 * bits // 32), codes, mx.uint32)
    scales = mx.array([[[255, 127], [0, 0], [127, 127]]], mx.uint8)
    w2 = ExpertWeights(words, scales, mode)
    h = mx.concatenate([mx.full((1, 64), 1.0), mx.full((1, 64), 2.0**100)])
    found = expert_down(h, w2, mx.zeros(2, mx.int32), False)
    np.testing.assert_array_equal(wide(found), [[np.inf, 2.0**-121, 64], [np.inf, 2.0**-21, 2.0**106]])
    expect_match(found, wide(expert_down_reference(h, w2, mx.zeros(2, mx.int32), False)), mx.float32)


def test_offsets_are_64_bit() -> None:
    """Up to more blocks, and more rows, than 2^32: the number of the last block, and the words that are read for it."""
    body = """
    size_t seen = 0;
    const Probe probe{&seen};
    float sums[1] = {};
    const float x[32] = {};
    const int expert = numbers[0];
    const int rows = numbers[1];
    const int blocks = numbers[2];
    // Such an array would not fit here, so its start lies where its last block is the one that is there.
    const size_t block = (static_cast<size_t>(expert) * rows + rows - 1) * blocks + blocks - 1;
    add_rows<1, 4, 32, false>(sums, words - block * 4, probe, probe, expert, rows, rows - 1, blocks, blocks - 1, x);
    place[0] = static_cast<uint>(seen >> 32);
    place[1] = static_cast<uint>(seen);
    """
    probe = """
    struct Probe {
        thread size_t* seen;
        uint operator[](size_t at) const { *seen = at; return 127u; }
    };
    """
    made = emulator.metal_kernel(
        name="offsets", input_names=["words", "numbers"], output_names=["place"], source=body,
        header=source("decode") + probe,
    )  # fmt: skip
    for expert, rows, blocks in ((255, 2048, 128), (383, 7168, 2048), (1 << 20, 4099, 3)):
        (place,) = made(
            inputs=[mx.zeros(8, mx.uint32), mx.array([expert, rows, blocks] + [0] * 5)],
            grid=(1, 1, 1), threadgroup=(1, 1, 1), output_shapes=[(2,)], output_dtypes=[mx.uint32],
        )  # fmt: skip
        high, low = (int(v) for v in np.array(place))
        assert (high << 32) + low == ((expert + 1) * rows) * blocks - 1


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
    h, w2 = normal(7, 2048, dtype=mx.bfloat16), many_weights(6, 4096, 2048, "mxfp4")
    one = many_weights(1, 4096, 2048, "mxfp8")
    expert, shared = mx.array([[3, 0, 5, 1, 4, 2]]), ExpertWeights(one.weight[0], one.scales[0], "mxfp8")
    with emulate(counters=True, repeat=False) as session:
        found = expert_down_sum(h, w2, expert, shared)
    (launch,) = session.dispatches
    assert (launch.grid, launch.threadgroup, launch.threadgroup_bytes) == ((32, 7, 1024), (32, 7, 1), 112)
    for name, w in (("", w2), ("shared_", shared)):
        words, scales = launch.traffic[f"{name}w2"], launch.traffic[f"{name}s2"]
        assert words.read_bytes == words.read_distinct == 16 * words.read_accesses == w.weight.nbytes
        assert scales.read_bytes == scales.read_distinct == w.scales.nbytes
    expect_match(found, wide(expert_down_sum_reference(h, w2, expert, shared)), mx.bfloat16)


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
    plain = [ExpertWeights(normal(*a.weight.shape[:-1], 32)) if isinstance(a, ExpertWeights) else a for a in args]
    for refused in (*(args for _, args in beyond), plain):
        with pytest.raises(KernelError, match="the kernel covers up to"):
            op(*refused)
        with kernels("reference"):
            op(*refused)


def test_refuses_scales_of_another_shape() -> None:
    """The kernel would read past their end."""
    h, w2, expert, shared = down_arrays(3, 2, 2, 13, 64, "mxfp4")
    short, short_shared = (dataclasses.replace(w, scales=w.scales[..., :1]) for w in (w2, shared))
    expect_refused("w2.scales", expert_down_sum, h, short, expert, shared)
    expect_refused("shared w2.scales", expert_down_sum, h, w2, expert, short_shared)
    expect_refused("w2.scales", expert_down, h[:2], short, expert[0], False)
    expect_refused("h", expert_down_sum, h, w2, expert[:1], shared)
    expect_refused("w2", expert_down_sum, h[..., :32], w2, expert, shared)
    x, w1, w3, *rest = gate_up_arrays(3, 2, 3, 64, 13, "mxfp4")
    expect_refused("w1.scales", expert_gate_up, x, dataclasses.replace(w1, scales=w1.scales[:2]), w3, *rest)
    expect_refused("w3.scales", expert_gate_up, x, w1, dataclasses.replace(w3, scales=w3.scales[:, :1]), *rest)
