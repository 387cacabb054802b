"""Which reader and how many threads are fastest on this disk: measured once, and remembered."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import platform
import random
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from metal_kernels import _profile

from .readers import READERS, PlainReader

# A map is never chosen: a disk that fails under it ends the process.
# macOS has no call that empties the page cache, so it would be measured there, and would take memory from the experts.
KINDS, THREADS = ("direct",) if sys.platform == "darwin" else ("direct", "pread"), (4, 8)
# Experts smaller than this are those of test models, for which nothing has to be measured.
LEAST_BYTES = 1 << 20
_BLOCK = 16384


@dataclass(frozen=True)
class Choice:
    """How to read; bytes_per_s is None if it was not measured."""

    reader: str = "pread"
    threads: int = 4
    bytes_per_s: float | None = None


def choose(path: Path, record_bytes: int) -> Choice:
    """The remembered choice for the disk that holds a file; without one, the fastest of `measure`."""
    if record_bytes < LEAST_BYTES or path.stat().st_size < 2 * record_bytes:
        return Choice()
    kept = _kept(path)
    try:
        choice = Choice(**json.loads(kept.read_text(encoding="utf-8")))
        if choice.reader in KINDS and choice.threads in THREADS:
            with closing(READERS[choice.reader](path)) as reader:  # another disk may have got the number of that one
                reader.read(0, [memoryview(bytearray(_BLOCK))])
            return choice
    except (OSError, EOFError, ValueError, TypeError):
        pass
    try:
        best = max(measure(path, record_bytes), key=lambda choice: choice.bytes_per_s or 0.0)
    except (OSError, EOFError):
        return Choice()  # the first read that matters will say what is wrong
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(asdict(best)) + "\n", encoding="utf-8")
        part.replace(kept)
    except OSError:
        pass  # it is measured again the next time
    return best


def measure(path: Path, record_bytes: int, seconds: float = 0.15, rounds: int = 3) -> list[Choice]:
    """Every way that works here with its speed: the median of rounds of about so many seconds of random reads.

    The ways take turns: a disk that others use, or that is fast in bursts, changes its speed meanwhile.
    """
    file_bytes, speeds = path.stat().st_size, dict[tuple[str, int], list[float]]()
    with ExitStack() as opened:
        readers = {}
        for kind in KINDS:
            with suppress(OSError):  # the file system knows no such reads
                readers[kind] = opened.enter_context(closing(READERS[kind](path)))
        ways = [(kind, threads) for kind in readers for threads in THREADS]
        for number in range(rounds):
            for kind, threads in ways if number % 2 else ways[::-1]:
                speed = _speed(readers[kind], file_bytes, record_bytes, threads, seconds)
                speeds.setdefault((kind, threads), []).append(speed)
    return [Choice(*way, statistics.median(found)) for way, found in speeds.items()]


def _speed(reader: PlainReader, file_bytes: int, record_bytes: int, threads: int, seconds: float) -> float:
    """Bytes/s of threads that read records at random places for about so long, with nothing of them in the cache."""
    begun = time.perf_counter()

    def work(seed: int) -> int:
        places, done = random.Random(f"{threads} {seed} {begun}"), 0
        with mmap.mmap(-1, record_bytes) as memory, memoryview(memory) as buffer:
            while not done or time.perf_counter() - begun < seconds:
                offset = places.randrange((file_bytes - record_bytes) // _BLOCK + 1) * _BLOCK
                if hasattr(os, "posix_fadvise"):  # what an earlier measurement left in the cache is no help later
                    os.posix_fadvise(reader.fd, offset, record_bytes, os.POSIX_FADV_DONTNEED)
                reader.read(offset, [buffer])
                done += record_bytes
        return done

    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(work, range(threads)))
    return total / (time.perf_counter() - begun)


def _kept(path: Path) -> Path:
    """File of the choice for this machine and file system, beside what is known of the kernels."""
    key = hashlib.sha256(f"{platform.platform()} {path.stat().st_dev}".encode()).hexdigest()[:16]
    return _profile.path().with_name(f"readers-{key}.json")
