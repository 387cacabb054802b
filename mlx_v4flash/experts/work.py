"""Threads that read and copy, and what is left of their work after an exception."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor


class Work:
    """Jobs on threads, which can be given up: those that have not begun never begin, and the others can be awaited.

    No job is lost from sight, even if Ctrl-C comes between two lines of whoever submits it: it is written down by the
    thread that does it, and belongs to an epoch that ends when work is given up.
    """

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, "experts")
        self._busy: dict[int, str] = {}  # what each thread is doing
        self._epoch = 0

    def submit(self, name: str, job: Callable[..., float], *arguments: object) -> Future[float]:
        return self._threads.submit(self._run, self._epoch, name, job, arguments)

    def give_up(self) -> None:
        """Begin nothing of what was submitted so far: asking for its result raises CancelledError."""
        self._epoch += 1

    def unfinished(self, timeout_s: float) -> str | None:
        """Wait until no thread is busy; the name of a job that goes on for longer than this, else None."""
        end_s = time.monotonic() + timeout_s
        while busy := list(self._busy.values()):
            if time.monotonic() > end_s:
                return busy[0]
            time.sleep(0.001)
        return None

    def close(self) -> None:
        """End the threads, after what they are doing."""
        self.give_up()
        self._threads.shutdown(cancel_futures=True)

    def _run(self, epoch: int, name: str, job: Callable[..., float], arguments: tuple[object, ...]) -> float:
        self._busy[threading.get_ident()] = name  # before the look at the epoch, else `unfinished` could see neither
        try:
            if epoch != self._epoch:
                raise CancelledError
            return job(*arguments)
        finally:
            del self._busy[threading.get_ident()]
