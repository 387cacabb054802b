"""Linear layers as the checkpoint stores them, and the rounding of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import FORMATS, ExpertWeights, fp8_round_trip, project_f32, quantized_product

from .config import ModelConfig

ACTIVATION_BLOCK = 128


@dataclass(frozen=True)
class Numerics:
    """How to compute, as opposed to what.

    Args:
        dtype: of activations, residual streams and caches.
        simulate_cache_quant: the FP8 and FP4 round trips of cached rows and the indexer's Hadamard transform,
            which the model was trained with (spec 6.3).
        quantize_activations: round the inputs of quantised linear layers to FP8, as the official code does
            (spec 6.4). Off is more precise.
    """

    dtype: mx.Dtype = mx.bfloat16
    simulate_cache_quant: bool = True
    quantize_activations: bool = False

    @property
    def packed_caches(self) -> bool:
        """Whether caches hold rows and index keys as FP8 and FP4 codes, which here loses nothing (spec 10.1)."""
        return self.simulate_cache_quant and self.dtype == mx.bfloat16

    @property
    def round_input(self) -> Callable[[mx.array], mx.array]:
        """What the input of a quantised linear layer goes through."""
        return _fp8_input if self.quantize_activations else _unchanged


def _fp8_input(x: mx.array) -> mx.array:
    return fp8_round_trip(x, ACTIVATION_BLOCK)


def _unchanged(x: mx.array) -> mx.array:
    return x


class QuantizedLinear(nn.QuantizedLinear):
    """Packed weights: mxfp8, as the checkpoint's FP8 is held, unless told otherwise; the sum is float32 everywhere."""

    def __init__(self, inputs: int, outputs: int, mode: str = "mxfp8", bits: int = 8, group_size: int = 32) -> None:
        bits, group_size = FORMATS.get(mode, (bits, group_size))
        super().__init__(inputs, outputs, bias=False, group_size=group_size, bits=bits, mode=mode)

    def __call__(self, x: mx.array) -> mx.array:
        return packed_product(self, x)


class QuantizedWideLinear(QuantizedLinear):
    """A WideLinear with packed weights: its product is float32 throughout, too."""

    def __call__(self, x: mx.array) -> mx.array:
        return packed_product(self, x.astype(mx.float32))


class QuantizedEmbedding(nn.QuantizedEmbedding):
    """Rows of packed weights, decoded in float32: in the type of its scales a small step would be lost."""

    def __call__(self, ids: mx.array) -> mx.array:
        scales, biases = self.scales[ids], self.get("biases")
        if biases is not None:
            scales, biases = scales.astype(mx.float32), biases[ids].astype(mx.float32)
        return mx.dequantize(self.weight[ids], scales, biases, self.group_size, self.bits, self.mode, dtype=mx.float32)


class Observed(nn.Module):
    """A layer whose inputs are looked at on their way; calibration puts it in the place of the layer."""

    def __init__(self, layer: nn.Module, see: Callable[[mx.array], None]) -> None:
        super().__init__()
        self.layer, self.see = layer, see

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = _seen(self, x)(x)
        return y


Linear = nn.Linear | QuantizedLinear


def linear(config: ModelConfig, inputs: int, outputs: int) -> Linear:
    """A layer without bias: mxfp8 if the checkpoint is quantised, else plain."""
    return QuantizedLinear(inputs, outputs) if config.quantized else nn.Linear(inputs, outputs, bias=False)


def packed(layer: Linear) -> ExpertWeights:
    """The weights of a layer without bias, [outputs, inputs], as the ops of experts take them."""
    if not isinstance(layer, QuantizedLinear):
        return ExpertWeights(layer.weight)
    return ExpertWeights(layer.weight, layer.scales, layer.mode, layer.get("biases"), layer.bits, layer.group_size)


def grouped_linear(layer: Linear, x: mx.array) -> mx.array:
    """Group g of the inputs meets rows g * R ... of the weight (spec 4.5): [B, T, G, U] -> [B, T, G * R]."""
    layer, (B, T, G, U) = _seen(layer, x), x.shape
    x = x.reshape(B * T, G, U).swapaxes(0, 1)
    if isinstance(layer, QuantizedLinear):
        y = packed_product(layer, x, lambda array: array.reshape(G, -1, array.shape[-1]))
    else:
        y = x @ layer.weight.reshape(G, -1, layer.weight.shape[-1]).swapaxes(1, 2)
    return y.swapaxes(0, 1).reshape(B, T, -1)


def stacked_linear(layer: Linear, x: mx.array, sizes: Sequence[int]) -> list[mx.array]:
    """Products with layers whose weights are stacked in one: [..., D] -> [..., size] for each size.

    One product for a single token, where launches count. For more it is one for each part, so that no result has to
    be copied out of the others.
    """
    layer, ends = _seen(layer, x), list(accumulate(sizes))
    if x.size == x.shape[-1]:
        return list(mx.split(layer(x), ends[:-1], axis=-1))
    return [_part(layer, x, slice(*rows)) for rows in pairwise([0, *ends])]


def _part(layer: Linear, x: mx.array, rows: slice) -> mx.array:
    if isinstance(layer, QuantizedLinear):
        return packed_product(layer, x, lambda array: array[rows])
    return x @ layer.weight[rows].T


def packed_product(
    layer: QuantizedLinear, x: mx.array, part: Callable[[mx.array], mx.array] = lambda array: array
) -> mx.array:
    """x times the weight, or times what `part` makes of it and of its scales and biases."""
    biases = layer.get("biases")
    return quantized_product(
        x, part(layer.weight), part(layer.scales), layer.mode, None if biases is None else part(biases),
        layer.bits, layer.group_size,
    )  # fmt: skip


def _seen(layer: Any, x: mx.array) -> Any:
    """The layer itself; if it is observed, its input has been seen."""
    if isinstance(layer, Observed):
        layer.see(x)
        return layer.layer
    return layer


class RMSNorm(nn.Module):
    """Weight [D] and eps of a norm, which is part of the op that needs it."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((width,))
        self.eps = eps


class WideLinear(nn.Module):
    """A layer without bias whose weight keeps its stored type and whose product is float32 throughout."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = mx.zeros((outputs, inputs))

    def __call__(self, x: mx.array) -> mx.array:
        return project_f32(x, self.weight)
