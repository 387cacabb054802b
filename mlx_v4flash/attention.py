"""Hybrid attention: projections, what is attended, output."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import key_row, query_rope, sparse_attention

from .cache import LayerCache
from .compressor import Compressor, Indexer
from .config import ModelConfig
from .linear import Numerics, RMSNorm, grouped_linear, linear
from .rope import Rotations


class Attention(nn.Module):
    """Multi-query attention over a window and compressed rows (spec 4).

    The ratio decides what a layer is: 0 sees the window only, 4 (CSA) also the top rows of its indexer, anything
    else (HCA) also all its compressed rows.
    """

    def __init__(self, config: ModelConfig, numerics: Numerics, ratio: int) -> None:
        super().__init__()
        D, H, K = config.hidden_size, config.num_attention_heads, config.head_dim
        self.config, self.ratio = config, ratio
        self.wq_a = linear(config, D, config.q_lora_rank)
        self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.wq_b = linear(config, config.q_lora_rank, H * K)
        self.wkv = linear(config, D, K)
        self.kv_norm = RMSNorm(K, config.rms_norm_eps)
        self.attn_sink = mx.zeros((H,))
        self.wo_a = linear(config, H * K // config.o_groups, config.o_groups * config.o_lora_rank)
        self.wo_b = linear(config, config.o_groups * config.o_lora_rank, D)
        self.compressor = Compressor(config, numerics, ratio, K, index=False) if ratio else None
        self.indexer = Indexer(config, numerics, ratio) if ratio == 4 else None
        self._fp8, self._packed = numerics.simulate_cache_quant, numerics.packed_caches
        self._round_input = numerics.round_input

    def __call__(self, x: mx.array, cache: LayerCache, rotations: Rotations) -> mx.array:
        """[B, T, D] -> [B, T, D]; adds the tokens to the cache."""
        (B, T, _), c = x.shape, self.config
        cos, sin = rotations.tokens(compressed=self.ratio != 0)
        rounded = self._round_input(x)
        qr = self.q_norm(self.wq_a(rounded))
        rounded_qr = self._round_input(qr)
        q = self.wq_b(rounded_qr).reshape(B, T, c.num_attention_heads, c.head_dim)
        q = query_rope(q, cos, sin, c.rms_norm_eps)
        row = key_row(self.wkv(rounded), self.kv_norm.weight, cos, sin, c.rms_norm_eps, self._fp8, self._packed)
        window = cache.extend_window(row)

        rows = picks = None
        if self.compressor is not None and cache.attn is not None:
            rows = self.compressor(x, cache.attn, rotations)
        if self.indexer is not None and cache.index is not None:
            picks = self.indexer(x, rounded_qr, cache.index, rotations)

        o = sparse_attention(
            q, window, rows, picks, self.attn_sink, cos, sin,
            position=rotations.position, ratio=self.ratio or 1, window_size=c.sliding_window,
        )  # fmt: skip
        z = grouped_linear(self.wo_a, o.reshape(B, T, c.o_groups, -1))  # the one whose input is not rounded
        return self.wo_b(self._round_input(z))
