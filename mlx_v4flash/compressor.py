"""Full group -> one compressed row; the indexer and its top rows."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import Quant, compress, index_query, index_scores, index_topk

from .cache import Groups, Rows
from .config import ModelConfig
from .linear import Numerics, RMSNorm
from .rope import Rotations

# Bytes of index scores held at a time.
_SCORE_BYTES = 16 << 20


class Compressor(nn.Module):
    """Learned pooling of R tokens into one row (spec 5).

    With R = 4 groups overlap: the first half of a token's projection enters the row of the next group, the second
    half the row of its own.

    Args:
        width: K, of a row.
        first: column of the projected tokens where its values begin; its gates follow, and end before `end`.
        index: whether the rows are index keys.
    """

    def __init__(
        self, config: ModelConfig, numerics: Numerics, ratio: int, width: int, first: int = 0, index: bool = False
    ) -> None:
        super().__init__()
        channels = 2 * width if ratio == 4 else width
        self.ape = mx.zeros((ratio, channels))
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.ratio = ratio
        self._kv, self._gate = first, first + channels
        self.end = first + 2 * channels
        self._dtype, self._packed = numerics.dtype, numerics.packed_caches
        self._quant: Quant = ("fp4" if index else "fp8") if numerics.simulate_cache_quant else "none"

    def __call__(self, groups: Groups | None, rows: Rows, rotations: Rotations) -> mx.array | None:
        """Full groups -> all compressed rows so far, [B, S, K] or packed; None before the first group is full."""
        if groups is not None:
            cos, sin = rotations.groups(rows.count, groups.count, self.ratio)
            rows.append(
                compress(
                    groups.tokens, self.ape, self.norm.weight, cos, sin, self.norm.eps, self._dtype, self._quant,
                    self._packed, kv=self._kv, gate=self._gate, start=groups.start, before=groups.before,
                )
            )  # fmt: skip
        return rows.all()


class Indexer(nn.Module):
    """Chooses the compressed rows that a CSA layer attends (spec 6.1).

    Args:
        first: column of the projected tokens where the weights of its heads begin; its compressor follows.
    """

    def __init__(self, config: ModelConfig, numerics: Numerics, ratio: int, first: int) -> None:
        super().__init__()
        self.heads, self.width = config.index_n_heads, config.index_head_dim
        self._weights = slice(first, first + self.heads)
        self.compressor = Compressor(config, numerics, ratio, self.width, first + self.heads, index=True)
        self.end = self.compressor.end
        self.top_k, self.ratio = config.index_topk, ratio
        self._fp4 = numerics.simulate_cache_quant

    def __call__(
        self, q: mx.array, projected: mx.array, groups: Groups | None, rows: Rows, rotations: Rotations
    ) -> mx.array | None:
        """Picks of each query, [B, T, k], int32; None while every visible row is attended.

        Args:
            q: projected queries of its heads, [B, T, I * J]; projected: tokens, [B, T, width], and the `groups` full.
        """
        keys = self.compressor(groups, rows, rotations)
        if keys is None or keys.shape[1] <= self.top_k:
            return None
        B, T, _ = q.shape
        q = index_query(q.reshape(B, T, self.heads, self.width), *rotations.tokens(compressed=True), self._fp4)
        w, scale = projected[..., self._weights], self.width**-0.5 * self.heads**-0.5
        visible = mx.array([(rotations.position + t + 1) // self.ratio for t in range(T)])
        tile = max(1, _SCORE_BYTES // (4 * B * keys.shape[1]))  # scores of all queries would grow with context
        picks = [
            index_topk(
                index_scores(q[:, t : t + tile], w[:, t : t + tile], keys, scale), self.top_k, visible[t : t + tile]
            )
            for t in range(0, T, tile)
        ]
        return picks[0] if len(picks) == 1 else mx.concatenate(picks, axis=1)
