"""Rules that the project's own kernel texts keep, whether or not a test runs them."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import mlx.core as mx
import pytest
from lint import pointers_without_space

from metal_kernels import KernelError, _dispatch
from metal_kernels._cases import cases

TEXTS = sorted((Path(__file__).parents[2] / "metal_kernels").rglob("*.metal"))


def name_of(path: Path) -> str:
    return path.name


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.S)


def test_there_are_texts() -> None:
    assert TEXTS


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_ascii(path: Path) -> None:
    """MLX hands the text to Metal as ASCII, and what is not fails on a Mac only."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert not [f"line {n}: {line}" for n, line in enumerate(lines, 1) if not line.isascii()]


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_pointers_have_an_address_space(path: Path) -> None:
    found = list(pointers_without_space(without_comments(path.read_text(encoding="utf-8"))))
    assert not [f"line {n}: {words}" for n, words in found]


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_size(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.usefixtures("emulated")
def test_every_text_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases that decide on a user's machine which kernels are used leave none out."""
    read, source = set(), _dispatch.source
    monkeypatch.setattr(_dispatch, "source", lambda name: read.add(name) or source(name))
    _dispatch._made.cache_clear()
    for case in cases():
        if not case.real:
            with contextlib.suppress(KernelError):  # not made for these sizes
                mx.eval(case.call())
    assert read == {path.stem for path in TEXTS}
