"""Where a conversion reads from: a folder, or a repository shard by shard."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub

from . import hub
from .as_official import as_official, official_config
from .checkpoint import INDEX, Checkpoint, check_tensors
from .config import ModelConfig
from .converted import is_converted
from .errors import ConvertError, HubError
from .inventory import is_drafter, official_tensors
from .safetensors_header import DTYPES, StoredTensor, read_header


class FolderSource:
    """A checkpoint on this machine. Nothing in it is changed.

    Args:
        plain: keep weights that are not quantised as they are. If not, they are rounded as the official ones were.
    """

    rounded = False

    def __init__(self, folder: Path, plain: bool = False) -> None:
        if is_converted(folder):
            raise ConvertError(f"{folder}: expected an official checkpoint, found a converted one\nhint: use it as is")
        self.folder, self.checkpoint = folder, Checkpoint.open(folder)
        self._naming = self.checkpoint.naming
        if not (plain or self.checkpoint.config.quantized):
            self.rounded, self.checkpoint = True, as_official(self.checkpoint, official_config(folder))
        # A snapshot in Hugging Face's cache is named after its commit.
        self.revision = folder.resolve().name if folder.resolve().parent.name == "snapshots" else None

    def identity(self) -> dict[str, Any]:
        """What must be the same when a conversion continues."""
        found = {
            "config_crc32": zlib.crc32((self.folder / "config.json").read_bytes()),
            "revision": self.revision,
            "naming": self._naming,
        }
        return found | ({"rounded": True} if self.rounded else {})

    def config_json(self) -> bytes:
        """What config.json says of the weights as they are converted."""
        if not self.rounded:
            return (self.folder / "config.json").read_bytes()
        return json.dumps(official_config(self.folder), indent=2, sort_keys=True).encode() + b"\n"

    def fetch(self, tensors: Iterable[str]) -> None:
        """Make the files of these tensors readable, and `checkpoint` say where they lie."""

    def release(self, keep: Iterable[str]) -> None:
        """Give up files that hold none of these tensors."""

    def stat(self, names: Iterable[str]) -> dict[str, list[int]]:
        """Size and time of change of the files of these tensors, by name."""
        stored = self.checkpoint.tensors | self.checkpoint.drafter
        paths = sorted({stored[name].path for name in names})
        try:
            return {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in paths}
        except OSError as e:
            raise ConvertError(
                f"{e.filename}: the file has gone: {e.strerror}\nhint: restore it, and convert again"
            ) from e

    def extras(self) -> list[Path]:
        """Small files to copy: tokenizer, template, generation settings."""
        wanted = {p for pattern in ("*.json", "*.jinja", "tokenizer*") for p in self.folder.glob(pattern)}
        return sorted(p for p in wanted if p.is_file() and p.name not in ("config.json", INDEX))


class HubSource(FolderSource):
    """A repository: each file is downloaded when it is needed, and removed again unless it is to be kept.

    Args:
        scratch: where files lie that are not kept; those that are go to Hugging Face's cache.
    """

    def __init__(self, repository: str, revision: str | None, scratch: Path, keep: bool) -> None:
        self._repository, self._scratch, self._keep = repository, scratch, keep
        try:
            info = huggingface_hub.HfApi().model_info(repository, revision=revision)
        except hub.FAILURES as e:
            raise HubError(hub.explain(repository, revision, e)) from e
        self.revision = info.sha
        names = [file.rfilename for file in info.siblings or [] if "/" not in file.rfilename]
        small = [n for n in names if n.endswith((".json", ".jinja")) or n.startswith("tokenizer")]
        if INDEX not in names or "config.json" not in names:
            raise ConvertError(
                f"{repository}: expected config.json and {INDEX}, found {', '.join(small) or 'neither'}\n"
                "hint: download it, and convert the folder"
            )
        for name in small:
            path = self._download(name)
        self.folder = path.parent
        config = ModelConfig.from_folder(self.folder)
        if not config.quantized:
            raise ConvertError(
                f"{repository}: expected FP4 and FP8 weights, found no quantization_config in config.json\n"
                "hint: download it, and convert the folder"
            )
        self._files = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        self._specs = official_tensors(config)
        self._fetched: set[str] = set()
        placeholders = {name: self._placeholder(name) for name in self._specs}
        check_tensors(self.folder, {n: t for n, t in placeholders.items() if n in self._files}, self._specs)
        drafter = {
            n: StoredTensor(n, "U8", (0,), self.folder / f, 0, 0) for n, f in self._files.items() if is_drafter(n)
        }
        self.checkpoint, self._naming = Checkpoint(self.folder, config, placeholders, drafter, "official"), "official"

    def fetch(self, tensors: Iterable[str]) -> None:
        for file in sorted({self._files[name] for name in tensors} - self._fetched):
            stored = read_header(self._download(file))
            main = {n: t for n, t in stored.items() if not is_drafter(n)}
            check_tensors(
                self.folder, main, {n: self._specs[n] for n, f in self._files.items() if f == file and n in self._specs}
            )
            self.checkpoint.tensors.update(main)
            self.checkpoint.drafter.update({n: t for n, t in stored.items() if is_drafter(n)})
            self._fetched.add(file)

    def release(self, keep: Iterable[str]) -> None:
        if self._keep:
            return
        for file in self._fetched - {self._files[name] for name in keep}:
            (self._scratch / file).unlink(missing_ok=True)
            self._fetched.remove(file)

    def stat(self, names: Iterable[str]) -> dict[str, list[int]]:
        return {}  # the revision says which bytes these are

    def _placeholder(self, name: str) -> StoredTensor:
        spec = self._specs[name]
        nbytes = math.prod(spec.shape) * DTYPES[spec.dtypes[0]].itemsize
        return StoredTensor(name, spec.dtypes[0], spec.shape, self.folder / self._files.get(name, ""), 0, nbytes)

    def _download(self, file: str) -> Path:
        where: dict[str, Any] = {} if self._keep else {"local_dir": self._scratch}
        try:
            return Path(huggingface_hub.hf_hub_download(self._repository, file, revision=self.revision, **where))
        except hub.FAILURES as e:
            raise HubError(hub.explain(self._repository, self.revision, e)) from e
