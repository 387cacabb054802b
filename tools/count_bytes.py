"""Bytes that a decode step moves at several contexts, with packed caches and with the float layout, against the least.

    python tools/count_bytes.py [--names]

One layer of each kind is traced at the sizes of V4-Flash with all kernels on; arrays are never made, so it runs
anywhere. What counts are the arrays that each launch is given: inputs read once, outputs written once, views nothing.
Three launches touch a part of what they are given, and which part is checked in the emulator by tests/metal (accesses
of rows, keys and expert weights are counted there): experts their active share, attention the picked rows, a
gather or an update the rows it moves. Repeated reads that caches of the GPU may serve are not counted.
The least is every active weight once, as it is held, and of packed caches what a token attends and scores. --names
lists the launches of a layer.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path

from metal_kernels import _dispatch, kernels
from metal_kernels.packed_rows import key_bytes, row_bytes
from mlx_v4flash import Model, load_model
from mlx_v4flash.cache import LayerCache
from mlx_v4flash.config import ModelConfig
from mlx_v4flash.linear import Numerics
from mlx_v4flash.tiny import REAL, TINY, write_tiny

_spec = importlib.util.spec_from_file_location("count_launches", Path(__file__).with_name("count_launches.py"))
assert _spec is not None and _spec.loader is not None
launches = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(launches)

# A layer of each kind, and how many the model has. No group closes at the position after a context.
KINDS = {"layer_types": [0, 4, 128]}
SHAPE = {"num_hidden_layers": 3, "compress_ratios": KINDS["layer_types"], "num_hash_layers": 0}
CONTEXTS = {"2K": 2048, "64K": 65536, "1M": 1 << 20}
PAST = 62  # tokens past the context: half of a group of 128
MADE = {"Full", "Arange"}  # stand for arrays that lie in memory, or are made of nothing
MOVES = {"Gather", "GatherAxis"}
UPDATES = {"DynamicSliceUpdate", "SliceUpdate"}


def model_without_arrays(packed: bool) -> Model:
    """Sizes of V4-Flash, types of a loaded checkpoint; nothing is allocated."""
    with tempfile.TemporaryDirectory() as folder:
        held = dict(tree_flatten(load_model(write_tiny(Path(folder) / "m", TINY | SHAPE)).parameters()))
    model = Model(ModelConfig.from_dict(REAL | SHAPE), Numerics(simulate_cache_quant=packed))
    numbers = itertools.count()

    def stand_in(path: str, a: mx.array) -> mx.array:
        # Another number for each array of a layer: the tracer makes one product of two that are alike.
        return mx.full(a.shape, next(numbers) % 251, held[path].dtype)

    model.update(tree_map_with_path(stand_in, model.parameters()))
    return model


def cache_at(model: Model, number: int, context: int, packed: bool) -> LayerCache:
    """A cache of one layer as it is after so many tokens."""
    c, cache = model.config, LayerCache(model.config.sliding_window, model.config.compress_ratios[number])
    K, J, kind = c.head_dim, c.index_head_dim, mx.uint8 if packed else mx.bfloat16
    row, key = (row_bytes(K, c.qk_rope_head_dim), key_bytes(J)) if packed else (K, J)
    cache.position = context + PAST
    cache.window = mx.zeros((1, c.sliding_window, row), kind)
    for side, size in ((cache.attn, row), (cache.index, key)):
        if side is not None:
            side.append(mx.zeros((1, cache.position // cache.ratio, size), kind))
    if cache.ratio:
        kept = cache.ratio * (2 if cache.ratio == 4 else 1)
        cache.recent = mx.zeros((1, kept, model.layers[number].attn.wcompress.weight.shape[0]))
    return cache


class Tally:
    """Bytes by what they belong to: weights, caches, activations; and by launch."""

    def __init__(self, active: float) -> None:
        self.active, self.kinds = active, Counter[str]()
        self.names, self._origin = Counter[str](), dict[str, str]()

    def node(self, node: dict[str, Any]) -> None:
        if node["type"] == "inputs":
            self._origin |= {name: "caches" for name, *_ in node["inputs"][1:]}
        elif node["type"] == "primitive":
            self._primitive(node["name"], node["arguments"], node["inputs"], node["outputs"])

    def _primitive(self, name: str, arguments: list[Any], inputs: list[Any], outputs: list[Any]) -> None:
        if name in MADE or (name in launches.VIEWS and inputs):
            origin = "weights" if name == "Full" else self._origin.get(inputs[0][0] if inputs else "", "activations")
            self._origin |= {out[0]: origin for out in outputs}
            return
        label = arguments[0].split("_bfloat16")[0] if name == "CustomKernel" else name
        for i, (at, shape, dtype) in enumerate(inputs):
            if at in [name for name, *_ in inputs[:i]]:
                continue  # it stands where an array is that this format does not have
            kind, size = self._origin.get(at, "activations"), math.prod(shape) * dtype.size
            self._add(label, kind, self._touched(label, i, size, shape, inputs, outputs))
        for at, shape, dtype in outputs:
            whole = math.prod(shape) * dtype.size
            # An update writes into the array it was given, which no one else holds.
            size = math.prod(inputs[1][1]) * dtype.size if name in UPDATES else whole
            kind = self._origin.get(inputs[0][0], "activations") if name in UPDATES else "activations"
            self._origin[at] = kind
            self._add(label, kind, size)

    def _touched(self, label: str, i: int, size: int, shape: Any, inputs: list[Any], outputs: list[Any]) -> float:
        if label in UPDATES and i == 0:
            return 0
        if label in MOVES and i == 0:
            return sum(math.prod(out[1]) * out[2].size for out in outputs)
        if "expert" in label and len(shape) == 3 and shape[0] == REAL["n_routed_experts"]:
            return size * self.active
        if (
            "sparse_attention" in label and i == 2
        ):  # (q, window, rows, picks, ...): rows in place of none are the window
            if inputs[2][0] == inputs[1][0]:
                return 0
            if len(inputs[3][1]) == 3:
                return size / shape[1] * inputs[3][1][-1]
        return size

    def _add(self, label: str, kind: str, size: float) -> None:
        self.kinds[kind] += size
        self.names[label] += size


@contextmanager
def traced(tally: Tally) -> Iterator[Callable[..., None]]:
    """A function that traces a call as on a Mac with every kernel, and counts it."""
    factory, _dispatch.kernel_factory = _dispatch.kernel_factory, lambda **what: mx.fast.metal_kernel(**what)
    try:
        with kernels("metal"), launches.as_on_a_mac():
            yield lambda call, *arrays: mx.export_function(tally.node, call, *arrays)
    finally:
        _dispatch.kernel_factory = factory


def count(model: Model, number: int | None, context: int, packed: bool) -> Tally:
    """What one layer moves, or with None the head."""
    c, ids = model.config, mx.zeros((1, 1), mx.int32)
    tally = Tally(c.num_experts_per_tok / c.n_routed_experts)
    x = mx.zeros((1, 1, c.hc_mult, c.hidden_size), mx.bfloat16)
    with traced(tally) as trace:
        if number is None:
            trace(model.logits, x)
            return tally
        cache = cache_at(model, number, context, packed)
        rotations = model.rotations([cache], 1)
        turns = [rotations.tokens(True), rotations.tokens(False)]
        mx.eval(turns)

        def step(x: mx.array, *leaves: mx.array) -> list[mx.array]:
            _hold(cache, iter(leaves))
            return [model.layers[number](x, ids, cache, rotations), *cache.leaves()]

        trace(step, x, *cache.leaves())
    return tally


def _hold(cache: LayerCache, leaves: Iterator[mx.array]) -> None:
    """Put the arrays of a trace in the places of a cache's own, in the order of `leaves`."""
    cache.window = next(leaves)
    if cache.recent is not None:
        cache.recent = next(leaves)
    for side in (cache.attn, cache.index):
        if side is not None:
            side.buffer = next(leaves)


def least(model: Model, counts: dict[int, int], context: int) -> float:
    """Active weights and packed caches, each byte once."""
    c, total = model.config, 0.0
    active = c.num_experts_per_tok / c.n_routed_experts
    for path, a in tree_flatten(model.parameters()):
        if path.startswith("embed"):
            continue
        layer = int(path.split(".")[1]) if path.startswith("layers.") else -1
        total += a.nbytes * (active if ".experts." in path else 1) * counts.get(layer, 1)
    row, seen = row_bytes(c.head_dim, c.qk_rope_head_dim), context + PAST
    for number, ratio in enumerate(c.compress_ratios):
        rows = {0: 0, 4: min(c.index_topk, seen // 4)}.get(ratio, seen // ratio if ratio else 0)
        keys = seen // 4 * key_bytes(c.index_head_dim) if ratio == 4 else 0
        total += counts[number] * ((c.sliding_window + rows) * row + keys)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--names", action="store_true")
    args = parser.parse_args()
    first: dict[bool, float] = {}
    ratios = REAL["compress_ratios"][: REAL["num_hidden_layers"]]
    counts = {number: ratios.count(ratio) for number, ratio in enumerate(SHAPE["compress_ratios"])}
    print("| caches | context | weights, GB | caches, MB | activations, MB | all, GB | of the least | of 2K |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for packed in (True, False):
        model = model_without_arrays(packed)
        for label, context in CONTEXTS.items():
            total = count(model, None, context, packed).kinds
            for number, times in counts.items():
                layer = count(model, number, context, packed)
                for kind, size in layer.kinds.items():
                    total[kind] += times * size
                if args.names:
                    print(f"  ratio {SHAPE['compress_ratios'][number]}:", dict(layer.names.most_common()))
            whole = sum(total.values())
            base = first.setdefault(packed, whole)
            print(
                f"| {'packed' if packed else 'float'} | {label} | {total['weights'] / 1e9:.3f} | "
                f"{total['caches'] / 1e6:.1f} | {total['activations'] / 1e6:.1f} | {whole / 1e9:.3f} | "
                f"{whole / least(model, counts, context):.3f} | {whole / base:.3f} |"
            )


if __name__ == "__main__":
    main()
