"""Router, shared expert, routed experts. Shapes: T tokens, D width, E experts, A of them for a token."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_v4flash.config import ModelConfig

from .grouped import grouped_mm
from .layers import Training, Weights
from .rounding import fp4_weight


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)


class Shared(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        D, W = c.hidden_size, c.moe_intermediate_size
        self.w1, self.w3, self.w2 = Weights(W, D), Weights(W, D), Weights(D, W, gain=0.5)
        self.limit = c.swiglu_limit

    def forward(self, x: Tensor, how: Training) -> Tensor:
        return self.w2(swiglu(self.w1(x, how), self.w3(x, how), self.limit), how)


class Gate(nn.Module):
    """Router: by score, with a bias that only selects, or by token id (spec 7)."""

    def __init__(self, c: ModelConfig, hashed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c.n_routed_experts, c.hidden_size) / math.sqrt(c.hidden_size))
        if hashed:
            self.register_buffer("tid2eid", torch.zeros(c.vocab_size, c.num_experts_per_tok, dtype=torch.int64))
        else:
            self.register_buffer("bias", torch.zeros(c.n_routed_experts))
        self.hashed, self.k, self.scale = hashed, c.num_experts_per_tok, c.routed_scaling_factor

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D], ids [T] -> experts and weights, [T, A]."""
        scores = F.softplus(x.float() @ self.weight.T).sqrt()
        picks = self.tid2eid[ids] if self.hashed else (scores.detach() + self.bias).topk(self.k, -1).indices
        w = scores.gather(1, picks)
        return picks, w / (w.sum(-1, keepdim=True) + 1e-20) * self.scale


class Experts(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        E, D, W = c.n_routed_experts, c.hidden_size, c.moe_intermediate_size
        self.w1 = nn.Parameter(torch.randn(E, W, D) / math.sqrt(D))
        self.w3 = nn.Parameter(torch.randn(E, W, D) / math.sqrt(D))
        self.w2 = nn.Parameter(torch.randn(E, D, W) * 0.5 / math.sqrt(W))
        self.limit = c.swiglu_limit

    def forward(self, x: Tensor, picks: Tensor, weights: Tensor, how: Training) -> tuple[Tensor, Tensor]:
        """Weighted sum [T, D], float32, and tokens of each expert [E]."""
        (T, A), E = picks.shape, self.w1.shape[0]
        flat = picks.flatten()
        order = flat.argsort(stable=True)
        counts = torch.zeros(E, dtype=torch.int64).scatter_add_(0, flat, torch.ones_like(flat))
        w1, w3, w2 = ((fp4_weight(w) if how.rounding else w).to(how.dtype) for w in (self.w1, self.w3, self.w2))
        token = order // A
        both = grouped_mm(x.to(how.dtype)[token], torch.cat((w1, w3), 1), counts)
        h = swiglu(*both.chunk(2, -1), self.limit) * weights.flatten()[order, None]
        y = grouped_mm(h.to(how.dtype), w2, counts)
        return torch.zeros(T, y.shape[-1]).index_add(0, token, y.float()), counts


class MoE(nn.Module):
    def __init__(self, c: ModelConfig, hashed: bool) -> None:
        super().__init__()
        self.gate, self.experts, self.shared_experts = Gate(c, hashed), Experts(c), Shared(c)

    def forward(self, x: Tensor, ids: Tensor, how: Training) -> tuple[Tensor, Tensor]:
        flat = x.flatten(0, 1)
        picks, weights = self.gate(flat, ids.flatten())
        y, counts = self.experts(flat, picks, weights, how)
        return (y + self.shared_experts(flat, how).float()).view(x.shape), counts
