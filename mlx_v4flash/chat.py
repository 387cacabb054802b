"""A conversation: messages in, events out, and the caches carried from turn to turn."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from . import chat_file
from .encoding import THINK_LEVELS, Encoding, Think, shared_tokens
from .engine import PREFILL_CHUNK
from .errors import RequestError
from .events import Event, Meter, ToolCall, ToolResult, Usage
from .markup import DSML, EOS
from .model import Model
from .output_parser import OutputParser
from .sampling import SamplingParams, ThinkBudget, card_defaults, default_max_tokens, expect_limits
from .session import Progress, Session
from .tools import Function, Tool, calls_of, run_call, tools_of
from .turns import read_messages, text_of

Message = dict[str, Any]

# Model card: Think Max needs room for this many tokens.
MAX_THINK_CONTEXT = 384 * 1024

CALL_LIMIT = 16


class _Stopped(Exception):
    """Ends a prefill between two chunks."""


class Chat:
    """A conversation with a model.

    Each turn prefills only what the caches do not hold. Stopping an answer, by `stop`, Ctrl-C or leaving its loop,
    keeps what was said so far as the answer; before the first token it takes the turn back.

    Args:
        tokenizer: as `load` returns it, or an `Encoding`.
        system: what the model is told before everything else. Changing it makes the next turn read everything again.
        think: "off", "low", "high" or "max"; None takes "high", unless the checkpoint says otherwise. Changing the
            level may do the same, see `Encoding`.
        tools: annotated functions, or definitions as OpenAI's interface has them.
        messages: a conversation to go on with, without system messages.
        sampling: None takes what the model card recommends.
        max_tokens: of an answer, reasoning included; None depends on `think`.
        think_budget: tokens after which the reasoning is ended and the answer begins; None for no limit.
        context: tokens the conversation may have in all; None for what the model was made for.
        release: "v4-preview" or "v4-0731"; None guesses it from the checkpoint's folder.
        progress: called during prefill with new prompt tokens done and in all.

    Attributes:
        messages: the conversation, without the system message.
        turns: one Usage for each answer.

    Raises:
        RequestError, EncodingError: an argument that cannot be honoured.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: TokenizerWrapper | Encoding,
        *,
        system: str | None = None,
        think: Think | None = None,
        tools: Sequence[Function | Mapping[str, Any] | Tool] = (),
        messages: Sequence[Mapping[str, Any]] = (),
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        think_budget: int | None = None,
        context: int | None = None,
        release: str | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        progress: Progress | None = None,
        warn: Callable[[str], object] = warnings.warn,
    ) -> None:
        expect_limits(max_tokens=max_tokens, think_budget=think_budget, context=context, prefill_chunk=prefill_chunk)
        if not isinstance(tokenizer, Encoding):
            tokenizer = Encoding.from_folder(Path(tokenizer.name_or_path), release)
        self.model, self.encoding = model, tokenizer
        self.session = Session(model, prefill_chunk=prefill_chunk)
        self.system, self.progress = system, progress
        self.tools = tools_of(tools)
        read_messages(messages, {})  # raises if one is none
        self.messages: list[Message] = [dict(message) for message in messages]
        self.sampling, self.max_tokens, self.think_budget = sampling, max_tokens, think_budget
        self.context = min(context or model.config.max_position_embeddings, model.config.max_position_embeddings)
        self.turns: list[Usage] = []
        self._warn = warn
        self._sampled: dict[int, list[int]] = {}  # by position in `messages`, what the answer was generated as
        self._running: weakref.ref[Generator[Event]] | None = None  # weak: a loop that is left closes its answer
        self._stopped = False
        self._seeded: SamplingParams | None = None
        self.think = self.encoding.defaults.think if think is None else think

    @property
    def recommended(self) -> SamplingParams:
        """How tokens are drawn if nothing else is asked for."""
        return card_defaults(self.encoding.release, tools=bool(self.tools), temp=self.encoding.defaults.temp)

    @property
    def think(self) -> Think:
        return self._think

    @think.setter
    def think(self, level: Think) -> None:
        if level not in THINK_LEVELS:
            raise RequestError(f"think: expected {', '.join(THINK_LEVELS)}, found {level!r}")
        self._think: Think = level
        if level == "max" and self.context < MAX_THINK_CONTEXT:
            self._warn(
                f"think: max needs a context of {MAX_THINK_CONTEXT:,} tokens, and this one has {self.context:,}; "
                "an answer may be cut off while the model still thinks"
            )

    def send(self, text: str) -> Iterator[Event]:
        """Say something and get the events of the answer. The turn begins when the first one is read.

        Raises:
            RequestError: calls of the last answer have no result yet, or the context is full.
        """
        open_calls = self.open_calls()
        if open_calls:
            raise RequestError(
                f"send: expected results of {', '.join(c.name for c in open_calls)} first\n"
                f"hint: tool_result({open_calls[0].id!r}, ...), or undo()"
            )
        return self._start([{"role": "user", "content": text}])

    def answer(self) -> Iterator[Event]:
        """The model's answer to the messages as they are, such as after `tool_result`."""
        return self._start([])

    def tool_result(self, call_id: str, content: str) -> None:
        """Tell the model what a call of its last answer returned; `answer` goes on from there.

        Raises:
            RequestError: no such call, or it has a result.
        """
        ids = [call.id for call in self.open_calls()]
        if call_id not in ids:
            raise RequestError(f"tool_result: expected an open call ({', '.join(ids) or 'there is none'}), "
                               f"found {call_id!r}")  # fmt: skip
        if not isinstance(content, str):
            raise RequestError(f"tool_result: expected text as content, found {content!r}\nhint: json.dumps")
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": content})

    def open_calls(self) -> list[ToolCall]:
        """Calls of the last answer that have no result."""
        self._end_running()
        done = set()
        for message in reversed(self.messages):
            if message["role"] == "assistant":
                return [call for call in calls_of(message) if call.id not in done]
            done.add(message.get("tool_call_id"))
        return []

    def run(self, text: str, max_calls: int = CALL_LIMIT) -> Iterator[Event]:
        """`send`, then run the calls of the answer and let the model go on, until it answers without calls.

        Ends early at a call of a tool that has no function: give its result with `tool_result`, then `answer`. When
        max_calls are done, further calls get an error as their result, and one more answer is taken.
        """
        left = max_calls
        events = self.send(text)
        try:
            while True:
                yield from events
                calls = self.open_calls()
                theirs = {tool.name for tool in self.tools if tool.function is None}
                if not calls or any(call.name in theirs for call in calls):
                    return
                last = left <= 0 or self.turns[-1].finish_reason == "interrupted"
                for call in calls:
                    result = self._call(call, left)
                    left -= 1
                    self.tool_result(call.id, result.content)
                    yield result
                if last or self._stopped:
                    return
                events = self.answer()
        except BaseException:  # Ctrl-C, or the loop was left: no call stays open
            for call in self.open_calls():
                self.tool_result(call.id, "error: interrupted")
            raise

    def retry(self) -> Iterator[Event]:
        """Another answer to the last message of the user.

        Raises:
            RequestError: there is none.
        """
        return self._start([], keep=self._last_user() + 1)

    def undo(self) -> str:
        """Take back the last message of the user and all after it; its text.

        Raises:
            RequestError: there is none.
        """
        n = self._last_user()
        text = text_of(self.messages[n].get("content"), "content")
        self._cut(n)
        return text

    def stop(self) -> None:
        """End the answer at the next token; may be called from a signal handler."""
        self._stopped = True

    def read(self, text: str, progress: Progress | None = None) -> int:
        """Add a message of the user and prefill it, so that a question about it is answered soon; tokens this took.

        Raises:
            RequestError: the context is full; the message is not kept then.
        """
        self._end_running()
        self.messages.append({"role": "user", "content": text})
        self._stopped = False
        try:
            # Where the next message begins, the last tokens of this one may be other ones.
            beginnings = [self.prompt({"role": "user", "content": start}) for start in ("a", "1", ".", "\n", "<")]
            stable = min(shared_tokens(beginnings[0], other) for other in beginnings[1:])
            self._room(beginnings[0])
            known = self.session.known(beginnings[0])
            if known is not None and len(known.tokens) >= stable:
                return 0
            return self.session.prefill(beginnings[0][:stable], self._progress(progress or self.progress))
        except BaseException as e:
            self.messages.pop()
            if isinstance(e, _Stopped):
                return 0
            raise

    def prompt(self, *added: Message) -> list[int]:
        """Token ids of the conversation with these messages at its end."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        shift = len(system)
        return self.encoding.prompt(
            [*system, *self.messages, *added],
            tools=[tool.definition for tool in self.tools],
            think=self.think,
            sampled={n + shift: ids for n, ids in self._sampled.items()},
        )

    def save(self, path: str | Path) -> Path:
        """Write the conversation and its caches to a .safetensors file in mlx-lm's format of prompt caches."""
        self._end_running()
        return chat_file.save(self, Path(path), self._sampled)

    def load(self, path: str | Path) -> int:
        """Go on with a saved conversation; the number of tokens that need no prefill.

        Functions of tools are taken from this chat, by name. Caches of another model are left aside.

        Raises:
            RequestError: not a file that `save` wrote.
        """
        self._end_running()
        tokens, self._sampled = chat_file.load(self, Path(path))
        self.turns = []
        return tokens

    def _start(self, added: list[Message], keep: int | None = None) -> Iterator[Event]:
        self._end_running()
        events = self._answer(added, keep)
        self._running = weakref.ref(events)
        return events

    def _end_running(self) -> None:
        """Settle an answer nobody reads any more."""
        events = None if self._running is None else self._running()
        if events is not None:
            events.close()
        self._running = None

    def _answer(self, added: list[Message], keep: int | None) -> Generator[Event]:
        before = (list(self.messages), dict(self._sampled))
        if keep is not None:
            self._cut(keep)
        self.messages += added
        parser = self.encoding.parser(think=self.think, tools=bool(self.tools))
        meter = Meter()
        self._stopped = False
        kept, finished = True, False
        try:
            prompt = self.prompt()
            yield from self._events(prompt, parser, meter)
            yield from parser.finish()
            finished = True
        except (GeneratorExit, KeyboardInterrupt):
            raise
        except BaseException:
            kept = False
            raise
        finally:
            if not finished:
                parser.finish()
            if kept and meter.tokens:
                self._keep(parser)
                self.turns.append(meter.usage(len(prompt), self.session.cached_tokens))
            else:
                self.messages, self._sampled = before
        yield self.turns[-1] if meter.tokens else meter.usage(len(prompt), self.session.cached_tokens)

    def _events(self, prompt: list[int], parser: OutputParser, meter: Meter) -> Iterator[Event]:
        eos = self.encoding.vocabulary.id_of(EOS)
        room = self._room(prompt)
        wanted = default_max_tokens(self.think) if self.max_tokens is None else self.max_tokens
        expect_limits(max_tokens=wanted)
        limit = min(wanted, room)
        tokens = self.session.stream(
            prompt, limit, sampler=self._sampler(parser), progress=self._progress(self.progress)
        )
        try:
            for token in tokens:
                meter.count()
                if token == eos:
                    meter.reason = "stop"
                yield from parser.feed(token)
                if token == eos or parser.done or self._stopped:
                    break
            else:
                meter.reason = "length"
        except _Stopped:
            return
        finally:
            tokens.close()  # type: ignore[attr-defined]
        if "tool_calls" in parser.message and meter.reason != "length" and not self._stopped:
            meter.reason = "tool_calls"

    def _sampler(self, parser: OutputParser) -> Any:
        chosen = self.sampling or self.recommended
        if chosen is self._seeded:  # the seed is of the conversation: a second try is another answer
            chosen = replace(chosen, seed=None)
        else:
            self._seeded = chosen
        sampler = chosen.sampler(self.model.config.vocab_size)
        if self.think_budget is None or self.think == "off":
            return sampler
        ends = [*parser.end_of_reasoning, *([self.encoding.vocabulary.id_of(DSML)] if self.tools else [])]
        return ThinkBudget(sampler, self.think_budget, parser.end_of_reasoning, ends)

    def _room(self, prompt: Sequence[int]) -> int:
        if len(prompt) >= self.context:
            raise RequestError(
                f"prompt: expected fewer than {self.context:,} tokens, the context of this chat, found "
                f"{len(prompt):,}\nhint: take a turn back, or start another chat"
            )
        return self.context - len(prompt)

    def _progress(self, report: Progress | None) -> Progress:
        def between_chunks(done: int, total: int) -> None:
            if report is not None:
                report(done, total)
            if self._stopped and done < total:
                raise _Stopped

        return between_chunks

    def _keep(self, parser: OutputParser) -> None:
        sampled = parser.sampled
        if sampled is not None:
            self._sampled[len(self.messages)] = sampled
        self.messages.append(parser.message)

    def _cut(self, length: int) -> None:
        self.messages = self.messages[:length]
        self._sampled = {n: ids for n, ids in self._sampled.items() if n < length}

    def _last_user(self) -> int:
        self._end_running()
        found = [n for n, message in enumerate(self.messages) if message["role"] == "user"]
        if not found:
            raise RequestError("undo and retry: expected a message of the user, found none")
        return found[-1]

    def _call(self, call: ToolCall, left: int) -> ToolResult:
        if self._stopped:
            return ToolResult(call.id, "error: interrupted", failed=True)
        if left <= 0:
            return ToolResult(call.id, "error: no more calls are allowed; answer with what you have", failed=True)
        return run_call(self.tools, call)
