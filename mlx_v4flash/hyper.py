"""Residual streams: collapse them for a sublayer, expand its result into them."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import stream_enter, stream_expand, stream_head

from .config import ModelConfig

Expand = Callable[[mx.array], mx.array]


class HyperConnection(nn.Module):
    """Manifold-constrained hyper-connection of one sublayer (spec 3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        N = config.hc_mult
        self.fn = mx.zeros(((2 + N) * N, N * config.hidden_size))
        self.base = mx.zeros(((2 + N) * N,))
        self.scale = mx.zeros((3,))
        self._eps = (config.rms_norm_eps, config.hc_eps)
        self._iterations = config.hc_sinkhorn_iters

    def __call__(self, x: mx.array, norm: mx.array) -> tuple[mx.array, Expand]:
        """Streams [B, T, N, D] -> normalised input of the sublayer [B, T, D], and the way back."""
        y, post, comb = stream_enter(x, self.fn, self.base, self.scale, norm, *self._eps, self._iterations)
        return y, lambda y: stream_expand(x, y, post, comb)


class HyperHead(nn.Module):
    """The last collapse, before the head (spec 3.3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        N = config.hc_mult
        self.fn = mx.zeros((N, N * config.hidden_size))
        self.base = mx.zeros((N,))
        self.scale = mx.zeros((1,))
        self._eps = (config.rms_norm_eps, config.hc_eps)

    def __call__(self, x: mx.array, norm: mx.array) -> mx.array:
        """Streams [B, T, N, D] -> normalised input of the head [B, T, D]."""
        return stream_head(x, self.fn, self.base, self.scale, norm, *self._eps)
