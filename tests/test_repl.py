"""Conversations as they look on a screen."""

from __future__ import annotations

import io
import itertools
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from known import TALK, answers_to
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console
from rich.markdown import Markdown
from scripted import Script, thought

from mlx_v4flash import Chat, load, nano_folder
from mlx_v4flash.encoding import Encoding
from mlx_v4flash.errors import RequestError
from mlx_v4flash.model import Model
from mlx_v4flash.repl.commands import COMMANDS
from mlx_v4flash.repl.lines import PipedLines, TypedLines, history_file
from mlx_v4flash.repl.loop import Repl
from mlx_v4flash.repl.markdown import StreamedMarkdown, block_end
from mlx_v4flash.repl.screen import Screen
from mlx_v4flash.terminal import clean
from mlx_v4flash.tiny import write_tiny

# The beginning of a prompt that asks the first release to think as hard as it can has this many bytes.
ABSOLUTE = " " * 476


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "m", layers=(1, 2))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Model, Encoding]:
    return load(folder)[0], Encoding.from_folder(folder)


class Terminal:
    """Of a terminal, what a line printer with a cursor needs. Anything else it is sent is an error."""

    def __init__(self, width: int, height: int) -> None:
        self.lines, self.row, self.column = [""], 0, 0
        self.width, self.height = width, height

    def write(self, text: str) -> int:
        for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[^\x1b]|\x1b", text):
            self._move(part) if part.startswith("\x1b") else self._put(part)
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return True

    def _move(self, code: str) -> None:
        if code.endswith("A"):
            up = int(code[2:-1])
            top = max(0, len(self.lines) - self.height)
            assert self.row - up >= top, f"up {up} from row {self.row}: above the screen, which begins at {top}"
            self.row -= up
        elif code == "\x1b[K":
            self.lines[self.row] = self.lines[self.row][: self.column]
        elif code == "\x1b[J":
            self.lines = [*self.lines[: self.row], self.lines[self.row][: self.column]]
        else:
            assert code[-1] == "m" or code in ("\x1b[?2026h", "\x1b[?2026l"), f"unexpected {code!r}"

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self.row, self.column = self.row + 1, 0
            self.lines += [""] * (self.row == len(self.lines))
        else:
            assert character.isprintable(), f"unexpected {character!r}"
            if self.column == self.width:
                self._put("\n")
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1

    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines).rstrip()


def talk(loaded: tuple[Model, Encoding], lines: str, *answers: list[str], **options: Any) -> str:
    """What a pipe gets of a conversation."""
    out = io.StringIO()
    chat = Chat(*loaded, sampling=Script(encoding=loaded[1], answers=list(answers)), **options)
    Repl(chat, PipedLines(io.StringIO(lines)), Screen(Console(file=out, width=80), hides_thinking=True)).run()
    return out.getvalue()


def screen_of(
    loaded: tuple[Model, Encoding], lines: str, *answers: list[str], hides: bool = False, width: int = 60
) -> str:
    """What a terminal shows of it. Speeds are replaced."""
    terminal = Terminal(width, 24)
    console = Console(file=terminal, width=width, height=24, force_terminal=True, highlight=False)  # type: ignore[arg-type]
    chat = Chat(*loaded, sampling=Script(encoding=loaded[1], answers=list(answers)))
    Repl(chat, PipedLines(io.StringIO(lines)), Screen(console, hides_thinking=hides)).run()
    return re.sub(r"\d+\.\d s|[\d.]+/s", "#", terminal.text())


def test_piped_conversation(loaded: tuple[Model, Encoding]) -> None:
    lines = 'Hello\n\n"""\ntwo\nlines\n"""\n/undo\n/think hard\n /not a command\n/quit\nunread\n'
    answers = (thought("hm", "Hi **you**\n"), thought("", "both"), thought("", "right"))
    assert talk(loaded, lines, *answers) == (
        "Hi **you**\n"
        "both\n"
        "taken back; 2 messages are left\n"
        "error: /think: expected off, low, high, max, show or hide, found 'hard'\n"
        "right\n"
    )


def test_terminal_shows_thinking_then_markdown(loaded: tuple[Model, Encoding]) -> None:
    markdown = "*Title*\n\nSome **bold** words.\n\n- a\n- b\n"
    answers = (thought("Let me see.", markdown), thought("Again.", "Done"))
    # Beside the text: <think> and the end; then the same of the second turn, which shares its first four tokens.
    wrote, prompt = len("Let me see.") + len(markdown) + 2, 5 + len(markdown) + 1 + 4
    assert screen_of(loaded, "x\n/think hide\ny\n/think show\n", *answers) == (
        "Let me see.\n"
        "\n"
        "Title\n"
        "\n"
        "Some bold words.\n"
        "\n"
        " • a\n"
        " • b\n"
        f"(read 5 of 5 tokens in # · wrote {wrote} at #)\n"
        "(thought in 6 characters, /think show)\n"
        "Done\n"
        f"(read {prompt - 4} of {prompt} tokens in # · wrote 12 at #)\n"
        "Again."
    )


def test_commands(loaded: tuple[Model, Encoding], tmp_path: Path) -> None:
    file = tmp_path / "note.txt"
    file.write_text("abc\x1b]0;title\x07" * 10)
    lines = (
        f"/read {file}\nwhat?\n/retry\n/save {tmp_path / 'talk'}\n/undo\n/load {tmp_path / 'talk'}\n/think max\n"
        f"/system Be brief.\n/system -\n/read {tmp_path / 'none'}\n/save\n/ctx\n"
    )
    said = talk(loaded, lines, ["one"], ["two"], think="off", warn=lambda text: None)
    size = (tmp_path / "talk.safetensors").stat().st_size
    text = len(f"[file name]: note.txt\n[file content begin]\n{file.read_text()}\n[file content end]")
    read = text + 2  # and the marks before it
    turn = len("\n\nwhat?") + 2 + len("two") + 1  # what follows it, with marks
    again = len(ABSOLUTE) + read + turn + 4  # and `a` between marks, instead of the next message
    assert (
        re.sub(r"[\d.]+ MB", "# MB", said).splitlines()
        == (
            "note.txt: 130 tokens\n"
            f"read {read + 2} tokens; what about it?\n"
            "one\n"
            "two\n"
            f"saved: {tmp_path / 'talk.safetensors'}, {size:,} bytes\n"
            "taken back; 1 messages are left\n"
            f"3 messages; {read + turn} tokens need not be read again\n"
            f"think: max; the next turn prefills {again} tokens\n"
            f"system: Be brief.; the next turn prefills {again + len('Be brief.')} tokens\n"
            f"system: none; the next turn prefills {again} tokens\n"
            f"error: {tmp_path / 'none'}: expected a text file, found [Errno 2] No such file or directory: "
            f"'{tmp_path / 'none'}'\n"
            "error: /save: expected the name of a file, found none\n"
            f"{again - 1} of 65,536 tokens ({(again - 1) / 65536:.1%}), 3 messages, # MB of caches and their copies\n"
        ).splitlines()
    )


@pytest.mark.parametrize("command", ["/read", "/save", "/load"])
@pytest.mark.parametrize("name", [".", "/", "~nobody-of-this-name/x", "a" * 5000])
def test_names_that_no_file_has(loaded: tuple[Model, Encoding], command: str, name: str) -> None:
    said = talk(loaded, f"{command} {name}\nx\n", ["still there"], think="off")
    assert said.startswith("error: ") and said.endswith("\nstill there\n")


def test_files_that_cannot_be_read(loaded: tuple[Model, Encoding], tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\x7fELF\xff\xfe")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(2**40)
    os.mkfifo(tmp_path / "pipe")
    for name, reason in {
        "binary": "can't decode byte 0xff",
        "huge": "1,099,511,627,776 bytes",
        "pipe": "no regular file",
        ".": "no regular file",
    }.items():
        said = talk(loaded, f"/read {tmp_path / name}\n/ctx\n")
        assert said.startswith(f"error: {tmp_path / name}: expected a text file") and reason in said
        assert "0 messages" in said


def test_a_file_beyond_the_context(loaded: tuple[Model, Encoding], tmp_path: Path) -> None:
    (tmp_path / "long").write_text("x" * 300)
    said = talk(loaded, f"/read {tmp_path / 'long'}\n", context=300)
    assert said == f"error: {tmp_path / 'long'}: expected fewer than 300 tokens, the context of this chat, found 300\n"


def test_a_chat_of_another_model_is_read_again(loaded: tuple[Model, Encoding], tmp_path: Path) -> None:
    chat = Chat(load(write_tiny(tmp_path / "m", seed=1, layers=(1, 2)))[0], loaded[1])
    chat.messages = [{"role": "user", "content": "x"}]
    said = talk(loaded, f"/load {chat.save(tmp_path / 'talk')}\n")
    assert said == "1 messages; the next turn reads all of them again\n"


def test_byte_order_mark_is_not_text(loaded: tuple[Model, Encoding], tmp_path: Path) -> None:
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert talk(loaded, f"/read {tmp_path / 'windows.txt'}\n").startswith("windows.txt: 3 tokens\n")


def test_text_for_a_pipe_is_as_the_model_wrote_it(loaded: tuple[Model, Encoding]) -> None:
    makefile = "all:\n\tcc  -o x\t\tx.c  \n" + "long " * 50 + "\n\n:smile: [bold]\r\n\x1b[0m\n"
    assert talk(loaded, "x\n", [makefile], think="off") == makefile


def test_the_end_of_the_input_ends_a_message_of_several_lines(loaded: tuple[Model, Encoding]) -> None:
    lines = PipedLines(io.StringIO('"""\ntwo\nlines\n'))
    assert lines.read("", str) == "two\nlines"
    with pytest.raises(EOFError):
        lines.read("", str)


def test_input_that_is_no_text() -> None:
    with pytest.raises(RequestError, match=r"standard input: expected UTF-8, found .*0xff"):
        PipedLines(io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8")).read("", str)


def test_a_command_may_go_on_in_its_next_line(loaded: tuple[Model, Encoding]) -> None:
    assert talk(loaded, '"""\n/system\nBe\nbrief.\n"""\n') == "system: Be\nbrief.\n"


def test_stats_count_what_was_prefilled(loaded: tuple[Model, Encoding]) -> None:
    said = talk(loaded, "one\ntwo\n/stats\n", ["a"], ["b"], think="off")
    rows = [line.split() for line in said.splitlines()[-3:]]
    assert rows[0][:4] == ["turn", "prompt", "cached", "prefilled"]
    # <User> t w o <Assistant> </think> are new, and the end of the first answer lies in the caches.
    assert rows[1][:4] == ["1", "7", "0", "7"] and rows[2][:4] == ["2", "15", "9", "6"]


def test_help_names_every_command(loaded: tuple[Model, Encoding]) -> None:
    said = talk(loaded, "/help\n/bogus\n")
    assert "/bogus: expected one of /think, /system" in said and "hint: a message that begins with a slash" in said
    assert all(f"/{name} " in said for name in COMMANDS) and "Ctrl-C" in said


def test_escapes_do_not_reach_the_terminal(loaded: tuple[Model, Encoding]) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b2J\x7f"
    # The terminal above refuses what it does not know.
    assert "␛]0;owned␇␛[2J�2J␡" in screen_of(loaded, "x\n", thought(evil, f"a{evil}\n\n```\n{evil}\n```\n"))
    assert screen_of(loaded, f"/{evil}\n").startswith("error: /␛]0;owned␇")
    assert clean("a\tb\nc\u202ed") == "a\tb\nc�d"


TEXTS = {
    "blocks": "first *one*\nsame paragraph\n\n1. a\n2. b\n\n   inside\n\n3. c\n\nend `code`",
    "code": "x\n\n~~~\n\nblank\n\n```\nstill\n~~~\n\nafter\n",
    "table": "| a | b |\n| - | - |\n| 1 | 22 |\n| 333333 | 4 |\n\nafter\n",
    "tall": "start\n\n```\n" + "".join(f"line {n}\n" for n in range(30)) + "```\n\nend\n",
    "long": "word " * 80 + "\n\n" + "more " * 10,
    "nothing": "\n\n",
}

# What Markdown would not show.
SHOWN = {
    "a vector<int> b<br>c": "a vector<int> b<br>c",
    "<details>\nhidden\n</details>\n\n<!-- note -->": "<details> hidden </details>\n\n<!-- note -->",
    "[1]: http://a.b": "[1]: http://a.b",
    "![plot](a.png) here": "!plot (a.png) here",
    "| a |\n| - |\n| <b>x</b> |": " a\n ────────\n <b>x</b>",
}


@pytest.mark.parametrize("step", [1, 3, 50])
@pytest.mark.parametrize("name", TEXTS)
def test_streamed_markdown_ends_as_if_drawn_at_once(name: str, step: int) -> None:
    def drawn(pieces: list[str]) -> str:
        terminal = Terminal(40, 12)
        console = Console(file=terminal, width=40, height=12, force_terminal=True)  # type: ignore[arg-type]
        shown = StreamedMarkdown(console, clock=always())
        for piece in pieces:
            shown.feed(piece)
        shown.finish()
        return terminal.text()

    text = TEXTS[name]
    with (whole := Console(width=40, force_terminal=True)).capture() as capture:
        whole.print(Markdown(text, code_theme="ansi_dark", hyperlinks=False))
    plain = re.sub(r"\x1b\[[\d;]*m", "", capture.get())
    found = drawn([text[n : n + step] for n in range(0, len(text), step)])
    assert words(found) == words(plain)


@pytest.mark.parametrize("text", SHOWN)
def test_markdown_loses_no_text(text: str) -> None:
    terminal = Terminal(40, 12)
    shown = StreamedMarkdown(Console(file=terminal, width=40, height=12, force_terminal=True))  # type: ignore[arg-type]
    shown.feed(text)
    shown.finish()
    assert terminal.text() == SHOWN[text]


def test_tables_lose_no_text_in_a_narrow_window() -> None:
    terminal = Terminal(24, 40)
    shown = StreamedMarkdown(Console(file=terminal, width=24, height=40, force_terminal=True))  # type: ignore[arg-type]
    shown.feed("| Name | Description | Price |\n| - | - | - |\n| Supercalifragilistic | expialidocious | 123456789 |\n")
    shown.finish()
    columns = ["".join(line[start : start + 8].strip() for line in terminal.lines) for start in (0, 8, 16)]
    assert "…" not in terminal.text()
    for text in ("Name", "Description", "Price", "Supercalifragilistic", "expialidocious", "123456789"):
        assert any(text in column for column in columns), (text, terminal.text())


def test_stats_lose_no_figures_in_a_narrow_window(loaded: tuple[Model, Encoding]) -> None:
    said = screen_of(loaded, "x\n/stats\n", thought("", "y"), width=24).replace("\n", "")
    assert "prefilled" in said and "generated" in said and "…" not in said


def test_a_terminal_that_cannot_move_its_cursor(loaded: tuple[Model, Encoding]) -> None:
    out = io.StringIO()
    console = Console(file=out, width=40, force_terminal=True, _environ={"TERM": "dumb"})
    chat = Chat(*loaded, sampling=Script(encoding=loaded[1], answers=[thought("a b", "- c\x1b\n\n**d**")]))
    Repl(chat, PipedLines(io.StringIO("x\n")), Screen(console, hides_thinking=True)).run()
    assert "\x1b" not in out.getvalue() and "- c␛\n\n**d**\n" in out.getvalue()


def test_ctrl_c_ends_the_reading_of_a_pipe(loaded: tuple[Model, Encoding]) -> None:
    class Interrupted(io.StringIO):
        def readline(self, size: int = -1, /) -> str:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Repl(Chat(*loaded), PipedLines(Interrupted()), Screen(Console(file=io.StringIO()))).run()


def words(text: str) -> list[str]:
    """Lines that are not empty; how many empty ones lie between blocks is a matter of taste."""
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def always() -> Callable[[], float]:
    """A clock by which drawing takes no time, and a second passes before the next piece."""
    ticks = itertools.count()
    return lambda: next(ticks) // 2


def test_drawing_takes_a_small_part_of_the_time() -> None:
    out = io.StringIO()
    seconds = itertools.count(1)  # one between pieces, one for drawing
    console = Console(file=out, width=40, height=12, force_terminal=True)
    shown = StreamedMarkdown(console, clock=lambda: next(seconds))
    begins = []
    for n in range(95):
        before = out.tell()
        shown.feed("a ")
        begins += [n] if out.tell() > before else []
    assert begins[:3] == [0, 9, 18], begins  # 9 s of pause after 1 s of drawing
    shown.finish()
    assert out.getvalue().count("\x1b[?2026h") == len(begins) + 1


def test_only_changed_lines_are_drawn_again() -> None:
    out = io.StringIO()
    console = Console(file=out, width=40, height=12, force_terminal=True)
    shown = StreamedMarkdown(console, clock=always())
    shown.feed("first line that is long enough to be wrapped at forty")
    out.seek(0), out.truncate()
    shown.feed(" columns")
    assert "columns" in out.getvalue() and "first" not in out.getvalue()


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("a\n\nbcde", "a\n\n"),
        ("a\n\nb", ""),  # may become a list
        ("a\n\n- b", ""),
        ("a\n\n12. b", ""),
        ("```\na\n\nbcde", ""),
        ("```\na\n```\n\nbcde\n", "```\na\n```\n\n"),
        ("a\n\n    code", ""),
        ("a\nb\n", ""),
    ],
)
def test_block_end(text: str, finished: str) -> None:
    assert text[: block_end(text)] == finished


def typed(keys: str, count: int = 1, defaults: tuple[str, ...] = ("",)) -> list[str]:
    with create_pipe_input() as pipe:
        pipe.send_text(keys)
        lines = TypedLines(None, ["/help"], input=pipe, output=DummyOutput())
        return [lines.read(defaults[n % len(defaults)], lambda: "") for n in range(count)]


def test_typed_lines() -> None:
    assert typed("one\rtwo\r", 2) == ["one", "two"]
    assert typed("one\x1b\rtwo\\\rthree\r") == ["one\ntwo\nthree"]
    assert typed("one\x0atwo\x0a", 2) == ["one", "two"]
    pasted = "\n".join(f"line {n}" for n in range(2000))
    assert typed(f"\x1b[200~{pasted}\x1b[201~ end\r") == [pasted + " end"]
    assert typed(" changed\r", defaults=("draft",)) == ["draft changed"]
    with pytest.raises(EOFError):
        typed("\x04")
    with pytest.raises(KeyboardInterrupt):
        typed("half\x03")


def test_history_is_kept_for_the_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with create_pipe_input() as pipe:
        pipe.send_text("one\x1b\rtwo\r")
        TypedLines(history_file(), input=pipe, output=DummyOutput()).read("", lambda: "")
    file = tmp_path / "mlx-v4flash" / "history"
    assert list(FileHistory(str(file)).load_history_strings()) == ["one\ntwo"]
    assert file.stat().st_mode & 0o077 == 0
    monkeypatch.setenv("XDG_STATE_HOME", str(file))
    assert history_file() is None


def test_no_color(monkeypatch: pytest.MonkeyPatch, loaded: tuple[Model, Encoding]) -> None:
    def codes(**environment: str) -> str:
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, _environ={"TERM": "xterm-256color", **environment})
        Screen(console).error("wrong")
        return out.getvalue()

    assert codes() == "\x1b[31merror: wrong\x1b[0m\n" and codes(NO_COLOR="1") == "error: wrong\n"


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(folder: Path) -> None:
    command = [sys.executable, "-m", "mlx_v4flash", "chat", "--model", str(folder), "--think", "off"]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        bufsize=1, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write("Hello\n")
    child.stdin.flush()
    first = child.stdout.read(3)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate("/stats\n", timeout=60)
    assert child.returncode == 0 and "Traceback" not in err, err
    assert "(stopped)\n" in first + out and out.rstrip().endswith("interrupted")


def test_a_terminal(tmp_path: Path) -> None:
    """A person asks the small model something and reads the right answer."""
    prompt = Encoding.from_folder(nano_folder()).prompt([{"role": "user", "content": TALK[0]}], think="off")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
    child = subprocess.Popen(
        [sys.executable, "-m", "mlx_v4flash", "chat"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)

    seen = b""

    def until(text: str) -> str:
        nonlocal seen
        end = time.monotonic() + 60
        while text.encode() not in seen:
            assert time.monotonic() < end and select.select([ours], [], [], 60)[0], seen
            seen += os.read(ours, 4096)
        found, seen = seen.split(text.encode(), 1)
        return found.decode(errors="replace")

    listening = "\x1b[?12l\x1b[?25h"  # the cursor is shown again when the line is drawn
    until(listening)
    os.write(ours, f"{TALK[0]}\r".encode())
    shown = until("wrote ")
    assert any(answer in shown for answer in answers_to(TALK[0])), shown
    assert f"read {len(prompt)} of {len(prompt)} tokens" in shown
    until(listening)
    os.write(ours, b"/quit\r")
    while True:
        try:
            if not os.read(ours, 4096):
                break
        except OSError:  # what Linux says when the other side is closed
            break
    assert child.wait(60) == 0
    os.close(ours)
