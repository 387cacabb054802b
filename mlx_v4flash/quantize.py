"""Matrices to MLX's packed formats: the scale with the least error for each group, and errors made good later in a row.

Rounding a number alone is the best only if no other number can answer for its error. Inputs of a layer are
correlated, so a column's error is spread over the columns that follow (GPTQ; Frantar et al. 2023).
"""

from __future__ import annotations

from itertools import pairwise, product

import mlx.core as mx
import numpy as np

from .formats import Format

# Elements that are rounded at a time: about ten float32 arrays of this size are alive.
_CHUNK = 1 << 24
# Parts of a group's range that are cut off at either end for a try; each is then improved in rounds of least squares.
_CUTS, _ROUNDS = (0.0, 0.1, 0.2, 0.3), 1
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LARGEST = {"mxfp4": 6.0, "nvfp4": 6.0, "mxfp8": 448.0}
# Codes of scales that are tried, counted from the one that just holds the largest number of a group. A code more is
# twice the scale, or with nvfp4 about an eighth more.
_OFFSETS = {"mxfp4": (0, -1, -2), "mxfp8": (0, -1), "nvfp4": tuple(range(-8, 9))}

Packed = dict[str, mx.array]


def decode(arrays: Packed, format: Format, dtype: mx.Dtype = mx.float32) -> mx.array:
    """Numbers of a matrix held as weight, scales and biases: [..., rows, columns]."""
    weight = arrays["weight"]
    if format.mode == "plain":
        return weight.astype(dtype)
    scales, biases = arrays["scales"], arrays.get("biases")
    if biases is not None:  # MLX computes in the type of the scales
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(weight, scales, biases, dtype=dtype, **format.options)


def requantize(arrays: Packed, stored: Format, format: Format, feedback: mx.array | None = None) -> Packed:
    """A matrix [rows, columns] from one format to another, a part of its rows at a time.

    Args:
        feedback: what `feedback_matrix` returns, [columns, columns], or one for each of G parts of the rows,
            [G, columns, columns]; without it each number is rounded for itself.
    """
    rows = arrays["weight"].shape[0]
    if format == stored:
        return arrays
    shares = [feedback] if feedback is None or feedback.ndim == 2 else list(feedback)
    each = rows // len(shares)
    parts: list[Packed] = []
    for share, U in enumerate(shares):
        end = (share + 1) * each
        step = max(1, _CHUNK // _columns(arrays, stored))
        for start in range(share * each, end, step):
            rows_of = {name: array[start : min(start + step, end)] for name, array in arrays.items()}
            if format.mode == "plain":
                part = {"weight": decode(rows_of, stored, mx.bfloat16)}
            else:
                part = quantize(decode(rows_of, stored), format, U)
            mx.eval(part)
            parts.append(part)
    return {name: mx.concatenate([part[name] for part in parts]) for name in parts[0]}


def quantize(weight: mx.array, format: Format, feedback: mx.array | None = None) -> Packed:
    """Weight [rows, columns], float32 -> packed weight and scales, and biases if affine, as MLX lays them out."""
    g = format.group_size
    if feedback is not None:
        return _with_feedback(weight, format, feedback)
    groups = weight.reshape(weight.shape[0], -1, g)
    scales, biases = fit(groups, format)
    numbers = codes(groups, scales, biases, format)
    return _packed(numbers.reshape(weight.shape), scales, biases, format)


def feedback_matrix(gram: np.ndarray, damping: float = 0.03) -> mx.array:
    """U with U^T U the inverse of the damped Gram matrix; upper triangular, float32.

    Row i says how an error in column i is best made good in the columns after it.

    Args:
        gram: sums of products of inputs, [columns, columns].
        damping: part of the mean of its diagonal that is added to it; raised until it can be decomposed.
    """
    mean = float(np.trace(gram)) / len(gram) or 1.0
    while True:
        damped = gram.astype(np.float32, copy=True)
        damped[np.diag_indices_from(damped)] += np.float32(damping * mean)
        try:
            # From the lower factor of the reversed matrix: damped = M M^T with M upper triangular.
            M = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]
            U = np.linalg.solve(M, np.eye(len(M), dtype=np.float32))
        except np.linalg.LinAlgError:
            damping *= 10
            continue
        if np.isfinite(U).all():
            return mx.array(np.triu(U) * np.float32(np.sqrt(mean)))
        damping *= 10


def fit(groups: mx.array, format: Format, importance: mx.array | float = 1.0) -> tuple[mx.array, mx.array | None]:
    """Scales and biases with the least squared error, as they are stored; biases are None unless affine.

    Args:
        groups: [..., group_size], float32.
        importance: of each number's squared error, in a shape that broadcasts to that of groups.
    """
    if format.mode == "affine":
        return _fit_affine(groups, format, importance)
    largest = mx.abs(groups).max(axis=-1) / _LARGEST[format.mode]
    best, best_error = mx.zeros(largest.shape, mx.uint8), mx.full(largest.shape, mx.inf)
    first, last = _stored_scale(largest, format).astype(mx.int32), 0x7E if format.mode == "nvfp4" else 254
    for offset in _OFFSETS[format.mode]:
        scales = mx.clip(first + offset, 1, last).astype(mx.uint8)
        error = _error(groups, scales, None, format, importance)
        best, best_error = mx.where(error < best_error, scales, best), mx.minimum(error, best_error)
    return best, None


def codes(x: mx.array, scales: mx.array, biases: mx.array | None, format: Format) -> mx.array:
    """The nearest code of each number, uint32; scales and biases have one axis less than x."""
    scale = _scale(scales, format)[..., None]
    if biases is not None:
        ratio = (x - biases.astype(mx.float32)[..., None]) / mx.where(scale == 0, 1.0, scale)
        return mx.clip(mx.round(ratio), 0, (1 << format.bits) - 1).astype(mx.uint32)
    x = x / mx.where(scale == 0, 1.0, scale)
    if format.bits == 8:
        return mx.to_fp8(x).astype(mx.uint32)
    magnitude = mx.abs(x)
    code = mx.zeros(x.shape, mx.uint32)
    for low, high in pairwise(_E2M1):
        code = code + (magnitude > (low + high) / 2)
    return code + mx.where((x < 0) & (code > 0), 8, 0).astype(mx.uint32)


def values(numbers: mx.array, scales: mx.array, biases: mx.array | None, format: Format) -> mx.array:
    """What codes mean, float32."""
    scale = _scale(scales, format)[..., None]
    if biases is not None:
        return numbers.astype(mx.float32) * scale + biases.astype(mx.float32)[..., None]
    if format.bits == 8:
        return mx.from_fp8(numbers.astype(mx.uint8), dtype=mx.float32) * scale
    table = mx.array([*_E2M1, *(-value for value in _E2M1)])
    return table[numbers] * scale


def pack(numbers: mx.array, bits: int) -> mx.array:
    """Codes [rows, columns] -> words [rows, columns * bits / 32]: a stream of bits, the first in the lowest."""
    *lead, columns = numbers.shape
    numbers = numbers.reshape(*lead, columns // 32, 32)
    words = [mx.zeros(numbers.shape[:-1], mx.uint32) for _ in range(bits)]
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[word] = words[word] | (numbers[..., i] << shift)
        if shift + bits > 32:
            words[word + 1] = words[word + 1] | (numbers[..., i] >> (32 - shift))
    return mx.stack(words, axis=-1).reshape(*lead, columns * bits // 32)


def _with_feedback(weight: mx.array, format: Format, U: mx.array) -> Packed:
    """Column after column; a group's scale is chosen when its turn comes, for what the errors before it left."""
    g, diagonal = format.group_size, mx.diag(U)
    done, all_scales = [], []
    all_biases: list[mx.array] = []
    for start in range(0, weight.shape[1], g):
        span = slice(start, start + g)
        block, here = weight[:, span], U[span, span]
        scales, biases = fit(block, format, 1 / mx.square(diagonal[span]))
        errors = []
        for j in range(g):
            number = codes(block[:, j : j + 1], scales, biases, format)
            error = (block[:, j : j + 1] - values(number, scales, biases, format)) / here[j, j]
            block = block - error * here[j]
            done.append(number)
            errors.append(error)
        weight = weight - mx.concatenate(errors, axis=1) @ U[span]
        mx.eval(weight, done)
        all_scales.append(scales)
        all_biases += [] if biases is None else [biases]
    biases = mx.stack(all_biases, axis=1) if all_biases else None
    return _packed(mx.concatenate(done, axis=1), mx.stack(all_scales, axis=1), biases, format)


def _fit_affine(groups: mx.array, format: Format, importance: mx.array | float) -> tuple[mx.array, mx.array]:
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    width, steps = high - low, (1 << format.bits) - 1
    best, best_error = (_bf16(width), _bf16(low)), mx.full(low.shape, mx.inf)
    for below, above in product(_CUTS, _CUTS):
        scales, biases = _bf16(width * (1 - below - above) / steps), _bf16(low + width * below)
        for again in range(_ROUNDS + 1):
            if again:
                scales, biases = _least_squares(groups, codes(groups, scales, biases, format), importance)
            error = _error(groups, scales, biases, format, importance)
            better = error < best_error
            best = mx.where(better, scales, best[0]), mx.where(better, biases, best[1])
            best_error = mx.minimum(error, best_error)
    return best


def _least_squares(groups: mx.array, numbers: mx.array, importance: mx.array | float) -> tuple[mx.array, mx.array]:
    """The scale and bias that bring these codes nearest to their numbers."""
    q, c = numbers.astype(mx.float32), mx.broadcast_to(mx.array(importance), groups.shape)
    total = c.sum(axis=-1)
    q_mean, x_mean = (c * q).sum(axis=-1) / total, (c * groups).sum(axis=-1) / total
    centred = q - q_mean[..., None]
    spread = (c * centred * centred).sum(axis=-1)
    scale = (c * centred * (groups - x_mean[..., None])).sum(axis=-1) / mx.where(spread == 0, 1.0, spread)
    scale = _bf16(scale)
    return scale, _bf16(x_mean - scale.astype(mx.float32) * q_mean)


def _error(
    groups: mx.array, scales: mx.array, biases: mx.array | None, format: Format, importance: mx.array | float
) -> mx.array:
    found = values(codes(groups, scales, biases, format), scales, biases, format)
    return (importance * mx.square(groups - found)).sum(axis=-1)


def _stored_scale(scale: mx.array, format: Format) -> mx.array:
    """The code of a scale, uint8: the power of two from it on upwards, or for nvfp4 the nearest of E4M3."""
    if format.mode == "nvfp4":
        return mx.to_fp8(mx.maximum(scale, 2.0**-9))
    exponent = mx.ceil(mx.log2(mx.maximum(scale, 2.0**-120)) - 1e-6)
    return (mx.clip(exponent, -120, 127) + 127).astype(mx.uint8)


def _scale(scales: mx.array, format: Format) -> mx.array:
    if format.mode == "affine":
        return scales.astype(mx.float32)
    if format.mode == "nvfp4":
        return mx.from_fp8(scales, dtype=mx.float32)
    return (scales.astype(mx.uint32) << 23).view(mx.float32)


def _packed(numbers: mx.array, scales: mx.array, biases: mx.array | None, format: Format) -> Packed:
    arrays = {"weight": pack(numbers, format.bits), "scales": scales}
    return arrays if biases is None else arrays | {"biases": biases}


def _bf16(x: mx.array) -> mx.array:
    return x.astype(mx.bfloat16)


def _columns(arrays: Packed, stored: Format) -> int:
    words = arrays["weight"].shape[-1]
    return words * 32 // stored.bits if stored.bits else words
