"""Measure the small model in training, or when trained: figures as JSON on stdout. See docs/nano.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from nano import evaluate as e
from nano.baselines import ByteCounts, compressed_bits
from nano.data import TEXTS, Corpus
from nano.export import load_state
from nano.recipe import SHORT
from nano.texts import documents

# Of each source's held-out texts.
TOKENS = 8_193
DISTANCES = (60, 100, 200, 400, 800, 1600, 3000)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.option("--count", default=40, show_default=True, help="Questions of each kind.")
@click.option("--seed", default=1_000_003, show_default=True, help="Of the questions; training never uses this one.")
@click.option("--baselines/--no-baselines", default=False, help="gzip, xz and byte counts on the same texts.")
def main(folder: Path, count: int, seed: int, baselines: bool) -> None:
    """Measure the state in FOLDER, which train_nano.py wrote."""
    torch.set_num_threads(1)
    model, corpus = load_state(folder / "state.pt"), Corpus.from_folder(folder / "data")
    held_out = {name: np.load(folder / "data" / f"{name}.held_out.npy") for name in TEXTS}
    found: dict[str, Any] = {"step": torch.load(folder / "state.pt", weights_only=True)["step"]}
    found["small_talk"], found["small_talk_wrong"] = e.small_talk_right(model, corpus)
    found["arithmetic"] = e.arithmetic_right(model, corpus, count, seed)
    found["recall"] = {d: e.recall_right(model, corpus, d, count, seed + d) for d in DISTANCES}
    found["tools"] = e.tool_calls_right(model, corpus, count, seed)
    found["bits_per_byte"] = e.bits_per_byte(model, corpus, held_out, TOKENS)
    tokens = torch.from_numpy(corpus.batch(SHORT, 8, (seed,))[0][:, :-1])
    found["experts"] = [[round(x, 3) for x in layer] for layer in e.expert_use(model, tokens).tolist()]
    found["rounding"] = e.rounding_cost(model, tokens[:4])
    if baselines:
        found["baselines"] = {name: _baselines(name, e.text_of(corpus, ids[:TOKENS])) for name, ids in held_out.items()}
    click.echo(json.dumps(found, indent=1, ensure_ascii=False))


def _baselines(source: str, text: bytes) -> dict[str, float]:
    """Bits per byte by compressors that have seen 4 MB of the source, and by counts of 1 MB of it."""
    before = "\n".join(documents(source)).encode()
    counts = ByteCounts(before[:1_000_000], 6)
    return compressed_bits(text, before[:4_000_000]) | {"byte counts": counts.bits_per_byte(text)}


if __name__ == "__main__":
    main()
