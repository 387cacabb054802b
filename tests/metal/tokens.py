"""MSL text as a list of tokens, and back. Line markers of the preprocessor are kept between the tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# `>>` is left as two tokens, since it may close two lists of template arguments.
_TOKEN = re.compile(
    r"""
    (?P<space>(?:\s+|^\#[^\n]*)*+)
    (?P<text>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|\.?\d(?:[eEpP][+-]|[\w.])*|[A-Za-z_]\w*
      |::|->|<<=?|&&|\|\||[-+*/%&|^=<>!]=|\+\+|--|[^\s]|\Z)
    """,
    re.S | re.M | re.X,
)
_MARKER = re.compile(r'^\#\s*(?:line\s+)?(\d+)(?:\s+"([^"]*)")?', re.M)
_PAIRS = {"(": ")", "[": "]", "{": "}"}


class KernelTextError(Exception):
    """The text of a kernel breaks a rule of MSL; `line` is a line of the text, 0 if unknown."""

    def __init__(self, reason: str, line: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.line = reason, line


@dataclass(slots=True, eq=False)
class Token:
    space: str  # what stands before it
    text: str
    line: int
    kernel: object = None  # the kernel function in whose body it is

    @property
    def is_name(self) -> bool:
        return self.text[:1].isalpha() or self.text[:1] == "_"


def tokenize(text: str) -> list[Token]:
    """The last token is empty, so that every token has a next one."""
    return list(_tokens(text))


def _tokens(text: str) -> Iterator[Token]:
    line = 1
    for match in _TOKEN.finditer(text):
        space = match["space"]
        if space:
            if markers := list(_MARKER.finditer(space)):
                line = int(markers[-1][1]) + space.count("\n", markers[-1].end()) - 1
            else:
                line += space.count("\n")
        yield Token(space, match["text"], line)
        line += match["text"].count("\n")
        if not match["text"]:
            return


def join(tokens: list[Token]) -> str:
    return "".join(part for token in tokens for part in (token.space, token.text))


def remove(tokens: list[Token], start: int, stop: int) -> None:
    """Delete tokens, but keep the line breaks and markers between them."""
    tokens[stop].space = "".join(t.space for t in tokens[start : stop + 1])
    del tokens[start:stop]


def closing(tokens: list[Token], start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    expected = []
    for i in range(start, len(tokens)):
        text = tokens[i].text
        if text in _PAIRS:
            expected.append(_PAIRS[text])
        elif expected and text == expected[-1]:
            expected.pop()
            if not expected:
                return i
        elif text in (")", "]", "}"):
            break
    raise KernelTextError(f"unbalanced {tokens[start].text}", tokens[start].line)


def closing_angle(tokens: list[Token], start: int) -> int | None:
    """Index of the `>` that closes the `<` at `start`; None if it is a comparison."""
    depth, i = 0, start
    while i < len(tokens):
        text = tokens[i].text
        if text in _PAIRS:
            i = closing(tokens, i)
        elif text in (")", "]", "}", ";", ""):
            return None
        elif text == "<":
            depth += 1
        elif text == ">":
            depth -= 1
            if depth == 0:
                return i
        i += 1
    return None


def split(tokens: list[Token]) -> list[list[Token]]:
    """Cut at the commas that are in no bracket."""
    parts: list[list[Token]] = [[]]
    depth = angles = 0
    for token in tokens:
        depth += (token.text in _PAIRS) - (token.text in _PAIRS.values())
        angles = max(0, angles + (token.text == "<") - (token.text == ">"))
        if token.text == "," and depth == 0 and angles == 0:
            parts.append([])
        else:
            parts[-1].append(token)
    return [part for part in parts if part]
