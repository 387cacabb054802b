"""Compile the text of a kernel for the CPU, and keep the result in a cache.

clang comes from the package ziglang. Everything made is named by a hash of all that went into it, and put in place
by a rename, so several processes may share a cache and it may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import mlx.core as mx
from diagnostics import FILE, CompileError, judge, messages
from lint import pointers_without_space
from rewrite import OPENCL, STRICT, Kernel, entry, rewrite
from signature import is_builtin
from tokens import KernelTextError

HERE = Path(__file__).parent
CACHE_VARIABLE = "MLX_V4FLASH_EMULATOR_CACHE"

_STUBS = "atomic common compute integer logging math relational simdgroup simdgroup_matrix stdlib types"
_WARNINGS = """
-Wall -Werror=uninitialized -Werror=sometimes-uninitialized -Wno-unknown-attributes -Wno-ignored-attributes
-Wno-unknown-pragmas -Wno-unused -Wno-c++20-extensions -Wno-duplicate-decl-specifier -Wno-double-promotion
-Wno-main-return-type
""".split()
# -fstack-clash-protection: a frame larger than the guard below the stack cannot step over it.
_COMMON = """
--target=x86_64-linux-gnu -march=x86-64-v3 -fno-math-errno -ftrivial-auto-var-init=pattern -fstack-clash-protection
""".split()
# Without -f(b)float16-excess-precision=none, a * b + c in half or bfloat would be kept in float: too exact.
# -cl-single-precision-constant: `1.0` is a float in MSL.
_STRICT = """
--driver-mode=g++ -std=c++17 -nostdinc -nostdinc++ -fPIC -fno-exceptions -fno-rtti -Xclang
-ffloat16-excess-precision=none -Xclang -fbfloat16-excess-precision=none -Xclang -cl-single-precision-constant
-Wimplicit-float-conversion
""".split()
_OPENCL = [
    *"-cl-std=clc++2021 -cl-no-stdinc -fPIC -Xclang".split(),
    "-cl-ext=-__opencl_c_device_enqueue,-cl_khr_fp64,-__opencl_c_fp64,"
    "-__opencl_c_program_scope_global_variables,+__cl_clang_function_pointers",
]
# The hooks of -fsanitize=thread are ours, see runtime/checker.c. It ignores accesses wider than 16 bytes, hence no
# vectoriser. A shift into the sign bit is an error in C++17 only, and usual in code that packs bits.
_CHECKED = """
-O1 -gline-tables-only -gdwarf-4 -fsanitize=thread -mllvm -tsan-instrument-func-entry-exit=0 -mllvm
-tsan-instrument-atomics=0 -mllvm -tsan-instrument-read-before-write=1 -fno-vectorize -fno-slp-vectorize
-fsanitize=undefined,float-cast-overflow -fno-sanitize=null,shift-base,function,vptr -fsanitize-trap=undefined
-fsanitize-trap=float-cast-overflow -fno-sanitize-merge -fno-sanitize-debug-trap-reasons
""".split()
_FAST = "-O2 -gline-tables-only -gdwarf-4".split()


def missing() -> str | None:
    """Why kernels cannot be emulated on this machine; None if they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"the emulator of Metal kernels runs on Linux x86-64, this is {sys.platform} {platform.machine()}"
    if importlib.util.find_spec("ziglang") is None:
        return 'the emulator of Metal kernels needs a compiler: pip install -e ".[test]" installs ziglang'
    return None


# --- the cache --------------------------------------------------------------------------------------


@cache
def cache_folder() -> Path:
    named = os.environ.get(CACHE_VARIABLE)
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(named) if named else users / "mlx-v4flash" / "metal-emulator"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


@contextlib.contextmanager
def _workshop() -> Iterator[Path]:
    """A folder beside the results, so that they can be renamed into place."""
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="building-") as folder:
        yield Path(folder)


@cache
def _zig() -> str:
    spec = importlib.util.find_spec("ziglang")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent / "zig")


@cache
def mlx_headers() -> Path:
    return Path(mx.__file__).parent / "include"


@cache
def _tools() -> str:
    """What all results depend on: versions, and the files here that make them."""
    files = [
        *HERE.glob("shim/*"),
        *HERE.glob("runtime/*"),
        *(HERE / f"{n}.py" for n in ("compiler", "diagnostics", "rewrite", "tokens", "lint")),
    ]
    versions = [importlib.metadata.version("ziglang"), importlib.metadata.version("mlx")]
    return _hash(versions, [p.read_text() for p in sorted(files)])


def _run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([_zig(), *arguments], input=text, capture_output=True, text=True, env=_environment())


def _environment() -> dict[str, str]:
    zig_cache = str(cache_folder() / "zig")
    return {**os.environ, "ZIG_GLOBAL_CACHE_DIR": zig_cache, "ZIG_LOCAL_CACHE_DIR": zig_cache}


@cache
def runtime() -> ctypes.CDLL:
    """The loaded runtime. Its names are global: kernels find their hooks there."""
    sources = sorted(str(p) for p in (HERE / "runtime").glob("*.c"))
    library = cache_folder() / f"runtime-{_hash(_tools())}.so"
    if not library.exists():
        with _workshop() as folder:
            made = folder / "runtime.so"
            done = _run("cc", "-O2", "-Wall", "-shared", "-fPIC", *sources, "-lm", "-o", str(made))
            if done.returncode:
                raise RuntimeError(f"the runtime does not compile:\n{done.stderr}")
            made.rename(library)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


# --- from text to tokens that clang understands -----------------------------------------------------


def _preprocess(text: str, *options: str) -> str:
    """Expand macros and MLX's headers; Apple's are empty files, as the shim stands for all of them."""
    stubs = cache_folder() / "stubs"
    if not stubs.exists():
        with _workshop() as folder:
            for name in _STUBS.split():
                (folder / f"metal_{name}").touch()
            with contextlib.suppress(OSError):  # another process was faster
                folder.rename(stubs)
            folder.mkdir(exist_ok=True)
    done = _run(
        *"clang -E -x c++ -std=c++17 -nostdinc -nostdinc++ -undef -Wno-everything".split(),
        *"-D__METAL__=1 -D__METAL_VERSION__=320 -D__HAVE_BFLOAT__=1".split(),
        "-DMETAL_FUNC=inline __attribute__((always_inline))",
        *(f"-I{stubs}", f"-I{mlx_headers()}", *options, "-"),
        text=text,
    )
    if done.returncode:
        raise CompileError(messages(done.stderr))
    return done.stdout


def _number_files(text: str, files: list[str]) -> str:
    """Give the lines of every file but the kernel's own numbers; `files` gets their names."""

    def marker(match: re.Match[str]) -> str:
        line, name = int(match[1]), match[2]
        if name == "kernel":
            return f'# {line} "kernel"'
        if name not in files:
            files.append(name)
        return f'# {line + FILE * (files.index(name) + 1)} "{name}"'

    return re.sub(r'^# (\d+) "([^"]*)".*$', marker, text, flags=re.M)


@dataclass(frozen=True)
class Prelude:
    """What stands before a kernel: the shim, and MLX's utils.h if wanted. `macros` has those of utils.h."""

    dialect: str
    header: Path
    macros: Path
    files: tuple[str, ...]


@cache
def prelude(dialect: str, with_mlx: bool) -> Prelude:
    # It includes the shim of this checkout, so one that another made must not be taken for it.
    name = f"prelude-{dialect}-{'mlx' if with_mlx else 'bare'}-{_hash(_tools(), str(HERE))}"
    header, macros, files = (cache_folder() / f"{name}.{end}" for end in ("h", "macros", "json"))
    if not files.exists():
        names: list[str] = []
        body = definitions = ""
        if with_mlx:
            include = '#include "mlx/backend/metal/kernels/utils.h"\n'
            body, _ = rewrite(_number_files(_preprocess(include), names), dialect)
            definitions = _preprocess(include, "-dM")
        with _workshop() as folder:
            shim = HERE / "shim" / "msl_shim.h"
            (folder / "h").write_text(f'#include "{shim}"\nusing namespace metal;\n{body}\n')
            (folder / "macros").write_text(definitions)
            (folder / "json").write_text(json.dumps(names))
            for made, final in (("h", header), ("macros", macros), ("json", files)):
                (folder / made).rename(final)
    return Prelude(dialect, header, macros, tuple(json.loads(files.read_text())))


def _precompiled(before: Prelude, flags: tuple[str, ...]) -> Path:
    # It names the files it was made of, so one of another checkout or environment must not be taken for it.
    places = [str(path) for path in (before.header, HERE, mlx_headers())]
    result = cache_folder() / f"{before.header.stem}-{_hash(flags, places, _tools())}.pch"
    if not result.exists():
        with _workshop() as folder:
            made = folder / "pch"
            done = _run("clang", *flags, "-Xclang", "-emit-pch", "-c", "-o", str(made), str(before.header))
            if done.returncode:
                raise RuntimeError(f"the shim does not compile:\n{done.stderr}")
            made.rename(result)
    return result


# --- one kernel -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Text with a kernel, the expression that names it with its template arguments, and how to compile it."""

    text: str
    expression: str
    dialect: str = STRICT
    with_mlx: bool = True  # whether MLX's utils.h goes in front
    constants: tuple[tuple[int, object], ...] = ()  # function constants
    second_opinion: bool = True


@dataclass
class Program:
    """A compiled kernel: its entry point, and names for messages."""

    library: Path
    parameters: list[tuple[str, str]]
    variables: dict[int, str]
    files: list[str]
    loaded: ctypes.CDLL | None = field(default=None, repr=False)

    def address(self) -> int:
        if self.loaded is None:
            runtime()
            self.loaded = ctypes.CDLL(str(self.library))
        return int(ctypes.cast(self.loaded.msl_entry, ctypes.c_void_p).value or 0)


def _flags(dialect: str, checked: bool, contract: bool) -> tuple[str, ...]:
    language = ["-x", "c++", *_STRICT] if dialect == STRICT else ["-x", "cl", *_OPENCL]
    kind = _CHECKED if checked else _FAST
    return (*language, *_COMMON, *_WARNINGS, *kind, f"-ffp-contract={'fast' if contract else 'off'}")


programs: dict[str, Program] = {}


def build(source: Source, checked: bool = True, contract: bool = False) -> Program:
    """Compile, or take from the cache.

    Raises:
        CompileError: the text is wrong; also kept in the cache.
    """
    key = _hash(source.__dict__, checked, contract, _tools())
    if key in programs:
        return programs[key]
    library, facts, error = (cache_folder() / f"{key}.{end}" for end in ("so", "json", "error"))
    if error.exists():
        raise CompileError(error.read_text())
    if not facts.exists():
        try:
            _build(source, _flags(source.dialect, checked, contract), library, facts)
        except CompileError as reason:
            with _workshop() as folder:
                (folder / "error").write_text(str(reason))
                (folder / "error").rename(error)
            raise
    known = json.loads(facts.read_text())
    variables = {int(number): name for number, name in known["variables"].items()}
    programs[key] = Program(library, [tuple(p) for p in known["parameters"]], variables, known["files"])
    return programs[key]


def _build(source: Source, flags: tuple[str, ...], library: Path, facts: Path) -> None:
    before = prelude(source.dialect, source.with_mlx)
    files = list(before.files)
    macros = ("-imacros", str(before.macros))
    text = _number_files(_preprocess(f'#line 1 "kernel"\n{source.text}', *macros), files)
    try:
        for line, words in pointers_without_space(text) if source.second_opinion else ():
            raise KernelTextError(f"pointer type must have explicit address space qualifier: `{words}`", line)
        rewritten, kernel = _entry(source, text, source.dialect)
        jobs = [(source.dialect, flags, rewritten, ("-fPIC", "-c"))]
        if source.second_opinion:
            jobs.append((OPENCL, _flags(OPENCL, True, False), _entry(source, text, OPENCL)[0], ("-fsyntax-only",)))
            if "bfloat" in source.text:
                dump = ("-fsyntax-only", "-Xclang", "-ast-dump", "-Xclang", f"-ast-dump-filter={kernel.name}")
                jobs.append((STRICT, flags, rewritten, dump))
    except KernelTextError as wrong:
        raise CompileError(f"{{L{wrong.line}}}: {wrong.reason}") from wrong
    with _workshop() as folder:
        running = [_start(folder / str(i), source.with_mlx, *job) for i, job in enumerate(jobs)]
        for (dialect, *_), process in zip(jobs, running, strict=True):
            output, errors = process.communicate()
            if process.returncode not in (0, 1):
                raise RuntimeError(f"the compiler ended with {process.returncode}:\n{errors[-2000:]}")
            judge(process.returncode, output, errors, dialect == OPENCL)
        done = _run("ld.lld", "-shared", str(folder / "0.o"), "-o", str(folder / "so"))
        if done.returncode:
            raise CompileError(done.stderr)
        names = {"parameters": kernel.parameters, "variables": kernel.variables, "files": files}
        (folder / "json").write_text(json.dumps(names))
        (folder / "so").rename(library)
        (folder / "json").rename(facts)


def _entry(source: Source, text: str, dialect: str) -> tuple[str, Kernel]:
    rewritten, kernels = rewrite(text, dialect, dict(source.constants))
    name = source.expression.split("<")[0].strip()
    kernel = next((k for k in kernels if k.name == name), None)
    if kernel is None:
        raise KernelTextError(f"no kernel {name} in the text")
    return rewritten + entry(kernel, source.expression, is_builtin), kernel


def _start(
    stem: Path, with_mlx: bool, dialect: str, flags: tuple[str, ...], text: str, what: tuple[str, ...]
) -> subprocess.Popen[str]:
    path = stem.with_suffix(".cpp")
    path.write_text(text)
    header = _precompiled(prelude(dialect, with_mlx), flags)
    use = ("-Xclang", "-include-pch", "-Xclang", str(header), "-Xclang", "-fno-validate-pch")
    command = [_zig(), "clang", *flags, *use, *what, "-o", str(stem.with_suffix(".o")), str(path)]
    if what[0] == "-fsyntax-only":
        command.remove("-o"), command.remove(str(stem.with_suffix(".o")))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment())
