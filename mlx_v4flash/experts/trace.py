"""Routing traces: which experts every forward pass chose (docs/format.md)."""

from __future__ import annotations

import json
import weakref
from pathlib import Path

import mlx.core as mx

from ..errors import RequestError

FORMAT, VERSION = "mlx_v4flash.trace", 1


class TraceWriter:
    """Writes a header and then one JSON line for each forward pass.

    The header is {"format", "version", "layers", "experts", "chosen"}, a line {"tokens": T, "experts": [...]} with a
    flat list of T * chosen ids for each layer.

    Raises:
        RequestError: the file cannot be written.
    """

    def __init__(self, path: Path, layers: int, experts: int, chosen: int) -> None:
        try:
            self._file = path.open("w", encoding="utf-8")
        except OSError as e:
            raise RequestError(f"{path}: cannot be written: {e.strerror}\nhint: check its folder") from e
        weakref.finalize(self, self._file.close)
        self._layers: list[mx.array] = []
        self._count = layers
        self._write({"format": FORMAT, "version": VERSION, "layers": layers, "experts": experts, "chosen": chosen})

    def start(self) -> None:
        """A pass begins; one that did not come to its end is left out."""
        self._layers = []

    def add(self, ids: mx.array) -> None:
        """The choice of the next layer, [T, A]."""
        self._layers.append(ids)

    def end(self) -> None:
        """Write the pass; waits for its ids."""
        layers, self._layers = self._layers, []
        assert len(layers) == self._count
        mx.eval(layers)
        self._write({"tokens": layers[0].shape[0], "experts": [ids.flatten().tolist() for ids in layers]})

    def _write(self, values: dict[str, object]) -> None:
        self._file.write(json.dumps(values, separators=(",", ":")) + "\n")
        self._file.flush()
