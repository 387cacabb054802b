"""Random checkpoints in the official format, of any size: to try things without the real weights."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .byte_tokenizer import FILES, copy_tokenizer, expect_tokenizer, write_byte_tokenizer
from .checkpoint import INDEX
from .config import ModelConfig
from .errors import CheckpointError, ConfigError
from .inventory import FLOATS, TensorSpec, mtp_tensors, official_tensors
from .random_weights import COPIES, random_pieces, stored_dtype
from .safetensors_header import DTYPES

Progress = Callable[[int, int], None]

# Where config.json says that a folder was written here and may be written again.
_MARK = "mlx_v4flash"

# The values of V4-Flash, key for key.
REAL: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4] + [0],
    "compress_rope_theta": 160000,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_hidden_layers": 43,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": 129280,
}

# A few megabytes with every kind of layer.
TINY: dict[str, Any] = REAL | {
    "compress_ratios": [0, 4, 128, 4, 128],
    "head_dim": 128,
    "hidden_size": 128,
    "index_n_heads": 16,  # with fewer, all their ReLUs can be 0 for several rows, and the choice among those is open
    "index_topk": 24,
    "max_position_embeddings": 65536,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hash_layers": 2,
    "num_hidden_layers": 5,
    "num_nextn_predict_layers": 0,
    "o_groups": 2,
    "o_lora_rank": 128,
    "q_lora_rank": 128,
    "rope_scaling": REAL["rope_scaling"] | {"original_max_position_embeddings": 4096},
    "swiglu_limit": 1.0,
    "vocab_size": 272,
}


def real_dims(layers: Iterable[int] = (2, 3)) -> dict[str, Any]:
    """V4-Flash's config with only these of its layers, at 3.4 GB a layer.

    Raises:
        ConfigError: no layers, one that does not exist, or a hash-routed one (0, 1, 2) after another.
    """
    return choose_layers(REAL, layers)


def choose_layers(values: dict[str, Any], layers: Iterable[int]) -> dict[str, Any]:
    """A config with only these of its layers, numbered from 0 in this order."""
    layers = list(layers)
    ratios, count, hashed = values["compress_ratios"], values["num_hidden_layers"], values["num_hash_layers"]
    if not layers or not all(0 <= layer < count for layer in layers):
        raise ConfigError(f"layers: expected numbers from 0 to {count - 1}, found {layers}")
    by_id = [layer < hashed for layer in layers]
    if by_id != sorted(by_id, reverse=True):
        raise ConfigError(
            f"layers: expected those below {hashed}, which route by token id, to come first, found {layers}"
        )
    return values | {
        "num_hidden_layers": len(layers),
        "num_hash_layers": sum(by_id),
        "compress_ratios": [ratios[layer] for layer in layers] + ratios[count:],
    }


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What will be written: tensors with their types, and the files they go to."""

    config: ModelConfig
    specs: dict[str, TensorSpec]
    dtypes: dict[str, str]
    files: dict[str, list[str]]

    def nbytes(self, name: str) -> int:
        return math.prod(self.specs[name].shape) * DTYPES[self.dtypes[name]].itemsize

    @property
    def total_bytes(self) -> int:
        return sum(map(self.nbytes, self.specs))


def write_tiny(
    folder: str | Path,
    config_values: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    layers: Iterable[int] | None = None,
    tokenizer: str | Path | None = None,
    shard_bytes: int | None = None,
    drafter: bool = False,
    base: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a random checkpoint under DeepSeek's names and types, with config and tokenizer.

    Streams, logits (standard deviation about 2) and every table have the size and variety that tests need.
    Needs about 100 MB of memory, whatever the size of the checkpoint.

    Args:
        folder: created if absent; must be empty, or written by this function before.
        config_values: a complete config.json; TINY if absent.
        seed: every tensor depends on this and its own name alone.
        layers: keep these layers of the config only, see `choose_layers`.
        tokenizer: tokenizer.json, or a folder with one, to copy. If absent, a byte-level one is written.
        shard_bytes: above this total, one file per layer and an index, as DeepSeek does. If absent, one file.
        drafter: add the draft block of the April release, `mtp.0.*`.
        base: as V4-Flash-Base: FP8 experts, float32 scales.
        progress: called with bytes written and bytes in all.

    Returns:
        The folder.

    Raises:
        ConfigError: the config is refused, or has fewer ids than the tokenizer.
        CheckpointError: the folder holds something else, or there is not enough space.
    """
    values = _settings(config_values, layers, drafter, base, seed)
    plan = _plan(ModelConfig.from_dict(values, "config"), shard_bytes, drafter, base)
    folder, given = Path(folder), None
    if tokenizer is not None:
        given = expect_tokenizer(Path(tokenizer), plan.config.vocab_size)
    try:
        _prepare(folder, plan.total_bytes)
        # Before everything else: it marks the folder as ours, should we be interrupted.
        _write_json(folder / "config.json", values)
        if given is None:
            write_byte_tokenizer(folder, plan.config.vocab_size)
        else:
            copy_tokenizer(given, folder)
        _write_weights(folder, plan, seed, progress)
    except OSError as e:
        raise CheckpointError(
            f"{folder}: cannot be written: {e.strerror}\nhint: check its space and permissions"
        ) from e
    return folder


def _settings(
    given: dict[str, Any] | None, layers: Iterable[int] | None, drafter: bool, base: bool, seed: int
) -> dict[str, Any]:
    values = dict(TINY if given is None else given)
    ModelConfig.from_dict(values, "config")
    if layers is not None:
        values = choose_layers(values, layers)
    # What the file says of the draft block must be what is written.
    values = {key: value for key, value in values.items() if not key.startswith("dspark_")}
    values["num_nextn_predict_layers"] = int(drafter)
    values["compress_ratios"] = values["compress_ratios"][: values["num_hidden_layers"]] + [0] * drafter
    if base:
        if "quantization_config" not in values:
            raise ConfigError("config: quantization_config: expected one, as V4-Flash-Base has, found none")
        values["expert_dtype"] = "fp8"
    return values | {_MARK: {"tiny": True, "seed": seed}}


def _plan(config: ModelConfig, shard_bytes: int | None, drafter: bool, base: bool) -> _Plan:
    specs = official_tensors(config)
    if drafter:
        specs |= mtp_tensors(config)
        if base:
            specs |= {name: TensorSpec((config.vocab_size, config.hidden_size), FLOATS) for name in COPIES}
    dtypes = {name: stored_dtype(name, spec, base) for name, spec in specs.items()}
    plan = _Plan(config, specs, dtypes, {"model.safetensors": list(specs)})
    if shard_bytes is None or plan.total_bytes <= shard_bytes:
        return plan
    shards: dict[str, list[str]] = {}
    for name in specs:
        layer = ".".join(name.split(".")[:2]) if name.startswith(("layers.", "mtp.", "embed.")) else "end"
        shards.setdefault(layer, []).append(name)
    files = {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards.values(), 1)}
    return dataclasses.replace(plan, files=files)


def _prepare(folder: Path, nbytes: int) -> None:
    """Make the folder, and empty it if an earlier call filled it."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder, found a file\nhint: choose another place")
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    if found and not _is_ours(folder):
        raise CheckpointError(
            f"{folder}: expected an empty folder or a random checkpoint written before, found {', '.join(found[:3])}\n"
            "hint: choose another folder"
        )
    for path in [*folder.glob("model*.safetensors"), *(folder / n for n in (INDEX, "config.json", *FILES))]:
        path.unlink(missing_ok=True)
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise CheckpointError(
            f"{folder}: expected {nbytes:,} bytes of free space, found {free:,}\nhint: choose another disk"
        )


def _is_ours(folder: Path) -> bool:
    try:
        mark = json.loads((folder / "config.json").read_text(encoding="utf-8"))[_MARK]
        return bool(mark["tiny"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_weights(folder: Path, plan: _Plan, seed: int, progress: Progress | None) -> None:
    done, total = 0, plan.total_bytes
    for file, names in plan.files.items():
        # Larger elements first, so that each lies at a multiple of its size.
        names = sorted(names, key=lambda name: -DTYPES[plan.dtypes[name]].itemsize)
        with (folder / file).open("wb") as out:
            out.write(_header(plan, names))
            for name in names:
                for piece in random_pieces(name, plan.specs, plan.dtypes[name], plan.config, seed):
                    out.write(piece.data)
                    done += piece.nbytes
                    if progress is not None:
                        progress(done, total)
    if len(plan.files) > 1:
        files = {name: file for file, names in plan.files.items() for name in names}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": files})


def _header(plan: _Plan, names: list[str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + plan.nbytes(name)
        header[name] = {"dtype": plan.dtypes[name], "shape": plan.specs[name].shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
