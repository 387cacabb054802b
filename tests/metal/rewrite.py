"""MSL, preprocessed, into what clang compiles for a CPU: a few rules on tokens.

- `threadgroup float x[32];` becomes a reference to memory of the runtime: C++ has no such local variables.
- `float4(...)`, `float2 v(a, b);`, `uint4 v = {a, b, c};` call functions of the shim: clang's vectors are built
  from one value or from braces only.
- `static_cast<T>` becomes `__msl_cast<T>`, which also converts vectors.
- Attributes are removed; those of the parameters of a kernel are remembered. Function constants get their values.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from tokens import KernelTextError, Token, closing, closing_angle, join, remove, split, tokenize

STRICT, OPENCL = "strict", "opencl"
ENTRY_LINE = 2_000_000_000  # far from the lines of any file
SPACES = ("device", "threadgroup", "constant")
VECTOR = re.compile(r"(?:packed_)?(?:bool|char|uchar|short|ushort|int|uint|long|ulong|half|float|bfloat)[234]$")
_FUNCTION_CONSTANT = re.compile(r"function_constant\((\d+)\)")
_NUMBER = re.compile(r"\.?\d")


@dataclass
class Kernel:
    """A kernel function: its parameters, each with its attribute, and its threadgroup variables by number."""

    name: str
    parameters: list[tuple[str, str]] = field(default_factory=list)
    variables: dict[int, str] = field(default_factory=dict)


def rewrite(text: str, dialect: str = STRICT, constants: dict[int, object] | None = None) -> tuple[str, list[Kernel]]:
    """The text for clang, and the kernels in it.

    Raises:
        KernelTextError: the text breaks a rule that C++ does not have.
    """
    if dialect == STRICT:
        text = _array_parameters_to_pointers(text)
    tokens = tokenize(text)
    _remove_instantiations(tokens)
    kernels = _find_kernels(tokens)
    _remove_attributes(tokens, constants or {})
    _qualified_members(tokens, dialect)
    _declare_threadgroup_variables(tokens)
    _build_vectors(tokens)
    _replace_words(tokens, dialect)
    return join(tokens), kernels


def _array_parameters_to_pointers(text: str) -> str:
    # `constant int s[2]` as a parameter: C++ does not let it decay in a named address space.
    kind = r"(?:const\s+)?(?:constant|device)\s+(?:const\s+)?[\w:]+(?:<[^<>]*>)?"
    return re.sub(rf"({kind})\s+(\w+)\s*\[[^\[\]]*\](?=\s*[,)])", r"\1* \2", text)


# --- kernels and attributes -------------------------------------------------------------------------


def _is_attribute(tokens: list[Token], i: int) -> bool:
    return tokens[i].text == "[" and tokens[i + 1].text == "[" and not tokens[i + 1].space


def _attribute(tokens: list[Token], i: int) -> str:
    return "".join(t.text for t in tokens[i + 2 : closing(tokens, i) - 1])


def _remove_instantiations(tokens: list[Token]) -> None:
    """Explicit instantiations of kernels: the entry point instantiates the one that is run."""
    i = 0
    while i < len(tokens):
        if tokens[i].text == "template" and _is_attribute(tokens, i + 1):
            stop = next(k for k in range(i, len(tokens)) if tokens[k].text == ";")
            remove(tokens, i, stop + 1)
        else:
            i += 1


def _find_kernels(tokens: list[Token]) -> list[Kernel]:
    """Kernels with a body. Their tokens are marked."""
    kernels, i = [], 0
    while i < len(tokens):
        marked = tokens[i].text == "kernel" or (
            _is_attribute(tokens, i) and _attribute(tokens, i).split(",")[0] == "kernel"
        )
        i += 1
        if not marked:
            continue
        while tokens[i].text not in ("(", ";", ""):
            i = closing(tokens, i) + 1 if tokens[i].text == "[" else i + 1
        if tokens[i].text != "(":
            continue
        end = closing(tokens, i)
        if tokens[end + 1].text != "{":
            continue
        kernel = Kernel(tokens[i - 1].text, [_parameter(p) for p in split(tokens[i + 1 : end])])
        for token in tokens[end + 1 : closing(tokens, end + 1)]:
            token.kernel = kernel
        kernels.append(kernel)
    return kernels


def _parameter(tokens: list[Token]) -> tuple[str, str]:
    """Name and attribute."""
    for i in range(len(tokens) - 1):
        if _is_attribute(tokens, i):
            return tokens[i - 1].text, _attribute(tokens, i)
    return next(t.text for t in reversed(tokens) if t.is_name), ""


def _remove_attributes(tokens: list[Token], constants: dict[int, object]) -> None:
    i = 0
    while i < len(tokens) - 1:
        if not _is_attribute(tokens, i):
            i += 1
            continue
        constant = _FUNCTION_CONSTANT.fullmatch(_attribute(tokens, i))
        remove(tokens, i, closing(tokens, i) + 1)
        if constant:
            value = constants.get(int(constant[1]))
            words = "{}" if value is None else str(value).lower()
            tokens.insert(i, Token(" ", f"= {words}", tokens[i].line))


def _qualified_members(tokens: list[Token], dialect: str) -> None:
    """Member functions for another address space: plain C++ has none, OpenCL spells them differently."""
    i = 1
    while i < len(tokens) - 1:
        before = i - 2 if tokens[i - 1].text == "const" else i - 1
        if tokens[i].text not in SPACES or tokens[before].text != ")":
            i += 1
        elif dialect == OPENCL:
            if tokens[i].text == "constant":
                tokens[i].text = "__constant"
            i += 1
        elif tokens[i + 1].text in ("{", ":", ";", "noexcept", "="):
            start, stop = _start_of_member(tokens, before), _end_of_member(tokens, i)
            remove(tokens, start, stop)
            i = start + 1
        else:
            i += 1


def _start_of_member(tokens: list[Token], i: int) -> int:
    depth = 0
    while depth or tokens[i].text not in (";", "}", "{", "public", "private"):
        depth += (tokens[i].text == ")") - (tokens[i].text == "(")
        i -= 1
    return i + 2 if tokens[i].text in ("public", "private") else i + 1


def _end_of_member(tokens: list[Token], i: int) -> int:
    while tokens[i].text not in ("{", ";"):
        i += 1
    if tokens[i].text == "{":
        i = closing(tokens, i)
        if tokens[i + 1].text != ";":
            return i + 1
        i += 1
    return i + 1


# --- threadgroup variables --------------------------------------------------------------------------


def _declare_threadgroup_variables(tokens: list[Token]) -> None:
    i, count = 0, 0
    while i < len(tokens):
        i += 1
        if tokens[i - 1].text != "threadgroup" or not _starts_statement(tokens, i - 1):
            continue
        end = next((k for k in range(i, len(tokens)) if tokens[k].text in (";", "{", "")), len(tokens) - 1)
        statement = _without_initialiser(tokens, i, end)
        if statement is None or not _declares_variables(statement):
            continue
        kernel = tokens[i].kernel
        if not isinstance(kernel, Kernel):
            words = join(statement).strip()
            raise KernelTextError(f"threadgroup variable outside a kernel function: {words}", tokens[i].line)
        end = next(k for k in range(i, len(tokens)) if tokens[k].text == ";")
        declarations = []
        for name, kind in _declared(statement):
            kernel.variables[count] = name
            declarations.append(f"threadgroup {kind}& {name} = __msl_tg<{kind}, {count}>();")
            count += 1
        tokens[i - 1].text = " ".join(declarations)
        remove(tokens, i, end + 1)


def _starts_statement(tokens: list[Token], i: int) -> bool:
    return i == 0 or tokens[i - 1].text in ("{", "}", ";", ")") or tokens[i - 1].text.endswith(";")


def _without_initialiser(tokens: list[Token], start: int, end: int) -> list[Token] | None:
    """The declaration from start; None if it ends neither with `;` nor with `= {...};`.

    Metal accepts the braces and leaves the memory as it is.
    """
    if tokens[end].text == ";":
        return tokens[start:end]
    if tokens[end].text == "{" and tokens[end - 1].text == "=" and tokens[closing(tokens, end) + 1].text == ";":
        return tokens[start : end - 1]
    return None


def _declares_variables(statement: list[Token]) -> bool:
    """Neither a pointer or reference, nor a function, nor the start of an expression."""
    depth = 0
    for token in statement:
        if depth == 0 and token.text in ("*", "&", "(", "="):
            return False
        depth += (token.text == "[") - (token.text == "]")
    return True


def _declared(statement: list[Token]) -> list[tuple[str, str]]:
    """Names and types: `float x[4], y` gives ("x", "__msl_t<float[4]>"), ("y", "__msl_t<float>")."""
    found, base = [], ""
    for part in split(statement):
        bracket = next((k for k, t in enumerate(part) if t.text == "["), len(part))
        name = part[bracket - 1].text
        base = base or join(part[: bracket - 1]).strip()
        sizes, k = "", bracket
        while k < len(part):
            end = closing(part, k)
            sizes += f"[({join(part[k + 1 : end])})]"  # in brackets, for it may contain > or ,
            k = end + 1
        found.append((name, f"__msl_t<{base}{sizes}>"))
    return found


# --- vectors, casts, literals -----------------------------------------------------------------------


def _build_vectors(tokens: list[Token]) -> None:
    aliases = {
        tokens[i + 1].text
        for i in range(len(tokens) - 4)
        if tokens[i].text == "using"
        and tokens[i + 2].text == "="
        and "vec" in (tokens[i + 3].text, tokens[min(i + 5, len(tokens) - 1)].text)
    }
    depth = i = 0
    while i < len(tokens):
        token = tokens[i]
        depth += (token.text == "{") - (token.text == "}")
        after_operator = i > 0 and tokens[i - 1].text in ("operator", ".", "->", "using", "struct")
        if not after_operator:
            if token.text == "vec" and tokens[i + 1].text == "<":
                end = closing_angle(tokens, i + 1)
                if end and not (i > 2 and tokens[i - 3].text == "operator"):
                    _build_vector(tokens, i, end, depth)
            elif VECTOR.match(token.text) or token.text in aliases:
                _build_vector(tokens, i, i, depth)
        i += 1


def _build_vector(tokens: list[Token], start: int, end: int, depth: int) -> None:
    """The type from `start` to `end` may be followed by (...), by a name and (...), or by a name, = and {...}."""
    kind = join(tokens[start : end + 1]).strip()
    following = tokens[end + 1]
    if following.text == "(":
        _set_type(tokens, start, end, f"__msl_mk<{kind}>")
        return
    if depth == 0 or not following.is_name:
        return
    name, opening = following.text, end + 2
    if tokens[opening].text == "=":
        opening += 1
    if tokens[opening].text not in ("(", "{") or (tokens[opening].text == "(" and opening == end + 3):
        return
    stop = closing(tokens, opening)
    inner = tokens[opening + 1 : stop]
    if tokens[opening].text == "(":
        if tokens[stop + 1].text == ";":
            tokens[end + 1].text = f"{name} = __msl_mk<{kind}>"
    elif not any(t.text == "{" for t in inner):
        tokens[opening].text, tokens[stop].text = f"__msl_part<{kind}>(", ")"
        if opening == end + 2:
            tokens[opening].text = "= " + tokens[opening].text


def _set_type(tokens: list[Token], start: int, end: int, text: str) -> None:
    for token in tokens[start + 1 : end + 1]:
        token.text = ""
    tokens[start].text = text
    if start >= 2 and tokens[start - 1].text == "::" and tokens[start - 2].text == "metal":
        tokens[start - 1].text = tokens[start - 2].text = ""


def _replace_words(tokens: list[Token], dialect: str) -> None:
    for i, token in enumerate(tokens):
        if token.text == "static_cast":
            end = closing_angle(tokens, i + 1)
            if end and tokens[end - 1].text not in ("*", "&"):
                token.text = "__msl_cast"
        elif _NUMBER.match(token.text) and not token.text.startswith(("0x", "0X")):
            if token.text.endswith("bf"):
                token.text = f"((bfloat){token.text[:-2]}f)"
            elif token.text.endswith("h") and dialect == STRICT:
                token.text = token.text[:-1] + "f16"


# --- entry point ------------------------------------------------------------------------------------


def entry(kernel: Kernel, expression: str, is_builtin: Callable[[str], bool]) -> str:
    """C++ text of a function that the runtime can call, for one instantiation of a kernel."""
    arguments, next_buffer = [], 0
    for k, (_, attribute) in enumerate(kernel.parameters):
        kind = f"S::argument<{k}>"
        group = re.match(r"threadgroup\((\d+)\)", attribute)
        buffer = re.match(r"buffer\((\d+)\)", attribute)
        if is_builtin(attribute):
            arguments.append(f"__msl_builtin<{kind}>(position->{attribute})")
        elif group:
            variable = f"__msl_threadgroup_variable({1000 + int(group[1])}, 0, 16)"
            arguments.append(f"__msl_buffer<{kind}>::at({variable})")
        else:
            index = int(buffer[1]) if buffer else next_buffer
            next_buffer = index + 1
            arguments.append(f"__msl_buffer<{kind}>::at(buffers[{index}])")
    return (
        f'\n#line {ENTRY_LINE} "entry"\n'
        # What it reads belongs to the runtime, so it is not checked.
        '__attribute__((no_sanitize("thread")))\n'
        'extern "C" void msl_entry(const ulong* buffers, const __msl_position* position) {\n'
        f"    typedef __msl_signature<decltype({expression})> S;\n"
        f"    {expression}({', '.join(arguments)});\n}}\n"
    )
