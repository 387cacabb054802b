"""Is every kernel right on this machine, and worth running? The answer decides what `auto` runs."""

from __future__ import annotations

import importlib
import io
import json
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from rich.console import Console
from rich.table import Table

from metal_kernels import KernelError, _dispatch, _profile, kernels
from metal_kernels._cases import Case, cases
from metal_kernels._profile import Verdict

from .errors import DeviceError

# Relative root-mean-square differences that two correct float32 sums, rounded to the type, stay below.
LIMITS = {mx.float32: 2e-5, mx.float16: 1e-3, mx.bfloat16: 6e-3}
# Values on a coarse grid: how many may be off, because a last bit decided a rounding.
ROUNDED_APART = 0.005
# A kernel may be this much slower than stock MLX before it is switched off: timings scatter.
SLOWER = 1.05
# A kernel that hangs must not hang the check.
PATIENCE_S = 60.0
WORKER = [sys.executable, "-c", "from mlx_v4flash.doctor import work; work()"]


def approve(say: Callable[[str], None]) -> None:
    """Let `auto` run the kernels that this machine's profile approves; without a profile, make one first.

    Args:
        say: told that the check runs, since it takes some seconds, once.
    """
    if not mx.metal.is_available() or _dispatch.setting() != "auto":
        return
    verdicts = _profile.read()
    if verdicts is None:
        say("checking the Metal kernels on this machine, once")
        verdicts = list(examine(quick=True))
        say(f"kernels in use: {', '.join(v.op for v in verdicts if v.approved) or 'none'}; {_profile.write(verdicts)}")
    _dispatch.approved = {v.op for v in verdicts if v.approved}


def with_kernel() -> list[str]:
    """Ops that have cases and a body."""
    found = dict.fromkeys(case.op for case in cases())
    bodies = {part.name for part in resources.files("metal_kernels").iterdir()}
    return [op for op in found if f"{op}.metal" in bodies]


def examine(quick: bool = False) -> Iterator[Verdict]:
    """Check every kernel in a process of its own, so that a crash or a hang condemns one kernel and no more."""
    left = with_kernel()
    while left:
        for verdict in _examine_apart(list(left), quick):
            left.remove(verdict.op)
            yield verdict


def _examine_apart(ops: list[str], quick: bool) -> Iterator[Verdict]:
    """Verdicts of one process, up to and including the op that ends it."""
    command = [*WORKER, "quick" if quick else "full", *ops]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as worker,
    ):
        lines = _lines(worker)
        for op in ops:
            try:
                line = lines.get(timeout=PATIENCE_S)
            except queue.Empty:
                worker.kill()
                yield Verdict(op, False, False, f"did not finish within {PATIENCE_S:.0f} s")
                return
            if line is None:
                said.seek(0)
                last = (said.read().strip().splitlines() or ["no message"])[-1]
                yield Verdict(op, False, False, f"the process ended with {worker.wait()}: {last}")
                return
            yield Verdict(**json.loads(line))


def _lines(worker: subprocess.Popen[str]) -> queue.Queue[str | None]:
    """Lines the process prints, as they come, then None."""
    lines: queue.Queue[str | None] = queue.Queue()

    def pump() -> None:
        for line in worker.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=pump, daemon=True).start()
    return lines


def check(op: str, *, quick: bool, timed: bool = True) -> Verdict:
    """Compare an op's kernel with its reference on every case, and time it against stock MLX."""
    worst, kernel_s, stock_s, compared = 0.0, 0.0, 0.0, 0
    for case in (c for c in cases() if c.op == op and (timed or not c.large)):
        try:
            found = _run(case, "metal")
        except KernelError:
            continue  # not made for these shapes: auto does not run it there either
        except (RuntimeError, ValueError) as e:  # it does not compile, or cannot be launched
            return Verdict(op, False, False, f"{case.label}: {str(e).strip().splitlines()[0]}")
        error = difference(case, found, _run(case, "reference"))
        if error is None:
            return Verdict(op, False, False, f"{case.label}: differs from the reference")
        worst, compared = max(worst, error), compared + 1
        if timed and case.real:
            repeats = 5 if quick else 50
            kernel_s += _median_s(case, "metal", repeats)
            stock_s += _median_s(case, "stock", repeats)
    if not compared:
        return Verdict(op, False, False, "covers none of the cases")
    if not timed:
        return Verdict(op, True, False, f"right in {compared} cases, not timed", worst)
    fast = kernel_s <= SLOWER * stock_s
    return Verdict(
        op, True, fast, f"right in {compared} cases{'' if fast else ', but slower'}", worst, kernel_s, stock_s
    )


def difference(case: Case, found: list[mx.array], want: list[mx.array]) -> float | None:
    """Largest relative root-mean-square difference, or None if it is too large to be rounding."""
    worst = 0.0
    for a, b in zip(found, want, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return None
        x, y = (np.array(v.astype(mx.float32)).astype(np.float64) for v in (a, b))
        if not np.array_equal(np.isfinite(x), np.isfinite(y)) or (case.exact and not np.array_equal(x, y)):
            return None
        size = np.sqrt(np.mean(y[np.isfinite(y)] ** 2)) or 1.0
        apart = np.abs(x - y)[np.isfinite(y)] / size
        limit = LIMITS.get(a.dtype, 0.0)
        if case.rounds:
            if np.mean(apart > limit) > ROUNDED_APART:
                return None
            apart = apart[apart <= limit]
        error = float(np.sqrt(np.mean(apart**2))) if apart.size else 0.0
        if error > limit:
            return None
        worst = max(worst, error)
    return worst


def _run(case: Case, choice: str) -> list[mx.array]:
    with kernels(choice):
        result = case.call()
        out: list[mx.array] = [result] if isinstance(result, mx.array) else list(result)
        mx.eval(out)
    return out


def _median_s(case: Case, choice: str, repeats: int) -> float:
    _run(case, choice)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        _run(case, choice)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def on_device() -> list[Verdict]:
    """The full examination of this machine's GPU; its profile is replaced.

    Raises:
        DeviceError: there is no Metal device.
    """
    if not mx.metal.is_available():
        raise DeviceError(
            f"doctor: expected a Metal device, found {mx.default_device()}\n"
            "hint: --emulate runs the kernels on the CPU, from a checkout"
        )
    verdicts = list(examine())
    _profile.write(verdicts)
    return verdicts


def emulated() -> list[Verdict]:
    """Every kernel, executed on the CPU by the emulator of the tests; nothing is timed or kept.

    Raises:
        DeviceError: the emulator is not there.
    """
    folder = Path(__file__).parents[1] / "tests" / "metal"
    sys.path.insert(0, str(folder))
    try:
        emulator, compiler = importlib.import_module("emulator"), importlib.import_module("compiler")
    except ImportError as e:
        raise DeviceError(
            f"doctor: expected the emulator in {folder}, found {e}\n"
            "hint: run this in a checkout, with pip install -e '.[test]'"
        ) from e
    finally:
        sys.path.remove(str(folder))
    if reason := compiler.missing():
        raise DeviceError(f"doctor: the emulator cannot run: {reason}")
    factory, _dispatch.kernel_factory = _dispatch.kernel_factory, emulator.metal_kernel
    try:
        with emulator.emulate(repeat=True):
            return [check(op, quick=True, timed=False) for op in with_kernel()]
    finally:
        _dispatch.kernel_factory = factory


def table(verdicts: list[Verdict]) -> str:
    """One line for each kernel."""
    shown = Table("op", "right", "used", "error", "kernel", "stock", "reason")
    for v in verdicts:
        times = [f"{t * 1e6:.0f} us" if t is not None else "-" for t in (v.kernel_s, v.stock_s)]
        error = "-" if v.error is None else f"{v.error:.1e}"
        shown.add_row(v.op, "yes" if v.right else "NO", "yes" if v.approved else "no", error, *times, v.reason)
    out = io.StringIO()
    Console(file=out, width=120).print(shown)
    return out.getvalue().rstrip()


def report(verdicts: list[Verdict]) -> dict[str, Any]:
    """The machine and its verdicts, ready for JSON."""
    return {"machine": _profile.machine(), "verdicts": [asdict(v) for v in verdicts]}


def work() -> None:
    """What the process apart does: a verdict as a line of JSON for each op of its arguments."""
    for op in sys.argv[2:]:
        print(json.dumps(asdict(check(op, quick=sys.argv[1] == "quick"))), flush=True)
