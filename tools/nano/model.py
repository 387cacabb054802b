"""The architecture in torch, for training: whole sequences, no caches, masked instead of gathered rows.

Parameters have DeepSeek's names, routed experts stacked. Shapes: B sequences, T tokens, N streams, D width, H heads,
K head width, S compressed rows, E experts, A experts per token, F expert width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_v4flash.config import ModelConfig
from mlx_v4flash.rope import inverse_frequencies

from .grouped import grouped_mm
from .rounding import cache_fp4, cache_fp8, fp4_weight, fp8_weight

# Queries that share one block of window keys.
BLOCK = 64


@dataclass
class Training:
    """How to compute during training, as opposed to what.

    Args:
        dtype: of matrix products; sums are float32.
        sparse: CSA layers attend only the rows their indexer chose; off, all visible rows.
        rounding: weights and cached rows as the checkpoint and the cache will hold them, gradients unchanged.
        index_stride: the indexer learns from every so-manieth query.
    """

    dtype: torch.dtype = torch.bfloat16
    sparse: bool = True
    rounding: bool = False
    index_stride: int = 8


class Weights(nn.Module):
    """A weight [rows, columns] without bias, named as in the checkpoint; FP8 there if `coded`."""

    def __init__(self, rows: int, columns: int, coded: bool = True, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns) * gain / math.sqrt(columns))
        self.coded = coded

    def of(self, how: Training) -> Tensor:
        w = fp8_weight(self.weight) if how.rounding and self.coded else self.weight
        return w.to(how.dtype)

    def forward(self, x: Tensor, how: Training) -> Tensor:
        return F.linear(x.to(how.dtype), self.of(how))


def rms(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms(x, self.eps, self.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last dims of x [..., K], neighbours in pairs; cos and sin broadcast to [..., P / 2]."""
    P = 2 * cos.shape[-1]
    keep, pairs = x[..., : x.shape[-1] - P], x[..., x.shape[-1] - P :].unflatten(-1, (-1, 2))
    a, b = pairs.unbind(-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    return torch.cat((keep, turned), -1)


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
