"""Cases with the official code's own numbers: where they are, what they hold, how to compare."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

VENDORED = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared" / "golden"
CASES = ("f32-exact", "official-qat", "mtp", "dspark", "edge-lengths")


def folder(case: str) -> Path:
    """Where a case lies; skips the test, loudly, if it is nowhere."""
    for root in (VENDORED, SHARED):
        if (root / case / "config.json").is_file():
            return root / case
    pytest.skip(f"GOLDEN CASE NOT CHECKED: {case} is neither in {VENDORED} nor in {SHARED}")


@functools.cache
def expected(case: str) -> dict[str, np.ndarray]:
    return {k: np.array(v) for k, v in mx.load(str(folder(case) / "expected.safetensors")).items()}


@functools.cache
def tolerance(case: str) -> dict[str, dict[str, float]]:
    return json.loads((folder(case) / "case.json").read_text())["tolerance"]


@functools.cache
def prefill_length(case: str) -> int:
    return json.loads((folder(case) / "case.json").read_text())["prefill"]


def relative_rms(found: np.ndarray, want: np.ndarray) -> float:
    want = want.astype(np.float64)
    return float(np.sqrt(np.square(found - want).mean() / np.square(want).mean()))


def rms_by_position(found: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Relative RMS of each row of [T, V]."""
    want = want.astype(np.float64)
    return np.sqrt(np.square(found - want).mean(-1) / np.square(want).mean(-1))


def expect_within(found: np.ndarray, want: np.ndarray, limits: dict[str, float], what: str) -> None:
    """Assert the limits of a case's `tolerance` entry."""
    assert found.shape == want.shape, f"{what}: expected shape {want.shape}, found {found.shape}"
    rows, known = rms_by_position(found, want), set()
    if "rms" in limits:
        known.add("rms")
        error = relative_rms(found, want)
        assert error <= limits["rms"], f"{what}: rms {error:.2e} > {limits['rms']}, worst row {rows.argmax()}"
    if "median" in limits:
        known.add("median")
        assert np.median(rows) <= limits["median"], f"{what}: median {np.median(rows):.2e} > {limits['median']}"
    if "prefix" in limits:
        known.add("prefix")
        good = int(np.argmax(rows > 1e-4)) if (rows > 1e-4).any() else len(rows)
        assert good >= limits["prefix"], f"{what}: {good} leading rows within 1e-4, expected {limits['prefix']}"
    assert known, f"{what}: no limit to check in {limits}"
