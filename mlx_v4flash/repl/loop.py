"""The conversation: read a line, do what it says, until there is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..chat import Chat
from ..errors import V4FlashError
from ..events import Event
from ..terminal import busy
from .commands import find
from .lines import Lines
from .screen import Screen


class Repl:
    """Carries lines to a chat and its events to a screen.

    Attributes:
        draft: text the next line begins with.
        over: the user has left.
    """

    def __init__(self, chat: Chat, lines: Lines, screen: Screen) -> None:
        self.chat, self.lines, self.screen = chat, lines, screen
        self.draft = ""
        self.over = False

    def run(self) -> None:
        """Talk until `/quit` or the end of the input."""
        if self.lines.interactive:
            self.screen.note(
                f"DeepSeek-V4, release {self.chat.encoding.release}, context {self.chat.context:,} tokens. "
                "/help lists commands."
            )
        while not self.over:
            try:
                text = self.lines.read(self.draft, self.status)
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self.lines.interactive:
                    raise
                self.draft = ""
                continue
            self.draft = ""
            self.handle(text)

    def handle(self, text: str) -> None:
        """Do what a line says. Errors are shown, and the conversation goes on."""
        if not text.strip():
            return
        try:
            if text.startswith("/"):
                find(text)(self)
            else:
                self.answer(self.chat.send(text))
        except V4FlashError as e:
            self.screen.error(str(e))
        except KeyboardInterrupt:
            self.screen.note("(stopped)")

    def answer(self, events: Iterator[Event]) -> None:
        """Show an answer. Ctrl-C ends it."""
        with self.screen.prefill() as (progress, done), busy(self.chat.stop):
            self.chat.progress = progress
            self.screen.begin()
            with contextlib.closing(events):  # type: ignore[type-var]
                for event in events:
                    done()
                    self.screen.show(event)

    def status(self) -> str:
        """What is shown below the line."""
        return f"think {self.chat.think} · {self.chat.session.held_tokens:,} tokens held, context {self.chat.context:,}"
