"""Sizes of the model, and what each layer is."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError

MODEL_TYPE = "deepseek_v4"

# transformers names the layers; the official config names their ratios.
_LAYER_TYPES = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}

# The model has exactly one choice for each of these. Another value is another model.
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "n_shared_experts": (1,),
    "norm_topk_prob": (True,),
    "num_key_value_heads": (1,),
    "scoring_func": ("sqrtsoftplus",),
    "tie_word_embeddings": (False,),
    "topk_method": ("noaux_tc",),
    "expert_dtype": ("fp4", "fp8", None),
}

# Keys that describe the file, training or other programs, and change no result of ours.
_WITHOUT_EFFECT = frozenset(
    """architectures auto_map bos_token_id chunk_size_feed_forward dtype id2label initializer_range
    is_encoder_decoder label2id model_type num_nextn_predict_layers output_attentions output_hidden_states
    output_router_logits pad_token_id problem_type return_dict router_aux_loss_coef router_jitter_noise
    sep_token_id torch_dtype transformers_version use_cache use_return_dict _name_or_path
    partial_rotary_factor dspark_block_size dspark_noise_token_id dspark_target_layer_ids
    dspark_markov_rank mlx_v4flash""".split()
)


@dataclass(frozen=True)
class Yarn:
    """RoPE scaling of the layers with a compressor (spec 4.2); no magnitude factor."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32
    beta_slow: float = 1


def read_values(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"{path}: expected JSON, found {e}\nhint: download or write the file again") from e
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


@dataclass(frozen=True)
class ModelConfig:
    """The values of `config.json` that decide what is computed, under their official names.

    `compress_ratios` has one entry per layer of the main model: 0 is a window-only layer, 4 a CSA layer
    (indexer, overlapping groups), anything else an HCA layer with groups of that many tokens.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    max_position_embeddings: int
    rope_scaling: Yarn | None = None
    eos_token_id: int | tuple[int, ...] = 1
    expert_dtype: str | None = None  # "fp4", "fp8", or None: not quantised
    quantized: bool = False  # linear layers are FP8 with block scales
    weight_block_size: tuple[int, int] = (128, 128)

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read `folder/config.json`.

        Raises:
            ConfigError: the file is absent, is not JSON, or is refused by `from_dict`.
        """
        path = folder / "config.json"
        if not path.is_file():
            raise ConfigError(
                f"{folder}: expected a checkpoint folder with config.json, found none\n"
                "hint: pass the folder that holds config.json and the .safetensors files"
            )
        return cls.from_dict(read_values(path), str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Check the keys of a `config.json`, official or written by transformers.

        Raises:
            ConfigError: another model, a missing key, or a value that would change the result and is
                not supported; the message names the key.
        """
        _refuse_other_models(values, where)
        _check_kinds(values, where)
        values = _fold_transformers(dict(values), where)
        for key, allowed in _FIXED.items():
            if values.get(key, allowed[0]) not in allowed:
                raise ConfigError(
                    f"{where}: {key}: expected {_either(allowed)}, found {values[key]!r}\n"
                    "hint: this is not a DeepSeek-V4 model as released"
                )
        known = {f.name: f for f in dataclasses.fields(cls)}
        # Not keys of the file: these come out of quantization_config.
        official = set(known) - {"quantized", "weight_block_size"} | {"quantization_config"}
        foreign = sorted(set(values) - official - set(_FIXED) - _WITHOUT_EFFECT)
        if foreign:
            raise ConfigError(
                f"{where}: {', '.join(foreign)}: settings this version does not know and will not ignore\n"
                "hint: update mlx-v4flash, or remove the keys if they do not change the model"
            )
        missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and values.get(n) is None]
        if missing:
            raise ConfigError(f"{where}: missing {', '.join(missing)}\nhint: download config.json again")
        chosen = {n: values[n] for n in official & set(known) if values.get(n) is not None}
        chosen |= _quantization(values, where)
        chosen["rope_scaling"] = _yarn(values.get("rope_scaling"), where)
        # The list goes on with one entry per stage of the draft block, which is not part of this model.
        chosen["compress_ratios"] = tuple(values["compress_ratios"])[: values["num_hidden_layers"]]
        if isinstance(values.get("eos_token_id"), list):
            chosen["eos_token_id"] = tuple(values["eos_token_id"])
        config = cls(**chosen)
        config._check(where)
        return config

    def _check(self, where: str) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", "float"):
                whole = isinstance(value, int) and not isinstance(value, bool)
                if not (whole or (field.type == "float" and isinstance(value, float))):
                    raise ConfigError(f"{where}: {field.name}: expected a number, found {value!r}")
                # Written so that NaN is refused too.
                if not (0 if field.name == "num_hash_layers" else 1e-30) <= value < math.inf:
                    raise ConfigError(f"{where}: {field.name}: expected a positive number, found {value!r}")
        ratios, rope, topk = self.compress_ratios, self.qk_rope_head_dim, self.num_experts_per_tok
        ends = self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)
        rules = {
            "compress_ratios must have one entry per layer of num_hidden_layers": len(ratios) == self.num_hidden_layers,
            "compress_ratios must each be 0 or at least 2": all(type(r) is int and (r == 0 or r > 1) for r in ratios),
            "num_attention_heads must be divisible by o_groups": self.num_attention_heads % self.o_groups == 0,
            "qk_rope_head_dim must be even": rope % 2 == 0,
            "qk_rope_head_dim must not exceed head_dim": rope <= self.head_dim,
            "qk_rope_head_dim must not exceed index_head_dim": rope <= self.index_head_dim,
            "index_head_dim must be a power of two": self.index_head_dim & (self.index_head_dim - 1) == 0,
            "num_experts_per_tok must not exceed n_routed_experts": topk <= self.n_routed_experts,
            "num_hash_layers must not exceed num_hidden_layers": self.num_hash_layers <= self.num_hidden_layers,
            "eos_token_id must be below vocab_size": all(type(i) is int and 0 <= i < self.vocab_size for i in ends),
        }
        if self.quantized:
            # The inputs of quantised layers: a scale covers 32 of them (FP4) or a multiple of 32 (FP8).
            grouped, heads = self.o_groups * self.o_lora_rank, self.num_attention_heads * self.head_dim
            rules |= {
                "hidden_size must be divisible by 32": self.hidden_size % 32 == 0,
                "q_lora_rank must be divisible by 32": self.q_lora_rank % 32 == 0,
                "moe_intermediate_size must be divisible by 32": self.moe_intermediate_size % 32 == 0,
                "o_groups times o_lora_rank must be divisible by 32": grouped % 32 == 0,
                "num_attention_heads times head_dim / o_groups must be divisible by 32": heads // self.o_groups % 32
                == 0,
            }
        for rule, holds in rules.items():
            if not holds:
                found = {k: getattr(self, k) for k in rule.replace(",", "").split() if hasattr(self, k)}
                raise ConfigError(f"{where}: {rule}, found {found}")


def _refuse_other_models(values: dict[str, Any], where: str) -> None:
    kind, text = values.get("model_type"), values.get("text_config")
    kinds = (kind, text.get("model_type") if isinstance(text, dict) else None)
    if any(isinstance(k, str) and k.startswith("deepseek_v41") for k in kinds):
        raise ConfigError(
            f"{where}: this is DeepSeek-V4.1, which shares its name but not its architecture with V4\n"
            "hint: mlx-v4flash runs V4-Flash, V4-Flash-0731, V4-Flash-DSpark, V4-Flash-Base and V4-Pro"
        )
    if kind != MODEL_TYPE:
        raise ConfigError(
            f"{where}: model_type: expected {MODEL_TYPE!r}, found {kind!r}\n"
            "hint: mlx-v4flash runs DeepSeek-V4 models only"
        )


# What is inside these is looked at before any value is checked; null means the same as an absent key.
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("compress_ratios", "layer_types", "mlp_layer_types"), list),
    **dict.fromkeys(("compress_rates", "rope_parameters", "rope_scaling", "quantization_config"), dict),
    **dict.fromkeys(("num_hidden_layers", "head_dim"), int),
    "eos_token_id": (int, list),
}


def _check_kinds(values: dict[str, Any], where: str) -> None:
    for key, kind in _KINDS.items():
        value = values.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ConfigError(f"{where}: {key}: expected {_KIND_NAMES[kind]}, found {value!r}")


_KIND_NAMES: dict[type | tuple[type, ...], str] = {
    list: "a list", dict: "an object", int: "a whole number", (int, list): "one id or a list",
}  # fmt: skip


def _fold_transformers(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Translate what transformers writes differently into the official keys."""

    def fold(key: str, value: Any, source: str) -> None:
        if value is not None and values.get(key) not in (None, value):
            raise ConfigError(f"{where}: {key}: expected {value!r} as in {source}, found {values[key]!r}")
        if value is not None:
            values[key] = value

    rates = _compress_rates(values.pop("compress_rates", None) or {}, where)
    types = values.pop("layer_types", None)
    if types is not None:
        if any(t not in list(rates) for t in types):
            raise ConfigError(f"{where}: layer_types: expected {_either(tuple(rates))}, found {types}")
        if values.get("compress_ratios") is not None:
            values["compress_ratios"] = values["compress_ratios"][: len(types)]
        fold("compress_ratios", [rates[t] for t in types], "layer_types")
    experts = values.pop("mlp_layer_types", None)
    if experts is not None:
        hashed = experts.count("hash_moe")
        if experts != ["hash_moe"] * hashed + ["moe"] * (len(experts) - hashed):
            raise ConfigError(f"{where}: mlp_layer_types: expected hash_moe layers first, then moe, found {experts}")
        fold("num_hash_layers", hashed, "mlp_layer_types")
    main, compress = _rope_parameters(values.pop("rope_parameters", None) or {}, where)
    fold("rope_theta", main.get("rope_theta"), "rope_parameters")
    fold("compress_rope_theta", compress.get("rope_theta"), "rope_parameters")
    if compress.get("rope_type", "default") != "default":
        ours = {k: v for k, v in compress.items() if k not in ("rope_type", *_ROPE_ELSEWHERE)}
        fold("rope_scaling", {**ours, "type": compress["rope_type"]}, "rope_parameters")
    for part, source in ((values, "config"), (main, "rope_parameters.main"), (compress, "rope_parameters.compress")):
        share = part.get("partial_rotary_factor")
        if share is not None and values.get("head_dim") is not None:
            if type(share) not in (int, float) or not 0 < share <= 1:
                raise ConfigError(f"{where}: partial_rotary_factor: expected a number up to 1, found {share!r}")
            fold("qk_rope_head_dim", round(values["head_dim"] * share), f"partial_rotary_factor of {source}")
    return values


def _compress_rates(given: dict[str, Any], where: str) -> dict[str, int]:
    """Tokens per compressed row of each layer type."""
    rates = _LAYER_TYPES | given
    hca = rates["heavily_compressed_attention"]
    # The ratio alone says what a layer is: 4 has an indexer and overlapping groups, no other has.
    if rates != _LAYER_TYPES | {"heavily_compressed_attention": hca} or type(hca) is not int or hca in (0, 4):
        raise ConfigError(
            f"{where}: compress_rates: expected 4 for compressed_sparse_attention and another number for "
            f"heavily_compressed_attention, found {given}"
        )
    return rates


# Keys of rope_parameters that also stand elsewhere, or say that the magnitude stays as it is.
_ROPE_ELSEWHERE = ("rope_theta", "partial_rotary_factor", "attention_factor")


def _rope_parameters(rope: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its two parts, each free of anything that would change a magnitude."""
    main, compress = rope.get("main", {}), rope.get("compress", {})
    plain = set(rope) <= {"main", "compress"} and isinstance(main, dict) and isinstance(compress, dict)
    if plain:
        plain = set(main) <= {"rope_type", *_ROPE_ELSEWHERE} and main.get("rope_type", "default") == "default"
        plain &= all(part.get("attention_factor", 1) in (1, None) for part in (main, compress))
    if not plain:
        raise ConfigError(
            f"{where}: rope_parameters: expected plain RoPE in 'main' and no attention_factor in 'compress', "
            f"found {rope}"
        )
    return main, compress


def _quantization(values: dict[str, Any], where: str) -> dict[str, Any]:
    settings = values.get("quantization_config")
    if settings is None:
        return {"quantized": False, "expert_dtype": None}
    experts = values.get("expert_dtype") or settings.get("expert_dtype") or "fp4"
    expected: dict[str, tuple[Any, ...]] = {
        "quant_method": ("fp8",),
        "fmt": ("e4m3", None),
        "scale_fmt": ("ue8m0", None),
        "activation_scheme": ("dynamic", None),
        "weight_block_size": ([128, 128], (128, 128), None),
        "expert_dtype": (experts, None) if experts in ("fp4", "fp8") else ("fp4", "fp8"),
    }
    for key, allowed in expected.items():
        if settings.get(key) not in allowed:
            raise ConfigError(
                f"{where}: quantization_config.{key}: expected {_either(allowed)}, found {settings.get(key)!r}\n"
                "hint: use the checkpoint as DeepSeek published it"
            )
    return {"quantized": True, "expert_dtype": experts}


def _yarn(settings: dict[str, Any] | None, where: str) -> Yarn | None:
    if not settings:
        return None
    kinds = [settings[k] for k in ("type", "rope_type") if settings.get(k) is not None]
    if not kinds or any(k != "yarn" for k in kinds):
        raise ConfigError(f"{where}: rope_scaling.type: expected 'yarn', found {kinds[0] if kinds else None!r}")
    fields = {f.name: f for f in dataclasses.fields(Yarn)}
    foreign = sorted(set(settings) - set(fields) - {"type", "rope_type"})
    if foreign:
        raise ConfigError(f"{where}: rope_scaling: expected {', '.join(fields)}, found {', '.join(foreign)} as well")
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and settings.get(n) is None]
    if missing:
        raise ConfigError(f"{where}: rope_scaling: missing {', '.join(missing)}")
    values = {n: settings[n] for n in fields if settings.get(n) is not None}
    for name, value in values.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ConfigError(f"{where}: rope_scaling.{name}: expected a positive number, found {value!r}")
    return Yarn(**values)


def _either(allowed: tuple[Any, ...]) -> str:
    return " or ".join(repr(a) for a in allowed)
