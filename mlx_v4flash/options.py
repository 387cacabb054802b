"""Options that commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

PATH = click.Path(exists=True, dir_okay=False, path_type=Path)


class _Output(click.Path):
    """A file to write. Its folder must be there, which is said before any work is done."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(str(super().convert(value, param, ctx)))
        if not path.parent.is_dir():
            self.fail(f"{path}: expected a place in an existing folder", param, ctx)
        return path


class _Saved(click.Path):
    """A saved conversation; /save adds the suffix if it is left out."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(value)
        return super().convert(path if path.exists() else f"{path}.safetensors", param, ctx)


OUTPUT = _Output(dir_okay=False, path_type=Path)
SAVED = _Saved(exists=True, dir_okay=False, path_type=Path)

Command = Callable[..., Any]


def model_options(command: Command) -> Command:
    """Which model, and how it computes."""
    options = [
        click.option("--model", help="Checkpoint folder or Hugging Face repository. Default: a small one, Nano."),
        click.option("--revision", help="Branch, tag or commit of the repository."),
        click.option("--trace", type=OUTPUT, metavar="FILE", help="Write the experts chosen in every pass."),
    ]
    command = loading_options(command)
    for option in reversed(options):
        command = option(command)
    return command


def loading_options(command: Command) -> Command:
    """How a model computes."""
    options = [
        click.option("--dtype", default="bfloat16", show_default=True, help="Of activations: bfloat16 or float32."),
        click.option("--cache-quant/--no-cache-quant", default=True, show_default=True,
                     help="The FP8 and FP4 rounding of cached rows that the model was trained with."),
        click.option("--activation-quant/--no-activation-quant", default=False, show_default=True,
                     help="FP8 rounding of inputs of linear layers, as in the official code."),
        click.option("--experts", type=click.Choice(["auto", "resident", "stream"]), default="auto", show_default=True,
                     help="Routed experts all in memory, or read from disk when needed; auto: if they do not fit."),
        click.option("--memory", metavar="BYTES", help="What the model may take, such as 48GB. Default: what the "
                     "machine can give."),
        click.option("--eviction", type=click.Choice(["lru", "lfu"]), default="lfu", show_default=True,
                     help="Which expert gives its place to another: the one used longest ago, or least often."),
        click.option("--max-context", type=int, help="Tokens of a conversation that memory is kept for. Default: 32768 "
                     "if memory is limited, else the model's own."),
        click.option("--prefetch/--no-prefetch", default=False, show_default=True,
                     help="Read what the next layer will need, by a guess."),
        click.option("--verify-reads", is_flag=True, help="Compare every expert read from disk with its checksum."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def sampling_options(command: Command) -> Command:
    """How tokens are drawn; the defaults are those of `Chat.recommended` for chats, of SamplingParams otherwise."""
    options = [
        click.option(
            "--temp", type=float, help="Temperature; 0: the most likely token. Default: 1 in chats, else 0; Nano: 0."
        ),
        click.option("--top-p", type=float, help="Keep the most likely tokens that reach this probability."),
        click.option("--min-p", type=float, help="Drop tokens below this share of the most likely one."),
        click.option("--top-k", type=int, help="Keep this many tokens."),
        click.option("--seed", type=int, help="Seed of the random numbers."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def chat_options(command: Command) -> Command:
    """How the model is talked to, and how much it may say."""
    options = [
        click.option("--system", help="What the model is told before everything else."),
        click.option("--think", type=click.Choice(["off", "low", "high", "max"]),
                     help="How much the model thinks before it answers. Default: high; Nano: off."),
        click.option("--think-budget", type=int, metavar="N", help="End the reasoning after N tokens."),
        click.option("--release", type=click.Choice(["v4-preview", "v4-0731"]),
                     help="Default: guessed from the checkpoint."),
        click.option("--max-tokens", type=int, help="Stop after this many, reasoning included. Default: by --think: "
                     "8192 off, 131072 max, else 65536; 256 for raw text."),
        click.option("--prefill-chunk", default=2048, show_default=True, help="Prompt tokens per forward pass."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def chosen_sampling(options: dict[str, Any]) -> dict[str, Any]:
    """Take the sampling options that were given out of all options."""
    found = {name: options.pop(name) for name in ("temp", "top_p", "min_p", "top_k", "seed")}
    return {name: value for name, value in found.items() if value is not None}
