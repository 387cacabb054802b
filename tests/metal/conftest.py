"""Tests that run Metal kernels: on the CPU in the emulator, or on the GPU of a Mac.

Helpers of the ops' tests are imported by their plain names, too.
"""

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
import on_device
import support

from metal_kernels import _dispatch

ON_DEVICE = mx.metal.is_available()
if ON_DEVICE:  # before the tests import it
    emulator.emulate = on_device.record  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """The same numbers for a test whether it runs alone or with others."""
    support.reseed(request.node.name)


@pytest.fixture
def emulation() -> Iterator[emulator.Session]:
    """Every dispatch of the test is checked and repeated in the reverse order, and is recorded."""
    if reason := "on a Mac kernels run on its GPU" if ON_DEVICE else compiler.missing():
        pytest.skip(f"NO KERNEL WAS EMULATED: {reason}")
    with emulator.emulate(repeat=True) as session:
        yield session


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[emulator.Session]:
    """The ops of metal_kernels run their kernels: in the emulator, or on the GPU of a Mac."""
    if ON_DEVICE:
        monkeypatch.setattr(_dispatch, "kernel_factory", on_device.metal_kernel)
        with on_device.record() as launches, _dispatch.kernels("metal"):
            yield launches  # type: ignore[misc]
        return
    session = request.getfixturevalue("emulation")
    monkeypatch.setattr(_dispatch, "kernel_factory", emulator.metal_kernel)
    # What is being compiled by mx.compile has no values yet, and the emulator needs them.
    mx.disable_compile()
    with _dispatch.kernels("metal"):
        yield session
    mx.enable_compile()
