"""How the numbers of a matrix are stored: MLX's formats, which layers have which, and layers that take another."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metal_kernels import AFFINE_BITS, AFFINE_GROUPS, FORMATS

from .experts.resident import ExpertMatrix
from .linear import QuantizedEmbedding, QuantizedLinear, QuantizedWideLinear, WideLinear

_AFFINE = re.compile(r"affine(\d)-g(\d+)")


@dataclass(frozen=True)
class Format:
    """What MLX's `dequantize` must know; `mode` "plain" is numbers that are not packed.

    Args:
        bits, group_size: of one number, and columns that share a scale; 0 if plain.
    """

    mode: str
    bits: int = 0
    group_size: int = 0

    def __post_init__(self) -> None:
        affine = self.mode == "affine" and self.bits in AFFINE_BITS and self.group_size in AFFINE_GROUPS
        fixed = FORMATS.get(self.mode, (0, 0) if self.mode == "plain" else None)
        if not affine and fixed != (self.bits, self.group_size):
            raise ValueError(f"no such format: {self.mode}, {self.bits} bits, groups of {self.group_size}")

    @classmethod
    def named(cls, name: str) -> Format:
        """From "bf16", "mxfp4", "mxfp8", "nvfp4", or "affine4-g64": 4 bits, groups of 64.

        Raises:
            ValueError: there is no such format.
        """
        if name == "bf16":
            return cls("plain")
        if name in FORMATS:
            return cls(name, *FORMATS[name])
        match = _AFFINE.fullmatch(name)
        if match is None:
            raise ValueError(name)
        return cls("affine", int(match[1]), int(match[2]))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Format:
        """Raises KeyError or ValueError if these are not the values of a format."""
        plain = values["mode"] == "plain"
        return cls("plain") if plain else cls(values["mode"], values["bits"], values["group_size"])

    def json(self) -> dict[str, Any]:
        """As the index of a converted folder has it."""
        if self.mode == "plain":
            return {"mode": self.mode}
        return {"mode": self.mode, "group_size": self.group_size, "bits": self.bits}

    def __str__(self) -> str:
        if self.mode == "affine":
            return f"affine{self.bits}-g{self.group_size}"
        return "bf16" if self.mode == "plain" else self.mode

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of MLX's functions for packed weights."""
        return {"mode": self.mode, "bits": self.bits, "group_size": self.group_size}

    def fits(self, columns: int) -> bool:
        return self.mode == "plain" or columns % max(32, self.group_size) == 0

    def arrays(self, *shape: int) -> dict[str, mx.array]:
        """Zeros in the place of a matrix [..., rows, columns]: weight, and scales and biases if it has them."""
        *rows, columns = shape
        if self.mode == "plain":
            return {"weight": mx.zeros(shape, mx.bfloat16)}
        groups = (*rows, columns // self.group_size)
        weight = mx.zeros((*rows, columns * self.bits // 32), mx.uint32)
        if self.mode != "affine":
            return {"weight": weight, "scales": mx.zeros(groups, mx.uint8)}
        return {"weight": weight, "scales": mx.zeros(groups, mx.bfloat16), "biases": mx.zeros(groups, mx.bfloat16)}


Matrix = nn.Linear | QuantizedLinear | WideLinear | nn.Embedding | QuantizedEmbedding | ExpertMatrix


def matrices(model: nn.Module) -> Iterator[tuple[str, Matrix]]:
    """The modules of a model whose format may change, by path."""
    for path, module in model.named_modules():
        if isinstance(module, Matrix):
            yield path, module


def format_of(module: Matrix) -> Format:
    mode = getattr(module, "mode", "plain")
    return Format("plain") if mode == "plain" else Format(mode, module.bits, module.group_size)


def shape_of(module: Matrix) -> tuple[int, ...]:
    """Shape of the matrix, [..., rows, columns], however it is packed."""
    format = format_of(module)
    *rows, words = module.weight.shape
    return (*rows, words * 32 // format.bits if format.bits else words)


def adapt(model: nn.Module, formats: Mapping[str, Format]) -> None:
    """Put layers that hold these formats, still zeros, in the place of those at these paths.

    Paths that are not of the model are passed over: where experts are streamed, no module holds them.
    """
    modules = dict(model.named_modules())
    for path, format in formats.items():
        if path in modules:
            parent, _, name = path.rpartition(".")
            setattr(modules[parent], name, _with(modules[path], format))


def _with(module: Matrix, format: Format) -> Matrix:
    shape = shape_of(module)
    *_, rows, columns = shape
    new: Matrix
    if isinstance(module, ExpertMatrix):
        new = module
        new.mode, new.bits, new.group_size = format.mode, format.bits, format.group_size
        for name in ("scales", "biases"):
            new.pop(name, None)
    elif format.mode == "plain":
        wide = isinstance(module, WideLinear | QuantizedWideLinear)
        embedding = isinstance(module, nn.Embedding | QuantizedEmbedding)
        new = nn.Embedding(rows, columns) if embedding else nn.Linear(columns, rows, bias=False)
        new = WideLinear(columns, rows) if wide else new
    elif isinstance(module, nn.Embedding | QuantizedEmbedding):
        new = QuantizedEmbedding(rows, columns, **format.options)
    elif isinstance(module, WideLinear | QuantizedWideLinear):
        new = QuantizedWideLinear(columns, rows, **format.options)
    else:
        new = QuantizedLinear(columns, rows, **format.options)
    for name, array in format.arrays(*shape).items():
        setattr(new, name, array)
    return new
