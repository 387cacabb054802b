"""Which format each kind of matrix takes in each layer."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import ModelConfig
from .errors import ConvertError
from .formats import Format, format_of, matrices, shape_of
from .linear import Numerics
from .model import Model

# Kinds of matrices by the end of their path. What the model multiplies as one matrix has one format: wq_a and wkv,
# wq_b and that of the indexer, the projections of compressors and the indexer's others.
CLASSES = {
    "routed_w1_w3": r"experts\.w[13]",
    "routed_w2": r"experts\.w2",
    "shared": r"shared_experts\.w[123]",
    "attention_in": r"attn\.wqkv_a",
    "attention_q": r"attn\.wq_b",
    "attention_o": r"attn\.wo_[ab]",
    "compressor": r"attn\.wcompress",
    "embedding": r"embed",
    "head": r"head",
}
_WHOLE = ("embedding", "head")
_MEANT = {
    "indexer": "its queries are part of attention_q and its other projections of compressor",
    "attention_kv": "wkv is part of attention_in, as it is one matrix with wq_a",
    "routed": "expected routed_w1_w3 and routed_w2",
    "attention": "expected attention_in, attention_q and attention_o",
}
NATIVE = "native"


@dataclass(frozen=True)
class Recipe:
    """Formats by class, and those of some layers.

    Args:
        classes: "native", for as it is in the checkpoint, or the name of a format, by class; native where absent.
        machine: GB of memory of the machines it is made for; 0 if unknown.
        layers: the same, for these layers; the last that names a class counts. Numbers below 0 count from the end.
    """

    name: str
    about: str = ""
    machine: int = 0
    classes: Mapping[str, str] = field(default_factory=dict)
    layers: tuple[tuple[tuple[int, ...], Mapping[str, str]], ...] = ()

    def formats(self, config: ModelConfig) -> dict[str, Format]:
        """Formats of those matrices that are not to stay as they are, by path in the model.

        Raises:
            ConvertError: a layer does not exist, or groups of a format do not divide the columns of a matrix.
        """
        count = config.num_hidden_layers
        for numbers, _ in self.layers:
            for n in numbers:
                if not -count <= n < count:
                    raise ConvertError(f"recipe {self.name}: layers: expected {-count} to {count - 1}, found {n}")
        found: dict[str, Format] = {}
        for path, module in matrices(Model(config, Numerics())):
            kind = next(kind for kind, pattern in CLASSES.items() if re.search(rf"(^|\.){pattern}$", path))
            name = self._of(kind, int(path.split(".")[1]), count) if kind not in _WHOLE else self._of(kind, None, count)
            if name == NATIVE:
                continue
            format, columns = Format.named(name), shape_of(module)[-1]
            if not format.fits(columns):
                raise ConvertError(
                    f"recipe {self.name}: {kind}: expected a format whose groups divide {columns} columns of {path}, "
                    f"found {name}\nhint: choose a smaller group, or {NATIVE}"
                )
            if format.mode == "plain" or format != format_of(module):
                found[path] = format
        return found

    def _of(self, kind: str, layer: int | None, count: int) -> str:
        name = self.classes.get(kind, NATIVE)
        for numbers, classes in self.layers:
            if layer is not None and (layer in numbers or layer - count in numbers):
                name = classes.get(kind, name)
        return name

    def json(self) -> dict[str, Any]:
        layers = [[list(numbers), dict(classes)] for numbers, classes in self.layers]
        return {"name": self.name, "classes": dict(self.classes), "layers": layers}


def read_recipe(name: str) -> Recipe:
    """A named recipe, or one from a TOML file: classes with their formats, and tables `[layers."0-2,-1"]` of them.

    Raises:
        ConvertError: there is none of this name, or the file holds something else.
    """
    named = RECIPES | {NATIVE: AS_STORED}
    if name in named:
        return named[name]
    path = Path(name)
    if not path.is_file():
        raise ConvertError(f"recipe: expected {', '.join(named)} or a TOML file, found {name!r}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConvertError(f"{path}: expected TOML, found {e}\nhint: see docs/recipes.md") from e
    layers = values.pop("layers", {})
    about = values.pop("about", "")
    if not isinstance(layers, dict):
        raise ConvertError(f'{path}: layers: expected tables such as [layers."0-2,-1"], found {layers!r}')
    return Recipe(
        path.stem,
        str(about),
        0,
        _classes(values, f"{path}"),
        tuple((_numbers(key, path), _classes(table, f"{path}: layers {key}", True)) for key, table in layers.items()),
    )


def _classes(values: Any, where: str, in_layer: bool = False) -> dict[str, str]:
    if not isinstance(values, dict):
        raise ConvertError(f"{where}: expected a table of classes and formats, found {values!r}")
    allowed = [kind for kind in CLASSES if not (in_layer and kind in _WHOLE)]
    for kind, name in values.items():
        if kind not in allowed:
            hint = f"\nhint: {_MEANT[kind]}" if kind in _MEANT else ""
            raise ConvertError(f"{where}: expected {', '.join(allowed)}, found {kind!r}{hint}")
        try:
            _ = name == NATIVE or Format.named(name)
        except (ValueError, TypeError) as e:
            raise ConvertError(
                f"{where}: {kind}: expected {NATIVE}, bf16, mxfp8, mxfp4, nvfp4, or affineB-gN with 2, 3, 4, 5, 6 "
                f"or 8 bits in groups of 32, 64 or 128, found {name!r}"
            ) from e
    return dict(values)


def _numbers(text: str, path: Path) -> tuple[int, ...]:
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise ConvertError(f"{path}: layers: expected numbers and ranges such as 0-2,-1, found {text!r}")
        found += range(int(match[1]), int(match[2]) + 1) if match[2] else [int(match[1])]
    return tuple(found)


# Every number as the checkpoint stores it.
AS_STORED = Recipe(NATIVE)

# --- named recipes, each for machines of a size (GB of memory) ---

_SMALL = {
    "shared": "affine4-g64", "attention_in": "affine5-g64", "attention_q": "affine4-g64",
    "attention_o": "affine4-g64", "compressor": "affine8-g64", "embedding": "affine4-g64", "head": "affine6-g64",
}  # fmt: skip
_MIDDLE = {
    "shared": "affine6-g64", "attention_in": "affine6-g64", "attention_q": "affine5-g64",
    "attention_o": "affine5-g64", "compressor": "affine8-g64", "embedding": "affine4-g64", "head": "affine6-g64",
}  # fmt: skip
_ENDS = (0, 1, -1)
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("64gb", "the fewest bytes; experts that are not in memory come from disk", 64,
               {"routed_w1_w3": "affine2-g128", "routed_w2": "affine2-g128", **_SMALL}),
        Recipe("96gb", "few of the experts come from disk", 96,
               {"routed_w1_w3": "affine2-g128", "routed_w2": "affine2-g64", **_MIDDLE}),
        Recipe("128gb", "2 bits, w2 of the first and last layers 3; all in memory", 128,
               {"routed_w1_w3": "affine2-g64", "routed_w2": "affine2-g64", **_MIDDLE},
               ((_ENDS, {"routed_w2": "affine3-g64"}),)),
        Recipe("192gb", "w1 and w3 at 3 bits, the first and last layers and w2 as they are", 192,
               {"routed_w1_w3": "affine3-g64", "compressor": "affine8-g64", "head": "affine8-g64"},
               ((_ENDS, {"routed_w1_w3": NATIVE}),)),
        Recipe("256gb", "DeepSeek's own bits, nothing is rounded", 256),
        Recipe("256gb-fast", "DeepSeek's experts; fewer bytes a token", 256, _MIDDLE),
    )
}  # fmt: skip
