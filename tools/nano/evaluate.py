"""What a trained model knows, as figures: answers token by token, compression of texts, use of experts."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from random import Random

import numpy as np
import torch
from torch import Tensor

from .attention import BLOCK
from .chats import CALCULATOR, Chat, arithmetic, expression_of
from .data import TEXTS, Corpus
from .layers import Training
from .model import Nano
from .rounding import fp4_codes_value, fp8_codes_value
from .smalltalk import small_talk

# As the exported checkpoint is computed, but for the order of sums.
EXPORTED = Training(sparse=True, rounding=True)


@torch.no_grad()
def states(model: Nano, ids: Sequence[Sequence[int]], how: Training = EXPORTED) -> Tensor:
    """Last states [B, T, D] of sequences, filled up to one length; later tokens change nothing before them."""
    T = -(-max(map(len, ids)) // BLOCK) * BLOCK
    padded = torch.zeros(len(ids), T, dtype=torch.int64)
    for n, row in enumerate(ids):
        padded[n, : len(row)] = torch.tensor(row)
    return model(padded, how)[0]


@torch.no_grad()
def answers_right(model: Nano, corpus: Corpus, chats: Sequence[Chat], how: Training = EXPORTED) -> list[list[bool]]:
    """Of each conversation, for each of its answers: would the likeliest tokens, one by one, be exactly it?"""
    out = []
    for chat in chats:
        ids, weights = corpus.encode(chat)
        h = states(model, [ids[:-1]], how)[0, : len(ids) - 1]
        spoken = torch.tensor([w == 1 for w in weights[1:]])
        hit = torch.zeros(len(ids) - 1, dtype=torch.bool)
        hit[spoken] = model.head(h[spoken], how).float().argmax(-1) == torch.tensor(ids[1:])[spoken]
        answers: list[bool] = []
        for n in range(len(spoken)):
            if spoken[n] and (n == 0 or not spoken[n - 1]):
                answers.append(True)
            if spoken[n]:
                answers[-1] &= bool(hit[n])
        out.append(answers)
    return out


@torch.no_grad()
def greedy(model: Nano, prompts: Sequence[list[int]], most: int, end: int, how: Training = EXPORTED) -> list[list[int]]:
    """Up to `most` likeliest tokens after each prompt, to the end token."""
    rows, open_ = [list(p) for p in prompts], set(range(len(prompts)))
    for _ in range(most):
        if not open_:
            break
        some = sorted(open_)
        h = states(model, [rows[n] for n in some], how)
        last = h[torch.arange(len(some)), torch.tensor([len(rows[n]) - 1 for n in some])]
        for n, token in zip(some, model.head(last, how).float().argmax(-1).tolist(), strict=True):
            rows[n].append(token)
            if token == end:
                open_.remove(n)
    return [row[len(p) :] for row, p in zip(rows, prompts, strict=True)]


def share(values: Iterable[bool]) -> float:
    found = list(values)
    return sum(found) / max(1, len(found))


def small_talk_right(model: Nano, corpus: Corpus) -> tuple[float, list[tuple[str, str]]]:
    """Share of the first question of each kind that gets one of its answers, and the others with what they got."""
    talk = small_talk()
    prompts = [corpus.encoding.prompt([{"role": "user", "content": q[0]}], think="off") for q, _, _ in talk]
    texts = [corpus.encoding.vocabulary.decode(ids[:-1]) for ids in greedy(model, prompts, 48, corpus.eos)]
    wrong = [(q[0], text) for (q, answers, _), text in zip(talk, texts, strict=True) if text not in answers]
    return 1 - len(wrong) / len(talk), wrong


def arithmetic_right(model: Nano, corpus: Corpus, count: int, seed: int) -> dict[str, float]:
    """By sign, with steps and without: share of sums whose answer, and all steps to it, are right."""
    out = {}
    for thinks in (True, False):
        r, found = Random(seed), dict[str, list[bool]]()
        for _ in range(count):
            question, answer, steps = arithmetic(r, thinks)
            chat = Chat(thinks=thinks)
            chat.say(question, answer, steps)
            right = answers_right(model, corpus, [chat])[0][0]
            found.setdefault(answer.split()[1], []).append(right)
        out |= {f"{sign} {'with' if thinks else 'without'} steps": share(found[sign]) for sign in sorted(found)}
    return out


def recall_chat(corpus: Corpus, r: Random, distance: int, pairs: int) -> Chat:
    """A list of codes, so many tokens of text, and one question."""
    chats, chat = corpus.chats, Chat()
    keys = r.sample(chats.nouns, pairs)
    values = [str(n) for n in r.sample(range(100, 1000), pairs)]
    chat.say("Remember:\n" + "\n".join(f"{k}: {v}" for k, v in zip(keys, values, strict=True)), "OK.")
    ask = r.randrange(pairs)
    base = len(corpus.encode(chat)[0]) // 2
    if distance - base > 20:
        # Texts are joined until there are enough tokens between the list's middle and the question.
        text = ""
        while len(corpus.encoding.vocabulary.encode([text])) < distance - base:
            text += r.choice(chats.texts) + "\n"
        ids = corpus.encoding.vocabulary.encode([text])[: distance - base - 12]
        chat.say(f"Read this:\n{corpus.encoding.vocabulary.decode(ids)}", "I have read it.")
    chat.say(f"{keys[ask]}?", values[ask])
    return chat


def recall_right(model: Nano, corpus: Corpus, distance: int, count: int, seed: int, pairs: int = 8) -> float:
    """Share of questions answered with the right code; guessing among the codes of the list gives 1 / pairs."""
    r = Random(seed)
    chats = [recall_chat(corpus, r, distance, pairs) for _ in range(count)]
    return share(answers[-1] for answers in answers_right(model, corpus, chats))


def tool_calls_right(model: Nano, corpus: Corpus, count: int, seed: int) -> dict[str, float]:
    """Share of calls, and of answers from the calculator's results, that are right to the last token."""
    r, calls, answers = Random(seed), [], []
    for _ in range(count):
        chat = Chat(tools=[CALCULATOR])
        chat.compute(*expression_of(r))
        call, answer = answers_right(model, corpus, [chat])[0]
        calls.append(call)
        answers.append(answer)
    return {"call": share(calls), "answer": share(answers)}


@torch.no_grad()
def bits_per_byte(model: Nano, corpus: Corpus, held_out: dict[str, np.ndarray], tokens: int) -> dict[str, float]:
    """Of each source's held-out texts, read in pieces of 512 tokens."""
    out = {}
    for name in TEXTS:
        ids = held_out[name][:tokens].astype(np.int64)
        bits, size = 0.0, 0
        for start in range(0, len(ids) - 512, 512):
            piece = torch.from_numpy(ids[start : start + 513])
            logits = model.head(states(model, [piece[:-1].tolist()])[0], EXPORTED).float()
            bits += torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum").item() / math.log(2)
            size += len(text_of(corpus, piece[1:].numpy()))
        out[name] = bits / max(1, size)
    return out


def text_of(corpus: Corpus, ids: np.ndarray) -> bytes:
    """Text of tokens; a mark, which parts documents, counts as one byte."""
    found = [corpus.encoding.vocabulary.read(i) for i in ids.tolist()]
    return b"".join(part if isinstance(part, bytes) else b"\n" for part in found)


@torch.no_grad()
def expert_use(model: Nano, tokens: Tensor) -> Tensor:
    """Share of the choices that fell on each expert, [layers, E], highest first in each layer."""
    counts = model(tokens, EXPORTED)[2].float()
    return (counts / counts.sum(1, keepdim=True)).sort(1, descending=True).values


@torch.no_grad()
def rounding_cost(model: Nano, tokens: Tensor) -> dict[str, float]:
    """Mean divergence, in nats a token, of what is predicted with rounding from what is predicted without."""
    exact = Training(dtype=torch.float32, sparse=True, rounding=False)

    def predicted(m: Nano, how: Training) -> Tensor:
        return m.logits(tokens, how).log_softmax(-1)

    before = predicted(model, exact)
    parts = {"experts to FP4": {"Experts"}, "layers to FP8": {"Weights"}, "both": {"Experts", "Weights"}}
    out = {}
    for name, kinds in parts.items():
        rounded = copy.deepcopy(model)
        as_stored(rounded, kinds)
        out[name] = _divergence(before, predicted(rounded, exact))
    with_caches = Training(dtype=torch.float32, sparse=True, rounding=True)
    out["both, and cached rows"] = _divergence(before, predicted(model, with_caches))
    out["the same, in bfloat16"] = _divergence(before, predicted(model, EXPORTED))
    return out


def _divergence(before: Tensor, after: Tensor) -> float:
    return (before.exp() * (before - after)).sum(-1).mean().item()


@torch.no_grad()
def as_stored(model: Nano, kinds: set[str]) -> None:
    """Round the parameters of modules of these classes as their types in the file do."""
    for module in model.modules():
        kind = type(module).__name__
        for name, p in module.named_parameters(recurse=False):
            if kind not in kinds:
                continue
            if kind == "Experts":
                p.copy_(fp4_codes_value(p))
            elif kind == "Weights" and module.coded:
                p.copy_(fp8_codes_value(p))
            elif name == "weight":
                p.copy_(p.bfloat16().float())
