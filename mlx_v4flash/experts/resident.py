"""All routed experts of a layer in memory."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import ExpertWeights, add_shared

from ..config import ModelConfig
from ..linear import Numerics
from .products import SORT_FROM, ExpertProducts, SharedExpert

# MLX's names of the formats in a config.
MODES = {"fp4": "mxfp4", "fp8": "mxfp8", None: "plain"}


class ExpertMatrix(nn.Module):
    """One matrix of every expert: weight [E, rows, columns], packed with scales or plain."""

    def __init__(self, config: ModelConfig, rows: int, columns: int) -> None:
        super().__init__()
        self.mode = MODES[config.expert_dtype]
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

    def __call__(self, x: mx.array, ids: mx.array, weights: mx.array, shared: SharedExpert) -> mx.array:
        """Weighted sum of the chosen experts, and the shared one's result.

        Args:
            x: [T, D], already rounded if activations are; ids, weights: [T, A].

        Returns:
            [T, D] in the type of x; float32 inside.
        """
        products = ExpertProducts(self.w1.weights, self.w3.weights, self.w2.weights, self._limit, self._round_input)
        return compute_all(products, x, ids, weights, shared)


def compute_all(
    products: ExpertProducts, x: mx.array, ids: mx.array, weights: mx.array, shared: SharedExpert
) -> mx.array:
    """With the matrices of every expert; as `ResidentExperts`."""
    if ids.size < SORT_FROM:
        return products.few(x, ids, weights, shared)
    T, A = ids.shape
    expert = ids.flatten()
    order = mx.argsort(expert)
    y = products.run(x, order // A, expert[order], weights.flatten()[order])
    return add_shared(y[mx.argsort(order)].reshape(T, A, -1), shared(x))
