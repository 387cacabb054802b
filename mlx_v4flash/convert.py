"""From the official checkpoint to files that are read as they are (docs/format.md)."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx

from .checkpoint import StoredTensor, read
from .convert_source import FolderSource, HubSource
from .converted import FORMAT, INDEX, JOURNAL, PACK, VERSION, Converted, is_converted
from .errors import ConvertError
from .expert_pack import HEADER, NAMES, PAGE, as_numpy, lay_out, record_bytes, with_records
from .hub import is_repository
from .journal import Journal, alone, flush, rename, sync_folder, write_all, write_file
from .recipe import AS_STORED, Recipe
from .recipe_sizes import sizes as sizes_of
from .rounding import STATE, Rounding
from .safetensors_header import DTYPES
from .weights import parameter, sources

Progress = Callable[[int, int], None]
Chunk = bytes | memoryview

_EXPERTS = ".experts."
SCRATCH = ".download"


@dataclass(frozen=True)
class Plan:
    """What will be written, in order: units that are finished one after another.

    Args:
        units: names of source tensors by unit; a unit becomes one safetensors file, or the records of one layer.
        sizes: bytes that each unit takes in the result.
    """

    units: dict[str, list[str]]
    sizes: dict[str, int]

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes.values()) + PAGE


def plan(source: FolderSource, recipe: Recipe = AS_STORED) -> Plan:
    """Units and sizes of a conversion; reads no data."""
    checkpoint = source.checkpoint
    units: dict[str, list[str]] = {}
    stored: dict[str, int] = {}
    for path, tensors in sources(checkpoint):
        unit = _unit(path)
        units[unit] = list(dict.fromkeys([*units.get(unit, []), *(t.name for t in tensors)]))
        stored[path] = sum(t.nbytes for t in tensors)
    sizes: dict[str, int] = dict.fromkeys(units, 0)
    for path, nbytes in sizes_of(checkpoint.config, stored, recipe.formats(checkpoint.config)).parts.items():
        sizes[_unit(path)] += nbytes
    for name, tensor in checkpoint.drafter.items():
        unit = "drafter-" + ".".join(name.split(".")[:2])
        units.setdefault(unit, []).append(name)
        sizes[unit] = sizes.get(unit, 0) + tensor.nbytes
    return Plan(units, sizes)


def open_source(
    source: str | Path,
    target: Path,
    from_hub: bool = False,
    revision: str | None = None,
    keep: bool = False,
    plain: bool = False,
) -> FolderSource:
    """The source of a conversion; a repository's files go through a folder inside the target unless kept."""
    if from_hub:
        return HubSource(str(source), revision, target / SCRATCH, keep)
    if is_repository(str(source)) and not Path(source).exists():
        raise ConvertError(
            f"{source}: expected a folder, found nothing\nhint: --from-hub converts the repository of that name"
        )
    return FolderSource(Path(source), plain)


def measure_disk(folder: Path, nbytes: int = 1 << 26) -> float:
    """Bytes per second that a temporary file beside the target is written with."""
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)) as file:
            start = time.perf_counter()
            file.write(bytes(nbytes))
            file.flush()
            flush(file.fileno())
            return nbytes / (time.perf_counter() - start)
    except OSError as e:
        raise ConvertError(f"{folder}: cannot be written: {e.strerror}\nhint: check its space and permissions") from e


def check_space(job: Plan, target: Path, scratch: int = 0) -> int:
    """Bytes still needed.

    Args:
        scratch: bytes that are needed for a while beside the result.

    Raises:
        ConvertError: the disk has less free.
    """
    there = sum(p.stat().st_size for p in target.iterdir() if p.is_file()) if target.is_dir() else 0
    needed, free = max(0, job.total_bytes - there), shutil.disk_usage(_existing(target)).free
    if needed + scratch > free:
        raise ConvertError(
            f"{target}: expected {(needed + scratch) / 1e9:.2f} GB of free space, found {free / 1e9:.2f} GB\n"
            "hint: free some space, or choose a folder on another disk"
        )
    return needed


def convert(
    source: FolderSource,
    target: Path,
    progress: Progress | None = None,
    rounding: Rounding | None = None,
) -> Converted:
    """Convert, or continue where an earlier call stopped; the source is only read.

    Peak memory is that of the largest dense tensor, 1.1 GB for V4-Flash, beside one layer without its routed experts.

    Args:
        rounding: to the formats of a recipe; every number stays as it is if None.

    Raises:
        ConvertError: the target holds something else or cannot be written, or the source changed.
        CheckpointError, HubError: what is wrong with the source.
    """
    rounding = rounding or Rounding(source.checkpoint.config, AS_STORED)
    try:
        if _prepare(source, target, rounding):
            with alone(target):
                _Job(source, target, rounding).run(progress)
        return Converted.open(target)
    except OSError as e:
        raise ConvertError(
            f"{target}: cannot be written: {e.strerror}\n"
            "hint: check its space and permissions, and run the same command again; it continues"
        ) from e


def _prepare(source: FolderSource, target: Path, rounding: Rounding) -> bool:
    """Make the folder; False if it holds the finished conversion of this source."""
    if target.exists() and not target.is_dir():
        raise ConvertError(f"{target}: expected a folder, found a file\nhint: choose another place")
    if target.resolve() == source.folder.resolve():
        raise ConvertError(f"{target}: expected another folder than the source\nhint: choose another place")
    target.mkdir(parents=True, exist_ok=True)
    if (target / INDEX).exists() and not (target / JOURNAL).exists():
        if Converted.open(target).source != source.identity() | rounding.identity():
            raise ConvertError(
                f"{target}: holds the conversion of another source or by another recipe\nhint: choose another folder"
            )
        return False
    begun = {JOURNAL, JOURNAL + ".part", SCRATCH}
    # Finder puts hidden files wherever it looks.
    found = sorted(p.name for p in target.iterdir() if p.name not in begun and not p.name.startswith("."))
    if found and not is_converted(target):
        raise ConvertError(
            f"{target}: expected an empty folder or a conversion that was interrupted, found {', '.join(found[:3])}\n"
            "hint: choose another folder"
        )
    return True


class _Job:
    def __init__(self, source: FolderSource, target: Path, rounding: Rounding) -> None:
        self.source, self.target, self.rounding = source, target, rounding
        self.plan = plan(source, rounding.recipe)
        check_space(self.plan, target, rounding.scratch_bytes)
        self.identity = source.identity() | rounding.identity()
        head = {"format": FORMAT, "version": VERSION, **self.identity}
        self.journal = Journal(target / JOURNAL, head)
        self.pack = target / PACK if (target / PACK).exists() else target / (PACK + ".part")
        for unit, line in list(self.journal.units.items()):
            found = self.source.stat(self.plan.units[unit])
            if _is_pack(unit):
                self._expect_same(line["source"], found, unit)
            elif found != line["source"]:  # a damaged shard was replaced: its small part is soon done again
                del self.journal.units[unit]
        nbytes = self.pack.stat().st_size if self.pack.exists() else 0
        if nbytes < self._pack_end() != PAGE:
            raise ConvertError(
                f"{self.pack}: expected {self._pack_end():,} bytes, found {nbytes:,}: it was removed or truncated\n"
                f"hint: remove {target} and convert again"
            )

    def _pack_end(self) -> int:
        """Where the records end that the journal knows."""
        return max((line["layer"]["end"] for line in self.journal.units.values() if "layer" in line), default=PAGE)

    def run(self, progress: Progress | None) -> None:
        self._progress, left = progress, [unit for unit in self.plan.units if unit not in self.journal.units]
        # Said at once what was done before, so that a bar takes its rate from what is done now.
        self._count(0)
        with ThreadPoolExecutor(4) as readers:
            for i, unit in enumerate(left):
                self._convert(unit, readers)
                self.source.release(tensor for later in left[i + 1 :] for tensor in self.plan.units[later])
                mx.clear_cache()
        self._close()

    def _count(self, nbytes: int) -> None:
        """So much of the unit in work is written, beside all that is finished."""
        finished = PAGE + sum(self.plan.sizes[unit] for unit in self.journal.units)
        if self._progress is not None:
            self._progress(min(finished + nbytes, self.plan.total_bytes), self.plan.total_bytes)

    def _counted(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The chunks of a file after its header, counted as they are written."""
        done = 0
        for chunk in chunks:
            yield chunk
            done += len(chunk)
            self._count(done)

    def _convert(self, unit: str, readers: ThreadPoolExecutor) -> None:
        tensors = self.plan.units[unit]
        self.source.fetch(tensors)
        before = self.source.stat(tensors)
        checkpoint = self.source.checkpoint
        if unit.startswith("drafter-"):
            values = self._write_drafter(unit, [checkpoint.drafter[name] for name in tensors])
        else:
            groups = {path: group for path, group in sources(checkpoint) if _unit(path) == unit}
            write = self._write_experts if _is_pack(unit) else self._write_dense
            values = write(unit, groups, readers)
        self._expect_same(before, self.source.stat(tensors), unit)
        self.journal.finish(unit, {"source": before, **values})
        self._count(0)

    def _write_drafter(self, unit: str, tensors: list[StoredTensor]) -> dict[str, Any]:
        tensors = sorted(tensors, key=lambda t: (-DTYPES[t.dtype].itemsize, t.name))
        header = _header([(t.name, t.dtype, t.shape, t.nbytes) for t in tensors])
        values = self._counted(read(t).data.cast("B") for t in tensors if t.nbytes)
        nbytes, crc32 = write_file(self.target / f"{unit}.safetensors", chain([header], values))
        return {"bytes": nbytes, "crc32": crc32}

    def _write_dense(
        self, unit: str, groups: dict[str, list[StoredTensor]], readers: ThreadPoolExecutor
    ) -> dict[str, Any]:
        stored = {path: parameter(path, group, self.source.checkpoint, readers) for path, group in groups.items()}
        arrays = self.rounding.dense(unit, stored)
        del stored
        # Larger elements first, so that each lies at a multiple of its size.
        order = sorted(arrays, key=lambda path: -arrays[path].itemsize)
        header = _header([(p, NAMES[arrays[p].dtype], arrays[p].shape, arrays[p].nbytes) for p in order])
        values = self._counted(as_numpy(arrays.pop(path)).data.cast("B") for path in order)
        nbytes, crc32 = write_file(self.target / f"{unit}.safetensors", chain([header], values))
        return {"bytes": nbytes, "crc32": crc32}

    def _write_experts(
        self, unit: str, groups: dict[str, list[StoredTensor]], readers: ThreadPoolExecutor
    ) -> dict[str, Any]:
        """Append the records of one layer, after what the journal knows to be complete."""
        checkpoint, layer = self.source.checkpoint, None
        formats = self.rounding.expert_formats(unit)
        self.rounding.begin_experts(unit)
        start, count, sums = self._pack_end(), len(next(iter(groups.values()))), []
        file = os.open(self.pack, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.ftruncate(file, start if start > PAGE else 0)
            os.lseek(file, 0, os.SEEK_END)
            if start == PAGE:
                write_all(file, HEADER + bytes(PAGE - len(HEADER)))
            for expert in range(count):
                arrays = {
                    path.split(_EXPERTS)[1]: parameter(path, [group[expert]], checkpoint, readers)[0]
                    for path, group in groups.items()
                }
                arrays = self.rounding.expert(unit, expert, arrays)
                layer = lay_out(arrays, start, formats) if layer is None else layer
                record = record_bytes(layer, arrays)
                sums.append(zlib.crc32(record))
                write_all(file, record)
                self._count(len(sums) * layer.stride)
            flush(file)
        finally:
            os.close(file)
        sync_folder(self.target)  # the journal must not outlive the pack
        assert layer is not None
        layer = with_records(layer, sums)
        return {"layer": asdict(layer) | {"end": layer.end}, **self.rounding.end_experts(unit)}

    def _close(self) -> None:
        """Everything is there: give the pack its name, write index, extras and config, and forget the journal."""
        if self.pack.name != PACK:
            rename(self.pack, self.target / PACK)
        units = {unit: self.journal.units[unit] for unit in self.plan.units}
        dense = {f"{u}.safetensors": {k: v[k] for k in ("bytes", "crc32")} for u, v in units.items() if "bytes" in v}
        index = {
            "format": FORMAT,
            "version": VERSION,
            "source": self.identity,
            "files": dense,
            "drafter": [name for name in dense if name.startswith("drafter-")],
            "experts": {
                u: {k: x for k, x in v["layer"].items() if k != "end"} for u, v in units.items() if "layer" in v
            },
        }
        formats = {path: f.json() for path, f in self.rounding.formats.items() if _EXPERTS not in path}
        index |= {"formats": formats} if formats else {}
        rare = {u: line["rare"] for u, line in units.items() if "rare" in line}
        index |= {"rare_experts": rare} if rare else {}
        for path in self.source.extras():
            write_file(self.target / path.name, [path.read_bytes()])
        write_file(self.target / INDEX, [json.dumps(index, sort_keys=True).encode() + b"\n"])
        write_file(self.target / "config.json", [self.source.config_json()])
        for scratch in (SCRATCH, STATE):
            shutil.rmtree(self.target / scratch, ignore_errors=True)
        (self.target / JOURNAL).unlink()
        sync_folder(self.target)

    def _expect_same(self, expected: dict[str, list[int]], found: dict[str, list[int]], unit: str) -> None:
        for name in expected:
            if found.get(name) != expected[name]:
                raise ConvertError(
                    f"{self.source.folder / name}: changed since {unit} was converted from it: expected size and time "
                    f"{expected[name]}, found {found.get(name)}\n"
                    f"hint: restore the file, or remove {self.target} and convert again"
                )


def _unit(path: str) -> str:
    """What is finished at once: the experts of a layer (a path of the model), or a safetensors file (dense-...)."""
    if _EXPERTS in path:
        return path.split(_EXPERTS)[0] + _EXPERTS.rstrip(".")
    parts = path.split(".")
    return "dense-" + (".".join(parts[:2]) if parts[0] == "layers" else parts[0])


def _is_pack(unit: str) -> bool:
    return not unit.startswith(("dense-", "drafter-"))


def _header(tensors: list[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Header of a safetensors file with these names, types, shapes and sizes."""
    entries, end = {}, 0
    for name, dtype, shape, nbytes in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps({"__metadata__": {"format": "mlx"}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _existing(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
