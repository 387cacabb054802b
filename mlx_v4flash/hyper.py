"""Residual streams: collapse them for a sublayer, expand its result into them."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import stream_collapse, stream_expand, stream_head_mix, stream_mix

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
        pre, post, comb = stream_mix(x, self.fn, self.base, self.scale, *self._eps, self._iterations)
        return stream_collapse(x, pre, norm, self._eps[0]), lambda y: stream_expand(x, y, post, comb)


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
        pre = stream_head_mix(x, self.fn, self.base, self.scale, *self._eps)
        return stream_collapse(x, pre, norm, self._eps[0])
