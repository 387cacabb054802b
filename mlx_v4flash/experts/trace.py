"""Routing traces: which experts every forward pass chose (docs/format.md)."""

from __future__ import annotations

import json
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Trace:
    """What a model chose, pass by pass.

    Attributes:
        layers, experts, chosen: L, E, A of the model.
        tokens: T of each pass.
        passes: of each pass, of each layer: its distinct experts, ascending.
    """

    layers: int
    experts: int
    chosen: int
    tokens: list[int]
    passes: list[list[list[int]]]

    def layer(self, number: int) -> list[list[int]]:
        """Calls of one layer."""
        return [layers[number] for layers in self.passes]


def read_trace(path: Path) -> Trace:
    """A file that `TraceWriter` wrote.

    Raises:
        RequestError: it cannot be read, is no trace, or is damaged; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise RequestError(f"{path}: cannot be read as a trace: {e}\nhint: --trace writes one") from e
    sizes = _header(path, lines[0] if lines else "")
    tokens, passes = [], []
    for number, line in enumerate(lines[1:], 2):
        count, layers = _pass(f"{path}: line {number}", line, *sizes)
        tokens.append(count)
        passes.append(layers)
    return Trace(*sizes, tokens, passes)


def _header(path: Path, line: str) -> tuple[int, int, int]:
    found = _parsed(line)
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        raise RequestError(
            f'{path}: line 1: expected {{"format": "{FORMAT}", "version": {VERSION}, ...}}, found {line[:80]!r}\n'
            "hint: --trace writes such files"
        )
    layers, experts, chosen = (found.get(name) for name in ("layers", "experts", "chosen"))
    whole = all(type(n) is int and n > 0 for n in (layers, experts, chosen))
    if not whole or chosen > experts:  # type: ignore[operator]
        raise RequestError(f"{path}: line 1: expected layers, experts and chosen, whole and positive, found {line!r}")
    return layers, experts, chosen  # type: ignore[return-value]


def _pass(where: str, line: str, layers: int, experts: int, chosen: int) -> tuple[int, list[list[int]]]:
    """Tokens of a pass, and distinct experts of each layer."""
    found = _parsed(line)
    count, ids = found.get("tokens"), found.get("experts")
    hint = "hint: the file is damaged, or its last line was being written; remove that line"
    if type(count) is not int or count < 1 or not isinstance(ids, list) or len(ids) != layers:
        raise RequestError(f"{where}: expected tokens, and experts of {layers} layers, found {line[:80]!r}\n{hint}")
    for number, flat in enumerate(ids):
        if not isinstance(flat, list) or len(flat) != count * chosen:
            raise RequestError(f"{where}: layer {number}: expected a list of {count * chosen} experts\n{hint}")
        wrong = [e for e in flat if type(e) is not int or not 0 <= e < experts]
        if wrong:
            raise RequestError(f"{where}: layer {number}: expected experts below {experts}, found {wrong[0]!r}\n{hint}")
    return count, [sorted(set(flat)) for flat in ids]


def _parsed(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
