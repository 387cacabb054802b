"""The command line: options, and one call for each command."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from metal_kernels import KernelError

from . import __version__
from .errors import RequestError, V4FlashError
from .options import (
    OUTPUT,
    PATH,
    SAVED,
    chat_options,
    chosen_sampling,
    loading_options,
    model_options,
    sampling_options,
)


class _Group(click.Group):
    """Prints the errors a user can meet without a traceback, and exits with 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (V4FlashError, KernelError) as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            ctx.exit(130)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            click.echo(f"error: {error}", err=True)
            os._exit(1)  # what could not be written would be tried again, and fail with a traceback

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:  # closed by who started us
                setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
        return super().main(*args, **kwargs)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mlx-v4flash")
def main() -> None:
    """Run DeepSeek-V4-Flash with MLX."""


@main.command()
@click.argument("prompt")
@model_options
@sampling_options
@chat_options
@click.option("--raw/--chat", default=None, help="Continue PROMPT as it is, or answer it. Base models continue.")
@click.option("--tools", type=PATH, help="JSON file with tools the model may call; its calls are printed as JSON.")
@click.option("--show-thinking/--hide-thinking", default=None,
              help="Reasoning on stderr. Shown, dimmed, if that is a terminal.")  # fmt: skip
@click.option("--stats", is_flag=True, help="Print speed, bytes and memory to stderr at the end.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line: pieces of the answer, then a summary.")
def generate(prompt: str, **options: Any) -> None:
    """Answer PROMPT; `-` reads it from standard input.

    The answer, and it alone, goes to standard output; reasoning, progress and figures go to standard error.
    """
    from .answer import generate

    folder = _model(options.pop("model"))
    reason = generate(folder, _standard_input() if prompt == "-" else prompt, chosen_sampling(options), **options)
    if reason == "interrupted":
        sys.exit(130)


@main.command()
@model_options
@sampling_options
@chat_options
@click.option("--context", type=int, help="Tokens the conversation may have. Default: what the model was made for.")
@click.option(
    "--load",
    "saved",
    type=SAVED,
    help="Go on with a conversation that /save wrote, its system text and level of thinking.",
)
@click.option("--hide-thinking", is_flag=True, help="Show how long the model thinks, not what.")
def chat(**options: Any) -> None:
    """Talk with the model; /help in the conversation says how."""
    from .repl import chat

    folder = _model(options.pop("model"))
    chat(folder, chosen_sampling(options), **options)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--real-dims", is_flag=True, help="Layers with the true dimensions of V4-Flash.")
@click.option("--layers", help="With --real-dims: which layers of V4-Flash. Default: 2,3.")
@click.option(
    "--config",
    "config_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON file with keys of config.json that replace those of the small default.",
)
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), help="tokenizer.json to copy.")
@click.option("--base", is_flag=True, help="As V4-Flash-Base: FP8 experts and float32 scales.")
@click.option("--seed", default=0, show_default=True)
def tiny(folder: Path, real_dims: bool, layers: str | None, config_file: Path | None, **options: Any) -> None:
    """Write a random checkpoint in the official format to FOLDER."""
    from .config import read_values
    from .progress import bar
    from .tiny import TINY, write_tiny
    from .tiny import real_dims as real

    if layers is not None and not real_dims:
        raise click.UsageError("--layers: expected --real-dims, too; without it, num_hidden_layers in --config")
    values = real(_numbers(layers or "2,3")) if real_dims else dict(TINY)
    if config_file is not None:
        values |= read_values(config_file)
    with bar("writing", "bytes") as progress:
        write_tiny(folder, values, progress=progress, **options)
    click.echo(f"{folder}: {values['num_hidden_layers']} layers, random weights", err=True)


@main.command()
@click.argument("source", required=False)
@click.argument("target", required=False, type=click.Path(path_type=Path))
@click.option("--recipe", default="native", show_default=True, help="Formats: a name of --list, or a TOML file.")
@click.option("--calibrate", type=PATH, help="A text: round for the inputs it gives, layer by layer. Slow, and better.")
@click.option("--calibrate-tokens", default=32768, show_default=True, help="How much of the text to use.")
@click.option("--list", "listed", is_flag=True, help="Print the named recipes with their sizes for the real model.")
@click.option("--json", "as_json", is_flag=True, help="With --list: print JSON instead of a table.")
@click.option("--from-hub", is_flag=True, help="SOURCE is a repository: download, convert and remove file by file.")
@click.option("--revision", help="With --from-hub: branch, tag or commit.")
@click.option("--keep-source", is_flag=True, help="With --from-hub: keep what was downloaded.")
@click.option("--plain", is_flag=True, help="Keep bfloat16 and float32 weights; without it they become FP4 and FP8.")
@click.option("--dry-run", is_flag=True, help="Print sizes, time and free space needed; write nothing.")
@click.option("--verify", is_flag=True, help="Read everything again and compare checksums.")
def convert(
    source: str | None, target: Path | None, recipe: str, calibrate: Path | None, calibrate_tokens: int,
    from_hub: bool, revision: str | None, keep_source: bool, plain: bool, **options: bool,
) -> None:  # fmt: skip
    """Convert the checkpoint SOURCE to TARGET, in a form that is read as it is.

    Weights in DeepSeek's FP4 and FP8 keep every bit, unless a recipe makes them smaller; those in bfloat16 or
    float32 are rounded as DeepSeek's were.

    Run the same command again after an interruption; it continues.
    """
    from . import convert as conversion
    from . import recipe_sizes
    from .calibrate import Calibrated, read_text
    from .progress import bar
    from .recipe import read_recipe
    from .rounding import Rounding

    if options["listed"]:
        click.echo(json.dumps(recipe_sizes.listing(), indent=2) if options["as_json"] else recipe_sizes.table())
        return
    if source is None or target is None:
        raise click.UsageError("expected SOURCE and TARGET, or --list")
    wanted = read_recipe(recipe)
    opened = conversion.open_source(source, target, from_hub, revision, keep_source, plain)
    if opened.rounded:
        click.echo("no quantization_config: experts become FP4 and layers FP8, as in DeepSeek's files", err=True)
    job = conversion.plan(opened, wanted)
    needed = conversion.check_space(job, target)
    if options["dry_run"]:
        speed = conversion.measure_disk(target)
        click.echo(f"{target}: {job.total_bytes / 1e9:.4g} GB, {needed / 1e9:.4g} GB of them still to write")
        click.echo(f"about {needed / speed:,.0f} s at {speed / 1e9:.2f} GB/s, the measured speed of writing")
        return
    with bar("converting", "bytes") as progress:
        rounding = Rounding(opened.checkpoint.config, wanted)
        if calibrate is not None and not rounding.formats:
            raise click.UsageError("--calibrate: expected a --recipe that changes a format, too")
        if calibrate is not None:
            ids = read_text(opened, calibrate, calibrate_tokens)
            rounding = Calibrated(opened, target, wanted, ids)
        converted = conversion.convert(opened, target, progress, rounding)
    if options["verify"]:
        with bar("verifying", "bytes") as progress:
            converted.verify(progress)
    if rare := sum(converted.rare.values()):
        experts = sum(len(layer.crc32) for layer in converted.layers.values())
        click.echo(
            f"warning: {rare} of {experts} experts were chosen for so few tokens of the text that "
            "their numbers were rounded each for itself; a longer text, or more kinds of it, helps", err=True,
        )  # fmt: skip
    click.echo(f"{target}: {converted.nbytes / 1e9:.2f} GB{', verified' if options['verify'] else ''}", err=True)


@main.command()
@model_options
@click.option("--frontiers", default="512,1024,2048", show_default=True, help="Context lengths to measure at.")
@click.option("--decode", default=32, show_default=True, help="Tokens to decode at each.")
@click.option("--rounds", default=3, show_default=True, help="Repetitions; medians are reported.")
@click.option("--prefill-chunk", default=2048, show_default=True, help="Prompt tokens per forward pass.")
@click.option("--output", type=OUTPUT, metavar="NAME", help="Write NAME.json and NAME.csv.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def bench(
    frontiers: str, decode: int, rounds: int, prefill_chunk: int, output: Path | None, as_json: bool, **options: Any
) -> None:
    """Measure prefill and decode at frontiers of context."""
    from .bench import measure
    from .run import Run

    run = Run.load(_model(options.pop("model")), **options)
    report = measure(run.model, _numbers(frontiers), decode=decode, rounds=rounds, chunk=prefill_chunk)
    if output is not None:
        report.write(output)
    click.echo(report.json() if as_json else report.table())


@main.command()
@click.argument("model")
@click.option("--against", required=True, help="Model to compare with, or a file that --save-reference wrote.")
@click.option("--text", required=True, type=PATH, help="Text to predict, in UTF-8.")
@click.option("--tokens", type=int, help="Use the first so many. Default: 4096; 0.26 MB of disk each.")
@click.option("--context", type=int, help="Begin anew after so many. Default: 4096.")
@click.option("--prefill-chunk", type=int, help="Tokens per forward pass. Default: 2048; 1 MB of memory each.")
@loading_options
@click.option("--save-reference", type=click.Path(path_type=Path), help="Keep what the other model predicts.")
@click.option("--output", type=click.Path(path_type=Path), help="Write JSON. An interrupted run into it continues.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def quality(as_json: bool, **options: Any) -> None:
    """Compare the predictions of MODEL with those of another model: KL divergence, perplexity."""
    from .progress import bar
    from .quality import compare

    report = compare(**options, progresses=lambda what: bar(what, "tokens"))
    click.echo(report.json() if as_json else report.table())


@main.command()
@click.argument("results", nargs=-1, required=True, type=PATH)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="Picture to write, as NAME.png.")
def quality_plot(results: tuple[Path, ...], output: Path) -> None:
    """Plot divergence over size from RESULTS that `quality --output` wrote."""
    from .quality_report import Report, plot

    plot([Report.read(path) for path in results], output)


@main.command()
@click.option("--kernels", is_flag=True, help="Check and time every Metal kernel; decides which ones are used.")
@click.option("--emulate", is_flag=True, help="Run them on the CPU instead; from a checkout, with the test extra.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def doctor(kernels: bool, emulate: bool, as_json: bool) -> None:
    """Examine this machine."""
    from . import doctor as examination

    if not kernels:
        raise click.UsageError("expected --kernels: nothing else is examined in this version")
    verdicts = examination.emulated() if emulate else examination.on_device()
    click.echo(json.dumps(examination.report(verdicts), indent=2) if as_json else examination.table(verdicts))
    if not all(v.right for v in verdicts):
        sys.exit(1)


@main.command()
@click.argument("model", required=False)
@click.option("--real", is_flag=True, help="The sizes of V4-Flash, without a file of it.")
@click.option("--revision", help="Branch, tag or commit of the repository.")
@click.option("--memory", metavar="BYTES", help="What the process may take, such as 48GB. Default: what the machine "
              "can give.")  # fmt: skip
@click.option("--max-context", type=int, help="Tokens a conversation may have. Default: 32768, or the model's own.")
@click.option("--prefill-chunk", default=2048, show_default=True, help="Prompt tokens per forward pass.")
@click.option("--trace", type=PATH, help="Choices of experts to expect; without it invented ones.")
@click.option("--disk", metavar="BYTES", help="Read from disk in a second, such as 5GB. Default: measured.")
@click.option("--bandwidth", metavar="BYTES", help="Read from memory in a second. Default: measured on the processor.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def plan(model: str | None, real: bool, **options: Any) -> None:
    """What MODEL, a folder or a repository, will take of memory; exit code 1 if it does not fit.

    Nothing is loaded. Of a repository only config.json is downloaded, and the official formats are assumed.
    """
    from .plan_source import planned

    if (model is None) != real:
        raise click.UsageError(f"expected MODEL or --real, found {'both' if real else 'none'}")
    if real and options["revision"] is not None:
        raise click.UsageError("--revision: expected a repository, found --real")
    text, fits = planned(model, **options)
    click.echo(text)
    if not fits:
        sys.exit(1)


@main.command("cache-sim")
@click.argument("trace", type=PATH)
@click.option("--slots", help="Experts of a layer in memory, such as 16,32,64. Default: 3 to 100 % of them.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--output", type=OUTPUT, help="Write the JSON to a file, too.")
@click.option("--plot", type=OUTPUT, help="Write a picture; needs matplotlib.")
def cache_sim(trace: Path, slots: str | None, as_json: bool, output: Path | None, plot: Path | None) -> None:
    """How many experts would have been found in memory, for the choices in TRACE (see --trace).

    LRU and LFU are policies a model can run with; Belady knows the future and is the best that any could do.
    """
    from .experts.simulation import curves
    from .experts.trace import read_trace

    found = curves(read_trace(trace), None if slots is None else _numbers(slots))
    if output is not None:
        output.write_text(found.json() + "\n", encoding="utf-8")
    if plot is not None:
        found.plot(plot)
    click.echo(found.json() if as_json else found.table())


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("command")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def lm(ctx: click.Context, command: str, args: tuple[str, ...]) -> None:
    """Run an mlx-lm COMMAND (generate, server, chat, cache_prompt, perplexity, ...) with this model known to it.

    `lm COMMAND --help` lists what follows.
    """
    if command in ("-h", "--help"):
        click.echo(ctx.get_help())
        return
    from .mlx_lm_bridge import run_mlx_lm

    if not any(arg.split("=")[0] in ("--model", "-h", "--help") for arg in args):
        args = ("--model", _model(None), *args)
    run_mlx_lm(command, list(args))


def _model(name: str | None) -> str:
    """The model asked for, or the one in the package."""
    if name is not None:
        return name
    from .hub import nano_folder

    folder = str(nano_folder())
    click.echo(
        "no --model: this is Nano, 15 million parameters trained on public texts; it has the architecture of "
        "DeepSeek-V4-Flash and is not that model, which --model names", err=True,
    )  # fmt: skip
    return folder


def _standard_input() -> str:
    try:  # whatever the locale says
        return io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8").read()
    except UnicodeDecodeError as e:
        raise RequestError(f"standard input: expected UTF-8, found {e}") from e


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.UsageError(f"expected numbers separated by commas, found {text!r}") from None
