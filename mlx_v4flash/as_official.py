"""Plain weights as DeepSeek's own files would hold them: FP4 experts, FP8 layers, power-of-two scales (spec 9.3).

A block's scale is the smallest power of two by which its largest value, divided, is within the format: 6 for each 32
columns of a row of an expert, 448 for each 128 x 128 of another layer. Values in between go to the nearest code, ties
to the even one. This is the rule that the model's activations are rounded by (spec 6.3), and no value of official
weights changes under it: a scale that it finds smaller than theirs still has all their values.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import Checkpoint, ComputedTensor, StoredTensor, read
from .config import ModelConfig
from .errors import CheckpointError
from .inventory import TensorSpec, official_tensors
from .safetensors_header import DTYPES
from .weights import stored_tensor

Array = np.ndarray[Any, Any]

# What config.json says of such weights.
SETTINGS: dict[str, Any] = {
    "expert_dtype": "fp4",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
}


@dataclass(frozen=True)
class Minifloat:
    """A small floating-point type.

    Args:
        mantissa: so many bits.
        bias: of the exponent.
        sign: number of the highest bit.
        top, power: the largest value is top * 2^power, with top from 0.5 to 1.
    """

    mantissa: int
    bias: int
    sign: int
    top: float
    power: int

    def exponents(self, largest: Array) -> Array:
        """Of the scales of blocks with these largest absolute values; 0 for a block of zeros."""
        fraction, exponent = np.frexp(largest)  # fraction from 0.5 to 1, as `top` is
        found = (exponent - self.power + (fraction > self.top)).clip(-126, 126)
        return np.where(largest == 0, 0, found)

    def codes(self, x: Array) -> Array:
        """Nearest codes of float32 values within the range, as uint8 with the sign above the exponent."""
        bits = x.view(np.uint32)
        # What lies below 16 bits only says on which side of a tie a value is, and one bit is enough for that.
        found: Array = self._table[(bits >> 16) | ((bits & 0xFFFF) != 0)]
        return found

    @functools.cached_property
    def _table(self) -> Array:
        """Code of every float32 with 16 zeros at its end."""
        bits = np.arange(1 << 16, dtype=np.uint32) << 16
        exponent = np.maximum((bits >> 23 & 255).astype(np.int32) - 127, 1 - self.bias).clip(max=self.power)
        size = np.nan_to_num(np.abs(bits.view(np.float32)), nan=0).clip(max=self.top * 2**self.power)
        units = np.rint(size * _power_of_two(self.mantissa - exponent)).astype(np.int32)
        codes = ((exponent + self.bias - 1) << self.mantissa) + units
        table: Array = (codes | (bits >> 31 << self.sign).astype(np.int32)).astype(np.uint8)
        return table


FP4 = Minifloat(mantissa=1, bias=1, sign=3, top=0.75, power=3)
FP8 = Minifloat(mantissa=3, bias=7, sign=7, top=0.875, power=9)


def round_fp4(w: Array) -> tuple[Array, Array]:
    """float32 [R, C] -> two codes to a byte [R, C / 2], the even column in the low half; scale bytes [R, C / 32]."""
    blocks = w.reshape(len(w), -1, 32)
    exponents = FP4.exponents(np.abs(blocks).max(axis=-1))
    codes = FP4.codes(blocks * _power_of_two(-exponents)[..., None]).reshape(w.shape)
    return codes[:, ::2] | codes[:, 1::2] << 4, (exponents + 127).astype(np.uint8)


def round_fp8(w: Array, block: tuple[int, int] = (128, 128)) -> tuple[Array, Array]:
    """float32 [R, C] -> codes [R, C], and scale bytes, one for each block; the last ones may be cut short."""
    rows, columns = (range(0, size, step) for size, step in zip(w.shape, block, strict=True))
    largest = np.maximum.reduceat(np.maximum.reduceat(np.abs(w), rows, axis=0), columns, axis=1)
    exponents = FP8.exponents(largest)
    factors = _power_of_two(-exponents).repeat(block[0], 0)[: len(w)].repeat(block[1], 1)[:, : w.shape[1]]
    return FP8.codes(w * factors), (exponents + 127).astype(np.uint8)


def as_official(checkpoint: Checkpoint, config_json: dict[str, Any]) -> Checkpoint:
    """A checkpoint of plain weights as one under official names in official types; values are rounded when read.

    Args:
        config_json: what its config.json holds.

    Raises:
        ConfigError: sizes that the blocks do not divide.
    """
    assert not checkpoint.config.quantized, "rounded already"
    config = ModelConfig.from_dict(config_json | SETTINGS, str(checkpoint.folder / "config.json"))
    tensors: dict[str, StoredTensor] = {}
    specs = official_tensors(config)
    for name in official_tensors(checkpoint.config):
        plain, scale = stored_tensor(checkpoint, name), name.removesuffix("weight") + "scale"
        if scale in specs and scale != name:
            tensors[name], tensors[scale] = _pair(plain, {n: specs[n] for n in (name, scale)}, config)
        else:
            tensors[name] = dataclasses.replace(plain, name=name)
    return Checkpoint(checkpoint.folder, config, tensors, checkpoint.drafter, "official")


def official_config(folder: Path) -> dict[str, Any]:
    """Its config.json, saying that weights are as in the official files."""
    values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return values | SETTINGS


def _pair(plain: StoredTensor, specs: dict[str, TensorSpec], config: ModelConfig) -> tuple[StoredTensor, StoredTensor]:
    """A matrix and its scales. The scales found on the way to the codes are kept until they are read."""
    (name, matrix), (scale, table) = specs.items()
    kept: dict[str, Array] = {}

    def rounded() -> tuple[Array, Array]:
        stored, rows = read(plain), config.weight_block_size[0]
        # No more rows than belong together, as the steps between then stay in the processor's cache: 4 times as fast.
        parts = (_float32(stored, slice(i, i + rows), plain) for i in range(0, len(stored), rows))
        found = [round_fp4(w) if matrix.dtypes[0] == "I8" else round_fp8(w, config.weight_block_size) for w in parts]
        codes, scales = (np.concatenate(column) for column in zip(*found, strict=True))
        return codes, scales

    def codes() -> Array:
        found, kept["scales"] = rounded()
        return found

    def scales() -> Array:
        return kept.pop("scales") if kept else rounded()[1]

    return _computed(name, matrix, plain, codes), _computed(scale, table, plain, scales)


def _computed(name: str, spec: TensorSpec, plain: StoredTensor, values: Callable[[], Array]) -> ComputedTensor:
    nbytes = math.prod(spec.shape) * DTYPES[spec.dtypes[0]].itemsize
    return ComputedTensor(name, spec.dtypes[0], spec.shape, plain.path, plain.offset, nbytes, values)


def _float32(stored: Array, rows: slice, tensor: StoredTensor) -> Array:
    """Rows of a stored matrix; those of bfloat16 as uint16."""
    w = stored[rows]
    if tensor.dtype == "BF16":
        w = (w.astype(np.uint32) << 16).view(np.float32)
    if not np.isfinite(w).all():
        row, column = (int(i) for i in np.argwhere(~np.isfinite(w))[0])
        raise CheckpointError(
            f"{tensor.name}: expected finite weights, found {w[row, column]} at {[row + rows.start, column]} in "
            f"{tensor.path.name}\nhint: the file is damaged; download it again"
        )
    return w


def _power_of_two(exponents: Array) -> Array:
    """2^exponents in float32, exactly, from 2^-126 to 2^127."""
    return ((exponents + 127).astype(np.uint32) << 23).view(np.float32)
