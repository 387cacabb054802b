"""Apple's "pointer type must have explicit address space qualifier", on tokens.

C++ takes an unqualified pointer for one to `thread` memory. Metal refuses it everywhere, also for locals and casts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rewrite import VECTOR
from tokens import Token, tokenize

_SPACES = {"device", "constant", "threadgroup", "thread", "threadgroup_imageblock", "object_data", "ray_data"}
_TYPES = {f"{u}int{n}_t" for u in ("", "u") for n in (8, 16, 32, 64)} | set(
    "bool char uchar short ushort int uint long ulong half float bfloat size_t ptrdiff_t bfloat16_t float16_t "
    "complex64_t void".split()
)
_TEMPLATES = ("vec", "atomic", "array")
_QUALIFIERS = set("const volatile static constexpr inline typename unsigned signed metal mlx steel :: coherent".split())
# What may stand before the type of a declaration, a parameter, a template argument or a cast.
_BEGINNINGS = ("(", ",", ";", "{", "}", "<", ")", ">", "")


def pointers_without_space(text: str) -> Iterator[tuple[int, str]]:
    """Line and words of each pointer or reference that names no address space."""
    tokens = tokenize(text)
    names = set(re.findall(r"(?:typename|class)\s+(\w+)\s*(?=[,>=])", text))
    names |= set(re.findall(r"\b(?:struct|using)\s+(\w+)", text))
    for i in range(1, len(tokens) - 2):
        if tokens[i].text in ("*", "&"):
            start = _start_of_type(tokens, i, names)
            if start is not None:
                yield tokens[i].line, " ".join(t.text for t in tokens[start : i + 2])


def _start_of_type(tokens: list[Token], i: int, names: set[str]) -> int | None:
    """Where the type before the star at i starts; None if it has an address space, or if the star multiplies."""
    j = i - 1
    while j > 0 and tokens[j].text in ("const", "volatile"):
        j -= 1
    if tokens[j].text == ">":
        j = _before_angle(tokens, j)
        if tokens[j].text not in _TEMPLATES:
            return None
    kind = tokens[j].text
    if not (kind in _TYPES or VECTOR.match(kind) or kind in names or kind in _TEMPLATES):
        return None
    first = j
    while first > 0 and tokens[first - 1].text in _QUALIFIERS:
        first -= 1
    before = tokens[first - 1].text if first else ""
    if before in _SPACES or before not in _BEGINNINGS or _multiplies(tokens, i, kind, names, before):
        return None
    return first


def _before_angle(tokens: list[Token], j: int) -> int:
    depth = 0
    while j > 0:
        depth += (tokens[j].text == ">") - (tokens[j].text == "<")
        j -= 1
        if depth == 0:
            break
    return j


def _multiplies(tokens: list[Token], i: int, kind: str, names: set[str], before: str) -> bool:
    following, then = tokens[i + 1], tokens[i + 2].text
    if before in (")", ">") and tokens[i].text == "*" and not following.is_name:
        return True
    if kind not in names or before not in ("(", ","):
        return False
    if following.text == "(" or following.text[:1].isdigit():  # (N * 4)
        return True
    return tokens[i].text == "*" and following.is_name and then in ("+", "-", "*", "/", "<", ">")
