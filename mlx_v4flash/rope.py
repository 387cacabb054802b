"""Rotary tables: two sets of frequencies, computed once per forward pass."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from .config import ModelConfig, Yarn

Rotation = tuple[mx.array, mx.array]  # cos and sin, [T, P/2] each, float32


def inverse_frequencies(theta: float, width: int, yarn: Yarn | None) -> np.ndarray:
    """Radians per position of each pair, [width / 2], float32 (spec 4.2).

    With YaRN the slow pairs are slowed down by its factor, at every length, and nothing else changes: neither
    cos and sin nor the softmax scale carry YaRN's magnitude factor.
    """
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    frequencies = np.float32(1) / (theta ** exponents.astype(np.float64)).astype(np.float32)
    if yarn is None:
        return frequencies

    def pair(turns: float) -> float:  # the pair that makes this many turns within the original length
        return width * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair(yarn.beta_fast)), 0)
    high = min(math.ceil(pair(yarn.beta_slow)), width - 1)
    ramp = np.clip((np.arange(width // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1).astype(np.float32)
    slowed: np.ndarray = frequencies / np.float32(yarn.factor) * ramp + frequencies * (1 - ramp)
    return slowed


class RotaryTables:
    """Frequencies of the window-only layers and of the layers with a compressor."""

    def __init__(self, config: ModelConfig) -> None:
        width = config.qk_rope_head_dim
        self.plain = mx.array(inverse_frequencies(config.rope_theta, width, None))
        self.compress = mx.array(inverse_frequencies(config.compress_rope_theta, width, config.rope_scaling))

    def at(self, position: int, T: int) -> Rotations:
        return Rotations(self, position, T)


class Rotations:
    """cos and sin for the T tokens of one call and for the groups they close; shared by all layers."""

    def __init__(self, tables: RotaryTables, position: int, T: int) -> None:
        self._tables, self._known = tables, dict[tuple[bool, int, int, int], Rotation]()
        self.position, self.T = position, T

    def tokens(self, compressed: bool) -> Rotation:
        """For the tokens, in a layer with or without a compressor."""
        return self._rotation(compressed, self.position, self.T, 1)

    def groups(self, first: int, count: int, ratio: int) -> Rotation:
        """For groups first ... first + count - 1; a group stands at the position of its first token."""
        return self._rotation(True, first * ratio, count, ratio)

    def _rotation(self, compressed: bool, start: int, count: int, step: int) -> Rotation:
        key = (compressed, start, count, step)
        if key not in self._known:
            # Positions are exact in float32 up to 2^24; bfloat16 tables would lose them beyond 256.
            positions = mx.arange(start, start + count * step, step).astype(mx.float32)
            angles = positions[:, None] * (self._tables.compress if compressed else self._tables.plain)
            self._known[key] = (mx.cos(angles), mx.sin(angles))
        return self._known[key]
