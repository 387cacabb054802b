"""Run Metal kernels on the CPU: `metal_kernel` takes the place of mx.fast.metal_kernel.

    with emulator.emulate(order="reverse", counters=True) as session:
        (y,) = emulator.metal_kernel("copy", ["x"], ["y"], body)(inputs=[x], ...)
    print(session.dispatches[-1].traffic["x"].read_bytes)

Without `emulate` the defaults of `Settings` hold: every memory access is checked, and an error is raised as MetalError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import compiler
import mlx.core as mx
import numpy as np
from dispatch import Argument, MetalError, Text, run
from session import Dispatch, Session, Settings, Traffic, emulate
from signature import Template, generate, shape_arguments

__all__ = [
    "Argument",
    "Dispatch",
    "MetalError",
    "Session",
    "Settings",
    "Text",
    "Traffic",
    "emulate",
    "metal_kernel",
    "run",
]

MAX_BUFFER_INDEX = 31  # of Metal, for one kernel


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: dict[str, str] | None = None,
) -> Callable[..., list[mx.array]]:
    """The same arguments as mx.fast.metal_kernel. Options of the compiler are accepted and have no effect."""

    def call(
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Template | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        named = dict(zip(input_names, arrays, strict=True))
        outputs = dict(zip(output_names, output_dtypes, strict=True))
        made = generate(name, header, source, named, outputs, template or [], atomic_outputs)
        if verbose:
            print(made.text)
        text = Text(name, made.text, made.body_line)
        if not made.text.isascii():
            line = next(i for i, words in enumerate(made.text.splitlines(), 1) if not words.isascii())
            raise text.error("a character beyond ASCII, which MLX hands to Metal as something else", line)
        buffers = []
        for key, array in named.items():
            data, strides = _bytes_of(array, ensure_row_contiguous)
            buffers.append(Argument(key, data))
            facts = {
                "shape": np.array(array.shape, np.int32),
                "strides": strides,
                "ndim": np.array([array.ndim], np.int32),
            }
            buffers += [Argument(f"{key}_{w}", facts[w]) for w in shape_arguments(key, array, source)]
        for (key, dtype), shape in zip(outputs.items(), output_shapes, strict=True):
            start = None if init_value is None else _numpy(mx.full(shape, init_value, dtype=dtype))
            buffers.append(Argument(key, start, True, math.prod(shape) * dtype.size))
        if len(buffers) > MAX_BUFFER_INDEX:
            raise text.error(f"{len(buffers)} buffers, at most {MAX_BUFFER_INDEX}")
        results = run(text, compiler.Source(made.text, made.expression), buffers, grid, threadgroup)
        return [_array(raw, shape, d) for raw, shape, d in zip(results, output_shapes, output_dtypes, strict=True)]

    return call


def _numpy(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


def _bytes_of(array: mx.array, row_contiguous: bool) -> tuple[np.ndarray, np.ndarray]:
    """Memory of an array from its first element on, and its strides in elements."""
    mx.eval(array)
    view = np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)
    if row_contiguous:
        view = np.ascontiguousarray(view).reshape(array.shape)
        return view, np.array([math.prod(array.shape[i + 1 :]) for i in range(array.ndim)], np.int64)
    strides = np.array([s // view.itemsize for s in view.strides], np.int64)
    if (strides < 0).any():
        raise NotImplementedError("an input with negative strides that is not made contiguous")
    extent = 1 + sum((n - 1) * int(s) for n, s in zip(view.shape, strides, strict=True)) if view.size else 0
    return np.lib.stride_tricks.as_strided(view, (extent,), (view.itemsize,)).copy(), strides


def _array(raw: np.ndarray, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    return mx.array(raw).view(dtype).reshape(shape) if raw.size else mx.zeros(shape, dtype)
