"""Full group -> one compressed row; the indexer and its top rows."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import Quant, compress, index_query, index_scores, index_topk

from .cache import CompressorCache
from .config import ModelConfig
from .linear import Numerics, RMSNorm, WideLinear, linear
from .rope import Rotations

# Bytes of index scores held at a time.
_SCORE_BYTES = 16 << 20


class Compressor(nn.Module):
    """Learned pooling of R tokens into one row (spec 5).

    With R = 4 groups overlap: the first half of a token's projection enters the row of the next group, the second
    half the row of its own.
    """

    def __init__(self, config: ModelConfig, numerics: Numerics, ratio: int, width: int, index: bool) -> None:
        super().__init__()
        self.overlap = ratio == 4
        projected = 2 * width if self.overlap else width
        self.ape = mx.zeros((ratio, projected))
        self.wkv = WideLinear(config.hidden_size, projected)
        self.wgate = WideLinear(config.hidden_size, projected)
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.ratio = ratio
        self._dtype, self._packed = numerics.dtype, numerics.packed_caches
        self._quant: Quant = ("fp4" if index else "fp8") if numerics.simulate_cache_quant else "none"

    def __call__(self, x: mx.array, cache: CompressorCache, rotations: Rotations) -> mx.array | None:
        """Tokens [B, T, D] -> all compressed rows so far, [B, S, K] or packed; None before the first group is full."""
        slots = (mx.arange(x.shape[1]) + rotations.position % self.ratio) % self.ratio
        kv = self.wkv(x)
        gate = self.wgate(x) + self.ape[slots]
        groups = cache.close_groups(kv, gate)
        if groups is not None:
            kv, gate = self._with_last_group(*groups, cache) if self.overlap else groups
            cos, sin = rotations.groups(cache.rows.count, kv.shape[1], self.ratio)
            rows = compress(kv, gate, self.norm.weight, cos, sin, self.norm.eps, self._dtype, self._quant, self._packed)
            cache.rows.append(rows)
        return cache.rows.all()

    def _with_last_group(self, kv: mx.array, gate: mx.array, cache: CompressorCache) -> tuple[mx.array, mx.array]:
        """[B, S, R, 2K] -> candidates [B, S, 2R, K]: first halves of the group before, then second halves."""
        own_kv, own_gate = (mx.split(a, 2, axis=-1) for a in (kv, gate))
        last_kv, last_gate = cache.last_kv, cache.last_gate
        if last_kv is None or last_gate is None:  # no group before the first: it takes no part in the softmax
            last_kv = mx.zeros_like(own_kv[0][:, 0])
            last_gate = mx.full(last_kv.shape, -mx.inf)
        # Copies, not views: a view would keep the projections of the whole chunk alive.
        cache.last_kv = mx.contiguous(own_kv[0][:, -1])
        cache.last_gate = mx.contiguous(own_gate[0][:, -1])
        before_kv = mx.concatenate([last_kv[:, None], own_kv[0][:, :-1]], axis=1)
        before_gate = mx.concatenate([last_gate[:, None], own_gate[0][:, :-1]], axis=1)
        return mx.concatenate([before_kv, own_kv[1]], axis=2), mx.concatenate([before_gate, own_gate[1]], axis=2)


class Indexer(nn.Module):
    """Chooses the compressed rows that a CSA layer attends (spec 6.1)."""

    def __init__(self, config: ModelConfig, numerics: Numerics, ratio: int) -> None:
        super().__init__()
        self.heads, self.width = config.index_n_heads, config.index_head_dim
        self.wq_b = linear(config, config.q_lora_rank, self.heads * self.width)
        self.weights_proj = WideLinear(config.hidden_size, self.heads)
        self.compressor = Compressor(config, numerics, ratio, self.width, index=True)
        self.top_k, self.ratio = config.index_topk, ratio
        self._fp4 = numerics.simulate_cache_quant

    def __call__(self, x: mx.array, qr: mx.array, cache: CompressorCache, rotations: Rotations) -> mx.array | None:
        """Picks of each query, [B, T, k], int32; None while every visible row is attended.

        Args:
            x: input of the attention, [B, T, D]; qr: query latent, [B, T, q_lora_rank].
        """
        keys = self.compressor(x, cache, rotations)
        if keys is None or keys.shape[1] <= self.top_k:
            return None
        B, T, _ = x.shape
        q = self.wq_b(qr).reshape(B, T, self.heads, self.width)
        q = index_query(q, *rotations.tokens(compressed=True), self._fp4)
        w = self.weights_proj(x) * (self.width**-0.5 * self.heads**-0.5)
        visible = (mx.arange(T) + rotations.position + 1) // self.ratio
        tile = max(1, _SCORE_BYTES // (4 * B * keys.shape[1]))  # scores of all queries would grow with context
        picks = [
            index_topk(index_scores(q[:, t : t + tile], w[:, t : t + tile], keys), self.top_k, visible[t : t + tile])
            for t in range(0, T, tile)
        ]
        return picks[0] if len(picks) == 1 else mx.concatenate(picks, axis=1)
