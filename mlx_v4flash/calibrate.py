"""Rounding that knows what the model computes: a text runs through it, layer by layer, as the conversion goes on.

Each layer sees what the rounded layers before it give, so that it also answers for their errors. Only the streams
between two layers are kept, in a file, so that an interrupted conversion goes on with the same bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from .convert_source import FolderSource
from .errors import ConvertError
from .expert_pack import as_numpy
from .formats import Format, adapt
from .journal import write_file
from .linear import Numerics, Observed
from .loading import load_tokenizer
from .model import Layer, Model
from .quantize import decode, requantize
from .recipe import Recipe
from .rounding import STATE, Arrays, Rounding, by_module
from .routed_tokens import RARE, Back, Gram, RoutedTokens
from .weights import parameter, sources

# Tokens of one sequence.
SEQUENCE = 2048


def read_text(source: FolderSource, path: Path, tokens: int) -> list[list[int]]:
    """The first tokens of a text, in sequences.

    Raises:
        ConvertError: the file cannot be read, or is too short to say anything.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        raise ConvertError(f"{path}: expected a text in UTF-8, found {e}\nhint: choose another file") from e
    ids = [int(i) for i in load_tokenizer(source.folder).encode(text)][:tokens]
    if len(ids) < RARE:
        raise ConvertError(f"{path}: expected a text of many pages, found {len(ids)} tokens")
    return [ids[i : i + SEQUENCE] for i in range(0, len(ids), SEQUENCE)]


class Calibrated(Rounding):
    """Rounds with error feedback for the inputs that the matrices have on a text.

    Experts share one text, and many are chosen for few of its tokens. What all tokens of the layer look like stands in
    for what is not known of an expert's own inputs; one that is chosen for fewer than RARE is rounded plainly.

    Args:
        ids: of the text's sequences.
    """

    def __init__(self, source: FolderSource, target: Path, recipe: Recipe, ids: list[list[int]]) -> None:
        config = source.checkpoint.config
        super().__init__(config, recipe)
        self.source, self.target, self.ids, self.config = source, target, ids, config
        whole = (config.head_dim - config.qk_rope_head_dim) % 64 == 0 and config.index_head_dim % 32 == 0
        self.numerics = Numerics(mx.float32, simulate_cache_quant=whole)
        self.model = Model(config, self.numerics)
        self._state_bytes = 4 * sum(map(len, ids)) * config.hc_mult * config.hidden_size
        self.scratch_bytes = 2 * self._state_bytes

    def identity(self) -> dict[str, Any]:
        text = {"tokens": sum(map(len, self.ids)), "crc32": zlib.crc32(repr(self.ids).encode())}
        return super().identity() | {"calibration": text}

    # --- what is not an expert --------------------------------------------------------------------

    def dense(self, unit: str, arrays: Arrays) -> Arrays:
        if unit == "dense-head" and "head" in self.formats:
            return self.changed(arrays, {"head": self._head_inputs().feedback()})
        if not unit.startswith("dense-layers.") or not any(module in self.formats for module in by_module(arrays)):
            return super().dense(unit, arrays)
        number = int(unit.rpartition(".")[2])
        layer = self._layer(number)
        self._fill(layer, number, arrays, self.stored)
        done = {path: array for path, array in arrays.items() if path.split(".")[2] not in ("attn", "ffn")}
        for part in ("attn", "ffn"):  # the shared expert answers for the errors of attention, too
            mine = {path: array for path, array in arrays.items() if path.split(".")[2] == part}
            rounded = [m for m in by_module(mine) if m in self.formats and self.formats[m].mode != "plain"]
            with self._observed(layer, number, rounded) as inputs:
                for h, _ in self._attended(layer, number) if inputs else ():
                    mx.eval(layer.ffn.shared_experts(h[0]))
            done |= self.changed(mine, {module: gram.feedback() for module, gram in inputs.items()})
            self._fill(layer, number, done, self.stored | self.formats)
        return done

    @contextmanager
    def _observed(self, layer: Layer, number: int, modules: list[str]) -> Iterator[dict[str, Gram]]:
        """Collect the inputs of these modules of the layer."""
        grams = {module: Gram() for module in modules}
        inside = dict(layer.named_modules())
        places = []
        for module, gram in grams.items():
            parent, _, name = module.removeprefix(f"layers.{number}.").rpartition(".")
            places.append((inside[parent], name, inside[parent][name]))
            setattr(inside[parent], name, Observed(inside[parent][name], gram.add))
        yield grams
        for owner, name, module in places:
            setattr(owner, name, module)

    def _head_inputs(self) -> Gram:
        checkpoint = self.source.checkpoint
        needed = {p: t for p, t in sources(checkpoint) if p.startswith(("hc_head", "norm"))}
        self.source.fetch(tensor.name for tensors in needed.values() for tensor in tensors)
        with ThreadPoolExecutor(1) as readers:
            for path, tensors in sources(checkpoint):
                if path in needed:
                    self.model.update(tree_unflatten([(path, parameter(path, tensors, checkpoint, readers))]))
        gram = Gram()
        for x in self._streams(self.config.num_hidden_layers):
            gram.add(self.model.hc_head(x, self.model.norm.weight))
        return gram

    # --- experts ----------------------------------------------------------------------------------

    def begin_experts(self, module: str) -> None:
        number = int(module.split(".")[1])
        layer = self._layer(number)
        written = mx.load(str(self.target / f"dense-layers.{number}.safetensors"))
        assert isinstance(written, dict)
        self._fill(layer, number, written, self.stored | self.formats)
        self._tokens = RoutedTokens(self.config.swiglu_limit)
        for (h, back), ids in zip(self._attended(layer, number), self.ids, strict=True):
            experts, weights = layer.ffn.gate(h[0], mx.array(ids))
            self._tokens.add(h[0], experts, weights, layer.ffn.shared_experts(h[0]), back)
        self._tokens.begin()

    def expert(self, module: str, number: int, arrays: Arrays) -> Arrays:
        tokens = self._tokens.of(number)
        done: Arrays = {}
        known: dict[str, mx.array] = {}
        for matrices in (("w1", "w3"), ("w2",)):
            mine = {path: array for path, array in arrays.items() if path.split(".")[0] in matrices}
            if tokens.count >= RARE and any(f"{module}.{m}" in self.formats for m in matrices):
                done |= self._together(module, matrices, mine, tokens.inputs(known).feedback())
            else:
                done |= super().expert(module, number, mine)
            formats = self.stored | self.formats
            known |= {m: decode(by_module(done)[m], formats[f"{module}.{m}"]) for m in matrices}
        tokens.finish(known)
        return done

    def _together(self, module: str, matrices: tuple[str, ...], arrays: Arrays, feedback: mx.array) -> Arrays:
        """Matrices with one input and one format, as if their rows were those of one."""
        parts = by_module(arrays)
        rows = {name: mx.concatenate([parts[m][name] for m in matrices]) for name in parts[matrices[0]]}
        path = f"{module}.{matrices[0]}"
        rows = requantize(rows, self.stored[path], self.formats[path], feedback)
        return {
            f"{matrix}.{name}": share
            for name, array in rows.items()
            for matrix, share in zip(matrices, mx.split(array, len(matrices)), strict=True)
        }

    def end_experts(self, module: str) -> dict[str, Any]:
        number = int(module.split(".")[1])
        streams = self._tokens.streams()
        write_file(self._state(number + 1), (as_numpy(x).data.cast("B") for x in streams))
        return {"rare": self._tokens.rare}

    # --- layers and streams -----------------------------------------------------------------------

    def _layer(self, number: int) -> Layer:
        """A layer whose matrices are plain; its routed experts stay empty."""
        layer = Layer(self.config, self.numerics, number)
        prefix = f"layers.{number}."
        adapt(layer, {
            path.removeprefix(prefix): Format("plain")
            for path in self.stored if path.startswith(prefix) and ".experts." not in path
        })  # fmt: skip
        return layer

    def _fill(self, layer: Layer, number: int, arrays: Arrays, formats: Mapping[str, Format]) -> None:
        for module, parts in by_module(arrays).items():
            values = {"weight": decode(parts, formats[module])} if module in self.stored else parts
            for name, array in values.items():
                layer.update(tree_unflatten([(f"{module}.{name}".removeprefix(f"layers.{number}."), array)]))

    def _attended(self, layer: Layer, number: int) -> Iterator[tuple[mx.array, Back]]:
        """Of each sequence, the input [1, T, D] of the layer's experts, and the way back to the streams."""
        for x in self._streams(number):
            cache = self.model.make_cache()
            h, back = layer.hc_attn(x, layer.attn_norm.weight)
            x = back(layer.attn(h, cache[number], self.model.rotations(cache, x.shape[1])))
            h, back = layer.hc_ffn(x, layer.ffn_norm.weight)
            mx.eval(x, h)
            yield h, back

    def _streams(self, number: int) -> Iterator[mx.array]:
        """What enters a layer, or the head after the last: [1, T, N, D] of each sequence, float32."""
        c = self.config
        if number == 0:
            written = mx.load(str(self.target / "dense-embed.safetensors"))
            assert isinstance(written, dict)
            formats = self.stored | self.formats
            for ids in self.ids:
                rows = {n: array[mx.array(ids)] for n, array in by_module(written)["embed"].items()}
                yield mx.repeat(decode(rows, formats["embed"])[None, :, None], c.hc_mult, axis=2)
            return
        for earlier in range(1, number):
            self._state(earlier).unlink(missing_ok=True)
        path = self._state(number)
        if not path.is_file() or path.stat().st_size != self._state_bytes:
            raise ConvertError(
                f"{path}: expected what entered layer {number} when this conversion was interrupted, found "
                f"{'another size' if path.is_file() else 'nothing'}\nhint: remove {self.target} and convert again"
            )
        values = np.memmap(path, np.float32, "r").reshape(-1, c.hc_mult, c.hidden_size)
        start = 0
        for ids in self.ids:
            yield mx.array(np.array(values[None, start : start + len(ids)]))
            start += len(ids)

    def _state(self, number: int) -> Path:
        folder = self.target / STATE
        folder.mkdir(exist_ok=True)
        return folder / f"streams-{number}"
