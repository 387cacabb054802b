"""Router, shared expert, routed experts."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import project_f32, route, route_hash

from .config import ModelConfig
from .experts import Experts, ResidentExperts, SharedExpert
from .linear import Numerics


class Router(nn.Module):
    """Chooses experts by score, or in the first layers by token id (spec 7)."""

    def __init__(self, config: ModelConfig, hashed: bool) -> None:
        super().__init__()
        self.weight = mx.zeros((config.n_routed_experts, config.hidden_size))
        if hashed:
            self.tid2eid = mx.zeros((config.vocab_size, config.num_experts_per_tok), mx.int32)
        else:
            self.bias = mx.zeros((config.n_routed_experts,))
        self.hashed = hashed
        self._k, self._scale = config.num_experts_per_tok, config.routed_scaling_factor

    def __call__(self, x: mx.array, ids: mx.array) -> tuple[mx.array, mx.array]:
        """x [T, D] and token ids [T] -> expert ids [T, A], int32, and their weights [T, A], float32."""
        logits = project_f32(x, self.weight)
        if self.hashed:
            return route_hash(logits, self.tid2eid, ids, self._scale)
        return route(logits, self.bias, self._k, self._scale)


class MoE(nn.Module):
    """Sum of the chosen routed experts and the shared one."""

    def __init__(self, config: ModelConfig, numerics: Numerics, hashed: bool) -> None:
        super().__init__()
        self.gate = Router(config, hashed)
        self.experts: Experts = ResidentExperts(config, numerics)
        self.watch: Callable[[mx.array], None] | None = None  # told which experts are chosen, [B * T, A]
        self.shared_experts = SharedExpert(config, numerics)
        self._round_input = numerics.round_input

    def __call__(self, x: mx.array, ids: mx.array) -> mx.array:
        """x [B, T, D] and token ids [B, T] -> [B, T, D]."""
        flat = x.flatten(0, 1)
        experts, weights = self.gate(flat, ids.flatten())
        if self.watch is not None:
            self.watch(experts)
        rounded = self._round_input(flat)
        return self.experts(rounded, experts, weights, self.shared_experts).reshape(x.shape)
