"""All routed experts of a layer in memory, and the shared one."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import FORMATS, ExpertWeights, add_shared, expert_down, expert_down_sum, expert_gate_up, swiglu

from ..config import ModelConfig
from ..linear import Numerics, linear, packed

# From this many pairs of token and expert on they are sorted, so that one expert's tokens share a product.
_SORT_FROM = 64


class ExpertMatrix(nn.Module):
    """One matrix of every expert: weight [E, rows, columns], packed with scales and perhaps biases, or plain."""

    def __init__(self, config: ModelConfig, rows: int, columns: int) -> None:
        super().__init__()
        self.mode = {"fp4": "mxfp4", "fp8": "mxfp8", None: "plain"}[config.expert_dtype]
        self.bits, self.group_size = FORMATS.get(self.mode, (0, 0))
        E = config.n_routed_experts
        if self.mode == "plain":
            self.weight = mx.zeros((E, rows, columns))
        else:
            self.weight = mx.zeros((E, rows, columns * self.bits // 32), mx.uint32)
            self.scales = mx.zeros((E, rows, columns // self.group_size), mx.uint8)

    @property
    def weights(self) -> ExpertWeights:
        return ExpertWeights(self.weight, self.get("scales"), self.mode, self.get("biases"), self.bits, self.group_size)


class SharedExpert(nn.Module):
    """The expert every token uses; clamped like the others, without a weight."""

    def __init__(self, config: ModelConfig, numerics: Numerics) -> None:
        super().__init__()
        D, F = config.hidden_size, config.moe_intermediate_size
        self.w1, self.w2, self.w3 = linear(config, D, F), linear(config, F, D), linear(config, D, F)
        self._limit = config.swiglu_limit
        self._round_input = numerics.round_input

    def __call__(self, x: mx.array) -> mx.array:
        """[T, D], rounded if activations are -> [T, D]."""
        h = swiglu(self.w1(x), self.w3(x), self._limit).astype(x.dtype)
        return self.w2(self._round_input(h))


class ResidentExperts(nn.Module):
    """All routed experts of a layer in memory."""

    def __init__(self, config: ModelConfig, numerics: Numerics) -> None:
        super().__init__()
        D, F = config.hidden_size, config.moe_intermediate_size
        self.w1 = ExpertMatrix(config, F, D)
        self.w2 = ExpertMatrix(config, D, F)
        self.w3 = ExpertMatrix(config, F, D)
        self._limit = config.swiglu_limit
        self._round_input = numerics.round_input

    def __call__(self, x: mx.array, ids: mx.array, weights: mx.array, shared: SharedExpert) -> mx.array:
        """Weighted sum of the chosen experts, and the shared one's result.

        Args:
            x: [T, D], already rounded if activations are; ids, weights: [T, A].

        Returns:
            [T, D] in the type of x; float32 inside.
        """
        if ids.size < _SORT_FROM:
            return self._few(x, ids, weights, shared)
        return add_shared(self._sorted(x, ids, weights), shared(x))

    def _few(self, x: mx.array, ids: mx.array, weights: mx.array, shared: SharedExpert) -> mx.array:
        """The shared expert in the same products, since each of them waits for little but its weights."""
        w1, w3, w2 = (packed(layer) for layer in (shared.w1, shared.w3, shared.w2))
        token, both = _token_of_pair(*ids.shape), (w1, w3)
        h = expert_gate_up(
            x, self.w1.weights, self.w3.weights, token, ids.flatten(), weights.flatten(), self._limit, False, both
        )
        return expert_down_sum(self._round_input(h), self.w2.weights, ids, w2)

    def _sorted(self, x: mx.array, ids: mx.array, weights: mx.array) -> mx.array:
        """Products of each token's experts, [T, A, D]; pairs with the same expert are multiplied together."""
        T, A = ids.shape
        expert = ids.flatten()
        order = mx.argsort(expert)
        token, expert, weight = order // A, expert[order], weights.flatten()[order]
        h = expert_gate_up(x, self.w1.weights, self.w3.weights, token, expert, weight, self._limit, True)
        y = expert_down(self._round_input(h), self.w2.weights, expert, True)
        return y[mx.argsort(order)].reshape(T, A, -1)


@cache
def _token_of_pair(T: int, A: int) -> mx.array:
    """A constant, so that a decode step does not compute it."""
    return mx.array([pair // A for pair in range(T * A)], mx.int32)
