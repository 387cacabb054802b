"""Make every mistake of `mistakes.py`, one at a time, in a copy of the project, and see whether a test notices.

    python tests/mutations.py [--jobs N] [WORDS ...]

With words, only mistakes whose rule or text contains one of these ("stream", "a short read"). Prints a row for each
mistake: which test noticed it and with what message, or SURVIVED. Exits 1 if one survived, or failed with another
error than an assertion: then it was not the test that noticed. The copies lie in a temporary folder and the project is
only read.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mistakes import MISTAKES, Mistake

ROOT = Path(__file__).resolve().parents[1]
# In this order, each only if the one before it noticed nothing. Cases that lie beside the checkout are not part of the
# copy, so the result is the same everywhere.
GOLDEN = ("tests/test_golden.py",)
PARTS = ("tests/kernels", "tests/test_rope.py", "tests/test_linear.py")
ORACLE = ("tests/test_transformers_oracle.py",)
SKIP = shutil.ignore_patterns("__pycache__", "golden")
# Longer than any suite takes on a slow machine.
LIMIT_S = 900


def mistaken(mistake: Mistake, root: Path = ROOT) -> str:
    """The text of the file with the mistake in it.

    Raises:
        ValueError: the text to replace is not there exactly once, so the mistake has to be written anew.
    """
    text = (root / mistake.file).read_text(encoding="utf-8")
    for right, wrong in mistake.edits:
        if text.count(right) != 1:
            raise ValueError(f"{mistake.what}: expected once in {mistake.file}, found {text.count(right)}: {right!r}")
        text = text.replace(right, wrong)
    return text


@dataclass(frozen=True)
class Result:
    """The first failing test and its message; no test if none failed."""

    test: str | None
    message: str
    elapsed_s: float

    @property
    def asserted(self) -> bool:
        return self.test is not None and self.message.startswith(("AssertionError", "assert ", "Failed: DID NOT"))


@contextmanager
def copy_of(root: Path) -> Iterator[Path]:
    """A folder with what the suites need, of the project or of another copy."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("mlx_v4flash", "metal_kernels", "tests"):
            shutil.copytree(root / name, folder / name, ignore=SKIP)
        shutil.copy(root / "pyproject.toml", folder)
        (folder / "tests" / "golden").symlink_to(root / "tests" / "golden")
        yield folder


def first_failure(folder: Path, suites: Sequence[Sequence[str]] = (GOLDEN, PARTS, ORACLE)) -> Result:
    """Run the suites in a copy of the project until a test fails."""
    start = time.monotonic()
    # Compiled files are told apart by second and size: one of the right version could be taken for the wrong one.
    env = os.environ | {
        "MLX_V4FLASH_KERNELS": "reference", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder), "COLUMNS": "250",
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider", "-m", "not slow"]
    for suite in suites:
        done = subprocess.run([*command, *suite], cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT_S)
        if done.returncode == 1 and (found := re.search(r"^(?:FAILED|ERROR) (.+?) - (.*)$", done.stdout, re.MULTILINE)):
            return Result(found[1], found[2], time.monotonic() - start)
        if done.returncode != 0:
            return Result("none ran", done.stdout[-2000:] + done.stderr[-2000:], time.monotonic() - start)
    return Result(None, "", time.monotonic() - start)


def try_mistake(mistake: Mistake, root: Path) -> Result:
    with copy_of(root) as folder:
        (folder / mistake.file).write_text(mistaken(mistake, root), encoding="utf-8")
        if mistake.tests:
            return first_failure(folder, (mistake.tests,))
        return first_failure(folder, (PARTS, GOLDEN) if mistake.too_small else (GOLDEN, PARTS, ORACLE))


def check_copy(root: Path) -> None:
    """A copy must pass without a mistake, and must be what is tested."""
    result = first_failure(root)
    if result.test is not None:
        raise SystemExit(f"the tests fail without any mistake: {result.test}: {result.message}")
    with copy_of(root) as folder:
        (folder / "metal_kernels" / "__init__.py").write_text("raise AssertionError('the copy')", encoding="utf-8")
        if "the copy" not in first_failure(folder).message:
            raise SystemExit("the tests ran on another version of the project than the copy")


def row(mistake: Mistake, result: Result) -> str:
    found = "SURVIVED" if result.test is None else f"{result.test}  {result.message}"
    note = "" if result.asserted or result.test is None else "NOT AN ASSERTION: "
    return f"{mistake.rule:8} {mistake.what:46} {result.elapsed_s:5.1f} s  {note}{found}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="See whether the tests notice known mistakes.")
    parser.add_argument("words", nargs="*", metavar="WORDS", help="only mistakes whose rule or text contains one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mistakes at a time")
    options = parser.parse_args(arguments)
    chosen = [
        m for m in MISTAKES if not options.words or any(f" {w} " in f" {m.rule} {m.what} " for w in options.words)
    ]
    for mistake in chosen:
        mistaken(mistake)  # all of them before any is tried
    bad = 0
    # Copies are made of one copy, so that the project can go on changing.
    with copy_of(ROOT) as root, ThreadPoolExecutor(options.jobs) as pool:
        check_copy(root)
        for mistake, result in zip(chosen, pool.map(lambda m: try_mistake(m, root), chosen), strict=True):
            bad += not result.asserted
            print(row(mistake, result), flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} mistakes are noticed")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
