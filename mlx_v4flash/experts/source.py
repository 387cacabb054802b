"""Where the bytes of an expert lie: in experts.pack, or, slower to read, in the shards of a checkpoint."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..checkpoint import Checkpoint, StoredTensor, scale_bytes
from ..converted import PACK, Converted
from ..errors import ExpertReadError, RequestError
from ..expert_pack import MLX_TYPES, PackedLayer
from ..safetensors_header import DTYPES
from ..weights import HELD, expand_blocks, sources
from .pool import Record, Shape, Shapes
from .readers import Files


class Source(Protocol):
    """Experts of all layers.

    Attributes:
        shapes: of each layer, arrays of an expert, by their names in its layer.
        formats: of each layer, mode, and unless plain group_size and bits, of w1, w2 and w3.
        paths: the files that hold experts.
        pieces: of an expert, each of which can be read by itself: those of w1, w3 and w2, or all in one.
    """

    shapes: list[Shapes]
    formats: list[dict[str, dict[str, Any]]]
    paths: list[Path]
    pieces: tuple[str, ...]

    def read(self, layer: int, expert: int, into: Record, files: Files, piece: str = "") -> int:
        """Fill the arrays of one expert, or those whose names begin with `piece`; called by several threads.

        Returns:
            Bytes that were read.

        Raises:
            ExpertReadError: names the expert and the file.
        """


PIECES: tuple[str, ...] = ("w1.", "w3.", "w2.")


class PackSource:
    """Records of a converted folder.

    Args:
        verify: compare each record with its checksum.
    """

    def __init__(self, converted: Converted, verify: bool = False) -> None:
        self.paths = [converted.folder / PACK]
        self._layers: list[PackedLayer] = [
            converted.layers[f"layers.{n}.ffn.experts"] for n in range(converted.config.num_hidden_layers)
        ]
        self.shapes = [
            {part.name: Shape(part.shape, MLX_TYPES[part.dtype]) for part in layer.components} for layer in self._layers
        ]
        self.formats = [layer.formats for layer in self._layers]
        self._verify = verify
        self.pieces = ("",) if verify else PIECES  # a checksum is of a whole record

    def read(self, layer: int, expert: int, into: Record, files: Files, piece: str = "") -> int:
        packed = self._layers[layer]
        record, length = packed.record(expert)
        components = [part for part in packed.components if part.name.startswith(piece)]
        buffers: list[memoryview] = []
        first = end = components[0].offset
        for part in components:
            buffers += [memoryview(bytearray(part.offset - end))] if part.offset > end else []
            buffers.append(into[part.name].data.cast("B"))
            end = part.offset + part.nbytes
        start = record + first
        if self._verify and end < length:
            buffers.append(memoryview(bytearray(length - end)))
        nbytes = sum(map(len, buffers))
        where = f"layers.{layer}, expert {expert}: {self.paths[0]}"
        _read(files, self.paths[0], start, buffers, where)
        if self._verify:
            crc = 0
            for buffer in buffers:
                crc = zlib.crc32(buffer, crc)
            if crc != packed.crc32[expert]:
                raise ExpertReadError(
                    f"{where}: expected checksum {packed.crc32[expert]:08x} of the record at {start:,}, found "
                    f"{crc:08x}\nhint: the file or the disk is damaged; convert the checkpoint again"
                )
        return nbytes


class ShardSource:
    """Tensors of a checkpoint as it was published: several reads for an expert, some of them small."""

    pieces = PIECES

    def __init__(self, checkpoint: Checkpoint, verify: bool = False) -> None:
        if verify:
            raise RequestError(
                "verify_reads: expected a converted folder, which has a checksum for each expert, found a checkpoint\n"
                "hint: convert it with mlx-v4flash convert, or leave verify_reads (--verify-reads) out"
            )
        self._checkpoint = checkpoint
        self._layers: list[dict[str, list[StoredTensor]]] = [{} for _ in range(checkpoint.config.num_hidden_layers)]
        for path, tensors in sources(checkpoint):
            if ".ffn.experts." in path:
                _, layer, _, _, name = path.split(".", 4)
                self._layers[int(layer)][name] = tensors
        mode = {"fp4": "mxfp4", "fp8": "mxfp8", None: "plain"}[checkpoint.config.expert_dtype]
        self.formats = [{name: {"mode": mode} for name in ("w1", "w2", "w3")}] * len(self._layers)
        first = self._layers[0]
        self.paths = sorted({t.path for layer in self._layers for tensors in layer.values() for t in tensors})
        shapes = {name: self._shape(name, [layer[name] for layer in self._layers]) for name in first}
        self.shapes = [shapes] * len(self._layers)

    def read(self, layer: int, expert: int, into: Record, files: Files, piece: str = "") -> int:
        nbytes = 0
        for name, tensors in self._layers[layer].items():
            if not name.startswith(piece):
                continue
            tensor, target = tensors[expert], into[name]
            where = f"layers.{layer}, expert {expert}: {tensor.path}: {tensor.name}"
            nbytes += tensor.nbytes
            if tensor.nbytes == target.nbytes and self._as_stored(tensor, target):
                _read(files, tensor.path, tensor.offset, [target.data.cast("B")], where)
                if name.endswith(".scales"):
                    scale_bytes(target, tensor.name)
                continue
            stored = np.empty(tensor.shape, DTYPES[tensor.dtype])
            _read(files, tensor.path, tensor.offset, [stored.data.cast("B")], where)
            if name.endswith(".scales"):
                target[:] = expand_blocks(stored, tensor, self._checkpoint)
            else:  # bfloat16 beside float32, which holds both
                target[:] = (stored.astype(np.uint32) << 16).view(np.float32)
        return nbytes

    def _as_stored(self, tensor: StoredTensor, target: np.ndarray[Any, Any]) -> bool:
        return not tensor.name.endswith(".scale") or tensor.shape == target.shape

    def _shape(self, name: str, layers: list[list[StoredTensor]]) -> Shape:
        tensor = layers[0][0]
        if name.endswith(".scales"):
            weight = self._checkpoint.tensors[tensor.name.removesuffix(".scale") + ".weight"]
            columns = weight.shape[1] * (2 if weight.dtype in ("I8", "U8") else 1)
            return Shape((weight.shape[0], columns // 32), mx.uint8)
        wide = {t.dtype for tensors in layers for t in tensors} & {"BF16", "F32"}
        if wide:
            return Shape(tensor.shape, mx.bfloat16 if wide == {"BF16"} else mx.float32)
        rows, columns = tensor.shape
        assert HELD[tensor.dtype] == mx.uint32
        return Shape((rows, columns // 4), mx.uint32)


def open_all(files: Files, paths: list[Path]) -> None:
    """Open files before they are needed, so that none can be replaced unseen.

    Raises:
        ExpertReadError: one cannot be opened.
    """
    for path in paths:
        try:
            files.open(path)
        except OSError as e:
            raise ExpertReadError(f"{path}: cannot be opened: {e.strerror}\nhint: check the disk") from e


def _read(files: Files, path: Path, offset: int, buffers: list[memoryview], where: str) -> None:
    expected = sum(map(len, buffers))
    try:
        files.read(path, offset, buffers)
    except EOFError as e:
        raise ExpertReadError(
            f"{where}: expected {expected:,} bytes at {offset:,}, found {e}: the file was truncated\n"
            "hint: download or convert it again, then load the model again"
        ) from e
    except OSError as e:
        raise ExpertReadError(
            f"{where}: cannot read {expected:,} bytes at {offset:,}: {e.strerror or e}\n"
            "hint: check the disk and its connection; if the file was changed, load the model again"
        ) from e
