"""What a model thinks of every token of a text, on disk: its log-probabilities in 16 bits each (docs/quality.md)."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .errors import RequestError
from .journal import flush, write_all, write_file
from .passage import Array, Passage

FORMAT, VERSION = "mlx_v4flash.reference", 1
_LEVELS = 65535


def encode(logits: Array, targets: Array) -> Array:
    """Records of T tokens from logits [T, V] and the ids [T] that follow in the text.

    A log-probability becomes `low + step * code`, at most half a step away, which is (largest - smallest) / 131070.
    `top` is the most likely token and `chosen` the log-probability of the one that follows, both exact.
    """
    logprobs = log_softmax(logits)
    records = np.empty(len(logprobs), _record(logprobs.shape[1]))
    records["low"] = low = logprobs.min(axis=1).astype(np.float32)
    records["step"] = step = np.maximum((logprobs.max(axis=1) - low) / _LEVELS, 1e-30).astype(np.float32)
    codes = np.rint((logprobs - low[:, None]) / step[:, None])
    records["codes"] = codes.clip(0, _LEVELS)
    records["top"] = logprobs.argmax(axis=1)
    records["chosen"] = np.take_along_axis(logprobs, targets[:, None], axis=1)[:, 0]
    return records


def decode(records: Array) -> Array:
    """Log-probabilities [T, V] in float64; what rounding added to the sum of probabilities is taken out again."""
    # The lowest is left out: taking out the sum does away with it.
    return log_softmax(records["step"][:, None] * records["codes"].astype(np.float64))


def log_softmax(x: Array) -> Array:
    """[T, V] to float64."""
    x = x.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


class Reference:
    """A file of blocks, one for each chunk: records of the tokens, then their CRC-32.

    Its first line is JSON and says what it holds; a file that is cut off holds the blocks that are whole.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path, self.head = path, head
        self.passage = Passage(head["tokens"], head["context"], head["chunk"])
        self._start = len(_line(head))
        self.done = self._count()

    @classmethod
    def open(cls, path: Path) -> Reference:
        """Raises RequestError if this is no reference, one of another version, or one that is not finished."""
        reference = cls(path, _read_head(path))
        if not reference.finished:
            raise RequestError(
                f"{path}: expected {len(reference.passage.spans)} blocks, found {reference.done}: writing it was "
                "interrupted, or it was damaged\nhint: run the command that wrote it again; it continues"
            )
        return reference

    @classmethod
    def begin(cls, path: Path, head: dict[str, Any]) -> Reference:
        """Begin a file, or continue one with the same head.

        Raises:
            RequestError: the file is something else, or was begun with another model, text or options.
        """
        head = {"format": FORMAT, "version": VERSION, **head}
        if path.exists():
            found = _read_head(path)
            differs = ", ".join(sorted(k for k in found.keys() | head.keys() if found.get(k) != head.get(k)))
            if differs:
                raise RequestError(
                    f"{path}: expected a reference of the same model and text, found another {differs}\n"
                    "hint: remove the file, or choose another place"
                )
        else:
            write_file(path, [_line(head)])
        return cls(path, head)

    @property
    def finished(self) -> bool:
        return self.done == len(self.passage.spans)

    @property
    def nbytes(self) -> int:
        """Of the finished file."""
        return self._offset(len(self.passage.spans))

    def append(self, parts: Iterable[Array]) -> None:
        """Write the records of the next block; they are on disk when this returns."""
        crc = 0
        with self.path.open("r+b", buffering=0) as file:
            file.truncate(self._offset(self.done))
            file.seek(0, os.SEEK_END)
            for part in parts:
                data = part.tobytes()
                crc = zlib.crc32(data, crc)
                write_all(file.fileno(), data)
            write_all(file.fileno(), crc.to_bytes(4, "little"))
            flush(file.fileno())
        self.done += 1

    def block(self, number: int) -> Array:
        """Records of a block.

        Raises:
            RequestError: they were damaged.
        """
        found = self._read(number)
        if found is None:
            raise RequestError(f"{self.path}: block {number}: its checksum differs\nhint: remove the file")
        return found

    def _read(self, number: int) -> Array | None:
        with self.path.open("rb") as file:
            file.seek(self._offset(number))
            data = file.read(self._offset(number + 1) - self._offset(number))
        if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
            return None
        return np.frombuffer(data[:-4], _record(self.head["vocab_size"]))

    def _count(self) -> int:
        """Blocks that are there; the last may have been written before the crash, but not all of it."""
        size = self.path.stat().st_size
        count = sum(self._offset(n + 1) <= size for n in range(len(self.passage.spans)))
        return count - 1 if count and self._read(count - 1) is None else count

    def _offset(self, block: int) -> int:
        spans = self.passage.spans
        tokens = spans[block][0] if block < len(spans) else self.passage.tokens
        return self._start + tokens * _record(self.head["vocab_size"]).itemsize + 4 * block


def _record(vocab_size: int) -> np.dtype[Any]:
    return np.dtype([("low", "<f4"), ("step", "<f4"), ("top", "<i4"), ("chosen", "<f4"), ("codes", "<u2", vocab_size)])


def _line(head: dict[str, Any]) -> bytes:
    return json.dumps(head, sort_keys=True).encode() + b"\n"


def _read_head(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            head = json.loads(file.readline(1 << 16))
        found = (head["format"], head["version"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise RequestError(
            f"{path}: expected a file that quality --save-reference wrote, found {e!r}\nhint: name another file"
        ) from e
    if found != (FORMAT, VERSION):
        raise RequestError(
            f"{path}: expected format {FORMAT!r} version {VERSION}, found {found[0]!r} version {found[1]!r}\n"
            "hint: write it again with this version of mlx-v4flash"
        )
    return dict(head)
