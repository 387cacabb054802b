"""Sizes of the model, and what each layer is."""

from __future__ import annotations

import dataclasses
import json
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
            raise ConfigError(f"{folder}: expected a checkpoint folder with config.json, found none\n"
                              "hint: pass the folder that holds config.json and the .safetensors files")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as e:
            raise ConfigError(f"{path}: expected JSON, found {e}\nhint: download the file again") from e
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected a JSON object, found {type(values).__name__}")
        return cls.from_dict(values, str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Check the keys of a `config.json`, official or written by transformers.

        Raises:
            ConfigError: another model, a missing key, or a value that would change the result and is
                not supported; the message names the key.
        """
        _refuse_other_models(values, where)
        values = _fold_transformers(dict(values), where)
        for key, allowed in _FIXED.items():
            if values.get(key, allowed[0]) not in allowed:
                raise ConfigError(f"{where}: {key}: expected {_either(allowed)}, found {values[key]!r}\n"
                                  "hint: this is not a DeepSeek-V4 model as released")
        known = {f.name: f for f in dataclasses.fields(cls)}
        foreign = sorted(set(values) - set(known) - set(_FIXED) - _WITHOUT_EFFECT - {"quantization_config"})
        if foreign:
            raise ConfigError(f"{where}: {', '.join(foreign)}: settings this version does not know and will not ignore\n"
                              "hint: update mlx-v4flash, or remove the keys if they do not change the model")
        missing = [n for n, f in known.items() if f.default is dataclasses.MISSING and values.get(n) is None]
        if missing:
            raise ConfigError(f"{where}: missing {', '.join(missing)}\nhint: download config.json again")
        chosen = {n: values[n] for n in known if values.get(n) is not None}
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
                if value < (0 if field.name == "num_hash_layers" else 1e-30):
                    raise ConfigError(f"{where}: {field.name}: expected a positive number, found {value!r}")
        rules = {
            "compress_ratios must have one entry per layer, each 0 or at least 2":
                len(self.compress_ratios) == self.num_hidden_layers and all(r == 0 or r > 1 for r in self.compress_ratios),
            "num_attention_heads must be divisible by o_groups": self.num_attention_heads % self.o_groups == 0,
            "qk_rope_head_dim must be even, and at most head_dim and index_head_dim":
                self.qk_rope_head_dim % 2 == 0 and self.qk_rope_head_dim <= min(self.head_dim, self.index_head_dim),
            "index_head_dim must be a power of two": self.index_head_dim & (self.index_head_dim - 1) == 0,
            "num_experts_per_tok must not exceed n_routed_experts": self.num_experts_per_tok <= self.n_routed_experts,
            "num_hash_layers must not exceed num_hidden_layers": self.num_hash_layers <= self.num_hidden_layers,
        }
        for rule, holds in rules.items():
            if not holds:
                found = {k: getattr(self, k) for k in rule.replace(",", "").split() if hasattr(self, k)}
                raise ConfigError(f"{where}: {rule}, found {found}")


def _refuse_other_models(values: dict[str, Any], where: str) -> None:
    kind = values.get("model_type")
    if kind == "deepseek_v41" or (isinstance(values.get("text_config"), dict)
                                  and values["text_config"].get("model_type", kind) != MODEL_TYPE):
        raise ConfigError(f"{where}: this is DeepSeek-V4.1, which shares its name but not its architecture with V4\n"
                          "hint: mlx-v4flash runs V4-Flash, V4-Flash-0731, V4-Flash-DSpark, V4-Flash-Base and V4-Pro")
    if kind != MODEL_TYPE:
        raise ConfigError(f"{where}: model_type: expected {MODEL_TYPE!r}, found {kind!r}\n"
                          "hint: mlx-v4flash runs DeepSeek-V4 models only")


def _fold_transformers(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Translate what transformers writes differently into the official keys."""
    types = values.pop("layer_types", None)
    rates = values.pop("compress_rates", None) or {}
    if types is not None:
        unknown = sorted(set(types) - set(_LAYER_TYPES))
        if unknown:
            raise ConfigError(f"{where}: layer_types: expected {_either(tuple(_LAYER_TYPES))}, found {', '.join(unknown)}")
        values["compress_ratios"] = [rates.get(t, _LAYER_TYPES[t]) for t in types]
    experts = values.pop("mlp_layer_types", None)
    if experts is not None:
        hashed = experts.count("hash_moe")
        if experts != ["hash_moe"] * hashed + ["moe"] * (len(experts) - hashed):
            raise ConfigError(f"{where}: mlp_layer_types: expected hash_moe layers first, then moe, found {experts}")
        values["num_hash_layers"] = hashed
    rope = values.pop("rope_parameters", None)
    if rope is not None:
        main, compress = rope.get("main", {}), rope.get("compress", {})
        if main.get("rope_type", "default") != "default" or compress.get("attention_factor", 1.0) not in (1, None):
            raise ConfigError(f"{where}: rope_parameters: expected plain RoPE in 'main' and no attention_factor in "
                              f"'compress', found {rope}")
        values.setdefault("rope_theta", main.get("rope_theta"))
        values.setdefault("compress_rope_theta", compress.get("rope_theta"))
        if compress.get("rope_type", "default") != "default":
            values.setdefault("rope_scaling", {**compress, "type": compress["rope_type"]})
    if "qk_rope_head_dim" not in values and values.get("partial_rotary_factor") is not None:
        values["qk_rope_head_dim"] = round(values["head_dim"] * values["partial_rotary_factor"])
    return values


def _quantization(values: dict[str, Any], where: str) -> dict[str, Any]:
    settings = values.get("quantization_config")
    if settings is None:
        return {"quantized": False, "expert_dtype": None}
    expected = {"quant_method": ("fp8",), "fmt": ("e4m3", None), "scale_fmt": ("ue8m0", None)}
    for key, allowed in expected.items():
        if settings.get(key) not in allowed:
            raise ConfigError(f"{where}: quantization_config.{key}: expected {_either(allowed)}, found {settings.get(key)!r}\n"
                              "hint: use the checkpoint as DeepSeek published it")
    experts = values.get("expert_dtype") or settings.get("expert_dtype") or "fp4"
    block = tuple(settings.get("weight_block_size", (128, 128)))
    if block != (128, 128):
        raise ConfigError(f"{where}: quantization_config.weight_block_size: expected [128, 128], found {list(block)}")
    return {"quantized": True, "expert_dtype": experts, "weight_block_size": block}


def _yarn(settings: dict[str, Any] | None, where: str) -> Yarn | None:
    if not settings:
        return None
    kind = settings.get("type", settings.get("rope_type"))
    if kind != "yarn":
        raise ConfigError(f"{where}: rope_scaling.type: expected 'yarn', found {kind!r}")
    try:
        return Yarn(**{f.name: settings[f.name] for f in dataclasses.fields(Yarn)
                       if f.name in settings or f.default is dataclasses.MISSING})
    except KeyError as e:
        raise ConfigError(f"{where}: rope_scaling: missing {e.args[0]}") from e


def _either(allowed: tuple[Any, ...]) -> str:
    return " or ".join(repr(a) for a in allowed)
