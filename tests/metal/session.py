"""How kernels are run, and what they did."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

ORDERS = ("forward", "reverse", "random")
ALLOWANCES = ("same_value_writes", "uninit_threadgroup", "divergent_barrier", "order_dependent")


@dataclass(frozen=True)
class Settings:
    """How kernels are run.

    Args:
        order: in which order threads, simdgroups and threadgroups run where they may run in any.
        poison: byte that fills outputs and threadgroup memory; 0xff makes NaN.
        checked: watch every memory access. Without it kernels run 2 to 5 times faster, and only what leaves a buffer
            by a lot, or writes to an input, is noticed.
        allow: names of `ALLOWANCES`, for kernels of others, each with its reason in a comment.
        repeat: run every dispatch again, in the reverse order and with other poison; the results must be the same.
        contract: let the compiler fuse multiplications and additions, as it may on a GPU.
        ftz: flush denormals to zero.
        counters: count the bytes that are read and written, see `Traffic`; needs `checked`.
        alignment: of buffers, in bytes. Below 16, no buffer is aligned better than that, like a slice on a Mac.
        seed: of the random order.
        timeout_s: processor time after which a dispatch is given up.
    """

    order: str = "forward"
    poison: int = 0xFF
    checked: bool = True
    allow: tuple[str, ...] = ()
    repeat: bool = False
    contract: bool = False
    ftz: bool = False
    counters: bool = False
    alignment: int = 16
    seed: int = 1
    timeout_s: int = 120

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order: expected one of {ORDERS}, found {self.order!r}")
        if unknown := set(self.allow) - set(ALLOWANCES):
            raise ValueError(f"allow: expected some of {ALLOWANCES}, found {sorted(unknown)}")
        if self.counters and not self.checked:
            raise ValueError("counters: only a checked run sees its accesses")


@dataclass
class Traffic:
    """Use of one buffer in one dispatch.

    `accesses` and `bytes` count every load and store that the compiled kernel makes, after the compiler has removed
    what it could. `distinct` counts each byte once, `by_group` once for every threadgroup that touches it: about what
    memory delivers if a threadgroup keeps what it has read.
    """

    read_accesses: int
    read_bytes: int
    read_distinct: int
    read_by_group: int
    write_accesses: int
    write_bytes: int
    write_distinct: int
    write_by_group: int


@dataclass
class Dispatch:
    """What one call did; `traffic` by buffer, only with counters.

    `threadgroup_bytes` is what a threadgroup had, `threadgroup_traffic` what all of them read and wrote there, in
    bytes; 0 unless checked.
    """

    kernel: str
    grid: tuple[int, ...]
    threadgroup: tuple[int, ...]
    seconds: float
    accesses: int
    collectives: int
    barriers: int
    threadgroup_bytes: int
    threadgroup_traffic: int
    traffic: dict[str, Traffic] = field(default_factory=dict)


@dataclass
class Session:
    """What ran inside `emulate`."""

    settings: Settings
    dispatches: list[Dispatch] = field(default_factory=list)


_DEFAULTS = Settings()
_session = Session(_DEFAULTS)


@contextlib.contextmanager
def emulate(**changes: Any) -> Iterator[Session]:
    """Run kernels with other `Settings` inside the block, and record what they do."""
    global _session
    if isinstance(changes.get("allow"), Iterable):
        changes["allow"] = tuple(changes["allow"])
    before = _session
    _session = Session(replace(before.settings, **changes))
    try:
        yield _session
    finally:
        before.dispatches += _session.dispatches if before.settings is not _DEFAULTS else []
        _session = before


def settings() -> Settings:
    """Those in force."""
    return _session.settings


def record(dispatch: Dispatch) -> None:
    """Outside of `emulate` nobody would read it."""
    if _session.settings is not _DEFAULTS:
        _session.dispatches.append(dispatch)
