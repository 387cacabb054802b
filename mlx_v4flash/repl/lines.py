"""What the user types, or what a pipe holds."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output

from ..errors import RequestError
from ..terminal import clean

FENCE = '"""'


class Lines(Protocol):
    """Source of messages and commands."""

    interactive: bool

    def read(self, default: str, status: Callable[[], str]) -> str:
        """The next message.

        Args:
            default: text to begin with, for the user to change.
            status: what to show below the line.

        Raises:
            EOFError: there is no more.
            KeyboardInterrupt: the line is given up.
        """
        ...


class TypedLines:
    """A line editor with history. Enter sends, Alt-Enter or Enter after a backslash begins a new line.

    Pasted text keeps its lines.
    """

    interactive = True

    def __init__(
        self, history: Path | None, commands: list[str] | None = None, *, input: Input | None = None,
        output: Output | None = None,
    ) -> None:  # fmt: skip
        kept: History = InMemoryHistory() if history is None else FileHistory(str(history))
        self._session: PromptSession[str] = PromptSession(
            history=kept,
            multiline=True,
            key_bindings=_keys(),
            prompt_continuation="… ",
            completer=WordCompleter(commands or [], sentence=True),
            complete_while_typing=False,
            reserve_space_for_menu=0,
            enable_open_in_editor=True,
            tempfile_suffix=".md",
            input=input,
            output=output,
        )

    def read(self, default: str, status: Callable[[], str]) -> str:
        # Terminals of macOS send Alt-Enter as Enter unless told otherwise.
        newline = "Esc Enter" if sys.platform == "darwin" else "Alt-Enter"
        toolbar = f" Enter sends · {newline} new line · /help · {clean(status())}"
        return self._session.prompt("> ", default=default, bottom_toolbar=toolbar)


class PipedLines:
    """One message a line; several lines between two lines of three quotes are one."""

    interactive = False

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def read(self, default: str, status: Callable[[], str]) -> str:
        line = self._line()
        if line.strip() != FENCE:
            return line
        lines = []
        with suppress(EOFError):  # ends the message, too
            while (line := self._line()).strip() != FENCE:
                lines.append(line)
        return "\n".join(lines)

    def _line(self) -> str:
        try:
            line = self._stream.readline()
        except UnicodeDecodeError as e:
            raise RequestError(f"standard input: expected UTF-8, found {e}") from e
        if not line:
            raise EOFError
        return line.rstrip("\r\n")


def history_file() -> Path | None:
    """Where typed lines are kept, for the user alone; None if there is no such place."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    file = Path(state) / "mlx-v4flash" / "history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except OSError:
        return None
    return file


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    @keys.add("c-j")  # what Enter is for a terminal that was not listened to yet
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
