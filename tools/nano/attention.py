"""Attention over a window and compressed rows; all rows are computed, and those not attended masked.

Shapes: B sequences, T tokens, D width, H heads, K head width, W window, S compressed rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_v4flash.config import ModelConfig

from .layers import Norm, Training, Weights, rms, rotate
from .rounding import cache_fp4, cache_fp8

# Queries that share one block of window keys.
BLOCK = 64


class Compressor(nn.Module):
    """Learned pooling of groups of tokens into rows (spec 5)."""

    def __init__(self, c: ModelConfig, ratio: int, width: int, index: bool) -> None:
        super().__init__()
        self.ratio, self.overlap, self.index = ratio, ratio == 4, index
        rows = 2 * width if self.overlap else width
        self.ape = nn.Parameter(torch.randn(ratio, rows) * 0.1)
        self.wkv, self.wgate = Weights(rows, c.hidden_size, False), Weights(rows, c.hidden_size, False, 0.5)
        self.norm = Norm(width, c.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, how: Training) -> Tensor:
        """[B, T, D] -> rows [B, S, K]; tokens of an open group are left out."""
        R = self.ratio
        S = x.shape[1] // R
        x = x[:, : S * R]
        kv = self.wkv(x, how).float().unflatten(1, (S, R))
        gate = self.wgate(x, how).float().unflatten(1, (S, R)) + self.ape
        if self.overlap:
            (kv0, kv1), (gate0, gate1) = kv.chunk(2, -1), gate.chunk(2, -1)
            kv = torch.cat((F.pad(kv0[:, :-1], (0, 0, 0, 0, 1, 0)), kv1), 2)
            gate = torch.cat((F.pad(gate0[:, :-1], (0, 0, 0, 0, 1, 0), value=-1e30), gate1), 2)
        row = self.norm((gate.softmax(2) * kv).sum(2))
        row = rotate(row, cos[: S * R : R], sin[: S * R : R])
        if not how.rounding:
            return row
        return cache_fp4(row) if self.index else cache_fp8(row, 2 * cos.shape[-1])


class Indexer(nn.Module):
    """Chooses compressed rows; it learns where attention looks, and passes no gradient on (spec 6.1)."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads, self.width, self.top_k = c.index_n_heads, c.index_head_dim, c.index_topk
        self.wq_b = Weights(self.heads * self.width, c.q_lora_rank)
        self.weights_proj = Weights(self.heads, c.hidden_size, False)
        self.compressor = Compressor(c, 4, self.width, index=True)

    def scores(self, x: Tensor, qr: Tensor, keys: Tensor, cos: Tensor, sin: Tensor, how: Training) -> Tensor:
        """[B, T, S] of the queries given; cos and sin are theirs."""
        q = self.wq_b(qr, how).float().unflatten(-1, (self.heads, self.width))
        q = rotate(q, cos[:, None], sin[:, None])
        q = cache_fp4(q) if how.rounding else q
        w = self.weights_proj(x, how).float() * (self.width**-0.5 * self.heads**-0.5)
        B, T = q.shape[:2]
        dots = q.flatten(1, 2).to(how.dtype) @ keys.to(how.dtype).mT
        return (dots.float().relu().unflatten(1, (T, self.heads)) * w[..., None]).sum(2)


class Attention(nn.Module):
    """Window, compressed rows, sink, grouped output (spec 4)."""

    def __init__(self, c: ModelConfig, ratio: int) -> None:
        super().__init__()
        D, H, K = c.hidden_size, c.num_attention_heads, c.head_dim
        self.c, self.ratio, self.eps = c, ratio, c.rms_norm_eps
        self.wq_a, self.q_norm = Weights(c.q_lora_rank, D), Norm(c.q_lora_rank, self.eps)
        self.wq_b = Weights(H * K, c.q_lora_rank)
        self.wkv, self.kv_norm = Weights(K, D), Norm(K, self.eps)
        self.attn_sink = nn.Parameter(torch.zeros(H))
        self.wo_a = Weights(c.o_groups * c.o_lora_rank, H * K // c.o_groups)
        self.wo_b = Weights(D, c.o_groups * c.o_lora_rank, gain=0.5)
        self.compressor = Compressor(c, ratio, K, index=False) if ratio else None
        self.indexer = Indexer(c) if ratio == 4 else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, how: Training) -> tuple[Tensor, Tensor]:
        """[B, T, D] -> the same and the indexer's loss; cos and sin [T, P / 2]."""
        c, (B, T, _) = self.c, x.shape
        H, K = c.num_attention_heads, c.head_dim
        qr = self.q_norm(self.wq_a(x, how))
        q = rms(self.wq_b(qr, how).unflatten(-1, (H, K)), self.eps)
        q = rotate(q, cos[:, None], sin[:, None]).to(how.dtype)
        kv = rotate(self.kv_norm(self.wkv(x, how)), cos, sin)
        kv = (cache_fp8(kv, 2 * cos.shape[-1]) if how.rounding else kv).to(how.dtype)
        near, near_keys = self._window_logits(q, kv)
        parts, loss = [near], x.new_zeros(())
        if self.compressor is not None:
            rows = self.compressor(x, cos, sin, how).to(how.dtype)
            far = (q.flatten(1, 2) @ rows.mT).float().mul(K**-0.5).unflatten(1, (T, H))
            seen = torch.arange(rows.shape[1]) < (torch.arange(T)[:, None] + 1) // self.ratio
            far = far.masked_fill(~seen[:, None], -1e30)
            if self.indexer is not None:
                chosen, loss = self._index(x.detach(), qr.detach(), far.detach(), seen, cos, sin, how)
                if chosen is not None:
                    far = far.masked_fill(~chosen[:, :, None], -1e30)
            parts.append(far)
        p = softmax_with_sink(torch.cat(parts, -1), self.attn_sink).to(how.dtype)
        near_p = p[..., : near.shape[-1]].reshape(-1, BLOCK * H, near.shape[-1])
        o = (near_p @ near_keys).view(B, T, H, K)
        if self.compressor is not None:
            o = o + (p[..., near.shape[-1] :].flatten(1, 2) @ rows).unflatten(1, (T, H))
        o = rotate(o.float(), cos[:, None], -sin[:, None]).to(how.dtype)
        return self._output(o, how), loss

    def _window_logits(self, q: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, T, H, W + BLOCK] of each query with the keys around it, and those keys, [B * blocks, ..., K]."""
        (B, T, H, K), W = q.shape, self.c.sliding_window
        keys = F.pad(kv, (0, 0, W, 0)).unfold(1, W + BLOCK, BLOCK).flatten(0, 1)  # -> [B * blocks, K, W + BLOCK]
        logits = q.reshape(-1, BLOCK * H, K) @ keys
        logits = logits.float().mul(K**-0.5).view(B, T, H, W + BLOCK)
        t = torch.arange(T)[:, None]
        distance = W + t % BLOCK - torch.arange(W + BLOCK)
        hidden = (distance < 0) | (distance >= W) | (distance > t)
        return logits.masked_fill(hidden[:, None], -1e30), keys.mT

    def _index(
        self, x: Tensor, qr: Tensor, far: Tensor, seen: Tensor, cos: Tensor, sin: Tensor, how: Training
    ) -> tuple[Tensor | None, Tensor]:
        """Rows chosen for each query, None for all; and the cross entropy of scores with attention over rows.

        The target is what the heads together would give each visible row, were every row attended.
        """
        ix = self.indexer
        assert ix is not None
        keys = ix.compressor(x, cos, sin, how)
        chosen = None
        if how.sparse and keys.shape[1] > ix.top_k:
            with torch.no_grad():
                scores = ix.scores(x, qr, keys, cos, sin, how).masked_fill(~seen, -torch.inf)
                chosen = torch.zeros_like(scores, dtype=torch.bool)
                chosen.scatter_(-1, scores.topk(ix.top_k, -1).indices, True)
        if not self.training:
            return chosen, x.new_zeros(())
        step = slice(how.index_stride - 1, None, how.index_stride)
        scores = ix.scores(x[:, step], qr[:, step], keys, cos[step], sin[step], how)
        log_p = scores.masked_fill(~seen[step], -1e30).log_softmax(-1)
        top = far[:, step].amax(-1, keepdim=True)
        target = (far[:, step] - torch.maximum(top, self.attn_sink[:, None].detach())).exp().sum(2)
        target = target / (target.sum(-1, keepdim=True) + 1e-9)
        # A query that gives rows nothing has nothing to teach.
        return chosen, -(target * log_p.masked_fill(~seen[step], 0)).sum(-1).mean()

    def _output(self, o: Tensor, how: Training) -> Tensor:
        G = self.c.o_groups
        u = o.flatten(2).unflatten(-1, (G, -1)).flatten(0, 1).transpose(0, 1)
        z = u @ self.wo_a.of(how).unflatten(0, (G, -1)).mT
        return self.wo_b(z.transpose(0, 1).flatten(1).unflatten(0, o.shape[:2]), how)


def softmax_with_sink(logits: Tensor, sink: Tensor) -> Tensor:
    """Softmax over the last axis of [..., H, S], with one more logit that takes its share and is dropped."""
    sink = sink[:, None]
    top = torch.maximum(logits.amax(-1, keepdim=True), sink).detach()
    e = (logits - top).exp()
    return e / (e.sum(-1, keepdim=True) + (sink - top).exp())
