"""A conversation in the terminal: `mlx-v4flash chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from ..run import Run
from ..sampling import SamplingParams, expect_limits
from .commands import COMMANDS
from .lines import PipedLines, TypedLines, history_file
from .loop import Repl
from .screen import Screen


def chat(
    folder: str,
    sampling: dict[str, Any],
    *,
    system: str | None,
    think: Any,
    think_budget: int | None,
    release: str | None,
    max_tokens: int | None,
    prefill_chunk: int,
    context: int | None,
    saved: Path | None,
    hide_thinking: bool,
    **loading: Any,
) -> None:
    """Load a model and talk until the user leaves."""
    SamplingParams(**sampling)  # values are checked before minutes of loading
    expect_limits(max_tokens=max_tokens, think_budget=think_budget, prefill_chunk=prefill_chunk, context=context)
    run = Run.load(folder, **loading)
    conversation = run.chat(
        sampling, system=system, think=think, think_budget=think_budget, release=release, max_tokens=max_tokens,
        prefill_chunk=prefill_chunk, context=context,
    )  # fmt: skip
    screen = Screen(Console(highlight=False), hides_thinking=hide_thinking or not sys.stdout.isatty())
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    repl = Repl(
        conversation,
        TypedLines(history_file(), [f"/{name}" for name in COMMANDS]) if typed else PipedLines(sys.stdin),
        screen,
    )
    if saved is not None:
        conversation.load(saved)
        repl.handle("/ctx")
    repl.run()
