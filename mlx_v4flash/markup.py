"""The marks between the parts of a conversation, and how calls of tools are written with them.

`call_reader.py` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any


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
