"""Measure the exported small model as this package runs it: figures as JSON on stdout. See docs/nano.md."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click
import numpy as np
from nano import shipped
from nano.data import TEXTS, Corpus
from nano.plot import draw_experts

from mlx_v4flash import Chat, load, nano_folder

FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
# Inside the window of 128, beyond it, and beyond the 2048 that sequences had in training.
DISTANCES = "60,100,200,400,800,1600,3000,6000"

checkpoint_option = click.option("--checkpoint", type=FOLDER, help="Default: the one in the package.")


@click.group()
def main() -> None:
    """Measure the exported small model. FOLDER is where train_nano.py worked."""


@main.command()
@click.argument("folder", type=FOLDER)
@checkpoint_option
@click.option("--names", default="native,256gb-fast,192gb,128gb,96gb,64gb", show_default=True, help="Recipes.")
@click.option("--tokens", default=8192, show_default=True, help="Of held-out texts, equally many of each source.")
@click.option("--calibrate", is_flag=True, help="Round for the inputs that texts of the training give.")
def recipes(folder: Path, checkpoint: Path | None, names: str, tokens: int, calibrate: bool) -> None:
    """Divergence of each recipe's conversion from the checkpoint."""
    corpus = Corpus.from_folder(folder / "data")
    held_out = {name: np.load(folder / "data" / f"{name}.held_out.npy") for name in TEXTS}
    with tempfile.TemporaryDirectory() as scratch:
        text, learned = Path(scratch) / "held_out.txt", Path(scratch) / "learned.txt"
        text.write_text(shipped.some_text(corpus, held_out, tokens), encoding="utf-8")
        learned.write_text(shipped.some_text(corpus, corpus.texts, shipped.CALIBRATION_TOKENS), encoding="utf-8")
        for row in shipped.divergences(
            checkpoint or nano_folder(), names.split(","), text, tokens, 2048, learned if calibrate else None
        ):
            click.echo(json.dumps(row))


@main.command()
@click.argument("folder", type=FOLDER)
@checkpoint_option
@click.option("--distances", default=DISTANCES, show_default=True, help="Tokens between a list and the question.")
@click.option("--count", default=24, show_default=True, help="Questions at each.")
@click.option("--seed", default=1_000_003, show_default=True, help="Of the questions; training never uses this one.")
def recall(folder: Path, checkpoint: Path | None, distances: str, count: int, seed: int) -> None:
    """Share of codes found again, by distance; guessing among those of the list gives an eighth."""
    corpus, chat = Corpus.from_folder(folder / "data"), Chat(*load(checkpoint or nano_folder()))
    for distance in map(int, distances.split(",")):
        right = shipped.recall(chat, corpus, distance, count, seed + distance)
        click.echo(json.dumps({"distance": distance, "right": right, "count": count}))


@main.command()
@checkpoint_option
def chats(checkpoint: Path | None) -> None:
    """Five conversations with the checkpoint."""
    found = shipped.sample_chats(Chat(*load(checkpoint or nano_folder())))
    click.echo(json.dumps(found, indent=1, ensure_ascii=False))


@main.command()
@click.argument("evaluation", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("picture", type=click.Path(path_type=Path, dir_okay=False))
def experts(evaluation: Path, picture: Path) -> None:
    """Draw how often each expert is chosen, from the JSON of evaluate_nano.py, as an SVG."""
    shares = json.loads(evaluation.read_text(encoding="utf-8"))["experts"]
    picture.write_text(draw_experts(shares), encoding="utf-8")


if __name__ == "__main__":
    main()
