"""Shape checks shared by all ops, and the choice between a kernel and its reference.

No op has a kernel yet: every public op checks its arguments and runs its reference.
"""

from __future__ import annotations

import mlx.core as mx


class KernelError(ValueError):
    """An op was called with arrays it is not defined for."""


def expect_shape(op: str, name: str, array: mx.array, shape: tuple[int, ...]) -> None:
    """Raise KernelError unless `array` has exactly `shape`."""
    if array.shape != shape:
        raise KernelError(f"{op}: {name}: expected shape {shape}, found {array.shape}")


def active() -> str:
    """Which implementation the ops run: always "reference" in this version."""
    return "reference"
