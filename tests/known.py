"""Questions that the small model in the package answers for sure, with what is right; see docs/nano.md.

The answers are those that it was taught, so another training needs no other tests.
"""

from __future__ import annotations

from nano.smalltalk import small_talk

# What is asked, as the table of small talk has it.
TALK = (
    "What is your name?",
    "What is the capital of France?",
    "Tell me a story.",
    "Are you DeepSeek?",
)

# A question, what is to be computed, and the result: one to be done in steps, one for the calculator.
SUM = ("What is 23 + 45?", "23 + 45", 68)
CALL = ("What is 345 - 67?", "345 - 67", 278)


def answers_to(question: str) -> list[str]:
    """What the model was taught to answer.

    Raises:
        StopIteration: the table lacks the question.
    """
    return next(answers for questions, answers, _ in small_talk() if question in questions)
