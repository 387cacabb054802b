"""What the tests of the ops share: numbers to feed them, the formats' rounding in numpy, and comparisons.

Nothing here uses MLX to compute an expectation. Expectations are float64 arrays; `rounded` puts them on the grid of
a type wherever an op documents that it rounds.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import metal_kernels
from metal_kernels import KernelError, latents
from metal_kernels.compress import compress_reference as compress_tokens_reference
from metal_kernels.latents import latents_reference

# Largest relative root-mean-square error. They tell accumulation in float32 from accumulation in the low type.
BOUNDS = {mx.float32: 5e-6, mx.float16: 5e-4, mx.bfloat16: 3e-3}

_generator = np.random.default_rng(0)


# --- parameters of tests ----------------------------------------------------------------------------


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


FLOATS = pytest.mark.parametrize("dtype", list(BOUNDS), ids=dtype_name)


def sizes(names: str, *rows: tuple[int, ...]) -> pytest.MarkDecorator:
    """Parametrise by sizes with readable ids: sizes("T D", (1, 67)) gives [T=1,D=67]."""
    keys = names.split()
    ids = [",".join(f"{key}={value}" for key, value in zip(keys, row, strict=True)) for row in rows]
    return pytest.mark.parametrize(keys, rows, ids=ids)


# --- numbers ----------------------------------------------------------------------------------------


def reseed(name: str) -> None:
    global _generator
    _generator = np.random.default_rng(zlib.crc32(name.encode()))


def generator() -> np.random.Generator:
    return _generator


def normal(*shape: int, dtype: mx.Dtype = mx.float32, scale: float = 1.0) -> mx.array:
    """Normally distributed numbers; each call draws others, each test draws the same ones every time."""
    return mx.array((_generator.standard_normal(shape) * scale).astype(np.float32)).astype(dtype)


def rotation(positions: np.ndarray | int, pairs: int) -> tuple[mx.array, mx.array]:
    """cos and sin, [T, pairs]: for the given positions, or for the first T of them."""
    positions = np.arange(positions) if isinstance(positions, int) else positions
    angles = positions[:, None] * 0.7 ** np.arange(1, pairs + 1)
    return mx.array(np.cos(angles).astype(np.float32)), mx.array(np.sin(angles).astype(np.float32))


def wide(a: mx.array) -> np.ndarray:
    """The exact values of an array, in float64."""
    return np.array(a.astype(mx.float32)).astype(np.float64)


# --- the formats ------------------------------------------------------------------------------------

# Every number that is not negative and finite, in order of its bits, so that an even index is an even mantissa.
E4M3 = np.array([m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)])
E4M3 = E4M3[:-1]  # the last code is NaN
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def rounded(x: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """The nearest numbers of a type, ties to even, in float64."""
    if dtype == mx.bfloat16:
        fraction, exponent = np.frexp(x)
        return np.ldexp(np.rint(fraction * 256), exponent - 8)
    return x.astype(np.float16 if dtype == mx.float16 else np.float32).astype(np.float64)


def nearest(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The nearest entries of a grid of numbers that are not negative, ties to even index, with the sign of x."""
    size, middles = np.abs(x), (grid[1:] + grid[:-1]) / 2
    index = np.searchsorted(middles, size, side="left")
    tie = (index < len(middles)) & (size == middles[np.minimum(index, len(middles) - 1)])
    return np.copysign(grid[index + (tie & (index % 2 == 1))], x)


def round_trip(x: np.ndarray, grid: np.ndarray, block: int, floor: float) -> np.ndarray:
    """Blocks of the last axis on a grid, times the power of two that brings them into its range (spec 6.3)."""
    blocks = x.reshape(*x.shape[:-1], -1, block)
    amax = np.maximum(np.abs(blocks).max(axis=-1, keepdims=True), floor)
    product = amax.astype(np.float32) * np.float32(1 / grid[-1])
    fraction, exponent = np.frexp(product)  # product = fraction * 2^exponent, 0.5 <= fraction < 1
    scale = np.ldexp(1.0, exponent - (fraction == 0.5))
    return (nearest(np.clip(blocks / scale, -grid[-1], grid[-1]), grid) * scale).reshape(x.shape)


def fp8_expected(x: np.ndarray, block: int) -> np.ndarray:
    return round_trip(x, E4M3, block, 1e-4)


def fp4_expected(x: np.ndarray, block: int = 32) -> np.ndarray:
    return round_trip(x, E2M1, block, 6 * 2.0**-126)


def packed_weights(*shape: int, mode: str) -> tuple[mx.array, mx.array, np.ndarray]:
    """Random weights of a quantised format, [..., rows, columns]: words, scales, and the numbers they stand for."""
    *lead, columns = shape
    # A block of 32 columns shares an exponent; codes of e4m3 go up to 120, so its exponents are lower.
    exponents = _generator.integers(-7, -3, (*lead, columns // 32)) - (0 if mode == "mxfp4" else 5)
    sign = _generator.integers(0, 2, shape)
    if mode == "mxfp4":
        codes = _generator.integers(0, 8, shape)
        values = E2M1[codes]
        nibbles = (codes | sign << 3).astype(np.uint8)
        packed = nibbles[..., 0::2] | nibbles[..., 1::2] << 4  # the even column is in the low bits
    else:
        codes = _generator.integers(0, 0x70, shape)
        values = E4M3[codes]
        packed = (codes | sign << 7).astype(np.uint8)
    values = np.where(sign, -values, values) * np.repeat(2.0**exponents, 32, axis=-1)
    return mx.array(packed).view(mx.uint32), mx.array((exponents + 127).astype(np.uint8)), values


# --- parts that several ops contain -----------------------------------------------------------------


def norm_expected(x: np.ndarray, weight: np.ndarray | float, eps: float) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + eps) * weight


def rope_expected(x: np.ndarray, cos: mx.array, sin: mx.array, dtype: mx.Dtype) -> np.ndarray:
    """Pair by pair; what is not rotated stays as it is. x is [B, T, K] or [B, T, H, K]."""
    c, s, out = wide(cos), wide(sin), x.copy()
    pairs = c.shape[1]
    start = x.shape[-1] - 2 * pairs
    for t in range(x.shape[1]):
        for i in range(pairs):
            a, b = x[:, t, ..., start + 2 * i], x[:, t, ..., start + 2 * i + 1]
            out[:, t, ..., start + 2 * i] = rounded(a * c[t, i] - b * s[t, i], dtype)
            out[:, t, ..., start + 2 * i + 1] = rounded(a * s[t, i] + b * c[t, i], dtype)
    return out


def hadamard_expected(x: np.ndarray) -> np.ndarray:
    """Sylvester's matrix, H[i, j] = (-1)^(number of bits that i and j share), orthogonal."""
    J = x.shape[-1]
    matrix = np.array([[(-1) ** (i & j).bit_count() for j in range(J)] for i in range(J)])
    return x @ matrix / np.sqrt(J)


# --- parts of ops as ops of their own -----------------------------------------------------------------


def key_row(
    kv: mx.array, weight: mx.array, cos: mx.array, sin: mx.array, eps: float, fp8: bool, packed: bool = False
) -> mx.array:
    """The row of the window that `latents` makes; the latent beside it does not matter."""
    return latents(mx.ones((*kv.shape[:-1], 2), kv.dtype), kv, mx.ones(2), weight, cos, sin, eps, fp8, packed)[1]


def key_row_reference(
    kv: mx.array, weight: mx.array, cos: mx.array, sin: mx.array, eps: float, fp8: bool, packed: bool = False
) -> mx.array:
    q = mx.ones((*kv.shape[:-1], 2), kv.dtype)
    return latents_reference(q, kv, mx.ones(2), weight, cos, sin, eps, fp8, packed)[1]


def compress(kv: mx.array, gate: mx.array, *rest: Any, ape: mx.array | None = None) -> mx.array:
    """The op for candidates [B, S, M, K] of groups that do not overlap."""
    return metal_kernels.compress(*_as_tokens(kv, gate, ape), *rest, **_columns(kv))


def compress_reference(kv: mx.array, gate: mx.array, *rest: Any) -> mx.array:
    return compress_tokens_reference(*_as_tokens(kv, gate), *rest, **_columns(kv))


def _as_tokens(kv: mx.array, gate: mx.array, ape: mx.array | None = None) -> tuple[mx.array, mx.array]:
    B, S, M, K = kv.shape
    tokens = mx.concatenate([kv.reshape(B, S * M, K), gate.reshape(B, S * M, K)], axis=-1)
    return tokens, mx.zeros((M, K)) if ape is None else ape


def _columns(kv: mx.array) -> dict[str, int]:
    return {"kv": 0, "gate": kv.shape[-1], "start": 0, "before": False}


# --- running and comparing --------------------------------------------------------------------------


def run(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an op twice: both results must have the same bits, and the inputs must be as before."""
    inputs = list(_arrays([*args, *kwargs.values()]))
    before = [_bits(a) for a in inputs]
    first, second = op(*args, **kwargs), op(*args, **kwargs)
    for one, other in zip(_arrays([first]), _arrays([second]), strict=True):
        assert np.array_equal(_bits(one), _bits(other)), f"{op.__name__}: two runs differ"
    for bits, a in zip(before, inputs, strict=True):
        assert np.array_equal(bits, _bits(a)), f"{op.__name__}: an input of shape {a.shape} was modified"
    return first


def expect_match(found: mx.array, expected: np.ndarray, dtype: mx.Dtype) -> None:
    """Assert the type, the shape, NaN and infinity in the same places, and the relative error of that type."""
    assert found.dtype == dtype, f"expected {dtype}, found {found.dtype}"
    values = wide(found)
    assert values.shape == expected.shape, f"expected shape {expected.shape}, found {values.shape}"
    finite = np.isfinite(expected)
    same = np.where(finite, np.isfinite(values), (values == expected) | (np.isnan(values) & np.isnan(expected)))
    assert same.all(), f"NaN or infinity in other places: {_worst(values, expected, ~same)}"
    error = np.where(finite, values - np.where(finite, expected, 0), 0)
    norm = np.sqrt(np.square(expected[finite]).sum())
    relative = np.sqrt(np.square(error).sum()) / (norm or 1)
    bound = BOUNDS[dtype]
    assert relative <= bound, f"relative error {relative:.2e} > {bound:.0e}: {_worst(values, expected, abs(error))}"


def expect_same(found: mx.array, expected: np.ndarray, share: float = 0.0) -> None:
    """Assert equality, but for a share of elements.

    After a rounding, error of float32 shows in the few elements that lie next to a tie. One rounding more, or one in
    another place, shows in a good part of them.
    """
    values = wide(found)
    assert values.shape == expected.shape, f"expected shape {expected.shape}, found {values.shape}"
    other = ~((values == expected) | (np.isnan(values) & np.isnan(expected)))
    assert other.sum() <= share * other.size, (
        f"{other.sum()} of {other.size} elements differ: {_worst(values, expected, other)}"
    )


def expect_equal(found: mx.array, other: mx.array) -> None:
    """Assert the same type, shape and bits."""
    assert (found.dtype, found.shape) == (other.dtype, other.shape)
    assert np.array_equal(_bits(found), _bits(other)), _worst(wide(found), wide(other), wide(found) != wide(other))


def expect_refused(argument: str, op: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Assert that an op names itself and an argument, and says what it expected."""
    with pytest.raises(KernelError, match=rf"^{op.__name__}: {argument}: expected "):
        op(*args, **kwargs)


def _worst(values: np.ndarray, expected: np.ndarray, size: np.ndarray) -> str:
    at = np.unravel_index(np.argmax(size), size.shape)
    return f"worst at {tuple(map(int, at))}: expected {expected[at]!r}, found {values[at]!r}"


def _bits(a: mx.array) -> np.ndarray:
    return np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a).reshape(-1).view(np.uint8)


def _arrays(values: Any) -> Iterator[mx.array]:
    """Arrays inside lists, tuples and dataclasses."""
    if isinstance(values, mx.array):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _arrays(value)
    elif dataclasses.is_dataclass(values):
        yield from _arrays([getattr(values, f.name) for f in dataclasses.fields(values)])
