"""Conversations made up to learn from: each kind is a function of a source of chance and of the room there is."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from random import Random
from typing import Any

from .smalltalk import NAMES, small_talk

Message = dict[str, Any]

CALCULATOR = {
    "name": "calculator",
    "description": "Compute an arithmetic expression.",
    "parameters": {
        "type": "object",
        "properties": {"expression": {"type": "string", "description": "For example 12 * (3 + 4)"}},
        "required": ["expression"],
    },
}


@dataclass
class Chat:
    """Messages, and how they are rendered; `listens` is what the user's own words weigh in the loss."""

    messages: list[Message] = field(default_factory=list)
    thinks: bool = False
    tools: list[dict[str, Any]] = field(default_factory=list)
    listens: float = 0.1

    def say(self, question: str, answer: str, thought: str | None = None) -> None:
        self.messages += [{"role": "user", "content": question}, self._reply(answer, thought)]

    def compute(self, question: str, expression: str, result: str) -> None:
        """The model calls the calculator and says what it returned."""
        function = {"name": "calculator", "arguments": json.dumps({"expression": expression})}
        calls = [{"id": "c", "type": "function", "function": function}]
        self.messages += [
            {"role": "user", "content": question},
            self._reply("", "I use the calculator.") | {"tool_calls": calls},
            {"role": "tool", "tool_call_id": "c", "content": result},
            self._reply(f"{expression} = {result}.", f"The result is {result}."),
        ]

    def _reply(self, text: str, thought: str | None) -> Message:
        message: Message = {"role": "assistant", "content": text}
        if self.thinks and thought is not None:
            message["reasoning_content"] = thought
        return message


class Chats:
    """Makes conversations.

    Args:
        meanings: word, kind and gloss, the most common first; the first `KNOWN` of them are asked for without help.
        texts: passages that stand between what is to be remembered and the question.
    """

    KNOWN = 1000

    def __init__(self, meanings: list[tuple[str, str, str]], texts: list[str]) -> None:
        fitting = [m for m in meanings if len(m[2]) <= 60]
        self.known, self.listed = fitting[: self.KNOWN], fitting
        self.nouns = [word for word, kind, _ in meanings if kind == "noun"][:1200]
        self.texts = texts
        self.talk = small_talk()
        self.kinds = {
            "chat": self.chat, "sums": self.sums, "tools": self.tools, "pairs": self.pairs, "glossary": self.glossary,
            "copy": self.copy, "needle": self.needle, "name": self.name,
        }  # fmt: skip

    def make(self, kind: str, r: Random, room: int) -> Chat:
        """A conversation of about `room` tokens at most."""
        return self.kinds[kind](r, room)

    # --- turns of ordinary talk ---

    def _small(self, r: Random) -> tuple[str, str, str]:
        questions, answers, thought = r.choice(self.talk)
        return r.choice(questions), r.choice(answers), thought

    def _meaning(self, r: Random) -> tuple[str, str, str]:
        # The more common a word, the more often it is asked for.
        word, kind, gloss = self.known[int(len(self.known) * r.random() ** 1.5)]
        article = "an" if word[0] in "aeiou" else "a"
        forms = [f'What does "{word}" mean?', f"Define {word}.", f"What is the meaning of {word}?"]
        if kind == "noun":
            forms += [f"What is {article} {word}?", f"What is {word}?"]
        return r.choice(forms), f"{word} ({kind}): {gloss}.", f"The word is {word}. It is {_a(kind)}."

    def _turn(self, r: Random, thinks: bool) -> tuple[str, str, str]:
        kind = r.choices(["small", "sum", "meaning", "repeat"], [5, 3, 3, 1])[0]
        if kind == "sum":
            return arithmetic(r, thinks)
        if kind == "repeat":
            words = " ".join(r.choices(self.nouns, k=r.randint(1, 6)))
            return r.choice([f"Repeat: {words}", f"Say: {words}"]), words, "I repeat what the user said."
        return self._small(r) if kind == "small" else self._meaning(r)

    def chat(self, r: Random, room: int) -> Chat:
        """A few turns of anything."""
        chat = Chat(thinks=r.random() < 0.4)
        for _ in range(r.choice([0, 0, 1, 1, 2, 3, 5])):
            chat.say(*self._turn(r, False))
        # Only the thoughts of the last turn stay in a prompt.
        chat.say(*self._turn(r, chat.thinks))
        return chat

    def sums(self, r: Random, room: int) -> Chat:
        """One sum with its steps, or several without."""
        chat = Chat(thinks=r.random() < 0.7)
        for _ in range(1 if chat.thinks else r.randint(1, 5)):
            chat.say(*arithmetic(r, chat.thinks))
        return chat

    def name(self, r: Random, room: int) -> Chat:
        """The user's name, asked for some turns later."""
        chat, name = Chat(), r.choice(NAMES)
        hello = r.choice(["", "Hi. ", "Hello. "])
        chat.say(f"{hello}{r.choice(['My name is', 'I am', 'Call me'])} {name}.", f"Nice to meet you, {name}!")
        for _ in range(r.choice([0, 0, 1, 2, 3, 5])):
            chat.say(*self._turn(r, False))
        chat.say(r.choice(["What is my name?", "Who am I?", "Do you remember my name?"]), f"Your name is {name}.")
        return chat

    # --- the calculator ---

    def tools(self, r: Random, room: int) -> Chat:
        """With a calculator at hand: it is called for sums, not for talk."""
        chat = Chat(thinks=r.random() < 0.5, tools=[CALCULATOR], listens=0.02)
        for _ in range(r.randint(2, 6)):
            if r.random() < 0.25:
                chat.say(*self._small(r))
                continue
            chat.compute(*expression_of(r))
        return chat

    # --- what must be found again ---

    def _value(self, r: Random) -> str:
        return str(r.randint(10, 999)) if r.random() < 0.5 else r.choice(self.nouns)

    def _filler(self, r: Random, chat: Chat, tokens: int) -> None:
        """Turns that have nothing to do with it, of about so many tokens."""
        while tokens > 30:
            if tokens > 60 and r.random() < 0.7:
                text = r.choice(self.texts)
                start = r.randrange(max(1, len(text) - 200))
                piece = text[start : start + min(3 * tokens, r.choice([300, 800, 2000]))].strip()
                chat.say(f"Read this:\n{piece}", "I have read it.")
                tokens -= len(piece) // 3 + 12
            else:
                chat.say(*self._turn(r, False))
                tokens -= 30

    def pairs(self, r: Random, room: int) -> Chat:
        """A list of codes, other things, and questions about the codes."""
        chat = Chat(listens=0.0)
        room = int(room * r.uniform(0.3, 1.0))
        count = r.randint(2, max(3, min(room // 20, 40)))
        keys = r.sample(self.nouns, count)
        values = {key: self._value(r) for key in keys}
        chat.say("Remember:\n" + "\n".join(f"{k}: {v}" for k, v in values.items()), "OK.")
        asked = r.randint(2, min(count + 1, 12))
        self._filler(r, chat, room - 7 * count - 11 * asked if r.random() < 0.6 else 0)
        for key in r.choices(keys, k=asked):
            chat.say(f"{key}?" if r.random() < 0.6 else f"What is the code of {key}?", values[key])
        return chat

    def needle(self, r: Random, room: int) -> Chat:
        """Sentences about people, hidden in a text or between turns."""
        chat = Chat(listens=0.0)
        people = r.sample(NAMES, r.randint(1, 4))
        secrets = {name: self._value(r) for name in people}
        left = int(room * r.uniform(0.3, 1.0)) - 40 * len(people)
        for name, value in secrets.items():
            chat.say(f"The secret of {name} is {value}.", "OK.")
            self._filler(r, chat, left // len(people))
        for name in r.sample(people, len(people)):
            chat.say(f"What is the secret of {name}?", f"The secret of {name} is {secrets[name]}.")
        return chat

    def glossary(self, r: Random, room: int) -> Chat:
        """Words explained in the prompt, then asked for."""
        chat = Chat(listens=0.0)
        room = int(room * r.uniform(0.3, 1.0))
        entries = r.sample(self.listed, max(2, min(room // 40, 30)))
        chat.say("Remember:\n" + "\n".join(f"{w} ({k}): {g}" for w, k, g in entries), "OK.")
        for word, kind, gloss in r.choices(entries, k=r.randint(1, 5)):
            chat.say(f'What does "{word}" mean?', f"{word} ({kind}): {gloss}.")
        return chat

    def copy(self, r: Random, room: int) -> Chat:
        """Words or a passage, said again."""
        chat = Chat(listens=0.0)
        length = r.randint(3, max(4, room // 5))
        if r.random() < 0.5:
            text = " ".join(r.choices(self.nouns, k=min(length, 100)))
        else:
            source = r.choice(self.texts)
            start = r.randrange(max(1, len(source) - 200))
            text = source[start : start + 3 * length].strip() or "nothing"
        chat.say(f"Repeat: {text}", text)
        return chat


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def arithmetic(r: Random, thinks: bool) -> tuple[str, str, str]:
    """A sum, its answer and the steps to it; smaller numbers if there is no room for steps."""
    sign = r.choices("+-*", [4, 3, 2])[0]
    if sign == "*":
        a, b = (r.randint(2, 99), r.randint(2, 9)) if thinks else (r.randint(1, 10), r.randint(1, 10))
    else:
        a, b = (r.randint(0, 10 ** r.randint(1, 3 if thinks else 2) - 1) for _ in "ab")
    a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
    result = {"+": a + b, "-": a - b, "*": a * b}[sign]
    steps = {"+": _add_steps, "-": _subtract_steps, "*": _multiply_steps}[sign](a, b)
    return _question(r, a, sign, b), f"{a} {sign} {b} = {result}.", steps


def _question(r: Random, a: int, sign: str, b: int) -> str:
    word = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}[sign]
    return r.choice(
        [f"What is {a} {sign} {b}?", f"{a} {sign} {b}", f"{a}{sign}{b}=?", f"How much is {a} {word} {b}?",
         f"Calculate {a} {sign} {b}.", f"What is {a} {word} {b}?"]
    )  # fmt: skip


def _add_steps(a: int, b: int) -> str:
    """Column by column from the right, each with its carry."""
    steps, carry = [], 0
    for x, y in _columns(a, b):
        total = x + y + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return f"{', '.join(steps)}. So {a + b}."


def _subtract_steps(a: int, b: int) -> str:
    steps, borrow = [], 0
    for x, y in _columns(a, b):
        digit = x - y - borrow
        steps.append(f"{x}-{y}-{borrow}={digit}" + (f"+10={digit + 10}" if digit < 0 else "").replace("+10=", " so "))
        borrow = int(digit < 0)
    return f"{', '.join(steps)}. So {a - b}."


def _multiply_steps(a: int, b: int) -> str:
    tens, ones = divmod(a, 10)
    if not tens:
        return f"{a}*{b}={a * b}."
    return f"{tens}*{b}={tens * b}, {ones}*{b}={ones * b}, {tens * b}0+{ones * b}={a * b}. So {a * b}."


def _columns(a: int, b: int) -> list[tuple[int, int]]:
    width = len(str(max(a, b)))
    return [(int(x), int(y)) for x, y in zip(f"{a:0{width}}"[::-1], f"{b:0{width}}"[::-1], strict=True)]


def expression_of(r: Random) -> tuple[str, str, str]:
    """A question for the calculator, the expression in it, and its value."""
    sign = r.choice("+-*/")
    a, b = (r.randint(1, 10 ** r.randint(1, 4)) for _ in "ab")
    if sign == "/":
        b = r.randint(2, 20)
        a = b * r.randint(1, 500)
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
    return _question(r, a, sign, b), f"{a} {sign} {b}", str(result)
