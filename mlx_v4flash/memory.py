"""Memory: what the machine has to give, and what this process holds of it."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from pathlib import Path

import mlx.core as mx

from .errors import RequestError

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
# Where containers are told their limit.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# `struct rusage_info_v4` of macOS: 16 bytes, then 64-bit numbers, among them the footprint and the most it has been.
_RUSAGE_FLAVOR, _RUSAGE_WORDS = 4, 2 + 35
_FOOTPRINT, _MOST_FOOTPRINT = 2 + 7, 2 + 28


def parse_bytes(value: str | int | None, name: str = "memory") -> int | None:
    """ "48GB", "1.5TiB" or a number of bytes.

    Raises:
        RequestError: anything else.
    """
    if value is None or (type(value) is int and value > 0):
        return value
    text = value if isinstance(value, str) else ""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise RequestError(f"{name}: expected a number of bytes such as 48GB or 64GiB, found {value!r}")
    units = _BINARY if found[3] else _UNITS
    nbytes = int(float(found[1]) * units[found[2].upper()])
    if not nbytes:
        raise RequestError(f"{name}: expected at least one byte, found {value!r}")
    return nbytes


def usable_bytes() -> int:
    """What a model may take of this machine: all but a quarter, or 8 GiB, of its memory, or of a container's; never
    more than a Mac's GPU should hold, or than Linux has available just now.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = min([total, *(int(text) for path in _LIMITS if (text := _text(path).strip()).isdigit())])
    usable = max(total - max(total // 4, 8 << 30), total // 4)
    usable = min(usable, int(mx.device_info().get("max_recommended_working_set_size", usable)))  # of Metal alone
    available = re.search(r"MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"))
    return usable if available is None else min(usable, 1024 * int(available[1]))


def held_bytes() -> int:
    """What this process holds now: resident memory on Linux, the footprint on macOS, or what MLX has of it if more."""
    arrays = mx.get_active_memory() + mx.get_cache_memory()
    if sys.platform == "linux":
        held = int(_text("/proc/self/statm").split()[1]) * resource.getpagesize()
    else:
        held = _rusage(_FOOTPRINT)
    return max(arrays, held)


def peak_bytes() -> int:
    """The most memory this process has held so far."""
    if sys.platform == "linux":  # getrusage would start with what the parent process held
        peak = int(_text("/proc/self/status").split("VmHWM:")[1].split()[0]) * 1024
    else:
        peak = max(_rusage(_MOST_FOOTPRINT), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return max(peak, mx.get_peak_memory())


def give_back() -> None:
    """Return freed memory to the system: what MLX keeps for later, and on Linux what the C library keeps."""
    mx.clear_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
        if trim is not None:
            trim(0)


def _rusage(word: int) -> int:
    """A number of macOS, whose footprints count memory of the GPU too; 0 if it does not say."""
    ask = getattr(ctypes.CDLL(None), "proc_pid_rusage", None)
    found = (ctypes.c_uint64 * _RUSAGE_WORDS)()
    return 0 if ask is None or ask(os.getpid(), _RUSAGE_FLAVOR, ctypes.byref(found)) else int(found[word])


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
