"""Tensors of a checkpoint -> parameters of the model, bit for bit."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .checkpoint import Checkpoint, StoredTensor, read, read_into, scale_bytes
from .converted import Converted
from .errors import CheckpointError
from .formats import adapt, format_of, matrices
from .inventory import official_tensors, transformers_name
from .linear import QuantizedWideLinear
from .model import Model

Progress = Callable[[int, int], None]

_READERS = 4
# How stored bytes are held in memory: four FP8 or eight FP4 codes to a word, bfloat16 by its bits.
HELD = {"F8_E4M3": mx.uint32, "I8": mx.uint32, "U8": mx.uint32, "BF16": mx.uint16, "F32": mx.float32}


def load_weights(model: Model, checkpoint: Checkpoint | Converted, progress: Progress | None = None) -> None:
    """Fill every parameter of the model; large tensors are read straight into their final place.

    Stored bits stay as they are: FP4 becomes mxfp4, FP8 becomes mxfp8 with its block scales repeated (spec 9.3).
    Streamed experts are no parameters and stay where they are.
    Only linear layers stored wider than the model computes are narrowed, and scales of affine weights become what
    they are multiplied with.

    Args:
        progress: called with bytes done and bytes in all.

    Raises:
        CheckpointError: a file changed or ends early, or holds a value that cannot be right.
    """
    if isinstance(checkpoint, Converted):
        adapt(model, checkpoint.formats)
    linears = {f"{path}.weight" for path, module in model.named_modules() if type(module) is nn.Linear}
    scales = dict(_affine_scales(model))
    parameters = dict(tree_flatten(model.parameters()))
    if isinstance(checkpoint, Converted):
        checkpoint.expect(parameters, experts=model.store is None)
    expected = set(parameters)
    del parameters
    streamed = model.store is not None
    done, total = 0, checkpoint.dense_bytes if streamed else checkpoint.nbytes
    with ThreadPoolExecutor(_READERS) as readers:
        for path, array, nbytes in _arrays(checkpoint, readers, streamed):
            if path in linears and array.dtype == mx.float32:
                array = array.astype(model.numerics.dtype)
            array = array.astype(scales.get(path, array.dtype))
            mx.eval(array)
            model.update(tree_unflatten([(path, array)]))
            expected.remove(path)
            done += nbytes
            if progress is not None:
                progress(done, total)
    assert not expected, f"parameters without a tensor: {sorted(expected)[:5]}"


def _affine_scales(model: Model) -> Iterator[tuple[str, mx.Dtype]]:
    """Paths of floating scales and biases, and the type of the product they enter, which MLX would cast them to."""
    for path, module in matrices(model):
        if format_of(module).mode == "affine":
            wide = isinstance(module, QuantizedWideLinear)
            yield from ((f"{path}.{n}", mx.float32 if wide else model.numerics.dtype) for n in ("scales", "biases"))


def _arrays(
    checkpoint: Checkpoint | Converted, readers: ThreadPoolExecutor, streamed: bool
) -> Iterator[tuple[str, mx.array, int]]:
    if isinstance(checkpoint, Converted):
        yield from checkpoint.parameters(readers, experts=not streamed)
        return
    for path, tensors in sources(checkpoint):
        if streamed and ".ffn.experts." in path:
            continue
        yield path, parameter(path, tensors, checkpoint, readers), sum(tensor.nbytes for tensor in tensors)


def parameter_path(name: str) -> str:
    """Path in the model of an official tensor name.

    Some tensors share a path: experts, whose number is dropped, are stacked along a new axis; layers of attention with
    the same input row after row, in the order of the names in a checkpoint.
    """
    name = re.sub(r"hc_(attn|ffn|head)_(fn|base|scale)$", r"hc_\1.\2", name)
    name = re.sub(r"\.experts\.\d+\.", ".experts.", name)
    name = re.sub(r"\.attn\.(wq_a|wkv)\.", ".attn.wqkv_a.", name)
    name = re.sub(r"\.attn\.indexer\.wq_b\.", ".attn.wq_b.", name)
    name = re.sub(r"\.attn\.(indexer\.)?(compressor\.)?(wkv|wgate|weights_proj)\.", ".attn.wcompress.", name)
    return re.sub(r"\.(w\w+)\.scale$", r".\1.scales", name)


def sources(checkpoint: Checkpoint) -> Iterator[tuple[str, list[StoredTensor]]]:
    """Paths of parameters, each with the stored tensors that fill it, one after another."""
    groups: dict[str, list[StoredTensor]] = {}
    for name in official_tensors(checkpoint.config):
        groups.setdefault(parameter_path(name), []).append(stored_tensor(checkpoint, name))
    yield from groups.items()


def stored_tensor(checkpoint: Checkpoint, name: str) -> StoredTensor:
    """The tensor of this official name, whatever the checkpoint's names are."""
    if checkpoint.naming == "official":
        return checkpoint.tensors[name]
    if ".ffn.experts." in name:
        return _expert_slice(checkpoint, name)
    return checkpoint.tensors[transformers_name(name)]


def _expert_slice(checkpoint: Checkpoint, name: str) -> StoredTensor:
    """The part of transformers' stacked experts that is the tensor of this official name."""
    _, layer, _, _, expert, matrix, _ = name.split(".")
    stacked = "down_proj" if matrix == "w2" else "gate_up_proj"
    tensor = checkpoint.tensors[f"model.layers.{layer}.mlp.experts.{stacked}"]
    parts = tensor.shape[0] * (1 if matrix == "w2" else 2)  # an expert's gate and up rows lie one after the other
    number = int(expert) if matrix == "w2" else 2 * int(expert) + (matrix == "w3")
    nbytes = tensor.nbytes // parts
    rows = tensor.shape[1] // (1 if matrix == "w2" else 2)
    return dataclasses.replace(
        tensor, shape=(rows, tensor.shape[2]), offset=tensor.offset + number * nbytes, nbytes=nbytes
    )


def parameter(path: str, tensors: list[StoredTensor], checkpoint: Checkpoint, readers: ThreadPoolExecutor) -> mx.array:
    """One parameter as the model holds it, from the stored tensors that `sources` names for it."""
    experts = ".ffn.experts." in path
    if path.endswith(".scales"):
        if experts and checkpoint.config.expert_dtype == "fp4":
            return _read(tensors, True, mx.uint8, readers, check_scales=True)
        parts = [expand_blocks(read(tensor), tensor, checkpoint) for tensor in tensors]
        return mx.array(np.stack(parts) if experts else np.concatenate(parts))
    if path.endswith("tid2eid"):
        return mx.array(_expert_table(tensors[0], checkpoint.config.n_routed_experts))
    if len({tensor.dtype for tensor in tensors}) > 1:  # bfloat16 beside float32, which holds both
        wide = [parameter(path, [tensor], checkpoint, readers).astype(mx.float32) for tensor in tensors]
        return mx.concatenate(wide)
    dtype = HELD[tensors[0].dtype]
    array = _read(tensors, experts, dtype, readers)
    return array.view(mx.bfloat16) if dtype == mx.uint16 else array


def _read(
    tensors: list[StoredTensor], stacked: bool, dtype: mx.Dtype, readers: ThreadPoolExecutor, check_scales: bool = False
) -> mx.array:
    """Tensors read into memory that MLX owns: stacked to [len, *shape], or row after row; words hold four bytes."""
    *rows, columns = tensors[0].shape
    if stacked:
        rows = [len(tensors), *rows]
    elif rows:
        rows[0] = sum(tensor.shape[0] for tensor in tensors)
    array = mx.zeros((*rows, columns // (4 if dtype == mx.uint32 else 1)), dtype)
    mx.eval(array)
    # On CUDA a view would move the array to managed memory for good; there the bytes take one copy more.
    host = np.array(array, copy=mx.cuda.is_available())
    assert host.flags.c_contiguous and host.flags.writeable
    parts = list(host) if stacked else _split_rows(host, tensors)
    list(readers.map(read_into, tensors, parts))
    if check_scales:
        for tensor, part in zip(tensors, parts, strict=True):
            scale_bytes(part, tensor.name)
    return mx.array(host) if mx.cuda.is_available() else array


def _split_rows(host: np.ndarray, tensors: list[StoredTensor]) -> list[np.ndarray]:
    if len(tensors) == 1:
        return [host]
    ends = np.cumsum([tensor.shape[0] for tensor in tensors])
    return np.split(host, ends[:-1])


def expand_blocks(stored: np.ndarray, tensor: StoredTensor, checkpoint: Checkpoint) -> np.ndarray:
    """One scale per block of 128 x 128 -> mxfp8's one per row and 32 columns.

    Raises:
        CheckpointError: a scale that cannot be right.
    """
    scales = scale_bytes(stored, tensor.name)
    rows, columns = checkpoint.tensors[tensor.name.removesuffix(".scale") + ".weight"].shape
    block_rows, block_columns = checkpoint.config.weight_block_size
    return scales.repeat(block_rows, 0)[:rows].repeat(block_columns // 32, 1)[:, : columns // 32]


def _expert_table(tensor: StoredTensor, experts: int) -> np.ndarray:
    table = read(tensor)
    if table.min() < 0 or table.max() >= experts:
        raise CheckpointError(
            f"{tensor.name}: expected expert numbers from 0 to {experts - 1}, found {table.min()} to {table.max()} "
            f"in {tensor.path.name}\nhint: the file is damaged; download it again"
        )
    return table.astype(np.int32)
