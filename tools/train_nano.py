"""Train the small model that the package carries, from data to a log with losses; goes on where it was stopped.

Needs the extra `test` and the Debian packages named in nano/texts.py. See docs/nano.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
from nano.chats import CALCULATOR
from nano.data import prepare, sample_texts
from nano.recipe import VOCABULARY
from nano.tokenizer import save_tokenizer, train_tokenizer
from nano.train import train


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--processes", default=2, show_default=True, help="Of one thread each.")
@click.option("--minutes", default=1e6, help="Stop after this time; the same command goes on.")
def main(folder: Path, processes: int, minutes: float) -> None:
    """Train in FOLDER, which holds the data, the state (state.pt) and the log (log.csv)."""
    data = folder / "data"
    if not (data / "docstrings.npy").exists():
        data.mkdir(parents=True, exist_ok=True)
        click.echo("Making the vocabulary and the tokens of all texts ...", err=True)
        texts = sample_texts() + [json.dumps(CALCULATOR)] * 50
        tokenizer = train_tokenizer(texts, VOCABULARY)
        save_tokenizer(tokenizer, data)
        prepare(data, tokenizer)
    train(folder, processes, 60 * minutes)


if __name__ == "__main__":
    main()
