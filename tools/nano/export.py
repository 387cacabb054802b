"""A trained state as a checkpoint in the official format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlx_v4flash.config import ModelConfig
from mlx_v4flash.inventory import TensorSpec, official_tensors
from mlx_v4flash.random_weights import stored_dtype

from .model import Nano
from .recipe import CONFIG
from .rounding import FP4_MAX, FP8_MAX, fp4_scale, fp8_scale, round_fp4

Array = np.ndarray[Any, np.dtype[Any]]

_FP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def load_state(file: Path) -> Nano:
    """The model of a training state."""
    model = Nano(ModelConfig.from_dict(CONFIG, "recipe"))
    model.load_state_dict(torch.load(file, weights_only=True)["model"])
    return model.eval()


def export(
    model: Nano, tokenizer: Path, folder: Path, about: dict[str, Any], settings: dict[str, Any] = CONFIG
) -> None:
    """Write config.json, the tokenizer's files and model.safetensors.

    Args:
        about: what config.json says of it under `mlx_v4flash`.
        settings: the rest of config.json, which the model was made from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings | {"mlx_v4flash": about}, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    write_safetensors(folder / "model.safetensors", stored(model))


def stored(model: Nano) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of the format: its type, shape and bytes."""
    parameters = {official_name(name): t.detach() for name, t in model.state_dict().items()}
    out = {}
    for name, spec in official_tensors(model.c).items():
        dtype = stored_dtype(name, spec, base=False)
        out[name] = (dtype, spec.shape, _bytes(name, spec, dtype, parameters))
    return out


def official_name(name: str) -> str:
    """Of a parameter here: only the hyper-connections are called otherwise, and routed experts are stacked."""
    for part in ("attn", "ffn", "head"):
        name = name.replace(f"hc_{part}.", f"hc_{part}_")
    return name


def _bytes(name: str, spec: TensorSpec, dtype: str, parameters: dict[str, Tensor]) -> bytes:
    base, leaf = name.rsplit(".", 1) if name.endswith((".weight", ".scale")) else (name, "")
    if ".experts." in base:
        layer, expert, matrix = base.split(".ffn.experts.")[0], *base.split(".")[-2:]
        value = parameters[f"{layer}.ffn.experts.{matrix}"][int(expert)]
    else:
        value = parameters[name if leaf != "scale" else f"{base}.weight"]
    if leaf == "scale":
        scale = fp4_scale(value) if ".experts." in base else fp8_scale(value)
        return (torch.log2(scale).round().int() + 127).to(torch.uint8).numpy().tobytes()
    if dtype == "I8":
        return fp4_bytes(value).numpy().tobytes()
    if dtype == "F8_E4M3":
        scale = fp8_scale(value).repeat_interleave(128, 0).repeat_interleave(128, 1)
        codes = (value / scale[: value.shape[0], : value.shape[1]]).clamp(-FP8_MAX, FP8_MAX)
        return codes.to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes()
    to = {"BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64}[dtype]
    value = value.to(to).reshape(spec.shape).contiguous()
    return (value.view(torch.uint16) if to == torch.bfloat16 else value).numpy().tobytes()


def fp4_bytes(w: Tensor) -> Tensor:
    """[rows, columns] -> two codes to a byte, the even column in the low half."""
    q = round_fp4((w / fp4_scale(w).repeat_interleave(32, -1)).clamp(-FP4_MAX, FP4_MAX))
    codes = torch.searchsorted(_FP4_VALUES, q.abs().contiguous()) + 8 * torch.signbit(q)
    low, high = codes.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4


def write_safetensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # Larger elements first, so that each lies at a multiple of its size.
    widths = {"I64": 8, "F32": 4, "BF16": 2}
    names = sorted(tensors, key=lambda name: -widths.get(tensors[name][0], 1))
    for name in names:
        dtype, shape, data = tensors[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + len(data)]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensors[name][2])
