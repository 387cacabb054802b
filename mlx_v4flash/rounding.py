"""What a conversion makes of each matrix on its way: as it is, or in the format that a recipe asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from .config import ModelConfig
from .formats import format_of, matrices
from .linear import Numerics
from .model import Model
from .quantize import requantize
from .recipe import Recipe

Arrays = dict[str, mx.array]
# A folder inside the target for what a rounding must know to continue.
STATE = ".calibration"


class Rounding:
    """Rounds every number for itself, to the scales with the least error in the weights.

    Attributes:
        stored, formats: of every matrix in the checkpoint, and of those that are to change, by path in the model.
    """

    scratch_bytes = 0  # on disk, of what a rounding must know to continue

    def __init__(self, config: ModelConfig, recipe: Recipe) -> None:
        self.recipe = recipe
        self.stored = {path: format_of(module) for path, module in matrices(Model(config, Numerics()))}
        self.formats = recipe.formats(config)

    def identity(self) -> dict[str, Any]:
        """What must be the same when a conversion continues; nothing if nothing changes."""
        return {"recipe": self.recipe.json()} if self.formats else {}

    def dense(self, unit: str, arrays: Arrays) -> Arrays:
        """Parameters of one unit by path, as the source holds them -> as they are to be written."""
        return self.changed(arrays, {})

    def begin_experts(self, module: str) -> None:
        """The experts of this layer come next, in their order."""

    def expert(self, module: str, number: int, arrays: Arrays) -> Arrays:
        """One expert's arrays, `w1.weight` and so on, as the source holds them -> as they are to be written."""
        return self.changed(arrays, {}, f"{module}.")

    def end_experts(self, module: str) -> dict[str, Any]:
        """All of them have been written; what the journal keeps of them."""
        return {}

    def changed(self, arrays: Arrays, feedback: Mapping[str, mx.array], prefix: str = "") -> Arrays:
        """Arrays with each matrix [rows, columns] in its new format.

        Args:
            feedback: of some modules, as `quantize.requantize` takes it.
            prefix: of the paths of arrays, to be those in the model.
        """
        done: Arrays = {}
        for path, parts in by_module(arrays).items():
            module = prefix + path
            if module in self.formats:
                parts = requantize(parts, self.stored[module], self.formats[module], feedback.get(module))
            done |= {f"{path}.{name}": array for name, array in parts.items()}
        return done

    def expert_formats(self, module: str) -> dict[str, dict[str, Any]]:
        """Formats of a layer's experts as the index has them."""
        formats = self.stored | self.formats
        return {name: formats[f"{module}.{name}"].json() for name in ("w1", "w2", "w3")}


def by_module(arrays: Arrays) -> dict[str, Arrays]:
    """Arrays by the module that holds them, and by their name in it."""
    modules: dict[str, Arrays] = {}
    for path, array in arrays.items():
        module, _, name = path.rpartition(".")
        modules.setdefault(module, {})[name] = array
    return modules
