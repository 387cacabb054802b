"""What clang says about a kernel, as messages about lines of its text."""

from __future__ import annotations

import re

# A line number also says which file it is in: file * FILE + line. File 0 is the kernel's text.
FILE = 1_000_000

_DIAGNOSTIC = re.compile(r"^(?:.*/)?([^\s/:]+):(\d+):\d+: (?:fatal )?(error|note): (.*)$", re.M)
_TO_BFLOAT = re.compile(
    r"^kernel:(\d+):\d+: warning: (implicit conversion .* to '(?:\w+' \(aka ')?(?:bfloat|__bf16)\S*.*)$",
    re.M,
)
_LINE = re.compile(r"[<, ](?:line|kernel):(\d+):\d+")
_CAST = re.compile(
    r"ImplicitCastExpr .*'(?:bfloat\w*|__bf16)'.*<(?:FloatingCast|IntegralToFloating)>(?!.*part_of_explicit_cast)"
)


class CompileError(Exception):
    """Messages with {Ln} for lines of the kernel's text."""


def judge(status: int, output: str, errors: str, opencl: bool) -> None:
    """Raise CompileError for what the compiler reports, and for what it should, in an AST dump if there is one."""
    if status:
        message = messages(errors)
        raise CompileError(f"{message}\n(in the stricter dialect, C++ for OpenCL)" if opencl else message)
    for where, message in _TO_BFLOAT.findall(errors):
        raise CompileError(f"{{L{where}}}: {message}; Metal has no such conversion, use static_cast")
    line = 0
    for node in output.splitlines():  # a node says its line only if it is not that of the node before
        line = int((_LINE.findall(node) or [line])[-1])
        if _CAST.search(node):
            at = f"{{L{line}}}: " if 0 < line < FILE else ""
            raise CompileError(f"{at}implicit conversion to bfloat; Metal has no such conversion, use static_cast")


def messages(errors: str) -> str:
    """The first errors, one a line, each at the line of the kernel that caused it."""
    found: list[str] = []
    pending = ""  # an error in the shim or in a header, until a note says who used it
    for file, number, kind, message in _DIAGNOSTIC.findall(errors):
        line = int(number)
        if kind != "note":
            found += [pending] if pending else []
            pending = message if file == "kernel" else f"{message} ({file}:{line % FILE})"
        if pending and file == "kernel" and line < FILE and (kind != "note" or "requested here" in message):
            found.append(f"{{L{line}}}: {pending}")
            pending = ""
    found += [pending] if pending else []
    return "\n".join(dict.fromkeys(found[:5])) or errors[-2000:]
