"""What a conversion makes of each matrix on its way: as it is, or in the format that a recipe asks for."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from .config import ModelConfig
from .formats import Format, format_of, matrices
from .linear import Numerics
from .model import Model
from .quantize import requantize
from .recipe import Recipe

Arrays = dict[str, mx.array]


class Rounding:
    """Rounds every number for itself, to the scales with the least error in the weights.

    Attributes:
        stored, formats: of every matrix in the checkpoint, and of those that are to change, by path in the model.
    """

    def __init__(self, config: ModelConfig, recipe: Recipe) -> None:
        self.recipe = recipe
        self.stored = {path: format_of(module) for path, module in matrices(Model(config, Numerics()))}
        self.formats = recipe.formats(config)

    def identity(self) -> dict[str, Any]:
        """What must be the same when a conversion continues; nothing if nothing changes."""
        return {"recipe": self.recipe.json()} if self.formats else {}

    def dense(self, unit: str, arrays: Arrays) -> Arrays:
        """Parameters of one unit by path, as the source holds them -> as they are to be written."""
        return {
            f"{module}.{name}": array
            for module, parts in by_module(arrays).items()
            for name, array in self.change(module, parts).items()
        }

    def begin_experts(self, module: str) -> None:
        """The experts of this layer come next, in their order."""

    def expert(self, module: str, number: int, arrays: Arrays) -> Arrays:
        """One expert's arrays, `w1.weight` and so on, as the source holds them -> as they are to be written."""
        return {
            f"{matrix}.{name}": array
            for matrix, parts in by_module(arrays).items()
            for name, array in self.change(f"{module}.{matrix}", parts).items()
        }

    def end_experts(self, module: str) -> dict[str, Any]:
        """All of them have been written; what the journal keeps of them."""
        return {}

    def change(self, module: str, arrays: Arrays, feedback: mx.array | None = None) -> Arrays:
        """Weight, scales and biases of a matrix [rows, columns] -> in its new format."""
        if module not in self.formats:
            return arrays
        return requantize(arrays, self.stored[module], self.formats[module], feedback)

    def expert_formats(self, module: str) -> dict[str, dict[str, Any]]:
        """Formats of a layer's experts as the index has them."""
        return {m: self._format(f"{module}.{m}").json() for m in ("w1", "w2", "w3")}

    def _format(self, path: str) -> Format:
        return self.formats.get(path, self.stored[path])


def by_module(arrays: Arrays) -> dict[str, Arrays]:
    """Arrays by the module that holds them, and by their name in it."""
    modules: dict[str, Arrays] = {}
    for path, array in arrays.items():
        module, _, name = path.rpartition(".")
        modules.setdefault(module, {})[name] = array
    return modules
