"""What must not reach a terminal, and Ctrl-C."""

from __future__ import annotations

import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Escapes move the cursor, change the title, fill the clipboard. Their pictures do none of this. C1 has no pictures.
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: 0x2421} | {code: 0xFFFD for code in range(0x80, 0xA0)}
# Directions that would make text read as something else.
_PICTURES |= {code: 0xFFFD for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def clean(text: str) -> str:
    """Text with its control characters made visible, except newlines and tabs."""
    return text.translate(_PICTURES)


@contextmanager
def on_interrupt(call: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C makes this call once; the next one raises KeyboardInterrupt, should the first not be enough."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        call()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def busy(stop: Callable[[], None]) -> Iterator[None]:
    """While an answer is written: Ctrl-C stops it, and what is typed meanwhile waits unseen for the next line."""
    with on_interrupt(stop), _no_echo():
        yield


@contextmanager
def _no_echo() -> Iterator[None]:
    try:
        before = termios.tcgetattr(sys.stdin)
    except (OSError, ValueError, termios.error):  # standard input is no terminal
        yield
        return
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
