"""From generated tokens to reasoning, text and calls of tools, as they arrive."""

from __future__ import annotations

import codecs
import re
import secrets
from typing import Any

from . import markup
from .events import Event, Reasoning, Text, ToolCall
from .markup import DSML, DSML_SIGN, END_THINK, END_THINK_SIGN, EOS, Mark
from .vocabulary import Vocabulary

_SIGNS: dict[str, str] = {DSML: DSML_SIGN, END_THINK: END_THINK_SIGN}
_SIGN = re.compile(f"[{DSML_SIGN}{END_THINK_SIGN}]")


class OutputParser:
    """Reads one answer token by token.

    A mark counts only if it came as its own token; the same characters made of other tokens are text. What is given
    out does not depend on how text is cut into tokens. Newlines at the edges of reasoning and before calls are form
    and disappear; everything else comes out, calls that are cut off or malformed as text.

    Attributes:
        done: the block of calls is complete; nothing the model adds to it makes sense.
    """

    def __init__(
        self, vocabulary: Vocabulary, thinks: bool, tools: bool, content: str = "", reasoning: str = ""
    ) -> None:
        """
        Args:
            thinks: the prompt ended where reasoning begins.
            tools: whether calls are expected; without it they are text.
            content, reasoning: of the message that is being continued.
        """
        self._vocabulary = vocabulary
        self._thinks = thinks
        self._tools = tools
        self._state = "reasoning" if thinks and not content else "content"
        # Newlines before the first other character are form, unless this continues what somebody wrote.
        self._at_start = not (content or reasoning)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._ended = False
        self._sampled: list[int] = []
        self._is_clean = not (content or reasoning)
        self._texts = {"reasoning": [reasoning], "content": [content]}
        self._calls: list[ToolCall] = []
        self._searched = 0
        self._read = {
            "reasoning": self._read_prose,
            "content": self._read_prose,
            "calls": self._read_calls,
            "after": self._read_after,
        }
        self.done = False

    @property
    def in_reasoning(self) -> bool:
        return self._state == "reasoning"

    @property
    def end_of_reasoning(self) -> list[int]:
        """What to feed the model, and this parser, to make it answer now."""
        return [self._vocabulary.id_of(END_THINK)]

    @property
    def message(self) -> dict[str, Any]:
        """The assistant message so far, to append to the history."""
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._texts["content"])}
        if self._thinks:
            message["reasoning_content"] = "".join(self._texts["reasoning"])
        if self._calls:
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in self._calls
            ]
        return message

    @property
    def sampled(self) -> list[int] | None:
        """The ids that were fed, for `Encoding.prompt(sampled=...)`; reasoning that was cut off is closed.

        None if they continue a message, or hold marks in places where the message's text does not say so.
        """
        if not self._is_clean or self._state == "calls":
            return None
        return self._sampled + (self.end_of_reasoning if self.in_reasoning else [])

    def feed(self, token: int) -> list[Event]:
        """What a token adds. The end-of-sentence token may be fed, too: it tells an answer that ended from one cut off.

        Raises:
            EncodingError: the tokenizer has no such token.
        """
        found = self._vocabulary.read(token)
        if found == EOS:
            self._ended = True
            return []
        self._sampled.append(token)
        if isinstance(found, Mark):
            text = self._utf8.decode(b"", final=True) + _SIGNS.get(found, found)
            self._is_clean &= found in _SIGNS
        else:
            text = self._utf8.decode(found)
        self._held += text
        events: list[Event] = []
        state = None if text else self._state
        while state != self._state:
            state = self._state
            events += self._read[state]()
        return events

    def finish(self) -> list[Event]:
        """What is left when generation ends. Bytes that begin a character and do not end it are dropped."""
        rest, self._held = self._held, ""
        if self._state != "calls":
            return self._emit(rest)
        call = markup.read_call(rest) if self._ended else None
        return self._call(call) if isinstance(call, tuple) else self._leftover(rest)

    def _read_prose(self) -> list[Event]:
        """Reasoning or content: give out what is certain, hold back what may belong to a mark."""
        events: list[Event] = []
        searched = 0
        while sign := _SIGN.search(self._held, searched):
            before, after = self._held[: sign.start()], self._held[sign.end() :]
            if sign.group() == END_THINK_SIGN:
                events += self._emit(before.rstrip("\n") if self.in_reasoning else before)
                self._is_clean &= self.in_reasoning
                self._at_start |= self.in_reasoning
                self._state, self._held, searched = "content", after, 0
                continue
            opens = markup.may_open(after) if self._tools and before.endswith("<") else False
            if opens is False:
                self._is_clean = False
                searched = sign.end()
                continue
            kept = before[:-1].rstrip("\n")
            events += self._emit(kept)
            self._held = self._held[len(kept) :]
            if opens:
                self._state, self._held, self._searched = "calls", self._held.lstrip("\n"), 0
            return events
        kept = self._held.removesuffix("<").rstrip("\n") if self._tools else self._held
        kept = kept.rstrip("\n") if self.in_reasoning else kept
        events += self._emit(kept)
        self._held = self._held[len(kept) :]
        return events

    def _read_calls(self) -> list[Event]:
        """A block of calls: give out each that is complete."""
        events: list[Event] = []
        while (n := self._held.find(DSML_SIGN, self._searched)) >= 0:
            tag = markup.read_tag(self._held, n)
            if tag is None:
                return events
            kind, start, stop = tag
            self._searched = n + 1
            if kind == "other" or (kind == "begin" and markup.is_blank(self._held[:start])):
                continue
            before, after = self._held[:start], self._held[start if kind == "begin" else stop :]
            call = markup.read_call(before)
            if call == "open":
                continue
            if isinstance(call, tuple):
                events += self._call(call)
            elif not (kind == "block" and not before.strip()):
                events += self._leftover(self._held[: len(self._held) - len(after)])
            self._held, self._searched = after, 0
            if kind == "block":
                self._state, self._at_start, self.done = "after", True, True
                return events
        return events

    def _read_after(self) -> list[Event]:
        """Behind the block nothing should come; what comes is given out as it is."""
        rest, self._held = self._held.replace(END_THINK_SIGN, ""), ""
        return self._leftover(rest.lstrip() if self._at_start else rest)

    def _leftover(self, text: str) -> list[Event]:
        if not text.strip() and self._at_start:
            return []
        self._is_clean = False
        self._state = "content" if self.in_reasoning else self._state
        return self._emit(text)

    def _emit(self, text: str) -> list[Event]:
        text = text.lstrip("\n") if self._at_start else text
        if not text:
            return []
        self._at_start = False
        text = markup.spelled(text)
        self._texts["reasoning" if self.in_reasoning else "content"].append(text)
        return [Reasoning(text) if self.in_reasoning else Text(text)]

    def _call(self, call: tuple[str, str]) -> list[Event]:
        # Ids sort in the order of the calls.
        found = ToolCall(f"call_{len(self._calls):04d}_{secrets.token_hex(8)}", *call)
        self._calls.append(found)
        return [found]
