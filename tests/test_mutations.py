"""The tests notice the mistakes that are easy to make."""

from __future__ import annotations

import ast

import mutations
import pytest
from mistakes import MISTAKES, Mistake


def test_rules_of_the_specification_are_covered() -> None:
    assert {str(rule) for rule in range(1, 11)} <= {m.rule for m in MISTAKES}
    assert len({(m.rule, m.what) for m in MISTAKES}) == len(MISTAKES)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m.rule}: {m.what}")
def test_mistake_can_still_be_made(mistake: Mistake) -> None:
    """After a change of the code its text is still there, once, and the wrong version is Python."""
    text = mutations.mistaken(mistake)
    assert text != (mutations.ROOT / mistake.file).read_text()
    ast.parse(text)


@pytest.mark.slow
def test_every_mistake_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    status = mutations.main([])
    assert status == 0, capsys.readouterr().out
