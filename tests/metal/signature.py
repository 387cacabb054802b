"""The text that mx.fast.metal_kernel makes of a body; test_emulator.py compares it with MLX's own."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

# MSL's attributes of a kernel parameter. MLX adds those whose name occurs in the body.
_INDICES = """
dispatch_quadgroups_per_threadgroup dispatch_simdgroups_per_threadgroup quadgroup_index_in_threadgroup
quadgroups_per_threadgroup simdgroup_index_in_threadgroup simdgroups_per_threadgroup thread_execution_width
thread_index_in_quadgroup thread_index_in_simdgroup thread_index_in_threadgroup threads_per_simdgroup
""".split()
_POSITIONS = """
dispatch_threads_per_threadgroup grid_origin grid_size thread_position_in_grid thread_position_in_threadgroup
threadgroup_position_in_grid threadgroups_per_grid threads_per_grid threads_per_threadgroup
""".split()
BUILTINS = dict(sorted({**dict.fromkeys(_INDICES, "uint"), **dict.fromkeys(_POSITIONS, "uint3")}.items()))

# An array of fewer elements is passed in constant memory.
SMALL = 8

_TYPES = {
    mx.bool_: "bool",
    mx.float32: "float",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.complex64: "complex64_t",
    **{getattr(mx, f"{u}int{n}"): f"{u}int{n}_t" for u in ("", "u") for n in (8, 16, 32, 64)},
}
Template = Sequence[tuple[str, "bool | int | mx.Dtype"]]


def type_name(dtype: mx.Dtype) -> str:
    return _TYPES[dtype]


@dataclass(frozen=True)
class Generated:
    """The full text, the name of the kernel in it, the expression that instantiates it, and where the body starts."""

    text: str
    name: str
    expression: str
    body_line: int


def _value(value: bool | int | mx.Dtype) -> str:
    return type_name(value) if isinstance(value, mx.Dtype) else str(int(value))


def _kernel_name(name: str, inputs: Sequence[mx.array], output_dtypes: Sequence[mx.Dtype], template: Template) -> str:
    parts = ["custom_kernel", name]
    if template:
        parts.append("".join(f"_{_value(value)}" for _, value in template).replace("-", "_"))
    for array in inputs:
        suffix = "s" if array.ndim == 0 else "c" if array.size < SMALL else ""
        parts.append(type_name(array.dtype) + suffix)
    return "_".join(parts + [type_name(dtype) for dtype in output_dtypes])


def shape_arguments(name: str, array: mx.array, source: str) -> list[str]:
    """Which of `shape`, `strides`, `ndim` of an input the body mentions."""
    return [what for what in ("shape", "strides", "ndim") if array.ndim and f"{name}_{what}" in source]


def generate(
    name: str,
    header: str,
    source: str,
    inputs: dict[str, mx.array],
    outputs: dict[str, mx.Dtype],
    template: Template,
    atomic_outputs: bool,
) -> Generated:
    full_name = _kernel_name(name, list(inputs.values()), list(outputs.values()), template)
    parameters = []
    for input_name, array in inputs.items():
        space = "constant" if math.prod(array.shape) < SMALL else "device"
        pointer = "*" if array.ndim else "&"
        parameters.append(f"const {space} {type_name(array.dtype)}{pointer} {input_name}")
        for what in shape_arguments(input_name, array, source):
            kind = {"shape": "int*", "strides": "int64_t*", "ndim": "int&"}[what]
            parameters.append(f"const constant {kind} {input_name}_{what}")
    for output_name, dtype in outputs.items():
        kind = f"atomic<{type_name(dtype)}>" if atomic_outputs else type_name(dtype)
        parameters.append(f"device {kind}* {output_name}")
    parameters = [f"  {p} [[buffer({i})]]" for i, p in enumerate(parameters)]
    parameters += [f"  {kind} {b} [[{b}]]" for b, kind in BUILTINS.items() if b in source]

    head = header
    if template:
        kinds = (
            (n, "bool" if isinstance(v, bool) else "int" if isinstance(v, int) else "typename") for n, v in template
        )
        head += "template <" + ", ".join(f"{kind} {n}" for n, kind in kinds) + ">\n"
    head += f"[[kernel]] void {full_name}(\n" + ",\n".join(parameters) + ") {\n"
    text, expression = f"{head}{source}\n}}\n", full_name
    if template:
        expression = f"{full_name}<{', '.join(_value(value) for _, value in template)}>"
        text += f'\ntemplate [[host_name("{full_name}")]] [[kernel]] decltype({expression}) {expression};\n'
    return Generated(text, full_name, expression, head.count("\n") + 1)


def is_builtin(attribute: str) -> bool:
    return re.fullmatch(r"\w+", attribute) is not None and attribute in BUILTINS
