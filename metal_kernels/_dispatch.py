"""Kernel, or reference: the only place that decides, and the only one that makes kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import resources
from typing import Any, TypeVar

import mlx.core as mx

SETTINGS = ("auto", "metal", "stock", "reference")
VARIABLE = "MLX_V4FLASH_KERNELS"
# Of sorted experts, MLX's own products are the ordinary choice: ours are as yet unmeasured.
PREFILL_SETTINGS = ("mlx", "metal")
PREFILL_VARIABLE = "MLX_V4FLASH_EXPERT_PREFILL"

Kernel = Callable[..., list[mx.array]]
Result = TypeVar("Result")

# What makes a kernel from its text. Tests put an emulator here, which runs the same text on the CPU.
kernel_factory: Callable[..., Any] = mx.fast.metal_kernel

# Ops whose kernels were compared with their references on this machine and found right; filled from its profile.
approved: set[str] = set()

_setting: str | None = None
_expert_prefill: str | None = None


class KernelError(ValueError):
    """An op was called with arrays it is not defined for, or a setting that cannot be honoured."""


def expect_shape(op: str, name: str, array: mx.array, shape: tuple[int, ...]) -> None:
    """Raise KernelError unless `array` has exactly `shape`."""
    if array.shape != shape:
        raise KernelError(f"{op}: {name}: expected shape {shape}, found {array.shape}")


def expect_rotation(op: str, cos: mx.array, sin: mx.array, T: int, width: int) -> None:
    """Raise KernelError unless cos and sin are [T, P/2] with P at most `width`."""
    pairs = min(cos.shape[-1], width // 2)
    expect_shape(op, "cos", cos, (T, pairs))
    expect_shape(op, "sin", sin, (T, pairs))


def expect_blocks(op: str, name: str, width: int, block: int) -> None:
    """Raise KernelError unless the blocks of a rounding divide `width`."""
    if width % block:
        raise KernelError(f"{op}: {name}: expected a number of values divisible by {block}, found {width}")


def setting() -> str:
    """The choice in force: of the innermost `kernels(...)`, else of the environment, else "auto".

    Raises:
        KernelError: the environment names an unknown one.
    """
    return _setting if _setting is not None else _checked(os.environ.get(VARIABLE, "auto"), VARIABLE, SETTINGS)


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """Choose how ops are computed inside the block.

    Args:
        choice: "auto" runs the kernels approved on this machine where they cover the shapes, and stock MLX ops
            elsewhere; "metal" every kernel, and raises where one does not cover its shapes; "stock" none, and compiles
            what it runs in their place; "reference" none.

    Raises:
        KernelError: another choice.
    """
    global _setting
    before, _setting = _setting, _checked(choice, "kernels", SETTINGS)
    try:
        yield
    finally:
        _setting = before


@contextmanager
def expert_prefill(choice: str) -> Iterator[None]:
    """Choose inside the block how many pairs sorted by expert are multiplied, in the place of the environment.

    Args:
        choice: "mlx" uses MLX's sorted products; "metal" this package's kernels, where `kernels` lets them run.

    Raises:
        KernelError: another choice.
    """
    global _expert_prefill
    before, _expert_prefill = _expert_prefill, _checked(choice, "expert_prefill", PREFILL_SETTINGS)
    try:
        yield
    finally:
        _expert_prefill = before


def use_expert_prefill(op: str, *, covers: bool, limit: str) -> bool:
    """Whether a call with sorted experts runs its kernel `op`: where that was chosen, as `use_kernel` says."""
    choice = _expert_prefill or os.environ.get(PREFILL_VARIABLE, "mlx")
    chosen = _checked(choice, PREFILL_VARIABLE, PREFILL_SETTINGS) == "metal"
    return chosen and use_kernel(op, covers=covers, limit=limit)


def use_kernel(op: str, *, covers: bool = True, limit: str = "") -> bool:
    """Whether a call of `op` runs its kernel.

    Args:
        covers: whether the kernel is made for the shapes and types of this call; `limit` says for which it is.

    Raises:
        KernelError: kernels are demanded, but this call is not covered or there is no Metal device.
    """
    choice = setting()
    if choice not in ("auto", "metal"):
        return False
    if choice == "auto":
        return covers and op in approved and _has_device()
    if not _has_device():
        raise KernelError(f"{op}: {VARIABLE}=metal: expected a Metal device, found {mx.default_device()}")
    if not covers:
        raise KernelError(f"{op}: the kernel covers {limit}\nhint: use the setting auto")
    return True


def without_kernel(reference: Callable[..., Result], *args: Any) -> Result:
    """An op by plain MLX operations, as `reference` writes them.

    Where stock MLX is chosen, and by default on a Metal device, they are compiled first: neighbouring operations on
    elements then run as one. Not for ops whose shapes change from step to step, as each would be compiled anew.

    Args:
        args: arrays, and values that can be hashed.
    """
    if setting() != "stock" and not (setting() == "auto" and _on_metal()):
        return reference(*args)
    constants = tuple(None if isinstance(arg, mx.array) else (arg,) for arg in args)
    compiled: Callable[..., Result] = _compiled(reference, constants)
    return compiled(*(arg for arg in args if isinstance(arg, mx.array)))


@cache
def _compiled(reference: Callable[..., Any], constants: tuple[tuple[Any] | None, ...]) -> Callable[..., Any]:
    def call(*arrays: mx.array) -> Any:
        given = iter(arrays)
        return reference(*(next(given) if constant is None else constant[0] for constant in constants))

    return mx.compile(call)


def kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], header: str = "") -> Kernel:
    """The kernel whose body is `<name>.metal`; made at its first use.

    Args:
        inputs, outputs: names of the arrays in the body, in the order of the call.
        header: names of `.metal` files with functions the body calls, separated by blanks.
    """
    made: Kernel = _made(kernel_factory, name, inputs, outputs, header)
    return made


@cache
def _made(
    factory: Callable[..., Any], name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], header: str
) -> Any:
    functions = "\n".join(source(part) for part in header.split())
    return factory(
        name=name, input_names=list(inputs), output_names=list(outputs), source=source(name), header=functions
    )


@cache
def scalar(value: float) -> mx.array:
    """A float for a kernel to read as `name[0]`: template arguments are whole numbers only."""
    return mx.array([value], mx.float32)


@cache
def source(name: str) -> str:
    """Text of `<name>.metal`."""
    return resources.files(__package__).joinpath(f"{name}.metal").read_text(encoding="ascii")


def active() -> str:
    """What the ops of this process run, in a word or a list."""
    if setting() == "auto":
        return ", ".join(sorted(approved)) if approved and _has_device() else "reference"
    return setting()


def _has_device() -> bool:
    emulated = kernel_factory is not mx.fast.metal_kernel
    return emulated or _on_metal()


def _on_metal() -> bool:
    return mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu


def _checked(choice: str, where: str, known: tuple[str, ...]) -> str:
    if choice not in known:
        raise KernelError(f"{where}: expected {' or '.join(known)}, found {choice!r}")
    return choice
