"""config.json: every release is read rightly, everything else is refused by name."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from configs import BASE, DSPARK, FLASH, PRO, V41
from hypothesis import given
from hypothesis import strategies as st

from mlx_v4flash.config import ModelConfig, Yarn
from mlx_v4flash.errors import ConfigError
from mlx_v4flash.tiny import REAL, TINY


def expect_refused(values: dict[str, Any], *parts: str) -> str:
    """The refusal's text, which must hold all parts."""
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(values)
    text = str(caught.value)
    missing = [part for part in parts if part not in text]
    assert not missing, f"{missing} not in: {text}"
    return text


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k not in keys}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (FLASH, {"hidden_size": 4096, "num_hidden_layers": 43, "expert_dtype": "fp4", "index_topk": 512}),
        (DSPARK, {"hidden_size": 4096, "num_hidden_layers": 43, "expert_dtype": "fp4", "num_hash_layers": 3}),
        (BASE, {"hidden_size": 4096, "num_hidden_layers": 43, "expert_dtype": "fp8", "swiglu_limit": 10.0}),
        (PRO, {"hidden_size": 7168, "num_hidden_layers": 61, "expert_dtype": "fp4", "routed_scaling_factor": 2.5}),
    ],
    ids=["Flash", "DSpark and 0731", "Base", "Pro"],
)
def test_releases_are_accepted(values: dict[str, Any], expected: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(values)
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.quantized
    assert config.weight_block_size == (128, 128)
    assert config.rope_scaling == Yarn(16, 65536, 32, 1)
    assert (config.rope_theta, config.compress_rope_theta) == (10000, 160000)
    # Everything else is what the file says.
    assert all(getattr(config, k) == v for k, v in values.items() if isinstance(v, int | float) and hasattr(config, k))


def test_layers_of_the_releases() -> None:
    """The entries of the draft block are not layers."""
    flash = ModelConfig.from_dict(FLASH).compress_ratios
    assert flash == ModelConfig.from_dict(DSPARK).compress_ratios == (0, 0, *(4, 128) * 20, 4)
    assert [flash.count(ratio) for ratio in (0, 4, 128)] == [2, 21, 20]
    pro = ModelConfig.from_dict(PRO).compress_ratios
    assert [pro.count(ratio) for ratio in (0, 4, 128)] == [0, 30, 31]
    assert pro[:3] == (128, 128, 4)


def test_written_configs_equal_the_released_one() -> None:
    assert REAL == FLASH
    assert TINY.keys() == FLASH.keys()
    assert ModelConfig.from_dict(TINY).num_hidden_layers == 5


@pytest.mark.parametrize(
    "values",
    [V41, FLASH | {"model_type": "deepseek_v41"}, FLASH | {"text_config": {"model_type": "deepseek_v41"}}],
    ids=["nested", "top level", "text_config alone"],
)
def test_v41_is_refused_by_name(values: dict[str, Any]) -> None:
    assert "hint: mlx-v4flash runs V4-Flash" in expect_refused(values, "config.json: this is DeepSeek-V4.1")


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3", None, 4])
def test_other_models_are_refused(kind: object) -> None:
    text = expect_refused(
        FLASH | {"model_type": kind, "text_config": {"model_type": "llama"}}, repr(kind), "'deepseek_v4'"
    )
    assert "V4.1" not in text


CHANGED = {
    "attention_bias": True,
    "attention_dropout": 0.1,
    "hidden_act": "gelu",
    "mlp_bias": True,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_key_value_heads": 8,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": True,
    "topk_method": "greedy",
    "expert_dtype": "int4",
}


@pytest.mark.parametrize("key", CHANGED)
def test_fixed_settings_cannot_change(key: str) -> None:
    value = CHANGED[key]
    expect_refused(FLASH | {key: value}, f"config.json: {key}: expected", f"found {value!r}", "hint:")


@pytest.mark.parametrize(
    "key", ["n_group", "kv_lora_rank", "engram_layer_ids", "quantized", "weight_block_size", "mscale"]
)
def test_unknown_settings_are_refused(key: str) -> None:
    expect_refused(FLASH | {key: 1}, f"config.json: {key}: settings this version does not know", "hint:")


def test_several_unknown_settings_are_all_named() -> None:
    expect_refused(FLASH | {"zeta": 1, "alpha": None}, "alpha, zeta")


REQUIRED = [
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "qk_rope_head_dim",
    "q_lora_rank", "o_groups", "o_lora_rank", "sliding_window", "compress_ratios", "index_n_heads", "index_head_dim",
    "index_topk", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "num_hash_layers",
    "routed_scaling_factor", "swiglu_limit", "hc_mult", "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps", "rope_theta",
    "compress_rope_theta", "max_position_embeddings",
]  # fmt: skip


@pytest.mark.parametrize("key", REQUIRED)
@pytest.mark.parametrize("how", ["absent", "null"])
def test_missing_keys_are_named(key: str, how: str) -> None:
    values = without(FLASH, key) if how == "absent" else FLASH | {key: None}
    expect_refused(values, f"config.json: missing {key}\n", "hint: download config.json again")


def test_all_missing_keys_are_named() -> None:
    expect_refused(without(FLASH, "hc_eps", "vocab_size"), "missing vocab_size, hc_eps")


def test_the_rest_is_optional() -> None:
    config = ModelConfig.from_dict({key: FLASH[key] for key in [*REQUIRED, "model_type"]})
    assert (config.quantized, config.expert_dtype, config.rope_scaling, config.eos_token_id) == (False, None, None, 1)
    # Without the key, as in the first days of the release, experts are FP4.
    assert ModelConfig.from_dict(without(FLASH, "expert_dtype")).expert_dtype == "fp4"
    assert ModelConfig.from_dict(FLASH | {"eos_token_id": [1, 5]}).eos_token_id == (1, 5)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": "4096"}, "hidden_size: expected a number, found '4096'"),
        ({"hidden_size": 4096.0}, "hidden_size: expected a number, found 4096.0"),
        ({"hidden_size": True}, "hidden_size: expected a number, found True"),
        ({"index_topk": 0}, "index_topk: expected a positive number, found 0"),
        ({"num_hash_layers": -1}, "num_hash_layers: expected a positive number, found -1"),
        ({"swiglu_limit": math.nan}, "swiglu_limit: expected a positive number, found nan"),
        ({"rope_theta": math.inf}, "rope_theta: expected a positive number, found inf"),
        ({"num_hidden_layers": "43"}, "num_hidden_layers: expected a whole number, found '43'"),
        ({"num_hidden_layers": 45}, "compress_ratios must have one entry per layer"),
        ({"compress_ratios": 4}, "compress_ratios: expected a list, found 4"),
        ({"compress_ratios": [1] * 43}, "compress_ratios must each be 0 or at least 2"),
        ({"compress_ratios": ["4"] * 43}, "compress_ratios must each be 0 or at least 2"),
        ({"o_groups": 7}, "num_attention_heads must be divisible by o_groups"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim must be even"),
        ({"qk_rope_head_dim": 514}, "qk_rope_head_dim must not exceed head_dim"),
        ({"qk_rope_head_dim": 130}, "qk_rope_head_dim must not exceed index_head_dim"),
        ({"index_head_dim": 96}, "index_head_dim must be a power of two"),
        ({"num_experts_per_tok": 257}, "num_experts_per_tok must not exceed n_routed_experts"),
        ({"num_hash_layers": 44}, "num_hash_layers must not exceed num_hidden_layers"),
        ({"eos_token_id": 129280}, "eos_token_id must be below vocab_size"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id must be below vocab_size"),
        ({"eos_token_id": True}, "eos_token_id: expected one id or a list, found True"),
        ({"hidden_size": 4100}, "hidden_size must be divisible by 32"),
        ({"q_lora_rank": 1000}, "q_lora_rank must be divisible by 32"),
        ({"moe_intermediate_size": 2040}, "moe_intermediate_size must be divisible by 32"),
        ({"o_lora_rank": 1}, "o_groups times o_lora_rank must be divisible by 32"),
        (
            {"head_dim": 66, "index_head_dim": 64},
            "num_attention_heads times head_dim / o_groups must be divisible by 32",
        ),
        ({"rope_scaling": "yarn"}, "rope_scaling: expected an object, found 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling.type: expected 'yarn', found 'linear'"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling.type: expected 'yarn', found None"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope_scaling: missing original_max_position_embeddings"),
        ({"rope_scaling": FLASH["rope_scaling"] | {"mscale": 1}}, "rope_scaling: expected factor, original"),
        ({"rope_scaling": FLASH["rope_scaling"] | {"factor": "16"}}, "rope_scaling.factor: expected a positive number"),
        ({"quantization_config": []}, "quantization_config: expected an object, found []"),
        *(
            (
                {"quantization_config": FLASH["quantization_config"] | {key: value}},
                f"quantization_config.{key}: expected",
            )
            for key, value in [
                ("quant_method", "awq"),
                ("fmt", "e5m2"),
                ("scale_fmt", "float"),
                ("activation_scheme", "static"),
                ("weight_block_size", [32, 32]),
                ("expert_dtype", "fp8"),
            ]
        ),
        (
            {"expert_dtype": None, "quantization_config": FLASH["quantization_config"] | {"expert_dtype": "int4"}},
            "quantization_config.expert_dtype: expected 'fp4' or 'fp8', found 'int4'",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_impossible_values_are_refused(changes: dict[str, Any], named: str) -> None:
    expect_refused(FLASH | changes, f"config.json: {named}")


def test_sizes_of_plain_weights_are_free() -> None:
    assert ModelConfig.from_dict(without(FLASH, "quantization_config") | {"hidden_size": 100}).hidden_size == 100


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "main", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)
EVERY_KEY = [
    *FLASH,
    "layer_types",
    "compress_rates",
    "mlp_layer_types",
    "rope_parameters",
    "partial_rotary_factor",
    "text_config",
]


@given(changes=st.dictionaries(st.sampled_from(EVERY_KEY), json_values, min_size=1, max_size=3))
def test_any_value_is_accepted_or_refused(changes: dict[str, Any]) -> None:
    """No value ends in a traceback."""
    try:
        assert isinstance(ModelConfig.from_dict(FLASH | changes), ModelConfig)
    except ConfigError as e:
        assert str(e).startswith("config.json: ")


# --- what transformers writes ---------------------------------------------------------------------


def by_transformers(values: dict[str, Any]) -> dict[str, Any]:
    transformers = pytest.importorskip("transformers", reason="TRANSFORMERS' CONFIG NOT CHECKED: it is not installed")
    written: dict[str, Any] = json.loads(
        transformers.DeepseekV4Config(**copy.deepcopy(values)).to_json_string()
    )  # it writes into its arguments
    assert "compress_ratios" not in written, "transformers no longer renames this, so the test proves nothing"
    return written


@pytest.mark.parametrize("values", [FLASH, BASE, PRO, TINY], ids=["Flash", "Base", "Pro", "tiny"])
def test_config_saved_by_transformers_means_the_same(values: dict[str, Any]) -> None:
    written = by_transformers(values)
    assert {"layer_types", "compress_rates", "rope_parameters", "mlp_layer_types"} <= written.keys()
    assert ModelConfig.from_dict(written) == ModelConfig.from_dict(values)


def test_transformers_other_sizes() -> None:
    """Rates, number of hash layers and rope of its own."""
    changes = {"compress_rate_hca": 16, "num_hash_layers": 1, "rope_theta": 5000, "compress_rope_theta": 70000}
    config = ModelConfig.from_dict(by_transformers(TINY | changes))
    assert config.compress_ratios == (0, 4, 16, 4, 16)
    assert (config.num_hash_layers, config.rope_theta, config.compress_rope_theta) == (1, 5000, 70000)
    assert config.qk_rope_head_dim == 64
    plain = by_transformers(without(TINY, "quantization_config", "rope_scaling"))
    assert ModelConfig.from_dict(plain).rope_scaling is None
    assert not ModelConfig.from_dict(plain).quantized


TYPES = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
FOLDED = without(FLASH, "compress_ratios") | {"num_hidden_layers": 3, "layer_types": TYPES}
YARN = {"rope_type": "yarn", "factor": 16, "original_max_position_embeddings": 65536, "attention_factor": 1.0}


def test_folded_form_is_accepted() -> None:
    assert ModelConfig.from_dict(FOLDED).compress_ratios == (0, 4, 128)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"compress_rates": {"compressed_sparse_attention": 8}}, "compress_rates: expected 4 for compressed_sparse"),
        ({"compress_rates": {"heavily_compressed_attention": 4}}, "another number for heavily_compressed_attention"),
        ({"compress_rates": {"heavily_compressed_attention": "16"}}, "compress_rates: expected 4"),
        ({"compress_rates": {"sliding_attention": 2}}, "compress_rates: expected 4"),
        ({"compress_rates": {"other_attention": 2}}, "compress_rates: expected 4"),
        ({"layer_types": [*TYPES[:2], "full_attention"]}, "layer_types: expected 'sliding_attention' or"),
        ({"layer_types": [*TYPES[:2], ["x"]]}, "layer_types: expected 'sliding_attention' or"),
        ({"layer_types": TYPES[:2]}, "compress_ratios must have one entry per layer"),
        ({"compress_ratios": [0, 4, 4]}, "compress_ratios: expected [0, 4, 128] as in layer_types, found [0, 4, 4]"),
        ({"mlp_layer_types": ["moe", "hash_moe", "moe"]}, "mlp_layer_types: expected hash_moe layers first"),
        ({"mlp_layer_types": ["hash_moe", "dense", "moe"]}, "mlp_layer_types: expected hash_moe layers first"),
        ({"mlp_layer_types": ["hash_moe", "moe", "moe"]}, "num_hash_layers: expected 1 as in mlp_layer_types, found 3"),
        ({"partial_rotary_factor": 0.25}, "expected 128 as in partial_rotary_factor of config, found 64"),
        ({"partial_rotary_factor": -1}, "partial_rotary_factor: expected a number up to 1, found -1"),
        (
            {"rope_parameters": {"main": {"rope_theta": 500}}},
            "rope_theta: expected 500 as in rope_parameters, found 10000",
        ),
        (
            {"rope_parameters": {"main": {"partial_rotary_factor": 1}}},
            "512 as in partial_rotary_factor of rope_parameters.main",
        ),
        ({"rope_parameters": {"main": YARN}}, "rope_parameters: expected plain RoPE in 'main'"),
        ({"rope_parameters": {"compress": YARN | {"attention_factor": 1.277}}}, "no attention_factor in 'compress'"),
        ({"rope_parameters": {"compress": YARN | {"factor": 8}}}, "rope_scaling: expected {'factor': 8,"),
        (
            {"rope_parameters": {"compress": YARN | {"mscale": 2}}, "rope_scaling": None},
            "rope_scaling: expected factor",
        ),
        (
            {"rope_parameters": {"compress": {"rope_type": "llama3"}}, "rope_scaling": None},
            "expected 'yarn', found 'llama3'",
        ),
        ({"rope_parameters": {"rope_theta": 3}}, "rope_parameters: expected plain RoPE"),
        ({"rope_parameters": {"main": 3}}, "rope_parameters: expected plain RoPE"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_transformers_form_is_not_silently_bent(changes: dict[str, Any], named: str) -> None:
    expect_refused(FOLDED | changes, "config.json: ", named)


# --- the file -------------------------------------------------------------------------------------


def test_from_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FLASH), encoding="utf-8")
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_dict(FLASH)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "expected a checkpoint folder with config.json, found none"),
        (b'{"model_type": ', "config.json: expected JSON, found Expecting value"),
        (b'{"model_type": "\xff"}', "config.json: expected JSON, found 'utf-8' codec"),
        (b"[" * 100_000, "config.json: expected JSON, found maximum recursion depth"),
        (b"[]", "config.json: expected a JSON object, found list"),
    ],
    ids=["absent", "cut off", "not text", "nested", "list"],
)
def test_unreadable_config(tmp_path: Path, content: bytes | None, named: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_folder(tmp_path)
    assert named in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_errors_in_a_file_name_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FLASH | {"n_group": 8}), encoding="utf-8")
    with pytest.raises(ConfigError, match="n_group") as caught:
        ModelConfig.from_folder(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: n_group")
