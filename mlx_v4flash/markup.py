"""The marks between the parts of a conversation, and how calls of tools are written with them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal


class Mark(str):
    """The spelling of a token that is structure. The same characters in a plain `str` are text."""

    __slots__ = ()


BOS = Mark("<｜begin▁of▁sentence｜>")
EOS = Mark("<｜end▁of▁sentence｜>")
USER = Mark("<｜User｜>")
ASSISTANT = Mark("<｜Assistant｜>")
THINK = Mark("<think>")
END_THINK = Mark("</think>")
DSML = Mark("｜DSML｜")
REMINDER = Mark("<｜latest_reminder｜>")

# Without these no conversation can be written or read.
NEEDED = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK, DSML)

# Small side questions of DeepSeek's own chat; the mark takes the place of the answer's beginning.
TASKS = {name: Mark(f"<｜{name}｜>") for name in ("action", "query", "authority", "domain", "title", "read_url")}

# Text, a mark, or token ids that stand as they are.
Piece = str | Sequence[int]


def write_calls(calls: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    """The block of calls that ends an assistant's turn.

    The form is that of the reference encoder. DeepSeek's package writes numbers otherwise (`1e-7`, and `1e+26` for a
    long integer), sorts calls by id, and leaves out the empty line of a call without arguments.

    Args:
        calls: name and arguments of each.
    """
    yield from ("\n\n<", DSML, "tool_calls>\n")
    for name, arguments in calls:
        yield from ("<", DSML, f'invoke name="{name}">\n')
        for number, (key, value) in enumerate(arguments.items()):
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            kind = "true" if isinstance(value, str) else "false"
            yield from ("\n" * bool(number) + "<", DSML, f'parameter name="{key}" string="{kind}">', text)
            yield from ("</", DSML, "parameter>")
        yield from ("\n</", DSML, "invoke>\n")
    yield from ("</", DSML, "tool_calls>")


def arguments_of(value: Any) -> dict[str, Any]:
    """Arguments as a dict: of a dict itself, of JSON text, and of any other text as one parameter `arguments`."""
    if isinstance(value, dict):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if value is None or not text.strip():
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {"arguments": text}
    return found if isinstance(found, dict) else {"arguments": text}


# While an answer is read, marks are single characters that no decoded text can hold: halves of surrogate pairs.
DSML_SIGN = "\ud800"
END_THINK_SIGN = "\ud801"

_BLOCKS = "tool_calls|function_calls|calls"
_NAME = r'([^\n\ud800\ud801]*?)"'
_OPENING = rf"\s*(?:<\ud800 ?(?:{_BLOCKS})>\s*)?"
_INVOKE = re.compile(rf'{_OPENING}<\ud800 ?invoke name="{_NAME}>')
_PARAMETER_HEAD = rf'\s*<\ud800 ?parameter name="{_NAME} string="(true|false)">'
_PARAMETER = re.compile(rf"{_PARAMETER_HEAD}(.*?)</\ud800 ?parameter>", re.DOTALL)
_OPEN_PARAMETER = re.compile(_PARAMETER_HEAD)
_BLANK = re.compile(_OPENING)
_CONSTANTS = {"True": "true", "False": "false", "None": "null"}

# What may open a block, after the mark. Other spellings than the first come from long contexts and from V4.1.
_WRAPPERS = ("tool_calls>", "function_calls>", " tool_calls>", " calls>")
_INVOKES = ('invoke name="', ' invoke name="')

# A tag of a block from behind its mark on: to the first `>` or `"`.
_TAG = re.compile(r' ?([^>"\ud800]{0,40}[>"])')
_TAGS = {
    ("</", "invoke>"): "end",
    ("<", 'invoke name="'): "begin",
    **{("</", f"{name}>"): "block" for name in _BLOCKS.split("|")},
}


def read_tag(text: str, n: int) -> tuple[str, int, int] | None:
    """The tag whose mark is text[n], and where it starts and stops; None if more text is needed to tell.

    It is the "end" of a call, the "begin" of the next one, the end of the "block", or "other".
    """
    opening = "</" if text.endswith("</", 0, n) else "<" if text.endswith("<", 0, n) else ""
    found = _TAG.match(text, n + 1)
    if found is None:
        return None if opening and len(text) - n <= 42 and DSML_SIGN not in text[n + 1 :] else ("other", n, n + 1)
    return _TAGS.get((opening, found.group(1)), "other"), n - len(opening), found.end()


def is_blank(text: str) -> bool:
    """Is there nothing before the first call of a block?"""
    return _BLANK.fullmatch(text) is not None


def may_open(text: str) -> bool | None:
    """Do the characters after `<` and the mark open a block of calls? None: they are too few to tell."""
    if any(text.startswith(x) for x in _INVOKES):
        return True
    for wrapper in _WRAPPERS:
        if text.startswith(wrapper):
            rest = text[len(wrapper) :].lstrip()
            wanted = [f"<{DSML_SIGN}{x}" for x in _INVOKES]
            if any(rest.startswith(x) for x in wanted):
                return True
            return None if any(x.startswith(rest) for x in wanted) else False
    return None if any(x.startswith(text) for x in _WRAPPERS + _INVOKES) else False


def read_call(text: str) -> tuple[str, str] | Literal["open", "malformed"]:
    """Name and arguments, a JSON object as text, of a call without its end tag.

    A value ends only at `</｜DSML｜parameter>`, so it may hold any other tag: "open" if it has not ended. Of a
    parameter given twice the last counts.
    """
    head = _INVOKE.match(text)
    if head is None:
        return "malformed"
    values: dict[str, str] = {}
    position = head.end()
    while found := _PARAMETER.match(text, position):
        key, kind, value = found.group(1), found.group(2), spelled(found.group(3))
        values[key] = json.dumps(value, ensure_ascii=False) if kind == "true" else _json_value(value)
        position = found.end()
    if text[position:].strip():
        return "open" if _OPEN_PARAMETER.match(text, position) else "malformed"
    inner = ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in values.items())
    return head.group(1), f"{{{inner}}}"


def spelled(text: str) -> str:
    """Text with the signs of marks written out."""
    return text.replace(DSML_SIGN, DSML).replace(END_THINK_SIGN, END_THINK)


def _json_value(text: str) -> str:
    """A value as the model gave it if it is JSON, else what comes closest: arguments must stay a JSON object."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _CONSTANTS.get(text.strip()) or json.dumps(text, ensure_ascii=False)
    return text.strip()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
