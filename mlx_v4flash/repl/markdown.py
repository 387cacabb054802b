"""Markdown on a terminal while it is being written."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import ClassVar

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Markdown, TableElement
from rich.table import Table

from ..terminal import clean

# Redraws per second; more is not seen.
_RATE = 15.0

# A long block takes long to draw, and the next token waits for it. At least this many times as long nothing is drawn.
_PAUSE = 9.0

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_CONTINUES = re.compile(r"\s|[-*+](\s|$)|\d{1,9}[.)](\s|$)|[-*+\d]$")

_STYLE = re.compile(r"\x1b\[[\d;]*m")

# A terminal that knows these shows what lies between at once; others ignore them.
_BEGIN, _END = "\x1b[?2026h", "\x1b[?2026l"


class _FoldedTable(TableElement):
    """A table whose words are folded, not cut, where the window is narrow."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for part in super().__rich_console__(console, options):
            if isinstance(part, Table):
                for column in part.columns:
                    column.overflow = "fold"
            yield part


class _Markdown(Markdown):
    """Markdown that shows all it is given: tags, definitions of links and addresses of images are text."""

    elements: ClassVar = {**Markdown.elements, "table_open": _FoldedTable}
    _reader = (
        MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable(["reference", "image"])
    )

    def __init__(self, text: str) -> None:
        super().__init__("", code_theme="ansi_dark", hyperlinks=False)
        self.markup, self.parsed = text, self._reader.parse(text)


class StreamedMarkdown:
    """Draws blocks as they grow. Finished blocks are left alone; of the last one only changed lines are drawn again.

    Args:
        console: a terminal.
        clock: seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._text = ""
        self._drawn: list[str] = []
        self._any = False
        self._next = float("-inf")

    def feed(self, text: str) -> None:
        """More text; its control characters become visible."""
        self._text += clean(text).expandtabs(4)
        now = self._clock()
        if now >= self._next:
            self._update()
            drawn = self._clock()
            self._next = drawn + max(1 / _RATE, _PAUSE * (drawn - now))

    def finish(self) -> None:
        """Draw what is left."""
        self._update()
        self._settle(self._text)
        self._text = ""

    def _update(self) -> None:
        end = block_end(self._text)
        if end:
            self._settle(self._text[:end])
            self._text = self._text[end:].lstrip("\n")
        self._draw(self._lines(self._text))

    def _settle(self, block: str) -> None:
        lines = self._lines(block)
        self._draw(lines)
        self._any |= bool(lines)
        self._drawn = []

    def _lines(self, block: str) -> list[str]:
        if not block.strip():
            return []
        with self._console.capture() as capture:
            self._console.print(_Markdown(block))
        lines = [line.rstrip() for line in capture.get().split("\n")]
        shown = [n for n, line in enumerate(lines) if _STYLE.sub("", line).strip()]
        lines = lines[shown[0] : shown[-1] + 1] if shown else []
        return ["", *lines] if self._any and lines else lines  # one empty line between blocks

    def _draw(self, lines: list[str]) -> None:
        same = next((n for n, (a, b) in enumerate(zip(self._drawn, lines, strict=False)) if a != b),
                    min(len(self._drawn), len(lines)))  # fmt: skip
        # Lines that have left the screen cannot be reached any more.
        first = max(same, len(self._drawn) - (self._console.height - 1))
        up = len(self._drawn) - first
        if not up and first == len(lines):
            return
        move = f"\r\x1b[{up}A" if up else "\r"
        changed = "".join(f"{line}\x1b[K\n" for line in lines[first:])
        self._console.file.write(f"{_BEGIN}{move}{changed}\x1b[J{_END}")
        self._console.file.flush()
        self._drawn = lines


def block_end(text: str) -> int:
    """Where the last finished block ends; 0 if none is. What follows it would not change how it looks."""
    end = position = 0
    fence = ""
    blank = False
    for line in text.splitlines(keepends=True):
        mark = _FENCE.match(line)
        is_last = not line.endswith("\n")
        if not fence and blank and line.strip() and not _CONTINUES.match(line) and not (is_last and len(line) < 4):
            end = position
        if mark and (not fence or (mark[1].startswith(fence) and not line[mark.end() :].strip())):
            fence = "" if fence else mark[1]
        blank = not line.strip()
        position += len(line)
    return end
