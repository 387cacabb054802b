"""What a chat answer is made of, in the order it arrives."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Reasoning:
    """A piece of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class Text:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """A complete call of a tool.

    Attributes:
        id: names the call in its result.
        arguments: a JSON object as text, as the model gave it.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ToolResult:
    """What a call returned; `failed` if the content is what went wrong."""

    call_id: str
    content: str
    failed: bool = False


@dataclass(frozen=True)
class Usage:
    """The last event of an answer.

    Attributes:
        prompt_tokens: of the whole conversation so far; cached_tokens: those that were in the caches already.
        finish_reason: "stop", "length", "tool_calls" or "interrupted".
        prefill_s, decode_s: seconds.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    finish_reason: str
    prefill_s: float
    decode_s: float


class Meter:
    """Counts the tokens of an answer and takes the times; `reason` is why it ended."""

    def __init__(self) -> None:
        self.tokens, self.reason = 0, "interrupted"
        self._begin = self._first = time.perf_counter()

    def count(self) -> None:
        """Another token is there."""
        self.tokens += 1
        if self.tokens == 1:
            self._first = time.perf_counter()

    def usage(self, prompt_tokens: int, cached_tokens: int) -> Usage:
        """The figures up to now."""
        now = time.perf_counter()
        first = self._first if self.tokens else now
        return Usage(prompt_tokens, cached_tokens, self.tokens, self.reason, first - self._begin, now - first)


Event = Reasoning | Text | ToolCall | ToolResult | Usage
