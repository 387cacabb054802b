"""DeepSeek-V4: token ids in, logits out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from .attention import Attention
from .cache import LayerCache
from .config import ModelConfig
from .errors import RequestError
from .hyper import HyperConnection, HyperHead
from .linear import Numerics, RMSNorm, WideLinear
from .moe import MoE
from .rope import RotaryTables, Rotations

if TYPE_CHECKING:
    from .experts.store import ExpertStore
    from .plan import Plan


class Model(nn.Module):
    """Embedding, layers over N residual streams, head (spec 2).

    Shapes: B sequences, T tokens in this call, N residual streams, D width, V vocabulary.
    """

    def __init__(self, config: ModelConfig, numerics: Numerics | None = None) -> None:
        super().__init__()
        self.config, self.numerics = config, numerics or Numerics()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, self.numerics, n) for n in range(config.num_hidden_layers)]
        self.hc_head = HyperHead(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = WideLinear(config.hidden_size, config.vocab_size)
        self._tables = RotaryTables(config)
        self.around: Callable[[mx.array], AbstractContextManager[object]] = nullcontext  # of every pass, with its ids
        self.store: ExpertStore | None = None  # of streamed experts
        self.plan: Plan | None = None  # of memory, kept to by the engine

    def __call__(self, ids: mx.array, cache: list[LayerCache] | None = None) -> mx.array:
        """Logits of the next token at each position.

        Args:
            ids: [B, T], all below V, which is not checked here: that would wait for them. Each sequence continues
                what the cache holds of it.
            cache: from `make_cache`, updated in place; None to start from nothing and keep nothing.

        Returns:
            [B, T, V], float32.

        Raises:
            RequestError: ids has another shape, or no token.
        """
        if ids.ndim != 2 or ids.shape[1] == 0:
            raise RequestError(f"ids: expected shape [B, T] with at least one token, found {list(ids.shape)}")
        cache = cache or self.make_cache()
        rotations = self.rotations(cache, ids.shape[1])
        x = self.streams(ids)
        with self.around(ids):
            for layer, layer_cache in zip(self.layers, cache, strict=True):
                x = layer(x, ids, layer_cache, rotations)
        logits = self.logits(x)
        # Some of the new state, such as an open group, is not needed for these logits. Evaluated with them, it
        # lets go of this step's graph; left lazy, it would keep every step alive until its group is full.
        held: list[mx.array] = mx.depends([logits], [leaf for c in cache for leaf in c.leaves()])
        return held[0]

    def streams(self, ids: mx.array) -> mx.array:
        """Embeddings, copied to N streams: [B, T] -> [B, T, N, D]."""
        x = self.embed(ids).astype(self.numerics.dtype)
        return mx.repeat(x[:, :, None], self.config.hc_mult, axis=2)

    def logits(self, x: mx.array) -> mx.array:
        """Streams after the last layer [B, T, N, D] -> [B, T, V], float32."""
        return self.head(self.hc_head(x, self.norm.weight))

    def rotations(self, cache: list[LayerCache], T: int) -> Rotations:
        """Rotary tables of the T tokens that follow what the cache holds."""
        return self._tables.at(cache[0].position, T)

    def make_cache(self) -> list[LayerCache]:
        """An empty cache: one entry per layer."""
        return [LayerCache(self.config.sliding_window, ratio) for ratio in self.config.compress_ratios]


class Layer(nn.Module):
    """One attention sublayer and one expert sublayer over N residual streams."""

    def __init__(self, config: ModelConfig, numerics: Numerics, number: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = Attention(config, numerics, config.compress_ratios[number])
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = MoE(config, numerics, hashed=number < config.num_hash_layers)
        self.hc_attn = HyperConnection(config)
        self.hc_ffn = HyperConnection(config)

    def __call__(self, x: mx.array, ids: mx.array, cache: LayerCache, rotations: Rotations) -> mx.array:
        """Streams [B, T, N, D] -> [B, T, N, D]."""
        h, back = self.hc_attn(x, self.attn_norm.weight)  # -> [B, T, D]
        x = back(self.attn(h, cache, rotations))  # -> [B, T, N, D]
        h, back = self.hc_ffn(x, self.ffn_norm.weight)
        # The first layers choose experts by token id, so experts need the ids too.
        return back(self.ffn(h, ids))
