"""The architecture in torch, for training: whole sequences, no caches.

Parameters have DeepSeek's names, routed experts stacked. Shapes: B sequences, T tokens, N streams, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_v4flash.config import ModelConfig
from mlx_v4flash.rope import inverse_frequencies

from .attention import Attention
from .experts import MoE
from .layers import Norm, Training, Weights


class Streams(nn.Module):
    """Hyper-connection of one sublayer (spec 3)."""

    def __init__(self, c: ModelConfig, number: int) -> None:
        super().__init__()
        N, D = c.hc_mult, c.hidden_size
        self.n, self.eps, self.hc_eps, self.iterations = N, c.rms_norm_eps, c.hc_eps, c.hc_sinkhorn_iters
        self.fn = nn.Parameter(torch.randn((2 + N) * N, N * D) * 0.02)
        self.scale = nn.Parameter(torch.full((3,), 0.3))
        # Each sublayer starts by reading one stream more than the others; streams start by staying themselves.
        own = torch.eye(N)[number % N]
        self.base = nn.Parameter(torch.cat((2 * own - 1.5, own - 0.5, 4 * torch.eye(N).flatten())))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, N, D] -> y [B, T, D], post [B, T, N], comb [B, T, N, N]."""
        N, scale, base = self.n, self.scale, self.base
        flat = x.flatten(-2)
        r = torch.rsqrt(flat.float().square().mean(-1, keepdim=True) + self.eps)
        m = F.linear(flat, self.fn.to(flat.dtype)).float() * r
        pre = torch.sigmoid(m[..., :N] * scale[0] + base[:N]) + self.hc_eps
        post = 2 * torch.sigmoid(m[..., N : 2 * N] * scale[1] + base[N : 2 * N])
        comb = sinkhorn(
            (m[..., 2 * N :] * scale[2] + base[2 * N :]).unflatten(-1, (N, N)), self.iterations, self.hc_eps
        )
        return (pre[..., None] * x.float()).sum(-2), post, comb


def sinkhorn(x: Tensor, iterations: int, eps: float) -> Tensor:
    x = x.softmax(-1) + eps
    x = x / (x.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        x = x / (x.sum(-1, keepdim=True) + eps)
        x = x / (x.sum(-2, keepdim=True) + eps)
    return x


def expand(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """What a sublayer gave, back into the streams: the first index of comb is the source."""
    mixed = sum(comb[..., j, :, None] * x[..., j, None, :].float() for j in range(x.shape[-2]))
    return (post[..., None] * y[..., None, :].float() + mixed).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, c: ModelConfig, number: int) -> None:
        super().__init__()
        self.attn_norm, self.ffn_norm = Norm(c.hidden_size, c.rms_norm_eps), Norm(c.hidden_size, c.rms_norm_eps)
        self.attn = Attention(c, c.compress_ratios[number])
        self.ffn = MoE(c, number < c.num_hash_layers)
        self.hc_attn, self.hc_ffn = Streams(c, 2 * number), Streams(c, 2 * number + 1)

    def forward(self, x: Tensor, ids: Tensor, cos: Tensor, sin: Tensor, how: Training) -> tuple[Tensor, Tensor, Tensor]:
        y, post, comb = self.hc_attn(x)
        y, loss = self.attn(self.attn_norm(y), cos, sin, how)
        x = expand(x, y, post, comb)
        y, post, comb = self.hc_ffn(x)
        y, counts = self.ffn(self.ffn_norm(y), ids, how)
        return expand(x, y, post, comb), loss, counts


class Head(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        N = c.hc_mult
        self.fn = nn.Parameter(torch.randn(N, N * c.hidden_size) * 0.02)
        self.base, self.scale = nn.Parameter(torch.zeros(N)), nn.Parameter(torch.full((1,), 0.3))
        self.eps, self.hc_eps = c.rms_norm_eps, c.hc_eps

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(-2).float()
        r = torch.rsqrt(flat.square().mean(-1, keepdim=True) + self.eps)
        pre = torch.sigmoid(F.linear(flat, self.fn) * r * self.scale + self.base) + self.hc_eps
        return (pre[..., None] * x.float()).sum(-2)


class Nano(nn.Module):
    """Token ids [B, T] in; normalised last states [B, T, D], indexer losses and expert counts out."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.embed = Weights(c.vocab_size, c.hidden_size, False, gain=math.sqrt(c.hidden_size))
        self.layers = nn.ModuleList(Layer(c, n) for n in range(c.num_hidden_layers))
        self.hc_head, self.norm = Head(c), Norm(c.hidden_size, c.rms_norm_eps)
        self.head = Weights(c.vocab_size, c.hidden_size, False)
        width = c.qk_rope_head_dim
        plain, slow = (c.rope_theta, None), (c.compress_rope_theta, c.rope_scaling)
        self.frequencies = [torch.from_numpy(inverse_frequencies(t, width, y)) for t, y in (plain, slow)]

    def forward(self, ids: Tensor, how: Training) -> tuple[Tensor, Tensor, Tensor]:
        T, c = ids.shape[1], self.c
        tables = [(a.cos(), a.sin()) for f in self.frequencies for a in [torch.arange(T)[:, None] * f]]
        x = F.embedding(ids, self.embed.weight)[:, :, None].expand(-1, -1, c.hc_mult, -1).to(how.dtype)
        losses, counts = [], []
        for layer in self.layers:
            x, loss, count = layer(x, ids, *tables[layer.attn.ratio != 0], how)
            losses.append(loss)
            counts.append(count)
        return self.norm(self.hc_head(x)), torch.stack(losses), torch.stack(counts)

    def logits(self, ids: Tensor, how: Training) -> Tensor:
        """[B, T, V], float32, of T tokens, T a multiple of BLOCK."""
        return self.head(self(ids, how)[0], how).float()
