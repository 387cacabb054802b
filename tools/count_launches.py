"""Primitives that a decode step launches, per kind of layer: with our kernels, and with stock MLX alone.

    python tools/count_launches.py [--names]

Counted from the traced graph of one layer and one token, so it runs anywhere. Views (reshapes, broadcasts, slices of
rows and the like) move no data and are left out. --names lists what is left.
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

from metal_kernels import _dispatch, kernels
from mlx_v4flash import Model, load_model
from mlx_v4flash.tiny import TINY, write_tiny

VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "Contiguous", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice",
    "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip
CONFIG = {**TINY, "num_hidden_layers": 3, "compress_ratios": [0, 4, 128], "num_hash_layers": 0, "index_topk": 16}
KINDS = ("window only", "CSA", "HCA")
# A position at which no group closes, and one at which the CSA layer closes one.
POSITIONS = {"ordinary step": 257, "step that closes a group of 4": 259}


def decode_step(model: Model, number: int, position: int) -> Callable[[mx.array], list[mx.array]]:
    """One token through layer `number` at `position`: streams in; streams and the new state out."""
    cache, ids = model.make_cache(), mx.zeros((1, 1), mx.int32)
    mx.eval(model(mx.zeros((1, position), mx.int32), cache), [c.state for c in cache])
    rotations = model.rotations(cache, 1)
    # Computed once for all layers, so no part of this one.
    mx.eval(rotations.tokens(True), rotations.tokens(False), rotations.groups(position // 4, 1, 4))

    def step(x: mx.array) -> list[mx.array]:
        return [model.layers[number](x, ids, cache[number], rotations), *cache[number].leaves()]

    return step


def with_stock(step: Callable[[mx.array], list[mx.array]], x: mx.array) -> Counter[str]:
    """Non-view primitives of a step in MLX's own operations."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *step(x))
    names = re.findall(r'label ="(\w+)", shape=rectangle', graph.getvalue())
    return Counter(name for name in names if name not in VIEWS)


def with_kernels(step: Callable[[mx.array], list[mx.array]], x: mx.array) -> Counter[str]:
    """Non-view primitives of a step whose ops run their kernels; traced as on a Mac, nothing is compiled."""
    found: Counter[str] = Counter()

    def record(node: dict[str, Any]) -> None:
        if node["type"] == "primitive" and node["name"] not in VIEWS:
            name = node["name"]
            found[node["arguments"][0].split("_bfloat16")[0] if name == "CustomKernel" else name] += 1

    factory, _dispatch.kernel_factory = _dispatch.kernel_factory, lambda **what: mx.fast.metal_kernel(**what)
    try:
        with kernels("metal"):
            mx.export_function(record, step, x)
    finally:
        _dispatch.kernel_factory = factory
    return found


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
    print("| layer | step | with kernels | stock MLX |")
    print("| --- | --- | --- | --- |")
    x = model.streams(mx.zeros((1, 1), mx.int32))
    mx.eval(x)
    for number, kind in enumerate(KINDS):
        for label, position in POSITIONS.items():
            steps = [decode_step(model, number, position) for _ in range(2)]
            with as_on_a_mac():
                ours, stock = with_kernels(steps[0], x), with_stock(steps[1], x)
            print(f"| {kind} | {label} | {ours.total()} | {stock.total()} |")
            if args.names:
                print("  ", dict(ours.most_common()))


if __name__ == "__main__":
    main()
