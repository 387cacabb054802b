"""`experts.pack`: every routed expert as one record at a page boundary (docs/format.md)."""

from __future__ import annotations

import dataclasses
import math
import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from .errors import CheckpointError
from .safetensors_header import DTYPES

PAGE = 16384
HEADER = b"mlx_v4flash.pack" + (1).to_bytes(4, "little") + PAGE.to_bytes(4, "little")

# Arrays of MLX by safetensors' names of their types, and the type that numpy can view them as.
MLX_TYPES = {
    "U32": mx.uint32, "U8": mx.uint8, "I32": mx.int32, "BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in MLX_TYPES.items()}

# In a record gate and up come first, as they are used first; the weight of each before its scales and biases.
_MATRICES, _PARTS = ("w1", "w3", "w2"), ("weight", "scales", "biases")


@dataclass(frozen=True)
class Component:
    """One array of a record; `offset` counts from the start of the record, and is a multiple of PAGE."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class PackedLayer:
    """Where the records of a layer lie, and what each holds.

    Record e begins at byte `offset + e * stride` of the file and has `stride` bytes.

    Args:
        formats: of each matrix, as MLX names it: mode, and group_size and bits unless the mode is "plain".
        crc32: of each whole record, padding included.
    """

    offset: int
    stride: int
    formats: dict[str, dict[str, Any]]
    components: tuple[Component, ...]
    crc32: tuple[int, ...]

    def record(self, expert: int) -> tuple[int, int]:
        """Offset in the file and length of one expert's record."""
        return self.offset + expert * self.stride, self.stride

    @property
    def end(self) -> int:
        return self.offset + len(self.crc32) * self.stride

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> PackedLayer:
        """Raises KeyError, TypeError or ValueError if these are not the values of a layer."""
        parts = tuple(Component(p["name"], p["dtype"], tuple(p["shape"]), p["offset"]) for p in values["components"])
        layer = cls(values["offset"], values["stride"], values["formats"], parts, tuple(values["crc32"]))
        end = 0
        for part in parts:
            if part.dtype not in MLX_TYPES or part.offset % PAGE or part.offset < end:
                raise ValueError(f"component {part.name}: {part.dtype} at {part.offset}")
            end = part.offset + part.nbytes
        if end > layer.stride or layer.stride % PAGE or layer.offset % PAGE or layer.offset < PAGE:
            raise ValueError(f"records of {layer.stride} bytes at {layer.offset}")
        return layer


def aligned(nbytes: int) -> int:
    """The next multiple of PAGE."""
    return -(-nbytes // PAGE) * PAGE


def lay_out(arrays: Mapping[str, mx.array], offset: int, formats: dict[str, dict[str, Any]]) -> PackedLayer:
    """Layout of a layer whose records hold arrays such as these, `w1.weight` and so on; no record yet."""
    end, components = 0, []
    for name in sorted(arrays, key=_order):
        components.append(Component(name, NAMES[arrays[name].dtype], arrays[name].shape, end))
        end = aligned(end + arrays[name].nbytes)
    return PackedLayer(offset, end, formats, tuple(components), ())


def record_bytes(layer: PackedLayer, arrays: Mapping[str, mx.array]) -> bytearray:
    """One record, zeros between its components."""
    record = bytearray(layer.stride)
    for part in layer.components:
        assert arrays[part.name].shape == part.shape, f"{part.name}: {arrays[part.name].shape}, not {part.shape}"
        record[part.offset : part.offset + part.nbytes] = as_numpy(arrays[part.name]).data.cast("B")
    return record


def with_records(layer: PackedLayer, crc32: list[int]) -> PackedLayer:
    return dataclasses.replace(layer, crc32=tuple(crc32))


def as_numpy(array: mx.array) -> np.ndarray[Any, Any]:
    """The array's bits, contiguous; bfloat16 as uint16."""
    array = mx.contiguous(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
    mx.eval(array)
    return np.array(array, copy=mx.cuda.is_available())


def read_layer(path: Path, layer: PackedLayer, readers: ThreadPoolExecutor) -> dict[str, mx.array]:
    """All experts of a layer: each component as one array [E, *shape].

    Raises:
        CheckpointError: the file has become shorter, or cannot be read.
    """
    arrays = {}
    for part in layer.components:
        held = mx.uint16 if part.dtype == "BF16" else MLX_TYPES[part.dtype]
        arrays[part.name] = mx.zeros((len(layer.crc32), *part.shape), held)
    mx.eval(arrays)
    hosts = {name: np.array(array, copy=mx.cuda.is_available()) for name, array in arrays.items()}

    def read(expert: int) -> None:
        read_record(path, layer, expert, {name: host[expert] for name, host in hosts.items()})

    list(readers.map(read, range(len(layer.crc32))))
    if mx.cuda.is_available():
        arrays = {name: mx.array(host) for name, host in hosts.items()}
    types = {part.name: MLX_TYPES[part.dtype] for part in layer.components}
    return {name: array.view(types[name]) for name, array in arrays.items()}


def read_record(path: Path, layer: PackedLayer, expert: int, into: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Fill one writable contiguous buffer for each component; safe to call from several threads.

    Raises:
        CheckpointError: the file has become shorter, or cannot be read.
    """
    start, length = layer.record(expert)
    buffers: list[memoryview] = []
    end = 0
    for part in layer.components:
        buffers += [memoryview(bytearray(part.offset - end))] if part.offset > end else []
        buffers.append(into[part.name].data.cast("B"))
        end = part.offset + part.nbytes
    try:
        with path.open("rb", buffering=0) as file:
            done = 0
            while buffers:
                count = os.preadv(file.fileno(), buffers, start + done)
                if not count:
                    raise CheckpointError(
                        f"{path}: expected {length:,} bytes of an expert at {start:,}, found {done:,}: the file was "
                        "changed or truncated\nhint: convert the checkpoint again"
                    )
                done += count
                while buffers and count >= len(buffers[0]):
                    count -= len(buffers.pop(0))
                if count:
                    buffers[0] = buffers[0][count:]
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}\nhint: check the file and its permissions") from e


def check_records(path: Path, layer: PackedLayer) -> list[int]:
    """Numbers of the experts whose record differs from its checksum."""
    bad = []
    with path.open("rb") as file:
        for expert, expected in enumerate(layer.crc32):
            start, length = layer.record(expert)
            file.seek(start)
            if zlib.crc32(file.read(length)) != expected:
                bad.append(expert)
    return bad


def _order(name: str) -> tuple[int, int, str]:
    matrix, _, part = name.partition(".")
    known = _MATRICES.index(matrix) if matrix in _MATRICES else len(_MATRICES)
    return known, _PARTS.index(part), name
