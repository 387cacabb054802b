"""What rounding costs: divergence from the source model, at equal size, of three ways to round.

    python benchmarks/rounding.py MODEL --calibrate TEXT --text OTHER [--recipes NAME,...] [--tokens 32768]

`mlx` is MLX's own `quantize`, `searched` what `convert --recipe` does, `calibrated` what `--calibrate` adds. Besides
names and files of recipes, `experts:FORMAT`, `attention:FORMAT` and `all:FORMAT` give that format to the routed
experts, to attention, or to everything but embedding and head. Reported is the mean of KL(MODEL || rounded) over the
tokens of OTHER, in stretches of 1024, in nats. Weights are decoded first: MLX's CPU backend is slow at packed products.
Writes benchmarks/rounding.csv.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_v4flash import Model, load_model, rounding
from mlx_v4flash import convert as conversion
from mlx_v4flash.calibrate import Calibrated, read_text
from mlx_v4flash.formats import Format, adapt, format_of, matrices
from mlx_v4flash.quantize import Packed, decode, requantize
from mlx_v4flash.recipe import CLASSES, Recipe, read_recipe
from mlx_v4flash.rounding import Rounding

STRETCH = 1024
GROUPS = {
    "experts": [kind for kind in CLASSES if kind.startswith("routed")],
    "attention": [kind for kind in CLASSES if kind.startswith("attention")],
    "all": [kind for kind in CLASSES if kind not in ("embedding", "head")],
}


def recipe_of(name: str) -> Recipe:
    group, _, format = name.partition(":")
    if format:
        return Recipe(name, classes=dict.fromkeys(GROUPS[group], format))
    return read_recipe(name)


def stock(arrays: Packed, stored: Format, format: Format, feedback: mx.array | None = None) -> Packed:
    """`requantize` by MLX's `quantize`."""
    if format == stored or format.mode == "plain":
        return requantize(arrays, stored, format)
    weight = decode(arrays, stored, mx.bfloat16 if format.mode == "affine" else mx.float32)
    return dict(zip(("weight", "scales", "biases"), mx.quantize(weight, **format.options), strict=False))


def decoded(model: Model) -> Model:
    weights = {}
    for path, module in matrices(model):
        arrays = {name: module[name] for name in ("weight", "scales", "biases") if module.get(name) is not None}
        weights[path] = decode(arrays, format_of(module))
    adapt(model, dict.fromkeys(weights, Format("plain")))
    for path, module in matrices(model):
        module.weight = weights[path]
    return model


def predictions(folder: Path, ids: list[list[int]]) -> np.ndarray:
    """Log-probabilities, [tokens, V]."""
    model, found = decoded(load_model(folder, dtype="float32")), []
    for stretch in ids:
        logits = model(mx.array([stretch]))[0]
        found.append(np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)))
    return np.concatenate(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibrate", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--recipes", default="experts:affine2-g64,experts:affine3-g64,all:affine4-g64,128gb")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--measure", type=int, default=4096)
    args = parser.parse_args()
    opened = conversion.open_source(args.model, Path("unused"))
    text = [i for sequence in read_text(opened, args.text, args.measure) for i in sequence]
    ids = [text[i : i + STRETCH] for i in range(0, len(text) - STRETCH + 1, STRETCH)]
    want = predictions(args.model, ids)
    rows = []
    for name in args.recipes.split(","):
        for way in ("mlx", "searched", "calibrated"):
            row = measure(args, recipe_of(name), way, want, ids)
            rows.append({"recipe": name, "way": way, **row})
            print(rows[-1], flush=True)
    with (Path(__file__).parent / "rounding.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def measure(
    args: argparse.Namespace, recipe: Recipe, way: str, want: np.ndarray, ids: list[list[int]]
) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "rounded"
        opened = conversion.open_source(args.model, target)
        how = Rounding(opened.checkpoint.config, recipe)
        if way == "calibrated":
            how = Calibrated(opened, target, recipe, read_text(opened, args.calibrate, args.tokens))
        rounding.requantize = stock if way == "mlx" else requantize
        start = time.perf_counter()
        converted = conversion.convert(opened, target, rounding=how)
        seconds = time.perf_counter() - start
        found = predictions(target, ids)
    kld = (np.exp(want) * (want - found)).sum(axis=-1)
    return {
        "bytes": converted.nbytes, "kld": round(float(kld.mean()), 5), "p99": round(float(np.percentile(kld, 99)), 4),
        "same_top": round(float((want.argmax(-1) == found.argmax(-1)).mean()), 4), "seconds": round(seconds, 1),
    }  # fmt: skip


if __name__ == "__main__":
    main()
