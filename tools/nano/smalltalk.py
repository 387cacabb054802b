"""Small talk: what is said, what is answered, what is thought in between."""

from __future__ import annotations

from pathlib import Path

# A line holds questions, answers to any of them, and a thought, parted by ` ; `; questions and answers by `|`.
_TABLE = Path(__file__).with_name("smalltalk.txt")


def small_talk() -> list[tuple[list[str], list[str], str]]:
    """Ways to say something, answers to it, and the thought before an answer."""
    rows = (line.split(" ; ") for line in _TABLE.read_text(encoding="utf-8").splitlines())
    return [(questions.split("|"), answers.split("|"), thought) for questions, answers, thought in rows]


NAMES = """Adam Alice Anna Ben Bob Carl Clara David Emma Eva Frank George Grace Hannah Henry Jack James Jane John
Julia Kate Laura Leo Lily Lucy Maria Mark Martha Mary Max Mia Nina Noah Oscar Paul Peter Rosa Ruth Sam Sarah Simon
Sophie Susan Thomas Tim Tom Victor William""".split()
