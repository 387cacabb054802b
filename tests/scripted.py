"""A small random model whose tokens are chosen beforehand; everything else about it runs as usual."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_v4flash.encoding import Encoding
from mlx_v4flash.markup import DSML, EOS, Mark, write_calls
from mlx_v4flash.sampling import SamplingParams

END = Mark("</think>")


@dataclass(frozen=True)
class Script(SamplingParams):
    """Draws the tokens of one answer after the other; an answer without more to say ends."""

    encoding: Encoding | None = None
    answers: list[Sequence[str]] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)

    def sampler(self, vocab_size: int) -> Callable[[mx.array], mx.array]:
        assert self.encoding is not None
        self.drawn.clear()
        ids = iter(self.encoding.vocabulary.encode(self.answers.pop(0)))
        eos = self.encoding.vocabulary.id_of(EOS)

        def draw(logprobs: mx.array) -> mx.array:
            assert logprobs.shape == (1, vocab_size)
            self.drawn.append(next(ids, eos))
            return mx.array([self.drawn[-1]])

        return draw


def thought(reasoning: str, text: str = "", *calls: tuple[str, dict[str, object]]) -> list[str]:
    """An answer with reasoning, as the model would write it."""
    return [reasoning, END, text, *(write_calls(calls) if calls else ())]


__all__ = ["DSML", "END", "Script", "thought"]
