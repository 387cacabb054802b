"""The header of a safetensors file: what it holds and where, checked before any data is read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CheckpointError

# numpy's type for each that can occur; BF16 and the FP8 types, which numpy lacks, as bits of that width.
# A type that is not here cannot be part of this model.
DTYPES: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(("U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), np.dtype(np.uint8)),
    **dict.fromkeys(("U16", "BF16"), np.dtype(np.uint16)),
    **{f"I{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"u{size}") for size in (4, 8)},
    **{f"F{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
    "BOOL": np.dtype(np.bool_),
}

# The format's own limit. A first number beyond it means that the file is something else.
_HEADER_LIMIT_BYTES = 100_000_000

_AGAIN = "\nhint: download the file again"


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `offset` and `nbytes` count from the start of the file, `dtype` is safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ComputedTensor(StoredTensor):
    """One that is computed from what lies there: `values` gives an array of its shape and type."""

    values: Callable[[], np.ndarray[Any, Any]]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one file, in the order of their data.

    Raises:
        CheckpointError: the file is absent, is not safetensors, or its data is not exactly what the header says.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(256)
            header_bytes = _header_bytes(path, start, file_bytes)
            file.seek(8)
            text = file.read(header_bytes)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e.strerror}\nhint: check the path and its permissions") from e
    return _layout(path, _parse(path, text), 8 + header_bytes, file_bytes)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, refusing a key that comes twice; for `object_pairs_hook`.

    Raises:
        KeyError: with the name of the key.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(next(n for n in names if names.count(n) > 1))
    return values


def _header_bytes(path: Path, start: bytes, file_bytes: int) -> int:
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: expected safetensors data, found a Git LFS pointer of {file_bytes} bytes\n"
            "hint: run `git lfs pull` in the folder it was cloned to, or download the file itself"
        )
    if start.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise CheckpointError(
            f"{path}: expected safetensors data, found a web page\n"
            "hint: the download was answered with a page, such as a login or an error; download the file again"
        )
    if len(start) < 8:
        raise CheckpointError(
            f"{path}: expected a safetensors file, found {file_bytes} bytes, too short for one{_AGAIN}"
        )
    header_bytes = int.from_bytes(start[:8], "little")
    if not 2 <= header_bytes <= _HEADER_LIMIT_BYTES or start[8:9] not in (b"{", b""):
        raise CheckpointError(
            f"{path}: expected a safetensors file, found one that begins with {start[:8]!r}, "
            f"which is not the length of a header{_AGAIN}"
        )
    if 8 + header_bytes > file_bytes:
        raise _truncated(path, 8 + header_bytes, file_bytes)
    return header_bytes


def _truncated(path: Path, expected: int, found: int) -> CheckpointError:
    return CheckpointError(
        f"{path}: truncated: expected at least {expected:,} bytes, found {found:,}\n"
        "hint: the download stopped early; resume it or download the file again"
    )


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=unique_keys)
    except KeyError as e:
        raise CheckpointError(f"{path}: expected each name once, found {e.args[0]} twice in the header{_AGAIN}") from e
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: expected a header of JSON, found {e}{_AGAIN}") from e
    assert isinstance(header, dict)  # it begins with a brace
    header.pop("__metadata__", None)
    return header


def _layout(path: Path, header: dict[str, Any], data_start: int, file_bytes: int) -> dict[str, StoredTensor]:
    tensors = sorted(_entries(path, header, data_start), key=lambda t: (t.offset, t.nbytes))
    end = data_start
    last = max((t.offset + t.nbytes for t in tensors), default=end)
    if last > file_bytes:
        raise _truncated(path, last, file_bytes)
    for tensor in tensors:
        if tensor.offset != end:
            how = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: {tensor.name}: expected data at byte {end:,}, found {tensor.offset:,}, which {how}{_AGAIN}"
            )
        end += tensor.nbytes
    if file_bytes > end:
        raise CheckpointError(
            f"{path}: expected {end:,} bytes, found {file_bytes:,}: {file_bytes - end:,} belong to no tensor{_AGAIN}"
        )
    return {t.name: t for t in tensors}


def _entries(path: Path, header: dict[str, Any], data_start: int) -> Iterator[StoredTensor]:
    for name, entry in header.items():
        if not _is_entry(entry):
            raise CheckpointError(
                f"{path}: {name}: expected dtype, shape and data_offsets, found {str(entry)[:200]}{_AGAIN}"
            )
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if dtype not in DTYPES:
            raise CheckpointError(
                f"{path}: {name}: expected a type of DeepSeek's checkpoints, found {dtype}\n"
                "hint: use the checkpoint as DeepSeek published it"
            )
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
        if end - begin != nbytes:
            raise CheckpointError(
                f"{path}: {name}: expected {nbytes:,} bytes for {dtype} {shape}, found {end - begin:,} "
                f"in data_offsets{_AGAIN}"
            )
        yield StoredTensor(name, dtype, shape, path, data_start + begin, nbytes)


def _is_entry(entry: Any) -> bool:
    if not (isinstance(entry, dict) and isinstance(entry.get("dtype"), str)):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        return False
    # Beyond this no file has a shape, and the products below would be numbers too long to print.
    return len(shape) < 32 and all(type(n) is int and 0 <= n < 2**63 for n in shape + offsets)
