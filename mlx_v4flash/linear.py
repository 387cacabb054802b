"""Linear layers as the checkpoint stores them, and the rounding of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import ExpertWeights, fp8_round_trip, project_f32, quantized_product

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
    """mxfp8 weights, as the checkpoint's FP8 is held; the sum is float32 on every device."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False, group_size=32, bits=8, mode="mxfp8")

    def __call__(self, x: mx.array) -> mx.array:
        return quantized_product(x, self.weight, self.scales, self.mode)


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
    B, T, G, U = x.shape
    x = x.reshape(B * T, G, U).swapaxes(0, 1)
    weight = layer.weight.reshape(G, -1, layer.weight.shape[-1])
    if isinstance(layer, QuantizedLinear):
        y = quantized_product(x, weight, layer.scales.reshape(G, -1, layer.scales.shape[-1]), layer.mode)
    else:
        y = x @ weight.swapaxes(1, 2)
    return y.swapaxes(0, 1).reshape(B, T, -1)


def stacked_linear(layer: Linear, x: mx.array, sizes: Sequence[int]) -> list[mx.array]:
    """Products with layers whose weights are stacked in one: [..., D] -> [..., size] for each size.

    One product for a single token, where launches count. For more it is one for each part, so that no result has to
    be copied out of the others.
    """
    ends = list(accumulate(sizes))
    if x.size == x.shape[-1]:
        return list(mx.split(layer(x), ends[:-1], axis=-1))
    return [_part(layer, x, slice(*rows)) for rows in pairwise([0, *ends])]


def _part(layer: Linear, x: mx.array, rows: slice) -> mx.array:
    if isinstance(layer, QuantizedLinear):
        return quantized_product(x, layer.weight[rows], layer.scales[rows], layer.mode)
    return x @ layer.weight[rows].T


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
