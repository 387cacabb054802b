"""One answer of the command line: on standard output it alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from .encoding import Think
from .errors import RequestError
from .events import Event, Reasoning, Text, ToolCall
from .run import Run
from .sampling import SamplingParams, expect_limits
from .terminal import clean
from .tools import read_tools, tools_of

RAW_MAX_TOKENS = 256


def generate(
    folder: str,
    prompt: str,
    sampling: dict[str, Any],
    *,
    raw: bool | None,
    system: str | None,
    think: Think | None,
    think_budget: int | None,
    tools: Path | None,
    release: str | None,
    max_tokens: int | None,
    prefill_chunk: int,
    show_thinking: bool | None,
    stats: bool,
    as_json: bool,
    **loading: Any,
) -> str:
    """Print an answer, or the continuation of a text; why it ended.

    Raises:
        RequestError: options of a chat for a text that is continued, an empty prompt, and what `Chat` raises.
    """
    # What can be checked is checked before minutes of loading.
    if not prompt:
        raise RequestError("prompt: expected at least one token, found none\nhint: pass some text")
    params = SamplingParams(**sampling)
    expect_limits(max_tokens=max_tokens, think_budget=think_budget, prefill_chunk=prefill_chunk)
    definitions = tools_of(read_tools(tools)) if tools else []
    run = Run.load(folder, **loading)
    shown = sys.stderr.isatty() if show_thinking is None else show_thinking
    out = Printer(as_json, shown)
    raw = run.is_base if raw is None else raw
    if raw and any(option is not None for option in (system, tools, think, think_budget)):
        raise RequestError(
            "--system, --tools, --think and --think-budget: expected a chat, found raw text\n"
            "hint: leave them out, or use --chat; base models are given raw text unless told otherwise"
        )
    if raw:
        chunk = {"prefill_chunk": prefill_chunk}
        for text in run.stream(
            prompt, params, max_tokens=RAW_MAX_TOKENS if max_tokens is None else max_tokens, **chunk
        ):
            out.show(Text(text))
    else:
        chat = run.chat(
            sampling, system=system, think=think, think_budget=think_budget, tools=definitions, release=release,
            max_tokens=max_tokens, prefill_chunk=prefill_chunk,
        )  # fmt: skip
        for event in run.answer(chat, prompt):
            out.show(event)
    out.end()
    if as_json:
        click.echo(json.dumps(run.summary()))
    elif run.finish_reason == "length" and run.generated != max_tokens:  # a limit that nobody named
        click.echo("(cut off, the limit of tokens is reached: --max-tokens, --max-context)", err=True)
    if stats:
        run.print_stats()
    return run.finish_reason


class Printer:
    """Writes events as they come: the answer to standard output, reasoning to standard error."""

    def __init__(self, as_json: bool, show_thinking: bool) -> None:
        self._as_json, self._show_thinking = as_json, show_thinking
        self._thinking = False
        self._at_line_start = True

    def show(self, event: Event) -> None:
        if self._as_json:
            click.echo(json.dumps(_values(event)))
        elif isinstance(event, Reasoning):
            self._reason(event.text)
        elif isinstance(event, Text):
            self._end_reasoning()
            click.echo(clean(event.text) if sys.stdout.isatty() else event.text, nl=False)
            self._at_line_start = event.text.endswith("\n") if event.text else self._at_line_start
        elif isinstance(event, ToolCall):
            self._end_reasoning()
            click.echo(("" if self._at_line_start else "\n") + json.dumps(_values(event)["tool_call"]))
            self._at_line_start = True

    def end(self) -> None:
        """What follows the last event."""
        self._end_reasoning()
        if not self._as_json and not self._at_line_start:
            click.echo()

    def _reason(self, text: str) -> None:
        if self._show_thinking:
            self._thinking = True
            shown = clean(text) if sys.stderr.isatty() else text
            click.echo(click.style(shown, dim=True), err=True, nl=False)

    def _end_reasoning(self) -> None:
        if self._thinking:
            click.echo("\n", err=True)
        self._thinking = False


def _values(event: Event) -> dict[str, Any]:
    if isinstance(event, Reasoning):
        return {"reasoning": event.text}
    if isinstance(event, ToolCall):
        try:
            arguments = json.loads(event.arguments)
        except ValueError:
            arguments = event.arguments
        return {"tool_call": {"id": event.id, "name": event.name, "arguments": arguments}}
    assert isinstance(event, Text)
    return {"text": event.text}
