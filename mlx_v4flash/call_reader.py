"""Reads the calls of tools in an answer while it arrives.

The model was trained on one form (`markup.write_calls`); real answers come close. Read are, too: other names of the
block, no block around calls, tags that are missing at the end of a call or block, other white space between tags.
What is not a call is given back as text.
"""

from __future__ import annotations

import json
import re

from .markup import DSML, END_THINK

# While an answer is read, marks are single characters that no decoded text can hold: halves of surrogate pairs.
DSML_SIGN = "\ud800"
END_THINK_SIGN = "\ud801"

# Name, and arguments: a JSON object as text.
Call = tuple[str, str]

_BLOCKS = "(?:tool_calls|function_calls|calls)"
_NAME = r"[^\n\ud800\ud801]*?"
_TAG = re.compile(
    rf"""\s*(?:
        (?P<begin> <\ud800\ ?{_BLOCKS}> )
      | (?P<invoke> <\ud800\ ?invoke\ name="(?P<name>{_NAME})"> )
      | (?P<parameter> <\ud800\ ?parameter\ name="(?P<key>{_NAME})"\ string="(?P<string>true|false)"> )
      | (?P<end> </\ud800\ ?invoke> )
      | (?P<block> </\ud800\ ?{_BLOCKS}> )
    )""",
    re.VERBOSE,
)
# What may become a tag: no end yet of its word, or of what stands in quotes. No name is that long.
_UNFINISHED = re.compile(r'\s*(?:</?(?:\ud800[ \w]*(?:=(?:"[^\n\ud800\ud801]{0,300})?)?)?)?')
_VALUE_END = re.compile(r"</\ud800 ?parameter>")
_LONGEST_END = len("</D parameter>")
_CONSTANTS = {"True": "true", "False": "false", "None": "null"}

# What may open a block, after the mark. Other spellings than the first come from long contexts and from V4.1.
_WRAPPERS = ("tool_calls>", "function_calls>", " tool_calls>", " calls>")
_INVOKES = ('invoke name="', ' invoke name="')


class CallReader:
    """One block of calls.

    Attributes:
        is_complete: the end of the block has arrived; the text behind it is in `rest`.
        is_broken: something came that does not belong into a block; it is in `rest`.
    """

    def __init__(self) -> None:
        self.rest = ""
        self.is_complete = False
        self.is_broken = False
        self._call_start = 0  # where the text of the call begins, in `rest`
        self._position = 0  # up to here everything is read
        self._name: str | None = None
        self._values: dict[str, str] = {}
        self._parameter: re.Match[str] | None = None

    def feed(self, text: str) -> list[Call | str]:
        """Calls that `text` completes; at last the text of one that turns out to be none.

        Args:
            text: goes on where the last one ended, with signs for marks; the first begins with the first tag.
        """
        self.rest += text
        found: list[Call | str] = []
        while not (self.is_complete or self.is_broken) and self._step(found):
            pass
        if self.is_broken and (before := self.rest[self._call_start : self._position]).strip():
            found.append(before)
        if self.is_complete or self.is_broken:
            self.rest = self.rest[self._position :]
        return found

    def finish(self, ended: bool) -> list[Call | str]:
        """What is left. If the model ended its answer itself (`ended`), the last call may lack its end tag."""
        if ended and self._name is not None and not self._parameter and not self.rest[self._position :].strip():
            return [self._take_call(self._name)]
        before = self.rest[self._call_start :]
        return [before] if before.strip() else []

    def _step(self, found: list[Call | str]) -> bool:
        """Read a tag or a value; False if there is none."""
        if self._parameter:
            return self._read_value(self._parameter)
        tag = _TAG.match(self.rest, self._position)
        kind = tag.lastgroup if tag else None
        if (
            tag is None
            or (kind == "begin" and self._name is not None)
            or (kind in ("parameter", "end") and self._name is None)
        ):
            self.is_broken = tag is not None or not _UNFINISHED.fullmatch(self.rest, self._position)
            if self.is_broken and not self._position:  # behind the first mark, or it would be read again
                self._position = self.rest.find(DSML_SIGN) + 1
            return False
        if kind == "parameter":
            self._parameter = tag
        elif kind != "begin":
            if self._name is not None:
                found.append(self._take_call(self._name))
                self._call_start = tag.start() if kind == "invoke" else tag.end()
            self._name = tag["name"]  # None but for an `invoke`
            self.is_complete = kind == "block"
        self._position = tag.end()
        return True

    def _read_value(self, head: re.Match[str]) -> bool:
        # The end may have arrived in part; what lies before need not be searched again.
        end = _VALUE_END.search(self.rest, max(head.end(), self._position))
        if end is None:
            self._position = max(head.end(), len(self.rest) - _LONGEST_END)
            return False
        value = spelled(self.rest[head.end() : end.start()])
        is_text = head["string"] == "true"
        self._values[head["key"]] = json.dumps(value, ensure_ascii=False) if is_text else _json_value(value)
        self._parameter = None
        self._position = end.end()
        return True

    def _take_call(self, name: str) -> Call:
        values = (f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in self._values.items())
        self._name, self._values = None, {}
        return name, f"{{{', '.join(values)}}}"


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


def _json_value(text: str) -> str:
    """A value as the model gave it if it is JSON, else what comes closest: arguments must stay a JSON object."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _CONSTANTS.get(text.strip()) or json.dumps(text, ensure_ascii=False)
    return text.strip()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
