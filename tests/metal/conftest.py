"""Tests that run Metal kernels on the CPU. Helpers of the ops' tests are imported by their plain names, too."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).parent))

import compiler
import emulator
import mlx.core as mx
import support

from metal_kernels import _dispatch


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """The same numbers for a test whether it runs alone or with others."""
    support.reseed(request.node.name)


@pytest.fixture
def emulation() -> Iterator[emulator.Session]:
    """Every dispatch of the test is checked and repeated in the reverse order, and is recorded."""
    if reason := compiler.missing():
        pytest.skip(f"NO METAL KERNEL WAS RUN: {reason}")
    with emulator.emulate(repeat=True) as session:
        yield session


@pytest.fixture
def emulated(emulation: emulator.Session, monkeypatch: pytest.MonkeyPatch) -> Iterator[emulator.Session]:
    """The ops of metal_kernels run their kernels, in the emulator."""
    monkeypatch.setattr(_dispatch, "kernel_factory", emulator.metal_kernel)
    # What is being compiled by mx.compile has no values yet, and the emulator needs them.
    mx.disable_compile()
    with _dispatch.kernels("metal"):
        yield emulation
    mx.enable_compile()
