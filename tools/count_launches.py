"""Primitives that a decode step launches, per kind of layer: with our kernels, with stock MLX alone, and in mlx-lm.

    python tools/count_launches.py [--names]

Counted from the traced graph of one layer and one token, so it runs anywhere. Views (reshapes, broadcasts, slices of
rows and the like) move no data and are left out. --names lists what is left.

The column of mlx-lm is its deepseek_v41, the nearest model it has, at the same sizes with 4-bit weights. It is traced
as on a Mac: norm, rotation, attention, Sinkhorn and swiglu count as one launch each. In the column of stock MLX they
are several, as on MLX's CPU backend.
"""

from __future__ import annotations

import argparse
import importlib
import io
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm_layer

from metal_kernels import _dispatch, kernels
from mlx_v4flash import Model, load_model
from mlx_v4flash.tiny import TINY, write_tiny

VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Contiguous", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice",
    "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
CONFIG = {
    **TINY, "num_hidden_layers": 4, "compress_ratios": [0, 0, 4, 128], "num_hash_layers": 1, "index_topk": 16
}  # fmt: skip
KINDS = ("window only, router by token id", "window only", "CSA", "HCA")
# What mlx-lm's model has of them, by the tokens of a compressed row.
IN_MLX_LM = {"window only": 0, "CSA": 4}
# A position at which no group closes, and one at which the CSA layer closes one.
POSITIONS = {"ordinary step": 257, "step that closes a group of 4": 259}
Step = Callable[[mx.array], list[mx.array]]


def decode_step(model: Model, number: int, position: int) -> Step:
    """One token through layer `number` at `position`: streams in; streams and the new state out."""
    cache, ids = model.make_cache(), mx.zeros((1, 1), mx.int32)
    mx.eval(ids, model(mx.zeros((1, position), mx.int32), cache), [c.state for c in cache])
    rotations = model.rotations(cache, 1)
    # Computed once for all layers, so no part of this one.
    mx.eval(rotations.tokens(True), rotations.tokens(False), rotations.groups(position // 4, 1, 4))

    def step(x: mx.array) -> list[mx.array]:
        return [model.layers[number](x, ids, cache[number], rotations), *cache[number].leaves()]

    return step


def expert_sublayer(model: Model, number: int) -> Step:
    """The second half of a layer alone, which keeps no state."""
    layer, ids = model.layers[number], mx.zeros((1, 1), mx.int32)
    mx.eval(ids)

    def step(x: mx.array) -> list[mx.array]:
        h, back = layer.hc_ffn(x, layer.ffn_norm.weight)
        return [back(layer.ffn(h, ids))]

    return step


def with_stock(step: Step, x: mx.array) -> Counter[str]:
    """Non-view primitives of a step in MLX's own operations."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *step(x))
    names = re.findall(r'label ="(\w+)", shape=rectangle', graph.getvalue())
    return Counter(name for name in names if name not in VIEWS)


def traced(step: Step, x: mx.array, made: list[str]) -> Counter[str]:
    """Non-view primitives of a step, kernels by their names in `made`; nothing is compiled."""
    found: Counter[str] = Counter()

    def record(node: dict[str, Any]) -> None:
        if node["type"] == "primitive" and node["name"] not in VIEWS:
            name = node["name"]
            if name == "CustomKernel":
                fits = [m for m in made if node["arguments"][0].startswith(f"custom_kernel_{m}_")]
                name = max(fits, key=len)
            found[name] += 1

    mx.export_function(record, step, x)
    return found


@contextmanager
def named_kernels() -> Iterator[tuple[Callable[..., Any], list[str]]]:
    """A factory of kernels, also for our ops, and the names of those it made."""
    made: list[str] = []

    def make(**what: Any) -> Any:
        made.append(what["name"])
        return mx.fast.metal_kernel(**what)

    factory, _dispatch.kernel_factory = _dispatch.kernel_factory, make
    try:
        yield make, made
    finally:
        _dispatch.kernel_factory = factory


def with_kernels(step: Step, x: mx.array) -> Counter[str]:
    """Non-view primitives of a step whose ops run their kernels; traced as on a Mac."""
    with named_kernels() as (_, made), kernels("metal"):
        return traced(step, x, made)


def in_mlx_lm(ratio: int, position: int, x: mx.array) -> Counter[str]:
    """Those of mlx-lm's model."""
    step = mlx_lm_layer.decode_step(CONFIG, ratio, position)
    with named_kernels() as (make, made), mlx_lm_layer.fused_as_on_metal(make):
        return traced(step, x, made)


@contextmanager
def as_on_a_mac() -> Iterator[None]:
    """Without what only MLX's CPU backend needs, and with copies that the tracer cannot record left out."""
    products, contiguous = importlib.import_module("metal_kernels.quantized_product"), mx.contiguous
    experts, widen = importlib.import_module("metal_kernels.experts"), products.summed_in_float32
    products.summed_in_float32 = experts.summed_in_float32 = lambda x: x
    mx.contiguous = lambda x: x
    try:
        yield
    finally:
        products.summed_in_float32 = experts.summed_in_float32 = widen
        mx.contiguous = contiguous


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(write_tiny(Path(folder) / "m", CONFIG))
    print("| layer | step | with kernels | of them in the expert sublayer | stock MLX | mlx-lm deepseek_v41 |")
    print("| --- | --- | --- | --- | --- | --- |")
    x = model.streams(mx.zeros((1, 1), mx.int32))
    mx.eval(x)
    for number, kind in enumerate(KINDS):
        for label, position in POSITIONS.items():
            if kind != "CSA" and position != 257:
                continue
            steps = [decode_step(model, number, position) for _ in range(2)]
            with as_on_a_mac():
                ours, stock = with_kernels(steps[0], x), with_stock(steps[1], x)
                half = with_kernels(expert_sublayer(model, number), x)
            theirs = in_mlx_lm(IN_MLX_LM[kind], position, x) if kind in IN_MLX_LM else None
            cells = (ours.total(), half.total(), stock.total(), theirs.total() if theirs else "not there")
            print(f"| {kind} | {label} | {' | '.join(map(str, cells))} |")
            if args.names:
                for name, counts in (("layer", ours), ("expert sublayer", half), ("mlx-lm", theirs)):
                    if counts:
                        print(f"    {name}:", ", ".join(f"{n} {count}" for n, count in counts.most_common()))


if __name__ == "__main__":
    main()
