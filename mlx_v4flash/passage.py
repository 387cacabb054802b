"""A text as a model reads it: its tokens, and how they are cut."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .config import ModelConfig
from .errors import RequestError
from .loading import load_tokenizer

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Passage:
    """How a text of so many tokens is read.

    Args:
        context: after this many tokens the model begins anew, so that depths are met several times.
        chunk: tokens of one forward pass, and of one block of the file.
    """

    tokens: int
    context: int
    chunk: int

    @functools.cached_property
    def spans(self) -> list[tuple[int, int]]:
        """First token and end of each chunk; none lies in two contexts."""
        return [
            (start, min(start + self.chunk, first + self.context, self.tokens))
            for first in range(0, self.tokens, self.context)
            for start in range(first, min(first + self.context, self.tokens), self.chunk)
        ]


@dataclass(frozen=True)
class Text:
    """A text as one tokenizer sees it.

    Args:
        ids: tokens to be predicted.
        start: the token before the first, also where the model begins anew.
    """

    ids: list[int]
    start: int
    vocab_size: int

    @classmethod
    def read(cls, file: Path, folder: Path, tokens: int | None) -> Text:
        """The first so many tokens of a file, all if it has fewer.

        Raises:
            RequestError: a file that is no text, an empty one, or a tokenizer without a first token.
            CheckpointError: the folder has no tokenizer.
        """
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise RequestError(f"{file}: expected text in UTF-8, found {e}\nhint: pass another file") from e
        tokenizer = load_tokenizer(folder)
        ids = _encode(tokenizer, text)[:tokens]
        vocab_size = ModelConfig.from_folder(folder).vocab_size
        if not ids:
            raise RequestError(f"{file}: expected at least one token, found none\nhint: pass some text")
        if tokenizer.bos_token_id is None or max(ids) >= vocab_size:
            raise RequestError(
                f"{folder}: expected a tokenizer with a beginning-of-sequence token and ids below {vocab_size}, "
                f"found {tokenizer.bos_token_id} and {max(ids)}\nhint: copy the tokenizer of the original checkpoint"
            )
        return cls(ids, tokenizer.bos_token_id, vocab_size)

    @property
    def crc32(self) -> int:
        return zlib.crc32(np.array(self.ids, "<u4").tobytes())

    def inputs(self, start: int, stop: int, context: int) -> mx.array:
        """What the model reads to predict tokens start to stop: [1, stop - start]."""
        return mx.array([[self.start if i % context == 0 else self.ids[i - 1] for i in range(start, stop)]])

    def targets(self, start: int, stop: int) -> Array:
        return np.array(self.ids[start:stop])

    def expect_same(self, head: dict[str, Any], file: Path, folder: Path) -> None:
        """Raise RequestError unless the reference was made from these very tokens."""
        if self.vocab_size != head["vocab_size"]:
            raise RequestError(
                f"{folder}: expected a vocabulary of {head['vocab_size']} as in the model it is compared with, found "
                f"{self.vocab_size}\nhint: only models with the same tokenizer can be compared"
            )
        if (len(self.ids), self.crc32) != (head["tokens"], head["ids_crc32"]):
            raise RequestError(
                f"{file}: expected the {head['tokens']} tokens of the reference, found {len(self.ids)} others with the "
                f"tokenizer of {folder}\nhint: the text or the tokenizer is another one; compare with the same text, "
                "and only models with the same tokenizer"
            )


def _encode(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids[1:] if ids[:1] == [tokenizer.bos_token_id] else ids
