"""What chosen experts compute, wherever their weights lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import ExpertWeights, expert_down, expert_down_sum, expert_gate_up, swiglu

from ..config import ModelConfig
from ..linear import Numerics, linear, packed

# From this many pairs of token and expert on they are sorted, so that one expert's tokens share a product.
SORT_FROM = 64
# On Metal MLX multiplies sorted pairs of one expert together from this many pairs per matrix on, else one by one,
# and the two round differently. A part of a call must go the way that the whole call goes.
SHARED_FROM = 4


class SharedExpert(nn.Module):
    """The expert every token uses; clamped like the others, without a weight."""

    def __init__(self, config: ModelConfig, numerics: Numerics) -> None:
        super().__init__()
        D, F = config.hidden_size, config.moe_intermediate_size
        self.w1, self.w2, self.w3 = linear(config, D, F), linear(config, F, D), linear(config, D, F)
        self._limit = config.swiglu_limit
        self._round_input = numerics.round_input

    def __call__(self, x: mx.array) -> mx.array:
        """[T, D], rounded if activations are -> [T, D]."""
        h = swiglu(self.w1(x), self.w3(x), self._limit).astype(x.dtype)
        return self.w2(self._round_input(h))


class Experts(Protocol):
    """Routed experts of a layer, wherever they are."""

    def __call__(self, x: mx.array, ids: mx.array, weights: mx.array, shared: SharedExpert, /) -> mx.array:
        """Weighted sum of the chosen experts, and the shared one's result: x [T, D], ids [T, A] -> [T, D]."""


@dataclass(frozen=True)
class ExpertProducts:
    """Products with the matrices of all experts of a layer, or with those of a range of slots.

    Pairs name rows of the matrices. A pair's result does not depend on the other pairs of a call, nor on how many
    matrices there are, so pairs may be computed in any groups. The exception is `run` where MLX's own products stand
    in for our kernels: see `SHARED_FROM`.
    """

    w1: ExpertWeights
    w3: ExpertWeights
    w2: ExpertWeights
    limit: float
    round_input: Callable[[mx.array], mx.array]

    def few(self, x: mx.array, rows: mx.array, weights: mx.array, shared: SharedExpert) -> mx.array:
        """Weighted sum of the chosen experts and the shared one: x [T, D], rows and weights [T, A] -> [T, D].

        The shared expert is in the same products, since each of them waits for little but its weights.
        """
        h = self.gate_up(x, token_of_pair(*rows.shape), rows.flatten(), weights.flatten(), shared)
        return self.down_sum(h, rows, shared)

    def gate_up(
        self, x: mx.array, token: mx.array, row: mx.array, weight: mx.array, shared: SharedExpert | None
    ) -> mx.array:
        """First half of `few`: -> [P, F], and below it [T, F] of the shared expert if there is one."""
        both = None if shared is None else (packed(shared.w1), packed(shared.w3))
        return expert_gate_up(x, self.w1, self.w3, token, row, weight, self.limit, False, both)

    def down_sum(self, h: mx.array, rows: mx.array, shared: SharedExpert) -> mx.array:
        """Second half of `few`: h [T * A + T, F], rows [T, A] -> [T, D]."""
        return expert_down_sum(self.round_input(h), self.w2, rows, packed(shared.w2))

    def run(self, x: mx.array, token: mx.array, row: mx.array, weight: mx.array) -> mx.array:
        """Pairs with ascending rows, those with the same row multiplied together: x [T, D], [P] each -> [P, D]."""
        h = expert_gate_up(x, self.w1, self.w3, token, row, weight, self.limit, True)
        return expert_down(self.round_input(h), self.w2, row, True)

    def one_by_one(self) -> ExpertProducts:
        """The same, but MLX's own products of sorted pairs never take several pairs at once."""
        w1, w3, w2 = (dataclasses.replace(w, shares=False) for w in (self.w1, self.w3, self.w2))
        return dataclasses.replace(self, w1=w1, w3=w3, w2=w2)


@cache
def token_of_pair(T: int, A: int) -> mx.array:
    """A constant, so that a decode step does not compute it."""
    return mx.array([pair // A for pair in range(T * A)], mx.int32)
