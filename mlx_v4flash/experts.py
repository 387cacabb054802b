"""Where routed experts live."""

from __future__ import annotations

from functools import cache

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import ExpertWeights, expert_down, expert_down_sum, expert_gate_up

from .config import ModelConfig
from .linear import Numerics

# From this many pairs of token and expert on they are sorted, so that one expert's tokens share a product.
_SORT_FROM = 64


class ExpertMatrix(nn.Module):
    """One matrix of every expert: weight [E, rows, columns], packed with scales or plain."""

    def __init__(self, config: ModelConfig, rows: int, columns: int) -> None:
        super().__init__()
        self.mode = {"fp4": "mxfp4", "fp8": "mxfp8", None: "plain"}[config.expert_dtype]
        E = config.n_routed_experts
        if self.mode == "plain":
            self.weight = mx.zeros((E, rows, columns))
        else:
            self.weight = mx.zeros((E, rows, columns // (8 if self.mode == "mxfp4" else 4)), mx.uint32)
            self.scales = mx.zeros((E, rows, columns // 32), mx.uint8)

    @property
    def weights(self) -> ExpertWeights:
        return ExpertWeights(self.weight, self.get("scales"), self.mode)


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

    def __call__(self, x: mx.array, ids: mx.array, weights: mx.array) -> mx.array:
        """Weighted sum of the chosen experts.

        Args:
            x: [T, D], already rounded if activations are; ids, weights: [T, A].

        Returns:
            [T, D], float32.
        """
        T, A = ids.shape
        expert, weight = ids.flatten(), weights.flatten()
        order = mx.argsort(expert) if T * A >= _SORT_FROM else None
        if order is None:
            token = _token_of_pair(T, A)
        else:
            token, expert, weight = order // A, expert[order], weight[order]
        is_sorted = order is not None
        h = expert_gate_up(x, self.w1.weights, self.w3.weights, token, expert, weight, self._limit, is_sorted)
        h = self._round_input(h)
        if order is None:
            return expert_down_sum(h.reshape(T, A, -1), self.w2.weights, ids)
        y = expert_down(h, self.w2.weights, expert, is_sorted)[mx.argsort(order)]
        return y.reshape(T, A, -1).astype(mx.float32).sum(axis=1)


@cache
def _token_of_pair(T: int, A: int) -> mx.array:
    """A constant, so that a decode step does not compute it."""
    return mx.array([pair // A for pair in range(T * A)], mx.int32)
