"""Kernels are used only where they were found right, and a bad one harms nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from click.testing import CliRunner

from metal_kernels import KernelError, _dispatch, _profile
from metal_kernels._cases import Case, cases
from metal_kernels._profile import Verdict
from mlx_v4flash import doctor, load_model
from mlx_v4flash.cli import main
from mlx_v4flash.tiny import write_tiny

GOOD = Verdict("route", True, True, "right in 3 cases", 1e-7, 1e-5, 2e-5)
SLOW = Verdict("compress", True, False, "right in 3 cases, but slower", 1e-7, 3e-5, 2e-5)
BAD = Verdict("key_row", False, False, "odd sizes: differs from the reference")


@pytest.fixture(autouse=True)
def own_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_V4FLASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_dispatch, "approved", set())


def case(kernel: Callable[[], object], reference: object, **options: object) -> Case:
    """An op whose kernel and reference are given."""
    return Case("op", "a case", lambda: kernel() if _dispatch.setting() == "metal" else reference, **options)


def verdict(monkeypatch: pytest.MonkeyPatch, *given: Case, timed: bool = False) -> Verdict:
    monkeypatch.setattr(doctor, "cases", lambda: iter(given))
    return doctor.check("op", quick=True, timed=timed)


ONES = mx.ones((1000,))
NAN = mx.where(mx.arange(1000) == 3, mx.nan, ONES)
ONE_OFF = mx.where(mx.arange(1000) == 3, 2.0, ONES)


@pytest.mark.parametrize(
    ("kernel", "reference", "options", "right"),
    [
        (ONES * 1.000001, ONES, {}, True),
        (ONES * 1.001, ONES, {}, False),
        ((ONES * 1.001).astype(mx.bfloat16), ONES.astype(mx.bfloat16), {}, True),
        (ONES * 1.01, ONES, {"rounds": True}, False),
        (ONE_OFF, ONES, {"rounds": True}, True),
        (ONE_OFF, ONES, {}, False),
        (ONES * 1.000001, ONES, {"exact": True}, False),
        (NAN, NAN, {}, True),
        (NAN, ONES, {"rounds": True}, False),
        (ONES, NAN, {}, False),
        (ONES[:999], ONES, {}, False),
        (ONES.astype(mx.float16), ONES, {}, False),
        (mx.zeros((4,)), mx.zeros((4,)), {}, True),
        ((ONES, ONES), (ONES, ONES), {}, True),
        ((ONES, ONE_OFF), (ONES, ONES), {}, False),
    ],
)
def test_right_and_wrong(
    kernel: object, reference: object, options: dict[str, bool], right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = verdict(monkeypatch, case(lambda: kernel, reference, **options))
    assert found.right == right, found.reason
    assert found.approved is False, "approved without having been timed"


def test_one_wrong_case_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    fine, wrong = case(lambda: ONES, ONES), case(lambda: ONE_OFF, ONES)
    assert verdict(monkeypatch, fine, wrong, fine) == Verdict("op", False, False, "a case: differs from the reference")


@pytest.mark.parametrize("error", [RuntimeError("does not compile\nline 3"), ValueError("too many threads")])
def test_a_kernel_that_cannot_run_is_not_right(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> object:
        raise error

    found = verdict(monkeypatch, case(fail, ONES))
    assert not found.right and found.reason == f"a case: {str(error).splitlines()[0]}"


def test_shapes_a_kernel_does_not_cover_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> object:
        raise KernelError("op: the kernel covers less")

    assert verdict(monkeypatch, case(refuse, ONES), case(lambda: ONES, ONES)).reason == "right in 1 cases, not timed"
    assert verdict(monkeypatch, case(refuse, ONES)) == Verdict("op", False, False, "covers none of the cases")


@pytest.mark.parametrize(("kernel_s", "stock_s", "approved"), [(0.0, 0.004, True), (0.004, 0.0, False)])
def test_the_slower_one_is_switched_off(
    kernel_s: float, stock_s: float, approved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call() -> mx.array:
        time.sleep({"metal": kernel_s, "stock": stock_s}.get(_dispatch.setting(), 0.0))
        return ONES

    found = verdict(monkeypatch, Case("op", "a case", call), timed=True)
    assert found.right and found.approved == approved and ("slower" in found.reason) != approved
    assert found.kernel_s is not None and found.stock_s is not None


# --- a process apart --------------------------------------------------------------------------------


def worker(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    lines = {v.op: json.dumps(v.__dict__) for v in (GOOD, SLOW, BAD)}
    monkeypatch.setattr(doctor, "WORKER", [sys.executable, "-c", f"import os, sys, time\nlines = {lines}\n{code}"])
    monkeypatch.setattr(doctor, "with_kernel", lambda: ["route", "key_row", "compress"])


def test_verdicts_come_from_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    worker(monkeypatch, "for op in sys.argv[2:]: print(lines[op], flush=True)")
    assert list(doctor.examine()) == [GOOD, BAD, SLOW]


def test_a_crash_condemns_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "for op in sys.argv[2:]:\n    if op == 'key_row': sys.exit('it broke')\n    print(lines[op], flush=True)"
    worker(monkeypatch, code)
    reason = "the process ended with 1: it broke"
    assert list(doctor.examine()) == [GOOD, Verdict("key_row", False, False, reason), SLOW]


def test_a_hang_condemns_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "for op in sys.argv[2:]:\n    if op == 'key_row': time.sleep(60)\n    print(lines[op], flush=True)"
    worker(monkeypatch, code)
    monkeypatch.setattr(doctor, "PATIENCE_S", 1.0)
    assert [v.reason for v in doctor.examine()] == [GOOD.reason, "did not finish within 1 s", SLOW.reason]


def test_the_real_worker_answers_for_every_op() -> None:
    """Without a Metal device every kernel is refused, op by op, and the process lives."""
    found = list(doctor.examine(quick=True))
    assert [v.op for v in found] == doctor.with_kernel() and len(found) >= 4
    if not mx.metal.is_available():
        assert {v.reason for v in found} == {"covers none of the cases"}


def test_every_kernel_has_odd_and_real_cases() -> None:
    known = {(c.op, c.real) for c in cases()}
    for op in doctor.with_kernel():
        assert (op, True) in known and (op, False) in known


# --- the profile ------------------------------------------------------------------------------------


def test_profile_is_kept_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _profile.read() is None
    path = _profile.write([GOOD, BAD])
    assert _profile.read() == [GOOD, BAD] and path == _profile.path()
    assert json.loads(path.read_text())["machine"] == _profile.machine()
    path.write_text(path.read_text()[:50])
    assert _profile.read() is None
    monkeypatch.setattr(_profile, "version", lambda name: "9.9.9")
    assert _profile.path() != path


def test_load_runs_what_the_profile_approves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, said = write_tiny(tmp_path / "m"), []
    monkeypatch.setattr(doctor.mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "examine", lambda quick: said.append(quick) or iter([GOOD, SLOW, BAD]))
    load_model(folder, experts="resident")
    assert said == [True] and _dispatch.approved == {"route"} and _profile.read() == [GOOD, SLOW, BAD]
    load_model(folder, experts="resident")
    assert said == [True], "examined again although there is a profile"


def test_nothing_is_examined_where_the_user_chose_or_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(doctor.mx.metal, "is_available", lambda: False)
    doctor.approve(said.append)
    monkeypatch.setattr(doctor.mx.metal, "is_available", lambda: True)
    monkeypatch.setenv("MLX_V4FLASH_KERNELS", "stock")
    doctor.approve(said.append)
    assert said == [] and _dispatch.approved == set() and _profile.read() is None


# --- the command ------------------------------------------------------------------------------------


def test_command_prints_verdicts_and_fails_for_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for verdicts, code in (([GOOD, SLOW], 0), ([GOOD, BAD], 1)):
        monkeypatch.setattr(doctor, "on_device", lambda verdicts=verdicts: verdicts)
        result = CliRunner().invoke(main, ["doctor", "--kernels"])
        assert result.exit_code == code and "route" in result.stdout and "10 us" in result.stdout
        result = CliRunner().invoke(main, ["doctor", "--kernels", "--json"])
        assert [v["op"] for v in json.loads(result.stdout)["verdicts"]] == [v.op for v in verdicts]


@pytest.mark.skipif(mx.metal.is_available(), reason="this machine has a Metal device")
def test_command_without_a_device_says_so() -> None:
    result = CliRunner().invoke(main, ["doctor", "--kernels"])
    assert result.exit_code == 1 and "expected a Metal device" in result.stderr and "--emulate" in result.stderr
    assert CliRunner().invoke(main, ["doctor"]).exit_code == 2


def test_kernels_are_right_in_emulation() -> None:
    """The whole way of `doctor --kernels --emulate`, in a process of its own."""
    command = [sys.executable, "-m", "mlx_v4flash", "doctor", "--kernels", "--emulate", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    if "the emulator cannot run" in done.stderr or "expected the emulator" in done.stderr:
        pytest.skip(f"NO METAL KERNEL WAS RUN: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr or done.stdout
    verdicts = json.loads(done.stdout)["verdicts"]
    assert [v["op"] for v in verdicts] == doctor.with_kernel() and all(v["right"] for v in verdicts)
