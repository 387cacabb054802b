"""Jobs of threads that are given up."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError

from mlx_v4flash.experts.work import Work


def test_what_has_not_begun_never_begins_and_the_rest_is_awaited() -> None:
    work, begun, go, done = Work(1), threading.Event(), threading.Event(), list[str]()

    def first() -> float:
        begun.set()
        go.wait()
        done.append("first")
        return 1.0

    running = work.submit("first", first)
    waiting = work.submit("second", lambda: done.append("second") or 2.0)
    begun.wait()
    work.give_up()
    late = work.unfinished(0.01)
    go.set()
    assert late == "first"
    assert work.unfinished(5) is None
    assert (running.result(5), done) == (1.0, ["first"])
    assert isinstance(waiting.exception(5), CancelledError)
    assert work.submit("third", lambda: 3.0).result(5) == 3.0
    work.close()


def test_a_job_that_fails_is_over() -> None:
    work = Work(2)
    future = work.submit("fails", lambda: 1 / 0)
    assert isinstance(future.exception(5), ZeroDivisionError)
    assert work.unfinished(5) is None
    work.close()
