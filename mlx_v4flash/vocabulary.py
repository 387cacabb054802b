"""Tokens of DeepSeek-V4: which are marks, which are bytes of text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path

import deepseek_recipe

from .errors import EncodingError
from .markup import NEEDED, Mark, Piece


class Vocabulary:
    """The tokenizer of a checkpoint, with text and marks kept apart."""

    def __init__(self, tokenizer_json: str, where: str = "tokenizer.json") -> None:
        """
        Args:
            tokenizer_json: content of the file.
            where: names it in errors.

        Raises:
            EncodingError: not a byte-level tokenizer, or one without this model's marks.
        """
        self.where = where
        try:
            content = json.loads(tokenizer_json)
            added = {token["content"]: int(token["id"]) for token in content["added_tokens"]}
            base = {int(i): text for text, i in content["model"]["vocab"].items()}
            # The added tokens are recognised in any text, so text is encoded by a tokenizer that has none.
            plain = json.dumps({**content, "added_tokens": []}, ensure_ascii=False)
            self._plain = deepseek_recipe.Tokenizer.from_str(plain)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as e:
            raise EncodingError(f"{where}: expected a tokenizer.json with a byte-level vocabulary, found {e!r}") from e
        self._ids = {Mark(text): i for text, i in added.items()}
        missing = [mark for mark in NEEDED if mark not in self._ids]
        if missing:
            raise EncodingError(
                f"{where}: expected the tokens of DeepSeek-V4, found none for {', '.join(missing)}\n"
                "hint: take tokenizer.json from the original checkpoint"
            )
        self._texts: dict[int, str] = {**base, **{i: mark for mark, i in self._ids.items()}}

    @classmethod
    def from_folder(cls, folder: Path) -> Vocabulary:
        """Read tokenizer.json of a checkpoint.

        Raises:
            EncodingError: there is none, or see `__init__`.
        """
        file = Path(folder) / "tokenizer.json"
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise EncodingError(
                f"{file}: expected a readable file, found {e!r}\nhint: copy it from the original checkpoint"
            ) from e
        return cls(text, str(file))

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        """Ids of marks and of the text between them; neighbouring texts are encoded as one."""
        ids: list[int] = []
        for is_text, group in groupby(pieces, lambda piece: type(piece) is str):
            if is_text:
                ids += self._plain.encode(well_formed("".join(map(str, group))))
                continue
            for piece in group:
                ids += [self.id_of(piece)] if isinstance(piece, Mark) else map(int, piece)
        return ids

    def id_of(self, mark: Mark) -> int:
        """The token of a mark.

        Raises:
            EncodingError: the tokenizer has none.
        """
        if mark not in self._ids:
            raise EncodingError(f"{self.where}: expected a token {mark}, which these messages need, found none")
        return self._ids[mark]

    def read(self, token: int) -> Mark | bytes:
        """What a token stands for.

        Raises:
            EncodingError: there is no such token.
        """
        text = self._texts.get(token)
        if text is None:
            raise EncodingError(f"token: expected an id that {self.where} has, found {token}")
        return text if isinstance(text, Mark) else b"".join(map(_bytes_of, text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens, marks written out. Bytes that are no UTF-8 become U+FFFD."""
        parts = (self.read(i) for i in ids)
        return b"".join(p.encode() if isinstance(p, Mark) else p for p in parts).decode(errors="replace")


def well_formed(text: str) -> str:
    """Text that can be encoded: halves of surrogate pairs are joined, or replaced when they are alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


@cache
def _bytes_of(character: str) -> bytes:
    """The byte that a character of a byte-level vocabulary stands for; any other character stands for itself."""
    byte = _BYTES.get(character)
    return character.encode() if byte is None else bytes([byte])


def _byte_alphabet() -> dict[str, int]:
    """Printable characters of Latin-1 stand for their byte, the other bytes follow from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(rest)}


_BYTES = _byte_alphabet()
