"""Batches: conversations and texts as tokens, packed one after another; the same for a seed and a step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mlx_v4flash.encoding import Encoding
from mlx_v4flash.markup import ASSISTANT, BOS, EOS

from .chats import Chat, Chats
from .texts import SOURCES, common_senses, documents

Array = np.ndarray[Any, np.dtype[Any]]

# Share of each source among the tokens of texts.
TEXTS = {
    "bible": 3, "fortunes": 3, "gcide": 3, "foldoc": 2, "wordnet": 3, "python_docs": 2, "docstrings": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Mix:
    """What a batch is made of.

    Args:
        length: tokens of a sequence.
        text: share of texts among the sequences.
        kinds: shares of the kinds of conversations, in tokens.
    """

    length: int
    text: float
    kinds: dict[str, float]


class Corpus:
    """Tokens of all texts, and what renders conversations."""

    def __init__(self, encoding: Encoding, texts: dict[str, Array], chats: Chats) -> None:
        self.encoding, self.texts, self.chats = encoding, texts, chats
        self.eos, self.assistant = map(encoding.vocabulary.id_of, (EOS, ASSISTANT))

    @classmethod
    def from_folder(cls, folder: Path) -> Corpus:
        """Read what `prepare` wrote."""
        texts = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in SOURCES}
        meanings = [sense[:3] for sense in common_senses()]
        fillers = [text for name in ("bible", "fortunes", "foldoc") for text in documents(name)[::7]]
        return cls(Encoding.from_folder(folder), texts, Chats(meanings, fillers))

    def encode(self, chat: Chat) -> tuple[list[int], list[float]]:
        """Tokens of a conversation and what each weighs in the loss: those the model says weigh 1."""
        think = "high" if chat.thinks else "off"
        # The prompt for the answer after the last one; its two last tokens open that answer.
        ids = self.encoding.prompt(chat.messages, tools=chat.tools, think=think)[:-2]
        weights, speaks, opens = [], False, False
        for token in ids:
            weights.append(1.0 if speaks and not opens else 0.0 if token == self.assistant else chat.listens)
            opens = token == self.assistant  # the next one says whether the turn thinks; the prompt gives it
            speaks = (speaks and token != self.eos) or opens
        return ids, weights

    def batch(self, mix: Mix, rows: int, seed: tuple[int, ...]) -> tuple[Array, Array]:
        """Tokens [rows, length + 1] and the weight of each as a target."""
        r = Random(str(seed))
        tokens = np.zeros((rows, mix.length + 1), np.int64)
        weights = np.zeros((rows, mix.length + 1), np.float32)
        # Texts and conversations alternate evenly, whatever the number of rows.
        start = r.random()
        for n in range(rows):
            is_text = int(start + (n + 1) * mix.text) > int(start + n * mix.text)
            ids, w = self._text_row(r, mix.length + 1) if is_text else self._chat_row(r, mix)
            tokens[n], weights[n] = ids[: mix.length + 1], w[: mix.length + 1]
        return tokens, weights

    def _text_row(self, r: Random, length: int) -> tuple[Array, Array]:
        names = list(self.texts)
        source = self.texts[r.choices(names, [TEXTS[name] for name in names])[0]]
        start = r.randrange(len(source) - length)
        return np.asarray(source[start : start + length], np.int64), np.ones(length, np.float32)

    def _chat_row(self, r: Random, mix: Mix) -> tuple[list[int], list[float]]:
        ids, weights = list[int](), list[float]()
        kinds = list(mix.kinds)
        # Shares are of tokens and conversations differ in length, so a row has one kind.
        kind = r.choices(kinds, [mix.kinds[k] for k in kinds])[0]
        while len(ids) <= mix.length:
            chat = self.chats.make(kind, r, min(mix.length - 20, max(100, mix.length - len(ids))))
            new, w = self.encode(chat)
            ids += new
            weights += w
        return ids, weights


def sample_texts(count: int = 3000) -> list[str]:
    """Texts and rendered conversations for the tokenizer, in about the shares of training."""
    r = Random(0)
    out = []
    for name in SOURCES:
        found = documents(name)
        for _ in range(count // len(SOURCES)):
            text = r.choice(found)
            start = r.randrange(max(1, len(text) - 1500))
            out.append(text[start : start + 1500])
    chats = Chats([sense[:3] for sense in common_senses()], out[:100])
    for _ in range(count * 2):
        chat = chats.make(r.choice(["chat", "sums", "glossary", "pairs", "name"]), r, 300)
        out += [f"{m.get('reasoning_content', '')}\n{m['content']}" for m in chat.messages]
    return out


def prepare(folder: Path, tokenizer: Tokenizer) -> None:
    """Write the tokens of every source, documents between BOS and EOS, as NAME.npy; held-out ones apart."""
    bos, eos = (tokenizer.token_to_id(mark) for mark in (BOS, EOS))
    for name in SOURCES:
        for suffix, held_out in (("", False), (".held_out", True)):
            encoded = tokenizer.encode_batch(documents(name, held_out))
            ids = [np.array([bos, *e.ids, eos], np.uint16) for e in encoded]
            np.save(folder / f"{name}{suffix}.npy", np.concatenate(ids))
