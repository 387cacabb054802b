"""How the next token is drawn; the samplers themselves are mlx-lm's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

from .errors import RequestError


@dataclass(frozen=True)
class SamplingParams:
    """Limits are applied in the order top_p, min_p, top_k; 0 switches each of them off.

    Args:
        temp: temperature; 0 takes the most likely token.
        top_p: keep the most likely tokens that together reach this probability.
        min_p: drop tokens less likely than this share of the most likely one.
        top_k: keep this many tokens.
        seed: of the random numbers; None for a different answer each time.

    Raises:
        RequestError: a value out of its range.
    """

    temp: float = 0.0
    top_p: float = 0.0
    min_p: float = 0.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        self._expect("temp", self.temp >= 0, "0 or more")
        self._expect("top_p", 0 <= self.top_p <= 1, "0 to 1")
        self._expect("min_p", 0 <= self.min_p <= 1, "0 to 1")
        self._expect("top_k", self.top_k >= 0, "0 or more")
        self._expect("seed", self.seed is None or 0 <= self.seed < 2**64, "0 to 2^64 - 1")

    def _expect(self, name: str, holds: bool, wanted: str) -> None:
        if not holds:
            raise RequestError(f"{name}: expected {wanted}, found {getattr(self, name)}")

    def sampler(self, vocab_size: int) -> Callable[[mx.array], mx.array]:
        """mlx-lm's sampler for these values, and its random state set if there is a seed."""
        if self.seed is not None:
            mx.random.seed(self.seed)
        top_k = self.top_k if self.top_k < vocab_size else 0
        sampler: Callable[[mx.array], mx.array] = make_sampler(self.temp, self.top_p, self.min_p, top_k=top_k)
        return sampler


def card_defaults(release: str, *, tools: bool, temp: float = 1.0) -> SamplingParams:
    """What the model card of a release recommends (encoding spec 4). Greedy decoding would think in circles.

    Args:
        temp: temperature, where a checkpoint recommends another one.
    """
    return SamplingParams(temp=temp, top_p=0.95 if tools and release == "v4-0731" else 0.0)


def default_max_tokens(think: str) -> int:
    """How long an answer may get unless told otherwise, reasoning included; DeepSeek's service has the same limits."""
    return {"off": 8192, "max": 131072}.get(think, 65536)


_LEAST = {"max_tokens": 1, "think_budget": 0, "context": 1, "prefill_chunk": 1, "decode": 1, "rounds": 1}


def expect_limits(**limits: int | None) -> None:
    """Refuse limits that leave no room; None is none.

    Raises:
        RequestError: a limit below the least that makes sense.
    """
    for name, value in limits.items():
        if value is not None and value < _LEAST[name]:
            raise RequestError(f"{name}: expected {_LEAST[name]} or more, found {value}")


class ThinkBudget:
    """A sampler that lets the model think for `limit` tokens, then draws the tokens that end the reasoning for it.

    Drawn like any other token, they are fed to the model, lie in its caches and are read by the parser. Whether the
    model ended its reasoning by itself is decided on the device, so nothing waits.

    Args:
        sampler: draws the other tokens.
        closing: the tokens that end the reasoning.
        ends: tokens after which the model no longer thinks.
    """

    def __init__(
        self, sampler: Callable[[mx.array], mx.array], limit: int, closing: Sequence[int], ends: Sequence[int]
    ) -> None:
        expect_limits(think_budget=limit)
        self._sampler, self._limit, self._closing, self._ends = sampler, limit, list(closing), list(ends)
        self._drawn = 0
        self._ended = mx.array(False)

    def __call__(self, logprobs: mx.array) -> mx.array:
        token = self._sampler(logprobs)
        step = self._drawn - self._limit
        self._drawn += 1
        if step < 0:
            for end in self._ends:
                self._ended = self._ended | (token == end).any()
        elif step < len(self._closing):
            return mx.where(self._ended, token, mx.array(self._closing[step], token.dtype))
        return token
