"""What a conversion has finished, on disk: so that it continues after a crash, and no file is ever half written."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import ConvertError


class Journal:
    """A file of JSON lines: first what is converted, then one line for each finished unit.

    A line is written once everything that it speaks of is on disk. A line cut off by a crash does not count.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        """Begin, or continue if the file is there with the same head.

        Raises:
            ConvertError: the file is of another source or format version.
        """
        self.path, self.units = path, {}
        lines = _complete_lines(path)
        if lines and lines[0] != head:
            differs = ", ".join(sorted(k for k in lines[0].keys() | head.keys() if lines[0].get(k) != head.get(k)))
            raise ConvertError(
                f"{path.parent}: expected a conversion of the same source, found one begun with another {differs}\n"
                "hint: convert the first source again, or choose another folder"
            )
        for line in lines[1:]:
            self.units[line["unit"]] = line
        # Written anew, so that the next line does not follow half of one.
        write_file(path, (_line(values) for values in [head, *self.units.values()]))

    def finish(self, unit: str, values: dict[str, Any]) -> None:
        line = {"unit": unit, **values}
        with self.path.open("ab", buffering=0) as file:
            write_all(file.fileno(), _line(line))
            flush(file.fileno())
        self.units[unit] = line


def write_file(path: Path, chunks: Iterable[bytes | bytearray | memoryview]) -> tuple[int, int]:
    """Write a file so that it is complete whenever it is there; returns bytes and CRC-32."""
    part = path.with_name(path.name + ".part")
    nbytes = crc = 0
    with part.open("wb", buffering=0) as file:
        for chunk in chunks:
            write_all(file.fileno(), chunk)
            nbytes, crc = nbytes + len(chunk), zlib.crc32(chunk, crc)
        flush(file.fileno())
    rename(part, path)
    return nbytes, crc


def write_all(file: int, data: bytes | bytearray | memoryview) -> None:
    """Write everything at the file's position; the system may take less at once."""
    left = memoryview(data).cast("B")
    while left:
        left = left[os.write(file, left) :]


def flush(file: int) -> None:
    """Wait until a file, or the names in a folder, survive a loss of power."""
    if sys.platform == "darwin":  # where fsync leaves it to the drive when to write
        with suppress(OSError):  # a file system that cannot do this
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            return
    os.fsync(file)


def rename(part: Path, path: Path) -> None:
    """Give a finished file its name, for good."""
    part.replace(path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make names that were given or removed in a folder survive a loss of power."""
    folder = os.open(path, os.O_RDONLY)
    try:
        flush(folder)
    finally:
        os.close(folder)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Refuse a second conversion into a folder at the same time; a process that dies lets go."""
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as e:
        raise ConvertError(f"{folder}: another conversion into this folder runs\nhint: wait until it ends") from e
    finally:
        os.close(held)


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True).encode() + b"\n"
