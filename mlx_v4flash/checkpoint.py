"""A folder of safetensors, opened and checked against its config before any data is read."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .config import ModelConfig
from .errors import CheckpointError
from .inventory import TensorSpec, is_drafter, official_tensors, transformers_tensors
from .safetensors_header import DTYPES, ComputedTensor, StoredTensor, read_header, unique_keys

__all__ = ["Checkpoint", "ComputedTensor", "StoredTensor", "check_tensors", "read", "read_into", "scale_bytes"]

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """Every tensor of the main model, each with the shape and a type that the config asks for.

    `drafter` holds the tensors of the draft block, unchecked; `nbytes` is without them.
    """

    folder: Path
    config: ModelConfig
    tensors: dict[str, StoredTensor]
    drafter: dict[str, StoredTensor]
    naming: Literal["official", "transformers"]

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read config.json and the headers of the safetensors files, and compare them.

        The files are those that the index names; without an index, model.safetensors, or else all of them.

        Raises:
            ConfigError: config.json is absent or refused.
            CheckpointError: a file or tensor is absent, damaged, of another size or type, or does not belong here.
        """
        folder = Path(folder)
        if not folder.is_dir():
            found = "a file" if folder.exists() else "nothing"
            raise CheckpointError(
                f"{folder}: expected a folder, found {found}\n"
                "hint: pass the folder that holds config.json and the .safetensors files"
            )
        if not any(folder.iterdir()):
            raise CheckpointError(
                f"{folder}: expected a checkpoint, found an empty folder\nhint: download the checkpoint again"
            )
        config = ModelConfig.from_folder(folder)
        stored = _stored_tensors(folder)
        drafter = {name: tensor for name, tensor in stored.items() if is_drafter(name)}
        tensors = {name: tensor for name, tensor in stored.items() if name not in drafter}
        naming = _naming(folder, tensors, config)
        expected = official_tensors(config) if naming == "official" else transformers_tensors(config)
        check_tensors(folder, tensors, expected)
        return cls(folder, config, tensors, drafter, naming)

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of the main model in the files."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @functools.cached_property
    def dense_bytes(self) -> int:
        """The part of `nbytes` that is outside the routed experts."""
        routed = (".ffn.experts.", ".mlp.experts.")
        return sum(tensor.nbytes for name, tensor in self.tensors.items() if not any(part in name for part in routed))


def read(tensor: StoredTensor) -> np.ndarray[Any, Any]:
    """The stored values; BF16 as uint16 and FP8 types as uint8, bit for bit.

    Raises:
        CheckpointError: the file has become shorter, or cannot be read.
    """
    values = np.empty(tensor.shape, DTYPES[tensor.dtype])
    read_into(tensor, values)
    return values


def read_into(tensor: StoredTensor, buffer: memoryview[int] | np.ndarray[Any, Any]) -> None:
    """Fill a contiguous writable buffer of exactly `tensor.nbytes`; safe to call from several threads.

    Raises:
        CheckpointError: the file has become shorter, or cannot be read.
    """
    assert buffer.nbytes == tensor.nbytes, f"{tensor.name}: {tensor.nbytes} bytes into a buffer of {buffer.nbytes}"
    if tensor.nbytes == 0:
        return
    target = (buffer.data if isinstance(buffer, np.ndarray) else buffer).cast("B")
    if isinstance(tensor, ComputedTensor):
        target[:] = np.ascontiguousarray(tensor.values()).data.cast("B")
        return
    done = 0
    try:
        # A file of its own for each call, so that threads do not move each other's position.
        with tensor.path.open("rb", buffering=0) as file:
            file.seek(tensor.offset)
            while done < tensor.nbytes:
                # The system may return less than asked for, and never gives more than 2 GiB at once.
                count = file.readinto(target[done:])
                if not count:
                    raise CheckpointError(
                        f"{tensor.path}: {tensor.name}: expected {tensor.nbytes:,} bytes, found {done:,}: "
                        "the file was changed or truncated while reading\nhint: download the file again"
                    )
                done += count
    except OSError as e:
        raise CheckpointError(
            f"{tensor.path}: {tensor.name}: cannot be read: {e.strerror}\nhint: check the file and its permissions"
        ) from e


def scale_bytes(values: np.ndarray[Any, Any], where: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Block scales as E8M0 bytes, byte b meaning 2^(b - 127).

    Args:
        values: E8M0 bytes, returned as they are, or float32 powers of two, as the base model stores them.
        where: name of the tensor, for the message.

    Raises:
        CheckpointError: byte 255, which is not a number, or a float32 that no byte can express.
    """
    if values.dtype == np.uint8:
        codes, bad = values, values == 255
    else:
        assert values.dtype == np.float32, f"{where}: scales as {values.dtype}"
        bits = np.ascontiguousarray(values).view(np.uint32)
        # The byte is float32's exponent. 2^-127 is subnormal there: exponent 0, highest bit of the mantissa.
        codes = (bits >> 23).astype(np.uint8)
        bad = ((bits & 0x7FFFFF) != 0) | (bits >> 23 == 0) | (bits >> 23 >= 255)
        bad &= bits != 0x00400000
    if bad.any():
        index = tuple(int(i) for i in np.argwhere(bad)[0])
        expected = "a scale byte from 0 to 254" if values.dtype == np.uint8 else "a power of two from 2^-127 to 2^127"
        raise CheckpointError(
            f"{where}: expected {expected}, found {values[index]} at {list(index)}\n"
            "hint: the file is damaged; download it again"
        )
    return codes


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    index, single = folder / INDEX, folder / "model.safetensors"
    listed = _read_index(index) if index.is_file() else None
    if listed is not None:
        paths = [folder / name for name in sorted(set(listed.values()))]
        if single.is_file() and single not in paths:
            raise CheckpointError(
                f"{folder}: expected one checkpoint, found {INDEX} and a model.safetensors that it does not name\n"
                "hint: remove the one that is left over"
            )
        _check_present(index, paths)
    elif single.is_file():
        paths = [single]
    else:
        paths = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("."))
    if not paths:
        names = sorted(p.name for p in folder.iterdir() if p.name != "config.json")
        raise CheckpointError(
            f"{folder}: expected .safetensors files, found {_few(names) or 'none'}\n"
            "hint: download the checkpoint as DeepSeek published it; GGUF and .bin files cannot be read"
        )
    stored: dict[str, StoredTensor] = {}
    for path in paths:
        for name, tensor in read_header(path).items():
            if name in stored:
                raise CheckpointError(
                    f"{name}: expected in one file, found in {stored[name].path.name} and {path.name}\n"
                    f"hint: remove the file that is left over from another download"
                )
            stored[name] = tensor
    if listed is not None:
        _check_index(index, listed, stored)
    return stored


def _read_index(path: Path) -> dict[str, str]:
    try:
        files = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)["weight_map"]
    except KeyError as e:
        what = "no weight_map" if e.args[0] == "weight_map" else f"{e.args[0]} twice"
        raise CheckpointError(
            f"{path}: expected a file for each tensor, found {what}\nhint: download the file again"
        ) from e
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise CheckpointError(f"{path}: expected JSON, found {e}\nhint: download the file again") from e
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{path}: expected a file for each tensor, found none\nhint: download the file again")
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{path}: {name}: expected the name of a file in this folder, found {file!r}\n"
                "hint: download the file again"
            )
    return files


def _check_present(index: Path, paths: list[Path]) -> None:
    absent = [p.name for p in paths if not p.is_file()]
    if absent:
        raise CheckpointError(
            f"{index}: expected {len(paths)} files, {len(absent)} of them absent: {_few(absent)}\n"
            "hint: the download is incomplete; resume it"
        )


def _check_index(index: Path, listed: dict[str, str], stored: dict[str, StoredTensor]) -> None:
    for name, file in listed.items():
        found = stored[name].path.name if name in stored else "in no file"
        if found != file:
            raise CheckpointError(
                f"{index}: {name}: expected in {file}, found {found}\n"
                "hint: index and files are from different downloads; download both again"
            )
    for name, tensor in stored.items():
        if name not in listed:
            raise CheckpointError(
                f"{tensor.path}: {name}: expected only tensors that {index.name} lists, found this one\n"
                "hint: index and files are from different downloads; download both again"
            )


def _naming(folder: Path, tensors: Iterable[str], config: ModelConfig) -> Literal["official", "transformers"]:
    names = set(tensors)
    if "embed.weight" in names:
        return "official"
    if "model.embed_tokens.weight" not in names:
        raise CheckpointError(
            f"{folder}: expected DeepSeek's names (embed.weight) or those of transformers (model.embed_tokens.weight), "
            f"found {_few(sorted(names)) or 'no tensors'}\n"
            "hint: use the checkpoint as DeepSeek published it, not one converted for another program"
        )
    if any(".ffn.experts." in name for name in names):
        raise CheckpointError(
            f"{folder}: expected one naming, found transformers' (model.embed_tokens) and DeepSeek's (ffn.experts)\n"
            "hint: save it with save_pretrained(folder, save_original_format=False)"
        )
    if config.quantized:
        raise CheckpointError(
            f"{folder}: expected plain weights under transformers' names, found quantization_config in config.json\n"
            "hint: use DeepSeek's own files, or save the model dequantised"
        )
    return "transformers"


def check_tensors(folder: Path, tensors: dict[str, StoredTensor], expected: dict[str, TensorSpec]) -> None:
    """Raise CheckpointError unless the tensors are those expected, in shape and type."""
    # Shapes first: a checkpoint of another size differs in them and in thousands of names.
    for name, spec in expected.items():
        tensor = tensors.get(name)
        if tensor is not None and tensor.shape != spec.shape:
            raise CheckpointError(
                f"{name}: expected shape {spec.shape}, found {tensor.shape} in {tensor.path.name}\n"
                "hint: the file is from a model of another size than config.json; download both from one place"
            )
        if tensor is not None and tensor.dtype not in spec.dtypes:
            raise CheckpointError(
                f"{name}: expected {' or '.join(spec.dtypes)}, found {tensor.dtype} in {tensor.path.name}\n"
                "hint: use the files and the config.json as DeepSeek published them"
            )
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    if missing or unexpected:
        found = []
        if missing:
            found.append(f"{len(missing):,} missing: {_few(_by_layer(missing, expected))}")
        if unexpected:
            found.append(f"{len(unexpected):,} unexpected: {_few(_by_layer(unexpected, tensors))}")
        raise CheckpointError(
            f"{folder}: expected {len(expected):,} tensors, found {len(tensors):,}; {'; '.join(found)}\n"
            "hint: the files and config.json are not of one checkpoint, or a file is absent; download it again"
        )


def _by_layer(names: list[str], whole: Iterable[str]) -> list[str]:
    """The names, with one entry for a layer that is named completely."""
    sizes, counts = Counter(map(_layer, whole)), Counter(map(_layer, names))
    complete = {layer for layer, count in counts.items() if layer and count == sizes[layer]}
    entries = [f"all {counts[_layer(n)]:,} of {_layer(n)}" if _layer(n) in complete else n for n in names]
    return list(dict.fromkeys(entries))


def _layer(name: str) -> str:
    """`layers.7` of `layers.7.ffn.gate.weight`, nothing outside the layers."""
    head, found, rest = name.partition("layers.")
    return head + found + rest.split(".")[0] if found else ""


def _few(names: list[str], count: int = 4) -> str:
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest:,} more" if rest > 0 else "")
