"""Run a kernel function on buffers, and say what went wrong in words of its text."""

from __future__ import annotations

import ctypes
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import compiler
import numpy as np
import session
from linetable import line_at
from session import ORDERS, Dispatch, Settings, Traffic

_lock = threading.Lock()  # the runtime has one state


class MetalError(Exception):
    """A kernel that does not compile, or does something it must not.

    Attributes:
        kernel: its name.
        reason: what is wrong.
        line: line of the body, or of the header if `in_header`; None if unknown.
        thread, group: position in the threadgroup, and of the threadgroup; None while compiling.
    """

    def __init__(
        self,
        kernel: str,
        reason: str,
        line: int | None = None,
        in_header: bool = False,
        source: str = "",
        thread: tuple[int, ...] | None = None,
        group: tuple[int, ...] | None = None,
    ) -> None:
        self.kernel, self.reason, self.line, self.in_header = kernel, reason, line, in_header
        self.thread, self.group = thread, group
        message = f"{kernel}: {reason}"
        if line is not None:
            message += f"\n  at {'header ' if in_header else ''}line {line}: {source}"
        if thread is not None:
            message += f"\n  in thread {thread} of threadgroup {group}"
        super().__init__(message)


@dataclass(frozen=True)
class Text:
    """Text of a kernel, for messages: lines before `body_line` belong to the header."""

    name: str
    text: str
    body_line: int = 1

    def place(self, line: int) -> tuple[int, bool]:
        """Number of a line in the body, or in the header."""
        return (line - self.body_line + 1, False) if line >= self.body_line else (line, True)

    def error(self, reason: str, line: int = 0, **position: Any) -> MetalError:
        lines = self.text.splitlines()
        if not 0 < line <= len(lines):
            return MetalError(self.name, reason, **position)
        number, in_header = self.place(line)
        return MetalError(self.name, reason, number, in_header, lines[line - 1].strip(), **position)


@dataclass
class Argument:
    """One buffer: data, or the size of an output that is not initialised."""

    name: str
    data: np.ndarray | None
    output: bool = False
    size: int = 0


class _Request(ctypes.Structure):
    """The same layout as in runtime/runtime.h."""

    _fields_ = [
        ("kernel", ctypes.c_uint64),
        ("buffers", ctypes.c_uint64 * 128),
        ("threadgroup_bytes", ctypes.c_uint64 * 32),
        ("grid", ctypes.c_uint * 3),
        ("threadgroup", ctypes.c_uint * 3),
        *((name, ctypes.c_uint) for name in ("order", "seed", "poison", "checked", "counting", "flush_denormals")),
        *((name, ctypes.c_uint) for name in ("allow_same_value", "allow_uninitialised", "allow_divergent_barrier")),
        ("timeout_s", ctypes.c_uint),
    ]


class _Report(ctypes.Structure):
    """The same layout as in runtime/runtime.h."""

    _fields_ = [
        ("failed", ctypes.c_uint),
        ("has_thread", ctypes.c_uint),
        ("line", ctypes.c_int),
        ("pc", ctypes.c_uint),
        ("thread", ctypes.c_uint * 3),
        ("group", ctypes.c_uint * 3),
        *((name, ctypes.c_uint64) for name in ("collectives", "barriers", "accesses")),
        *((name, ctypes.c_uint64) for name in ("threadgroup_peak", "threadgroup_traffic")),
        ("reason", ctypes.c_char * 512),
    ]


def run(
    text: Text,
    source: compiler.Source,
    arguments: Sequence[Argument],
    grid: Sequence[int],
    threadgroup: Sequence[int],
    threadgroup_bytes: Sequence[int] = (),
) -> list[np.ndarray]:
    """Run a kernel function on buffers 0, 1, ...; returns the bytes of the outputs.

    Raises:
        MetalError: it does not compile, or does something it must not.
    """
    settings = session.settings()
    program = _compiled(text, source, settings)
    if min(*grid, *threadgroup) < 1:
        raise text.error(f"expected a grid and a threadgroup of at least one thread, found {grid} and {threadgroup}")
    request = _Request(kernel=program.address(), grid=tuple(grid), threadgroup=tuple(threadgroup))
    request.threadgroup_bytes[: len(threadgroup_bytes)] = threadgroup_bytes
    request.order, request.seed, request.poison = ORDERS.index(settings.order), settings.seed, settings.poison
    request.checked, request.counting, request.flush_denormals = settings.checked, settings.counters, settings.ftz
    request.allow_same_value = "same_value_writes" in settings.allow
    request.allow_uninitialised = "uninit_threadgroup" in settings.allow
    request.allow_divergent_barrier = "divergent_barrier" in settings.allow
    request.timeout_s = settings.timeout_s
    with _lock:
        results = _dispatch(text, program, request, arguments)
        if settings.repeat and "order_dependent" not in settings.allow:
            request.order = ORDERS.index("forward" if settings.order == "reverse" else "reverse")
            request.poison = settings.poison ^ 0xBD
            _expect_same(text, arguments, results, _dispatch(text, program, request, arguments, record=False))
    return results


def _expect_same(
    text: Text, arguments: Sequence[Argument], results: Sequence[np.ndarray], again: Sequence[np.ndarray]
) -> None:
    names = [a.name for a in arguments if a.output]
    for name, one, other in zip(names, results, again, strict=True):
        different = np.flatnonzero(one != other)
        if different.size:
            raise text.error(
                f"byte {different[0]} of output {name}, and {different.size - 1} others, depend on the order of "
                "threads, or nobody writes them"
            )


def _compiled(text: Text, source: compiler.Source, settings: Settings) -> compiler.Program:
    try:
        return compiler.build(source, settings.checked, settings.contract)
    except compiler.CompileError as wrong:
        message = str(wrong)
        first = re.match(r"\{L(\d+)\}: ", message)
        if first:  # MetalError shows this line
            message = message[first.end() :]
        raise text.error(_named(text, None, (), message), int(first[1]) if first else 0) from None


def _dispatch(
    text: Text, program: compiler.Program, request: _Request, arguments: Sequence[Argument], record: bool = True
) -> list[np.ndarray]:
    library, settings = compiler.runtime(), session.settings()
    library.msl_buffer.restype = ctypes.c_uint64
    library.msl_buffer.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint]
    report, sizes = _Report(), []
    try:
        for i, a in enumerate(arguments):
            data = None if a.data is None else np.ascontiguousarray(a.data)
            sizes.append(a.size if data is None else data.nbytes)
            start = None if data is None else data.ctypes.data
            request.buffers[i] = library.msl_buffer(start, sizes[i], a.output, request.poison, settings.alignment)
        started = time.perf_counter()
        library.msl_dispatch(ctypes.byref(request), ctypes.byref(report))
        seconds = time.perf_counter() - started
        if report.failed:
            raise _failure(text, program, report, arguments)
        for i, a in enumerate(arguments):
            if not library.msl_intact(i):
                raise text.error(f"write out of bounds: beside {a.name}")
        if record:
            _record(text, request, report, arguments, seconds)
        return [
            np.frombuffer(ctypes.string_at(request.buffers[i], sizes[i]), np.uint8)
            for i, a in enumerate(arguments)
            if a.output
        ]
    finally:
        library.msl_free()


def _record(text: Text, request: _Request, report: _Report, arguments: Sequence[Argument], seconds: float) -> None:
    done = Dispatch(
        text.name,
        tuple(request.grid),
        tuple(request.threadgroup),
        seconds,
        *(report.accesses, report.collectives, report.barriers),
        *(report.threadgroup_peak, report.threadgroup_traffic),
    )
    if session.settings().counters:
        for i, a in enumerate(arguments):
            counts = (ctypes.c_uint64 * 8)()
            compiler.runtime().msl_traffic(i, counts)
            done.traffic[a.name] = Traffic(*counts)
    session.record(done)


def _failure(text: Text, program: compiler.Program, report: _Report, arguments: Sequence[Argument]) -> MetalError:
    line = report.line or (line_at(program.library, report.pc) if report.pc else 0)
    reason = _named(text, program, arguments, report.reason.decode(errors="replace"))
    if line >= compiler.FILE:
        reason += f"\n  at {_elsewhere(program, line)}"
    if not report.has_thread:
        return text.error(reason, line)
    return text.error(reason, line, thread=tuple(report.thread), group=tuple(report.group))


def _elsewhere(program: compiler.Program, line: int) -> str:
    name = program.files[line // compiler.FILE - 1] if line // compiler.FILE <= len(program.files) else "?"
    return f"{name.rsplit('/', 1)[-1]}:{line % compiler.FILE}"


def _named(text: Text, program: compiler.Program | None, arguments: Sequence[Argument], reason: str) -> str:
    """Put names in the place of {L12}, a line, {B2}, a buffer, and {V0}, a threadgroup variable."""

    def name(match: re.Match[str]) -> str:
        kind, number = match[1], int(match[2])
        if kind == "B":
            return arguments[number].name
        if kind == "V" and program:
            return program.variables.get(number, f"argument {number - 1000}")
        if number >= compiler.FILE:
            return _elsewhere(program, number) if program else f"MLX's headers, {number % compiler.FILE}"
        line, in_header = text.place(number)
        return f"header {line}" if in_header else str(line)

    return re.sub(r"\{([LBV])(\d+)\}", name, reason)
