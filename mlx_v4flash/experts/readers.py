"""Bytes of a file into memory: three ways behind one protocol. Any number of threads may read at once."""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

Buffers = Sequence[memoryview]


class Reader(Protocol):
    """Of one open file."""

    def read(self, offset: int, buffers: Buffers) -> None:
        """Fill writable byte buffers, one after another, from this byte of the file on.

        Raises:
            OSError: the system cannot read, or the file is not as it was when it was opened.
            EOFError: it ends before; the text says how many bytes there were.
        """

    def close(self) -> None: ...


class PlainReader:
    """`preadv`, through the page cache. A file that is replaced under its name goes on being read as it was."""

    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, self.flags)
        self._seen = self._state()

    def read(self, offset: int, buffers: Buffers) -> None:
        fill(self.fd, offset, list(buffers))
        self.expect_unchanged()

    def expect_unchanged(self) -> None:
        """Called after the bytes are read, so that a change while reading is found too."""
        if self._state() != self._seen:
            raise OSError("it was written to after the model was loaded")

    def close(self) -> None:
        os.close(self.fd)

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self.fd)
        return found.st_size, found.st_mtime_ns


class DirectReader(PlainReader):
    """Past the page cache: F_NOCACHE on macOS, where memory of MLX is aligned; elsewhere O_DIRECT and a copy.

    Raises:
        OSError: the file system cannot.
    """

    flags = PlainReader.flags | getattr(os, "O_DIRECT", 0)
    # Of offsets, lengths and addresses; divides what any file system asks for.
    block = 4096
    # Read at once: large enough for a disk, small enough to be copied from the processor's cache, while others read.
    bounce_bytes = 1 << 20

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._own = threading.local()
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(self.fd, fcntl.F_NOCACHE, 1)

    def read(self, offset: int, buffers: Buffers) -> None:
        if sys.platform == "darwin":
            super().read(offset, buffers)
            return
        left, nbytes = [b for b in buffers if len(b)], sum(len(b) for b in buffers)
        start, end = offset // self.block * self.block, offset + nbytes
        with memoryview(self._bounce()) as bounce:
            while start < end:
                with bounce[: -(-(end - start) // self.block) * self.block] as part:
                    count = os.preadv(self.fd, [part], start)
                with bounce[max(offset - start, 0) : max(min(count, end - start), 0)] as data:
                    left = _scatter(data, left)
                start += count
                if count % self.block or not count:  # the last block of a file may be a part of one
                    break
        if left:
            raise EOFError(f"{nbytes - sum(len(b) for b in left):,} bytes")
        self.expect_unchanged()

    def _bounce(self) -> mmap.mmap:
        """Page-aligned memory of this thread."""
        held: mmap.mmap | None = getattr(self._own, "memory", None)
        if held is None:
            held = self._own.memory = mmap.mmap(-1, self.bounce_bytes)
        return held


def _scatter(data: memoryview, buffers: list[memoryview]) -> list[memoryview]:
    """Copy bytes into buffers, one after another; what of them is still empty. Other threads run meanwhile."""
    done = 0
    while done < len(data):
        count = min(len(data) - done, len(buffers[0]))
        np.copyto(np.frombuffer(buffers[0][:count], np.uint8), np.frombuffer(data[done : done + count], np.uint8))
        done += count
        buffers = [buffers[0][count:], *buffers[1:]] if count < len(buffers[0]) else buffers[1:]
    return buffers


class MapReader(PlainReader):
    """Copies out of a memory map. Never chosen by itself: a disk that fails under a map ends the process."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._map = mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ)

    def read(self, offset: int, buffers: Buffers) -> None:
        self.expect_unchanged()  # before: touching what was cut off ends the process
        if offset + sum(len(b) for b in buffers) > len(self._map):
            raise EOFError(f"{max(len(self._map) - offset, 0):,} bytes")
        with memoryview(self._map) as whole, whole[offset : offset + sum(len(b) for b in buffers)] as data:
            _scatter(data, list(buffers))

    def close(self) -> None:
        self._map.close()
        super().close()


READERS: dict[str, type[PlainReader]] = {"pread": PlainReader, "direct": DirectReader, "map": MapReader}


def fill(fd: int, offset: int, buffers: list[memoryview]) -> None:
    """Fill all buffers; the system may give less than it was asked for.

    Raises:
        OSError, EOFError: as `Reader.read`.
    """
    done = 0
    while buffers:
        count = os.preadv(fd, buffers, offset + done)
        if not count:
            raise EOFError(f"{done:,} bytes")
        done += count
        while buffers and count >= len(buffers[0]):
            count -= len(buffers.pop(0))
        if count:
            buffers[0] = buffers[0][count:]


class Files:
    """Readers of one kind, one for each file, opened when first needed."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._open: dict[Path, Reader] = {}
        self._lock = threading.Lock()

    def open(self, path: Path) -> Reader:
        """From now on the file is read as it is now, or not at all."""
        with self._lock:
            reader = self._open.get(path)
            if reader is None:
                reader = self._open[path] = READERS[self.kind](path)
        return reader

    def read(self, path: Path, offset: int, buffers: Buffers) -> None:
        """As `Reader.read`."""
        self.open(path).read(offset, buffers)

    def close(self) -> None:
        with self._lock:
            for reader in self._open.values():
                reader.close()
            self._open.clear()
