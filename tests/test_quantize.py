"""Rounding of matrices: least errors by brute force, what error feedback gains, and MLX's layout of bits."""

from __future__ import annotations

import itertools

import mlx.core as mx
import numpy as np
import pytest

from mlx_v4flash.formats import Format
from mlx_v4flash.quantize import codes, decode, feedback_matrix, fit, pack, quantize, requantize, values

AFFINE = [Format("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
FORMATS = [*AFFINE, *(Format.named(name) for name in ("mxfp4", "mxfp8", "nvfp4"))]
SCALED = [format for format in FORMATS if format.mode != "affine"]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def mlx_packed(weight: np.ndarray, format: Format) -> dict[str, mx.array]:
    array = mx.array(weight).astype(mx.bfloat16 if format.mode == "affine" else mx.float32)
    return dict(zip(("weight", "scales", "biases"), mx.quantize(array, **format.options), strict=False))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_layout_is_that_of_mlx(format: Format) -> None:
    """MLX decodes what is packed here to what the codes mean, and nothing else."""
    weight = normal(5, 384)
    arrays = quantize(mx.array(weight), format)
    like = mlx_packed(weight, format)
    assert {n: (a.shape, a.dtype) for n, a in arrays.items()} == {n: (a.shape, a.dtype) for n, a in like.items()}
    groups = mx.array(weight).reshape(5, -1, format.group_size)
    scales, biases = arrays["scales"], arrays.get("biases")
    numbers = codes(groups, scales, biases, format)
    meant = np.array(values(numbers, scales, biases, format).reshape(5, 384))
    np.testing.assert_allclose(np.array(decode(arrays, format)), meant, rtol=1e-6, atol=1e-6)
    found = len(np.unique(np.array(numbers)))
    assert found == {2: 4, 3: 8, 4: 16 if format.mode == "affine" else 15}.get(format.bits, found)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_code_is_packed_as_mlx_packs_it(bits: int) -> None:
    numbers = np.random.default_rng(bits).integers(0, 1 << bits, (7, 192)).astype(np.uint32)
    ones, none = mx.ones((7, 3)), mx.zeros((7, 3))
    found = mx.dequantize(pack(mx.array(numbers), bits), ones, none, group_size=64, bits=bits)
    np.testing.assert_array_equal(np.array(found), numbers)


@pytest.mark.parametrize("format", SCALED, ids=str)
def test_nearest_codes_are_those_of_mlx(format: Format) -> None:
    """With MLX's own scales. Numbers half way between two codes are left out."""
    weight = normal(9, 256, seed=1)
    like = mlx_packed(weight, format)
    groups = mx.array(weight).reshape(9, -1, format.group_size)
    mine = pack(codes(groups, like["scales"], None, format).reshape(9, 256), format.bits)
    np.testing.assert_array_equal(np.array(mine), np.array(like["weight"]))


def test_affine_scales_are_nearly_the_best_of_a_fine_grid() -> None:
    groups = normal(24, 32, seed=2)
    groups[:4] = np.abs(groups[:4]) ** 2  # lopsided
    importance = np.exp(normal(24, 32, seed=3))
    for bits in (2, 3):
        format = Format("affine", bits, 32)
        scales, biases = fit(mx.array(groups), format, mx.array(importance))
        found = values(codes(mx.array(groups), scales, biases, format), scales, biases, format)
        error = (importance * (np.array(found) - groups) ** 2).sum(axis=1)
        low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
        best = np.full(24, np.inf)
        for a, b in itertools.product(np.linspace(0, 0.6, 61), repeat=2):
            if a + b < 0.9:
                start, step = low + a * (high - low), (high - low) * (1 - a - b) / (2**bits - 1)
                q = np.clip(np.rint((groups - start) / step), 0, 2**bits - 1)
                best = np.minimum(best, (importance * (q * step + start - groups) ** 2).sum(axis=1))
        assert error.sum() <= 1.06 * best.sum() and (error <= 1.5 * best).all()
        mlx_error = (decode(mlx_packed(groups, format), format) - mx.array(groups)) ** 2 * mx.array(importance)
        assert error.sum() < 0.75 * mlx_error.sum().item()


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4"])
def test_scales_are_the_best_there_are(name: str) -> None:
    """Against every scale that a byte can express; those of nvfp4 in steps of 0.05."""
    format = Format.named(name)
    groups = mx.array(normal(40, format.group_size, seed=4))
    every = range(255) if name != "nvfp4" else range(0x7F)

    def error(scales: mx.array) -> np.ndarray:
        found = values(codes(groups, scales, None, format), scales, None, format)
        return np.array(mx.square(found - groups).sum(axis=-1))

    found = error(fit(groups, format)[0])
    best = np.min([error(mx.full((40,), byte, mx.uint8)) for byte in every], axis=0)
    assert (found <= best * (1.02 if name == "nvfp4" else 1.0) + 1e-9).all()


@pytest.mark.parametrize("format", [f for f in FORMATS if f.group_size <= 64], ids=str)
def test_feedback_halves_the_error_of_correlated_inputs(format: Format) -> None:
    weight, K = normal(48, 128, seed=5), 128
    mixing = normal(K, K, seed=6) * np.exp(-np.arange(K) / 16)[:, None]
    inputs = normal(1500, K, seed=7) @ mixing + 0.1 * normal(1500, K, seed=8)
    others = normal(500, K, seed=9) @ mixing + 0.1 * normal(500, K, seed=10)

    def error(arrays: dict[str, mx.array]) -> float:
        return float((((np.array(decode(arrays, format)) - weight) @ others.T) ** 2).sum())

    plain = error(quantize(mx.array(weight), format))
    told = error(quantize(mx.array(weight), format, feedback_matrix(inputs.T @ inputs)))
    assert told < plain / 2


@pytest.mark.parametrize(("bits", "rho"), [(2, 0.9), (3, 0.9), (3, 0.6)])
def test_feedback_is_near_the_best_of_all_codes(bits: int, rho: float) -> None:
    """Columns are correlated in fours, far apart, so that all choices of codes can be tried for each four."""
    format, K = Format("affine", bits, 32), 32
    weight = normal(32, K)
    fours = np.arange(K).reshape(4, 8).T
    gram = np.zeros((K, K), np.float32)
    for four in fours:
        gram[np.ix_(four, four)] = rho ** np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
    arrays = quantize(mx.array(weight), format, feedback_matrix(gram, 1e-3))
    told = np.array(decode(arrays, format))
    scale, bias = (np.array(arrays[name].astype(mx.float32)) for name in ("scales", "biases"))

    def error(numbers: np.ndarray, four: np.ndarray) -> np.ndarray:
        """[..., row, 4] -> [..., row]."""
        difference = numbers - weight[:, four]
        return ((difference @ gram[np.ix_(four, four)]) * difference).sum(axis=-1)

    choices = np.array(list(itertools.product(range(1 << bits), repeat=4)), np.float32)
    best = sum(error(choices[:, None] * scale + bias, four).min(axis=0).sum() for four in fours)
    nearest = np.clip(np.rint((weight - bias) / scale), 0, (1 << bits) - 1) * scale + bias
    alone = sum(error(nearest[:, four], four).sum() for four in fours)
    found = sum(error(told[:, four], four).sum() for four in fours)
    assert best * 0.999 <= found < best + 0.45 * (alone - best), (best, found, alone)


def test_parts_of_the_rows_have_their_own_feedback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grouped matrix is two matrices, and chunks change nothing."""
    format, plain = Format("affine", 3, 32), Format("plain")
    weight, a, b = (mx.array(normal(*s, seed=i)) for i, s in enumerate([(24, 64), (64, 64), (64, 64)]))
    U = [feedback_matrix(np.array(x @ x.T)) for x in (a, b)]
    found = requantize({"weight": weight}, plain, format, mx.stack(U))
    halves = [quantize(weight[:12], format, U[0]), quantize(weight[12:], format, U[1])]
    monkeypatch.setattr("mlx_v4flash.quantize._CHUNK", 64 * 5)
    chunked = requantize({"weight": weight}, plain, format, mx.stack(U))
    for name, array in found.items():
        want = np.concatenate([np.array(half[name].astype(mx.float32)) for half in halves])
        np.testing.assert_array_equal(np.array(array.astype(mx.float32)), want)
        assert mx.array_equal(array, chunked[name]), name


def test_native_numbers_survive_wider_formats() -> None:
    fp4 = mlx_packed(normal(6, 128), Format.named("mxfp4"))
    stored = Format.named("mxfp4")
    for name in ("bf16", "mxfp8"):
        wider = requantize(fp4, stored, Format.named(name))
        assert mx.array_equal(decode(wider, Format.named(name)), decode(fp4, stored)), name
    assert requantize(fp4, stored, stored) is fp4


def test_zeros_and_constants() -> None:
    for format in FORMATS:
        for value in (0.0, 0.75):
            arrays = quantize(mx.full((3, 128), value), format)
            np.testing.assert_allclose(np.array(decode(arrays, format)), value, rtol=0.01)
        arrays = quantize(mx.zeros((3, 128)), format, feedback_matrix(np.zeros((128, 128), np.float32)))
        assert not np.array(decode(arrays, format)).any(), format
