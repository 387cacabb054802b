"""Lines that begin with a slash."""

from __future__ import annotations

import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..encoding import THINK_LEVELS
from ..errors import RequestError
from ..terminal import busy

if TYPE_CHECKING:
    from .loop import Repl

_DRAFT_LENGTH = 4000

# Of a file for `/read`. A token stands for some four bytes, and the context ends at a million tokens.
_MOST_BYTES = 64 * 1024**2


def find(text: str) -> Callable[[Repl], None]:
    """The command of a line, with what follows it.

    Raises:
        RequestError: there is none of this name.
    """
    name, rest = (*text[1:].split(maxsplit=1), "", "")[:2] if text[1:2].strip() else ("", "")
    if name not in COMMANDS:
        raise RequestError(
            f"/{name}: expected one of {', '.join('/' + known for known in COMMANDS)}\n"
            "hint: a message that begins with a slash needs a space before it"
        )
    return partial(COMMANDS[name][0], argument=rest.strip())


def help(repl: Repl, argument: str) -> None:
    """This list"""
    for name, (command, wanted) in COMMANDS.items():
        repl.screen.note(f"  {f'/{name} {wanted}':38} {command.__doc__}")
    repl.screen.note(
        "  Enter sends. Alt-Enter, Esc Enter, or Enter after a backslash begin a new line; pasted lines stay together."
    )
    repl.screen.note("  Ctrl-C stops an answer and keeps the chat, Ctrl-D leaves.")


def think(repl: Repl, argument: str) -> None:
    """How much the model thinks; show or hide what it thinks"""
    if argument in ("show", "hide"):
        repl.screen.hides_thinking = argument == "hide"
        if argument == "show":
            repl.screen.show_thoughts()
        return
    if argument:
        if argument not in THINK_LEVELS:
            raise RequestError(f"/think: expected {', '.join(THINK_LEVELS)}, show or hide, found {argument!r}")
        repl.chat.think = argument
    _tell_change(repl, f"think: {repl.chat.think}")


def system(repl: Repl, argument: str) -> None:
    """What the model is told before everything; - removes it"""
    if argument:
        repl.chat.system = None if argument == "-" else argument
    _tell_change(repl, f"system: {repl.chat.system or 'none'}")


def read(repl: Repl, argument: str) -> None:
    """Read a text file into the conversation; then ask about it"""
    file = _path("/read", argument)
    text = _text_of(file)
    tokens = len(repl.chat.encoding.vocabulary.encode([text]))
    if tokens >= repl.chat.context:
        raise RequestError(f"{file}: expected fewer than {repl.chat.context:,} tokens, the context of this chat, found "
                           f"{tokens:,}")  # fmt: skip
    repl.screen.note(f"{file.name}: {tokens:,} tokens")
    message = f"[file name]: {file.name}\n[file content begin]\n{text}\n[file content end]"
    before = len(repl.chat.messages)
    with repl.screen.prefill() as (progress, _), busy(repl.chat.stop):
        took = repl.chat.read(message, progress)
    kept = len(repl.chat.messages) > before
    repl.screen.note(f"read {took:,} tokens; what about it?" if kept else "(stopped; the file was not read)")


def save(repl: Repl, argument: str) -> None:
    """Write the conversation with its caches to a file"""
    path = repl.chat.save(_path("/save", argument))
    repl.screen.note(f"saved: {path}, {path.stat().st_size:,} bytes")


def load(repl: Repl, argument: str) -> None:
    """Go on with a conversation from a file"""
    tokens = repl.chat.load(_path("/load", argument))
    known = f"{tokens:,} tokens need not be read again" if tokens else "the next turn reads all of them again"
    repl.screen.note(f"{len(repl.chat.messages)} messages; {known}")


def undo(repl: Repl, argument: str) -> None:
    """Take back the last message and its answer, to change it and send it again"""
    text = repl.chat.undo()
    repl.screen.note(f"taken back; {len(repl.chat.messages)} messages are left")
    repl.draft = text if len(text) <= _DRAFT_LENGTH else ""


def retry(repl: Repl, argument: str) -> None:
    """Another answer to the last message"""
    repl.answer(repl.chat.retry())


def stats(repl: Repl, argument: str) -> None:
    """Tokens and speed of each turn"""
    rows = []
    for n, turn in enumerate(repl.chat.turns, 1):
        new = turn.prompt_tokens - turn.cached_tokens
        rows.append((
            str(n), f"{turn.prompt_tokens:,}", f"{turn.cached_tokens:,}", f"{new:,}", f"{turn.prefill_s:.2f}",
            f"{turn.generated_tokens:,}", f"{turn.generated_tokens / max(turn.decode_s, 1e-9):.1f}", turn.finish_reason,
        ))  # fmt: skip
    repl.screen.table(("turn", "prompt", "cached", "prefilled", "s", "generated", "per s", "ended"), rows)


def ctx(repl: Repl, argument: str) -> None:
    """How full the context is"""
    chat = repl.chat
    used = len(chat.prompt({"role": "user", "content": ""}))  # the next turn, before anything is said
    repl.screen.note(
        f"{used:,} of {chat.context:,} tokens ({used / chat.context:.1%}), {len(chat.messages)} messages, "
        f"{chat.session.nbytes / 1e6:,.1f} MB of caches and their copies"
    )


def quit(repl: Repl, argument: str) -> None:
    """Leave"""
    repl.over = True


# Each with what follows it.
COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "think": (think, "off|low|high|max|show|hide"),
    "system": (system, "TEXT"),
    "read": (read, "FILE"),
    "save": (save, "FILE"),
    "load": (load, "FILE"),
    "undo": (undo, ""),
    "retry": (retry, ""),
    "stats": (stats, ""),
    "ctx": (ctx, ""),
    "help": (help, ""),
    "quit": (quit, ""),
}


def _path(command: str, argument: str) -> Path:
    if not argument:
        raise RequestError(f"{command}: expected the name of a file, found none")
    try:
        return Path(argument.strip("'\"")).expanduser()
    except RuntimeError as e:  # ~ of a user there is not
        raise RequestError(f"{command}: expected the name of a file, found {argument}: {e}") from e


def _text_of(file: Path) -> str:
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise RequestError(f"{file}: expected a text file, found no regular file")
        if status.st_size > _MOST_BYTES:
            raise RequestError(f"{file}: expected a text file of at most {_MOST_BYTES:,} bytes, which is more than "
                               f"any context holds, found {status.st_size:,} bytes")  # fmt: skip
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise RequestError(f"{file}: expected a text file, found {e}") from e


def _tell_change(repl: Repl, text: str) -> None:
    """A setting, and what it costs: text at the beginning of the prompt makes all that follows new."""
    chat = repl.chat
    if chat.messages:
        prompt = chat.prompt({"role": "user", "content": "a"})
        held = chat.session.known(prompt)
        text += f"; the next turn prefills {len(prompt) - (len(held.tokens) if held else 0):,} tokens"
    repl.screen.note(text)
