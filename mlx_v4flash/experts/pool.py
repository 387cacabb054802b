"""Memory of MLX for experts: ranges of slots that the host writes and the device reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import DeviceError

Record = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Shape:
    """One array of an expert, `w1.weight` and so on."""

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.size


Shapes = dict[str, Shape]


@dataclass(frozen=True)
class SlotRange:
    """Slots that lie one after another.

    `arrays` are what the device reads, [slots, *shape] each, and `hosts` writable views of the same bytes. Neither
    may be the input of an op that could take over its memory or be assigned to in part.
    """

    slots: int
    arrays: dict[str, mx.array]
    hosts: Record

    def record(self, slot: int) -> Record:
        """Views of one slot."""
        return {name: host[slot] for name, host in self.hosts.items()}

    def part(self, start: int, end: int) -> SlotRange:
        """Some of the slots, in the same memory."""
        arrays = {name: array[start:end] for name, array in self.arrays.items()}
        mx.eval(arrays)
        return SlotRange(end - start, arrays, {name: host[start:end] for name, host in self.hosts.items()})


def record_bytes(shapes: Shapes) -> int:
    return sum(shape.nbytes for shape in shapes.values())


def share(nbytes: int, records: Sequence[int], least: int, most: int) -> list[int]:
    """Slots of each layer for so many bytes, as evenly as may be; what is left over goes to the first layers.

    Args:
        records: bytes of an expert of each layer.
        least, most: slots of a layer.
    """
    each, rest = divmod(nbytes, sum(records))
    slots = []
    for record in records:
        more = rest >= record
        rest -= record if more else 0
        slots.append(min(max(each + more, least), most))
    return slots


def allocate(shapes: Sequence[Shapes], sizes: Sequence[int], buffer_bytes: int | None = None) -> list[SlotRange]:
    """Ranges of so many slots each; neighbours of the same shapes share buffers, one for each component.

    Args:
        buffer_bytes: most of one buffer; asked of the device if absent.

    Raises:
        DeviceError: the host cannot write what the device reads.
    """
    if mx.cuda.is_available():
        raise DeviceError(
            "experts: expected memory that host and device share, found a CUDA device\n"
            'hint: load with experts="resident" (--experts resident)'
        )
    if buffer_bytes is None:
        buffer_bytes = int(mx.device_info().get("max_buffer_length", 1 << 62)) if mx.metal.is_available() else 1 << 62
    ranges: list[SlotRange] = []
    while len(ranges) < len(sizes):
        first = shapes[len(ranges)]
        most = max(1, buffer_bytes // max(shape.nbytes for shape in first.values()))
        bank = [sizes[len(ranges)]]
        for size, other in zip(sizes[len(ranges) + 1 :], shapes[len(ranges) + 1 :], strict=True):
            if other != first or sum(bank) + size > most:
                break
            bank.append(size)
        ranges += _bank(first, bank)
    return ranges


def _bank(shapes: Shapes, sizes: list[int]) -> list[SlotRange]:
    # numpy has no bfloat16; its bits are written.
    held = {n: mx.uint16 if s.dtype == mx.bfloat16 else s.dtype for n, s in shapes.items()}
    whole = {name: mx.zeros((sum(sizes), *shape.shape), held[name]) for name, shape in shapes.items()}
    mx.eval(whole)
    hosts = {name: np.array(array, copy=False) for name, array in whole.items()}
    ranges, ends = [], np.cumsum([0, *sizes]).tolist()
    for start, end in pairwise(ends):
        arrays = {name: array[start:end].view(shapes[name].dtype) for name, array in whole.items()}
        mx.eval(arrays)
        ranges.append(SlotRange(end - start, arrays, {name: host[start:end] for name, host in hosts.items()}))
    return ranges
