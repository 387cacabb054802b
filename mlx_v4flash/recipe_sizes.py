"""How many bytes a recipe makes of a model, and what a machine can hold of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .config import ModelConfig
from .expert_pack import PAGE, aligned
from .formats import Format, adapt
from .inventory import official_tensors
from .linear import Numerics
from .model import Model
from .random_weights import stored_dtype
from .recipe import RECIPES
from .safetensors_header import DTYPES
from .tiny import REAL
from .weights import parameter_path

# A machine's memory that its GPU may take unless told otherwise, and GB that caches and passing values are left.
GPU_SHARE, CACHES = 0.75, 2.0


@dataclass(frozen=True)
class Sizes:
    """Bytes in the files.

    Args:
        parts: of each array, with padding: of all experts together.
        token: bytes that one token reads, empty caches: everything but the embedding and the experts not chosen.
    """

    parts: Mapping[str, int]
    token: int

    @property
    def experts(self) -> int:
        return sum(n for path, n in self.parts.items() if ".experts." in path)

    @property
    def dense(self) -> int:
        return sum(self.parts.values()) - self.experts

    @property
    def total(self) -> int:
        return sum(self.parts.values()) + PAGE


def sizes(config: ModelConfig, stored: Mapping[str, int], formats: Mapping[str, Format]) -> Sizes:
    """What a conversion writes.

    Args:
        stored: bytes in the checkpoint of each parameter of the model, by path.
        formats: what `Recipe.formats` returns.
    """
    model = Model(config, Numerics())
    adapt(model, formats)
    parts = {}
    for path, array in dict(tree_flatten(model.parameters())).items():
        plain = array.dtype == mx.float32  # what is not packed keeps its stored size
        nbytes = stored[path] if plain else array.nbytes
        E = config.n_routed_experts
        parts[path] = E * aligned(nbytes // E) if ".experts." in path else nbytes
    used = config.num_experts_per_tok / config.n_routed_experts
    token = sum(n * used if ".experts." in path else n for path, n in parts.items() if not _looked_up(path))
    return Sizes(parts, round(token))


def _looked_up(path: str) -> bool:
    """Tables of which a token needs one row."""
    return path.startswith("embed.") or path.endswith("tid2eid")


def real_sizes(formats: Mapping[str, Format]) -> Sizes:
    """Those of V4-Flash."""
    config = ModelConfig.from_dict(REAL, "config")
    return sizes(config, _real_stored(), formats)


@cache
def _real_stored() -> dict[str, int]:
    """Bytes of each parameter in DeepSeek's files."""
    stored: dict[str, int] = {}
    for name, spec in official_tensors(ModelConfig.from_dict(REAL, "config")).items():
        path = parameter_path(name)
        nbytes = math.prod(spec.shape) * DTYPES[stored_dtype(name, spec, False)].itemsize
        stored[path] = stored.get(path, 0) + nbytes
    return stored


def listing() -> list[dict[str, Any]]:
    """The named recipes for V4-Flash, in GB; `resident` is the part of its experts that the machine can hold."""
    rows = []
    for recipe in RECIPES.values():
        found = real_sizes(recipe.formats(ModelConfig.from_dict(REAL, "config")))
        room = recipe.machine * GPU_SHARE - found.dense / 1e9 - CACHES
        rows.append({
            "name": recipe.name, "machine": recipe.machine, "total": found.total / 1e9, "experts": found.experts / 1e9,
            "dense": found.dense / 1e9, "token": found.token / 1e9, "resident": min(1.0, room / found.experts * 1e9),
            "about": recipe.about,
        })  # fmt: skip
    return rows


def table() -> str:
    """`listing` for people."""
    lines = [f"{'recipe':<12}{'machine':>8}{'files':>8}{'experts':>9}{'rest':>7}{'a token':>9}{'in memory':>11}  for"]
    for r in listing():
        lines.append(
            f"{r['name']:<12}{r['machine']:>8}{r['total']:>8.1f}{r['experts']:>9.1f}{r['dense']:>7.1f}"
            f"{r['token']:>9.2f}{r['resident']:>11.0%}  {r['about']}"
        )
    note = (
        f"GB of DeepSeek-V4-Flash. In memory: of the experts, where {GPU_SHARE:.0%} of the machine's memory are the "
        f"GPU's, less {CACHES} GB for caches."
    )
    return "\n".join([*lines, note])
