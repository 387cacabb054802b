"""A folder that `convert` wrote: opened, checked, and read into a model's parameters (docs/format.md)."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .config import ModelConfig
from .errors import CheckpointError
from .expert_pack import HEADER, PAGE, PackedLayer, check_records, read_layer
from .formats import Format
from .safetensors_header import StoredTensor, read_header

FORMAT, VERSION = "mlx_v4flash", 1
INDEX, PACK, JOURNAL = "mlx_v4flash.json", "experts.pack", "conversion.journal"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Converted:
    """A finished conversion.

    Args:
        dense: parameters outside the routed experts by their path in the model; in `files` without drafter files.
        formats: of every matrix that is not as in the source, by the path of its module.
        layers: records of routed experts by the path in the model of the module that they fill.
        files: bytes and CRC-32 of each safetensors file.
        drafter: tensors of the draft block, as the source stored them.
        rare: number of experts in each layer that calibration saw too rarely, by its path.
    """

    folder: Path
    config: ModelConfig
    dense: dict[str, StoredTensor]
    drafter: dict[str, StoredTensor]
    layers: dict[str, PackedLayer]
    formats: dict[str, Format]
    files: dict[str, tuple[int, int]]
    source: dict[str, Any]
    rare: dict[str, int]

    @classmethod
    def open(cls, folder: str | Path) -> Converted:
        """Read the index and the headers, and compare them with the files.

        Raises:
            ConfigError: config.json is absent or refused.
            CheckpointError: the conversion is unfinished, of another format or version, or a file does not fit.
        """
        folder = Path(folder)
        expect_finished(folder)
        values = _index(folder / INDEX)
        try:
            layers = {path: PackedLayer.from_json(layer) for path, layer in values["experts"].items()}
            formats = {path: Format.from_json(found) for path, found in values.get("formats", {}).items()}
            for path, layer in layers.items():
                formats |= {f"{path}.{name}": Format.from_json(found) for name, found in layer.formats.items()}
            files = {name: (file["bytes"], file["crc32"]) for name, file in values["files"].items()}
            drafters, source = set(values["drafter"]), dict(values["source"])
            rare = dict(values.get("rare_experts", {}))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise CheckpointError(
                f"{folder / INDEX}: expected an index as docs/format.md describes, found {e!r}\nhint: {_AGAIN}"
            ) from e
        dense: dict[str, StoredTensor] = {}
        drafter: dict[str, StoredTensor] = {}
        for name, (nbytes, _) in files.items():
            _expect_size(folder / name, nbytes)
            (drafter if name in drafters else dense).update(read_header(folder / name))
        _expect_size(folder / PACK, max((layer.end for layer in layers.values()), default=PAGE))
        with (folder / PACK).open("rb") as file:
            if file.read(len(HEADER)) != HEADER:
                raise CheckpointError(f"{folder / PACK}: expected the header of version {VERSION}\nhint: {_AGAIN}")
        return cls(folder, ModelConfig.from_folder(folder), dense, drafter, layers, formats, files, source, rare)

    @property
    def nbytes(self) -> int:
        """Bytes of the main model in the files."""
        return self.dense_bytes + sum(_record_bytes(layer) for layer in self.layers.values())

    @property
    def dense_bytes(self) -> int:
        """The part of `nbytes` that is outside the routed experts."""
        return sum(t.nbytes for t in self.dense.values())

    def parameters(self, readers: ThreadPoolExecutor, experts: bool = True) -> Iterator[tuple[str, mx.array, int]]:
        """Every parameter, or those outside the routed experts, with its path in the model and its bytes."""
        for file in sorted({tensor.path for tensor in self.dense.values()}):
            loaded = mx.load(str(file))
            assert isinstance(loaded, dict)
            for path in sorted(loaded):
                array = loaded.pop(path)
                yield path, array, array.nbytes
        for module, layer in self.layers.items() if experts else ():
            arrays = read_layer(self.folder / PACK, layer, readers)
            for name in list(arrays):
                array = arrays.pop(name)
                yield f"{module}.{name}", array, array.nbytes

    def expect(self, parameters: Mapping[str, mx.array], experts: bool = True) -> None:
        """Raise CheckpointError unless the folder holds exactly these parameters, in these shapes.

        Args:
            experts: whether the routed experts are among them.
        """
        held = {path: tensor.shape for path, tensor in self.dense.items()}
        for module, layer in self.layers.items() if experts else ():
            held |= {f"{module}.{part.name}": (len(layer.crc32), *part.shape) for part in layer.components}
        for path in sorted(held.keys() | parameters.keys()):
            expected = tuple(parameters[path].shape) if path in parameters else "none"
            if held.get(path, "none") != expected:
                raise CheckpointError(
                    f"{self.folder}: {path}: expected {expected}, found {held.get(path, 'none')}\n"
                    "hint: the folder was converted for another version of mlx-v4flash, or its config.json was "
                    "replaced; convert the checkpoint again"
                )

    def verify(self, progress: Progress | None = None) -> None:
        """Read everything and compare checksums.

        Raises:
            CheckpointError: names the first file, or the records of a layer, that differ.
        """
        done, total = 0, sum(n for n, _ in self.files.values()) + sum(x.end - x.offset for x in self.layers.values())
        for name, (nbytes, crc32) in self.files.items():
            if file_crc32(self.folder / name) != crc32:
                raise CheckpointError(f"{self.folder / name}: its checksum differs: it was damaged\nhint: {_AGAIN}")
            done += nbytes
            if progress is not None:
                progress(done, total)
        for module, layer in self.layers.items():
            bad = check_records(self.folder / PACK, layer)
            if bad:
                raise CheckpointError(
                    f"{self.folder / PACK}: {module}: the checksums of {len(bad)} of {len(layer.crc32)} records "
                    f"differ, first that of expert {bad[0]}: the file was damaged\nhint: {_AGAIN}"
                )
            done += layer.end - layer.offset
            if progress is not None:
                progress(done, total)


_AGAIN = "remove the folder and convert the checkpoint again"


def is_converted(folder: Path) -> bool:
    """Whether a folder is a conversion, finished or not."""
    return (folder / INDEX).exists() or (folder / JOURNAL).exists()


def expect_finished(folder: Path) -> None:
    """Raise CheckpointError if a conversion into this folder was interrupted."""
    if (folder / JOURNAL).exists():
        raise CheckpointError(
            f"{folder}: expected a finished conversion, found {JOURNAL}: it was interrupted or still runs\n"
            "hint: run the same convert command again; it continues"
        )


def file_crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            crc = zlib.crc32(piece, crc)
    return crc


def _index(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: expected JSON, found {e}\nhint: {_AGAIN}") from e
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{path}: expected format {FORMAT!r}, found {found!r}: another tool wrote this folder\n"
            "hint: convert DeepSeek's own checkpoint with mlx-v4flash convert"
        )
    version = values.get("version")
    if version != VERSION:
        newer = type(version) is int and version > VERSION
        hint = "update mlx-v4flash, or convert the checkpoint with this version" if newer else _AGAIN
        raise CheckpointError(f"{path}: expected format version {VERSION}, found {version!r}\nhint: {hint}")
    return dict(values)


def _expect_size(path: Path, nbytes: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != nbytes:
        what = "nothing" if found is None else f"{found:,}"
        raise CheckpointError(f"{path}: expected a file of {nbytes:,} bytes, found {what}\nhint: {_AGAIN}")


def _record_bytes(layer: PackedLayer) -> int:
    return len(layer.crc32) * sum(part.nbytes for part in layer.components)
