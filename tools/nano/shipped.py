"""What the exported checkpoint does when this package runs it: fewer bits, codes found again, samples."""

from __future__ import annotations

import operator
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from mlx_v4flash import Chat, convert
from mlx_v4flash.calibrate import Calibrated, read_text
from mlx_v4flash.encoding import Think
from mlx_v4flash.events import Text
from mlx_v4flash.quality import Progress, compare
from mlx_v4flash.recipe import read_recipe
from mlx_v4flash.rounding import Rounding

from .chats import CALCULATOR
from .data import Corpus
from .evaluate import recall_chat, text_of

# Of the text that weights are rounded for: a minute for each recipe.
CALIBRATION_TOKENS = 8192
# As `mlx-v4flash quality` has them by default.
NUMERICS: dict[str, Any] = {
    "cache_quant": True, "activation_quant": False, "dtype": "bfloat16", "experts": "resident", "memory": None,
}  # fmt: skip


def some_text(corpus: Corpus, sources: dict[str, np.ndarray], tokens: int) -> str:
    """The first tokens of each source, equally many, as text."""
    share = -(-tokens // len(sources))
    parts = [text_of(corpus, ids[:share].astype(np.int64)) for ids in sources.values()]
    return b"\n".join(parts).decode(errors="ignore")


def divergences(
    checkpoint: Path, recipes: Sequence[str], text: Path, tokens: int, context: int, calibration: Path | None = None
) -> Iterator[dict[str, Any]]:
    """For each recipe a row: sizes, and how far it is from the checkpoint, in nats a token, also by depth of context.

    Args:
        text: what both predict, in stretches of `context` tokens.
        calibration: another text, for the inputs that weights are rounded for; None rounds each for itself.
    """
    with tempfile.TemporaryDirectory() as scratch:
        reference = Path(scratch) / "reference"
        # The first comparison leaves what the checkpoint predicts to the others.
        how: dict[str, Any] = {"tokens": tokens, "context": context, "save_reference": reference}
        for recipe in recipes:
            target = Path(scratch) / recipe
            calibrated = _convert(checkpoint, target, recipe, calibration)
            against = reference if reference.exists() else checkpoint
            report = compare(str(target), str(against), text, progresses=_silent, **how, **NUMERICS)
            how = {}
            yield {
                "recipe": recipe, "calibrated": calibrated, "model_bytes": report.model_bytes,
                "tokens": report.tokens, "kld": report.all.kld, "kld_error": report.all.kld_error,
                "same_top": report.all.same_top, "perplexity": report.all.perplexity,
                "reference_perplexity": report.all.reference_perplexity,
                "kld_by_depth": {f"{d.first}-{d.last}": d.kld for d in report.depths},
            }  # fmt: skip


def _convert(checkpoint: Path, target: Path, recipe: str, calibration: Path | None) -> bool:
    source, wanted = convert.open_source(str(checkpoint), target, False, None, False, False), read_recipe(recipe)
    rounding = Rounding(source.checkpoint.config, wanted)
    if calibrated := calibration is not None and bool(rounding.formats):
        rounding = Calibrated(source, target, wanted, read_text(source, calibration, CALIBRATION_TOKENS))
    convert.convert(source, target, lambda done, total: None, rounding)
    return calibrated


def _silent(what: str) -> AbstractContextManager[Progress]:
    return nullcontext(lambda done, total: None)


def recall(chat: Chat, corpus: Corpus, distance: int, count: int, seed: int) -> float:
    """Share of questions answered with the right one of eight codes, so many tokens after their list."""
    r, right = Random(seed), 0
    for _ in range(count):
        *before, question, answer = recall_chat(corpus, r, distance, 8).messages
        talk = Chat(chat.model, chat.encoding, messages=before, think="off", max_tokens=12)
        said = "".join(event.text for event in talk.send(question["content"]) if isinstance(event, Text))
        right += said == answer["content"]
    return right / count


CODES = "Remember:\nriver: 482\nhouse: 917\nbread: 305\nhorse: 64"
SAMPLES: tuple[tuple[str, Think, tuple[str, ...]], ...] = (
    ("small talk", "off", ("Hi, who are you?", "How big are you?", "Tell me a joke.")),
    ("a sum with its steps", "high", ("What is 47 + 85?",)),
    ("a name", "off", ("My name is Lucy.", "What is the capital of France?", "What is my name?")),
    ("codes", "off", (CODES, "How are you today?", "bread?")),
    ("the calculator", "off", ("What is 512 * 33?", "Thank you.")),
)


def sample_chats(chat: Chat) -> list[dict[str, Any]]:
    """The SAMPLES, with likeliest tokens: messages as OpenAI's interface has them."""
    found = []
    for title, think, questions in SAMPLES:
        tools = [CALCULATOR] if title == "the calculator" else []
        talk = Chat(chat.model, chat.encoding, think=think, max_tokens=200, tools=tools)
        for question in questions:
            list(talk.send(question))
            for call in talk.open_calls():
                talk.tool_result(call.id, computed(call.arguments))
                list(talk.answer())
        found.append({"title": title, "think": think, "messages": talk.messages})
    return found


def computed(arguments: str) -> str:
    """The result of a call of the calculator, which knows one operation between two whole numbers."""
    found = re.search(r"(\d+) *([-+*/]) *(\d+)", arguments)
    if found is None:
        return "error: expected a number, one of + - * /, and a number"
    operations = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
    return str(operations[found[2]](int(found[1]), int(found[3])))
