"""Write the small model in training, or when trained, as a checkpoint in the official format."""

from __future__ import annotations

from pathlib import Path

import click
import torch
from nano.export import export, load_state
from nano.recipe import CHAT


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True))
@click.argument("checkpoint", type=click.Path(path_type=Path, file_okay=False))
def main(folder: Path, checkpoint: Path) -> None:
    """Write the state in FOLDER, which train_nano.py wrote, to CHECKPOINT."""
    state = folder / "state.pt"
    step = torch.load(state, weights_only=True)["step"]
    export(load_state(state), folder / "data", checkpoint, {"nano": True, "step": step, "chat": CHAT})
    size = (checkpoint / "model.safetensors").stat().st_size
    click.echo(f"{checkpoint}: {size / 2**20:.1f} MiB after step {step}", err=True)


if __name__ == "__main__":
    main()
