"""On a Mac the tests of the kernels run them on its GPU. What only the emulator counts is not known there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import pytest

# What makes the kernels; a test of this file puts the emulator here.
factory: Callable[..., Any] = mx.fast.metal_kernel


@dataclass
class Launch:
    """One call of a kernel. Asking for what the emulator counts skips the test that asks."""

    kernel: str
    grid: tuple[int, ...]
    threadgroup: tuple[int, ...]

    def __getattr__(self, name: str) -> Any:
        pytest.skip(f"NOT SEEN ON A DEVICE: {name} of a launch is counted in the emulator only")


@dataclass
class Session:
    """Kernels launched inside `record`."""

    dispatches: list[Launch] = field(default_factory=list)


_session = Session()


@contextlib.contextmanager
def record(**settings: Any) -> Iterator[Session]:
    """In the place of `emulator.emulate`: a device decides itself how it runs, so settings are passed over."""
    global _session
    if "ftz" in settings:
        pytest.skip("NOT SEEN ON A DEVICE: whether it flushes denormals is not known")
    before, _session = _session, Session()
    try:
        yield _session
    finally:
        _session = before


def metal_kernel(**what: Any) -> Callable[..., list[mx.array]]:
    """mx.fast.metal_kernel, recorded."""
    kernel = factory(**what)

    def call(**how: Any) -> list[mx.array]:
        _session.dispatches.append(Launch(what["name"], how["grid"], how["threadgroup"]))
        out: list[mx.array] = kernel(**how)
        return out

    return call
