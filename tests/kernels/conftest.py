"""Tests of the ops: `support` is imported by its plain name, and every test draws its own numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import support


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """The same numbers for a test whether it runs alone or with others."""
    support.reseed(request.node.name)
