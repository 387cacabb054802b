"""What a conversation looks like: on a terminal, and as plain text elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from rich.console import Console
from rich.text import Text as Styled

from ..events import Event, Reasoning, Text, ToolCall, Usage
from ..progress import bar
from ..terminal import clean
from .markdown import StreamedMarkdown

# A prefill of fewer tokens needs no bar.
_BAR_FROM = 512


class Screen:
    """Writes answers and notes to a console.

    Args:
        hides_thinking: show that the model thinks, but not what.

    Attributes:
        thoughts: reasoning of the last answer.
    """

    def __init__(self, console: Console, *, hides_thinking: bool = False) -> None:
        self.console, self.hides_thinking = console, hides_thinking
        self._moves_cursor = console.is_terminal and not console.is_dumb_terminal
        self.thoughts = ""
        self._markdown: StreamedMarkdown | None = None
        self._doing = ""
        self._pieces = 0
        self._line_open = False

    def begin(self) -> None:
        """An answer follows."""
        self.thoughts, self._doing, self._pieces = "", "", 0
        self._line_open = False
        self._markdown = StreamedMarkdown(self.console) if self._moves_cursor else None

    def show(self, event: Event) -> None:
        """A piece of the answer."""
        if isinstance(event, Reasoning):
            self._reason(clean(event.text))
        elif isinstance(event, Text):
            self._end_reasoning()
            if self.console.is_dumb_terminal:
                self._write(clean(event.text))
            elif self._markdown is None:
                self._write_as_it_is(event.text)
            else:
                self._markdown.feed(event.text)
        elif isinstance(event, ToolCall):
            self._end_reasoning()
            self.note(f"call of {event.name}: {event.arguments}")
        elif isinstance(event, Usage):
            self._end(event)

    def note(self, text: str) -> None:
        """A line that is not part of the conversation."""
        self._end_line()
        self.console.print(Styled(clean(text), style="dim"), soft_wrap=True)

    def error(self, text: str) -> None:
        self._end_line()
        self.console.print(Styled(f"error: {clean(text)}", style="red"), soft_wrap=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Right-aligned columns."""
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        for n, row in enumerate((columns, *rows)):
            line = "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            # rich's own table would leave out figures where the window is narrow.
            self.console.print(Styled(clean(line), style="" if n else "bold"), soft_wrap=True)

    def show_thoughts(self) -> None:
        """The reasoning of the last answer, if there was any."""
        if self.thoughts:
            self.console.print(Styled(self.thoughts.rstrip("\n"), style="dim italic"), soft_wrap=True)

    @contextmanager
    def prefill(self) -> Iterator[tuple[Callable[[int, int], None], Callable[[], None]]]:
        """Progress of a long prefill, and what takes it away again."""
        with ExitStack() as stack:
            report: Callable[[int, int], None] | None = None

            def progress(done: int, total: int) -> None:
                nonlocal report
                if report is None and total >= _BAR_FROM and done < total:
                    report = stack.enter_context(bar("reading", "tokens"))
                if report is not None:
                    report(done, total)

            yield progress, stack.close

    def _reason(self, text: str) -> None:
        self.thoughts += text
        self._pieces += 1
        self._doing = "thinking"
        if not self.hides_thinking:
            if not self.console.is_terminal and self._pieces == 1:
                self._write("[thinking] ")
            self._write(text, "dim italic")
        elif self._moves_cursor and self._pieces % 8 == 1:
            self.console.file.write("\r\x1b[K")
            self.console.print(Styled(f"thinking, {len(self.thoughts):,} characters", style="dim italic"), end="")
            self.console.file.flush()

    def _end_reasoning(self) -> None:
        if self._doing != "thinking":
            return
        self._doing = "answering"
        if not self.hides_thinking:
            self._write("\n\n" if not self.thoughts.endswith("\n") else "\n")
        elif self.console.is_terminal:
            self.console.file.write("\r\x1b[K" if self._moves_cursor else "")
            self.note(f"(thought in {len(self.thoughts):,} characters, /think show)")
        self._line_open = False

    def _end(self, usage: Usage) -> None:
        self._end_reasoning()
        if self._markdown is not None:
            self._markdown.finish()
        self._end_line()
        notes = []
        if usage.finish_reason == "interrupted":
            notes.append("stopped" if usage.generated_tokens else "stopped; the message was taken back")
        elif usage.finish_reason == "length":
            notes.append("cut off, the limit of tokens is reached: --max-tokens, /ctx")
        if self.console.is_terminal and usage.generated_tokens:
            new, speed = usage.prompt_tokens - usage.cached_tokens, usage.generated_tokens / max(usage.decode_s, 1e-9)
            notes.append(f"read {new:,} of {usage.prompt_tokens:,} tokens in {usage.prefill_s:.1f} s")
            notes.append(f"wrote {usage.generated_tokens:,} at {speed:.1f}/s")
        if notes:
            self.note(f"({' · '.join(notes)})")

    def _write(self, text: str, style: str = "") -> None:
        if text:
            self.console.print(Styled(text, style=style), end="", soft_wrap=True)
            self.console.file.flush()
            self._line_open = not text.endswith("\n")

    def _write_as_it_is(self, text: str) -> None:
        """For a pipe or a file; rich would replace tabs."""
        self.console.file.write(text)
        self.console.file.flush()
        self._line_open = not text.endswith("\n")

    def _end_line(self) -> None:
        if self._line_open:
            self.console.print()
        self._line_open = False
