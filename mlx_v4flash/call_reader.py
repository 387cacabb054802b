"""Reads the calls of tools in an answer while it arrives.

The model was trained on one form (`markup.write_calls`); real answers come close. Read are, too: other names of the
block, no block around calls, tags that are missing at the end of a call or block, other white space between tags.
What is not a call is given back as text.
"""

from __future__ import annotations

import json
import re
from typing import Literal

from .markup import DSML, END_THINK

# While an answer is read, marks are single characters that no decoded text can hold: halves of surrogate pairs.
DSML_SIGN = "\ud800"
END_THINK_SIGN = "\ud801"

# Name, and arguments: a JSON object as text.
Call = tuple[str, str]

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


class CallReader:
    """One block of calls.

    Attributes:
        is_complete: the end of the block has arrived; the text behind it is in `rest`.
        rest: text that is not decided yet.
    """

    def __init__(self) -> None:
        self.rest = ""
        self.is_complete = False
        self._searched = 0  # up to here there is no end of a call; long values would be searched again and again

    def feed(self, text: str) -> list[Call | str]:
        """Calls that `text` completes, and text that turns out to be none.

        Args:
            text: goes on where the last one ended, with signs for marks; the first begins with the first tag.
        """
        self.rest += text
        found: list[Call | str] = []
        while not self.is_complete and (n := self.rest.find(DSML_SIGN, self._searched)) >= 0:
            tag = _read_tag(self.rest, n)
            if tag is None:
                break
            kind, start, stop = tag
            self._searched = n + 1
            before = self.rest[:start]
            if kind == "other" or (kind == "begin" and _BLANK.fullmatch(before)):
                continue
            call = _read_call(before)
            if call == "open":
                continue
            end = start if kind == "begin" else stop
            if isinstance(call, tuple):
                found.append(call)
            elif kind != "block" or before.strip():
                found.append(self.rest[:end])
            self.rest, self._searched = self.rest[end:], 0
            self.is_complete = kind == "block"
        return found

    def finish(self, ended: bool) -> list[Call | str]:
        """What is left. If the model ended its answer itself (`ended`), the last call may lack its end tag."""
        rest, self.rest = self.rest, ""
        call = _read_call(rest) if ended else None
        return [call] if isinstance(call, tuple) else [rest] if rest.strip() else []


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


def spelled(text: str) -> str:
    """Text with the signs of marks written out."""
    return text.replace(DSML_SIGN, DSML).replace(END_THINK_SIGN, END_THINK)


def _read_tag(text: str, n: int) -> tuple[str, int, int] | None:
    """The tag whose mark is text[n], and where it starts and stops; None if more text is needed to tell.

    It is the "end" of a call, the "begin" of the next one, the end of the "block", or "other".
    """
    opening = "</" if text.endswith("</", 0, n) else "<" if text.endswith("<", 0, n) else ""
    found = _TAG.match(text, n + 1)
    if found is None:
        return None if opening and len(text) - n <= 42 and DSML_SIGN not in text[n + 1 :] else ("other", n, n + 1)
    return _TAGS.get((opening, found.group(1)), "other"), n - len(opening), found.end()


def _read_call(text: str) -> Call | Literal["open", "malformed"]:
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


def _json_value(text: str) -> str:
    """A value as the model gave it if it is JSON, else what comes closest: arguments must stay a JSON object."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _CONSTANTS.get(text.strip()) or json.dumps(text, ensure_ascii=False)
    return text.strip()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
