"""Every tensor a checkpoint must hold: name, shape, stored types (spec 9.2 and 9.4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from .config import ModelConfig

FLOATS = ("BF16", "F32")
SCALES = ("F8_E8M0", "F32")


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor must look like in the file; `dtypes` are safetensors names, any of them will do."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]


Named = Iterator[tuple[str, TensorSpec]]


def official_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Tensors of the main model under DeepSeek's own names, in file order."""
    c = config
    tensors = {"embed.weight": TensorSpec((c.vocab_size, c.hidden_size), FLOATS)}
    for layer in range(c.num_hidden_layers):
        tensors |= {f"layers.{layer}.{name}": spec for name, spec in layer_tensors(c, layer)}
    tensors["norm.weight"] = TensorSpec((c.hidden_size,), FLOATS)
    tensors["head.weight"] = TensorSpec((c.vocab_size, c.hidden_size), FLOATS)
    tensors |= _head_streams(c)
    return tensors


def mtp_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Tensors of the April release's draft block: a window-only layer, and what feeds it (spec 8)."""
    c = config
    window_only = dataclasses.replace(c, compress_ratios=(0,), num_hidden_layers=1, num_hash_layers=0)
    tensors = dict(layer_tensors(window_only, 0))
    for name in ("e_proj", "h_proj"):
        tensors |= _linear(c, name, c.hidden_size, c.hidden_size)
    for name in ("enorm", "hnorm", "norm"):
        tensors[f"{name}.weight"] = TensorSpec((c.hidden_size,), FLOATS)
    tensors |= _head_streams(c)
    return {f"mtp.0.{name}": spec for name, spec in tensors.items()}


def layer_tensors(config: ModelConfig, layer: int) -> Named:
    """Tensors of one layer, without the `layers.N.` prefix."""
    c, N = config, config.hc_mult
    mixes = (2 + N) * N
    for part in ("attn", "ffn"):
        yield f"{part}_norm.weight", TensorSpec((c.hidden_size,), FLOATS)
        yield f"hc_{part}_fn", TensorSpec((mixes, N * c.hidden_size), FLOATS)
        yield f"hc_{part}_base", TensorSpec((mixes,), FLOATS)
        yield f"hc_{part}_scale", TensorSpec((3,), FLOATS)
    yield from _attention(c, c.compress_ratios[layer])
    yield from _experts(c, hashed=layer < c.num_hash_layers)


def _head_streams(c: ModelConfig) -> Named:
    yield "hc_head_fn", TensorSpec((c.hc_mult, c.hc_mult * c.hidden_size), FLOATS)
    yield "hc_head_base", TensorSpec((c.hc_mult,), FLOATS)
    yield "hc_head_scale", TensorSpec((1,), FLOATS)


def _attention(c: ModelConfig, ratio: int) -> Named:
    D, H, K = c.hidden_size, c.num_attention_heads, c.head_dim
    yield "attn.attn_sink", TensorSpec((H,), FLOATS)
    yield from _linear(c, "attn.wq_a", c.q_lora_rank, D)
    yield "attn.q_norm.weight", TensorSpec((c.q_lora_rank,), FLOATS)
    yield from _linear(c, "attn.wq_b", H * K, c.q_lora_rank)
    yield from _linear(c, "attn.wkv", K, D)
    yield "attn.kv_norm.weight", TensorSpec((K,), FLOATS)
    yield from _linear(c, "attn.wo_a", c.o_groups * c.o_lora_rank, H * K // c.o_groups)
    yield from _linear(c, "attn.wo_b", D, c.o_groups * c.o_lora_rank)
    if ratio:
        yield from _compressor("attn.compressor", ratio, K, D)
    if ratio == 4:
        yield from _linear(c, "attn.indexer.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank)
        yield "attn.indexer.weights_proj.weight", TensorSpec((c.index_n_heads, D), FLOATS)
        yield from _compressor("attn.indexer.compressor", ratio, c.index_head_dim, D)


def _compressor(name: str, ratio: int, width: int, D: int) -> Named:
    rows = 2 * width if ratio == 4 else width  # overlapping groups project every token twice
    yield f"{name}.ape", TensorSpec((ratio, rows), FLOATS)
    yield f"{name}.wkv.weight", TensorSpec((rows, D), FLOATS)
    yield f"{name}.wgate.weight", TensorSpec((rows, D), FLOATS)
    yield f"{name}.norm.weight", TensorSpec((width,), FLOATS)


def _experts(c: ModelConfig, hashed: bool) -> Named:
    D, E, F = c.hidden_size, c.n_routed_experts, c.moe_intermediate_size
    yield "ffn.gate.weight", TensorSpec((E, D), FLOATS)
    if hashed:
        yield "ffn.gate.tid2eid", TensorSpec((c.vocab_size, c.num_experts_per_tok), ("I64", "I32"))
    else:
        yield "ffn.gate.bias", TensorSpec((E,), FLOATS)
    for e in range(E):
        for name, rows, columns in (("w1", F, D), ("w2", D, F), ("w3", F, D)):
            name = f"ffn.experts.{e}.{name}"
            yield from _fp4(name, rows, columns) if c.expert_dtype == "fp4" else _linear(c, name, rows, columns)
    for name, rows, columns in (("w1", F, D), ("w2", D, F), ("w3", F, D)):
        yield from _linear(c, f"ffn.shared_experts.{name}", rows, columns)


def _linear(c: ModelConfig, name: str, rows: int, columns: int) -> Named:
    if not c.quantized:
        yield f"{name}.weight", TensorSpec((rows, columns), FLOATS)
        return
    block_rows, block_columns = c.weight_block_size
    yield f"{name}.weight", TensorSpec((rows, columns), ("F8_E4M3",))
    yield f"{name}.scale", TensorSpec((-(-rows // block_rows), -(-columns // block_columns)), SCALES)


def _fp4(name: str, rows: int, columns: int) -> Named:
    yield f"{name}.weight", TensorSpec((rows, columns // 2), ("I8", "U8"))
    yield f"{name}.scale", TensorSpec((rows, columns // 32), ("F8_E8M0",))


# --- transformers' names (spec 9.4) ---------------------------------------------------------------

_TOP_LEVEL = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}

_IN_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    **{f"hc_{a}_{p}": f"{a}_hc.{p}" for a in ("attn", "ffn") for p in ("fn", "base", "scale")},
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    **{
        f"attn.{ours}.{a}": f"self_attn.{theirs}.{b}"
        for ours, theirs in (("compressor", "compressor"), ("indexer.compressor", "compressor.indexer"))
        for a, b in (
            ("wkv.weight", "kv_proj.weight"),
            ("wgate.weight", "gate_proj.weight"),
            ("ape", "position_bias"),
            ("norm.weight", "kv_norm.weight"),
        )
    },
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
}


def transformers_name(name: str) -> str:
    """Name in a transformers checkpoint of an official tensor outside the routed experts."""
    if name in _TOP_LEVEL:
        return _TOP_LEVEL[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{_IN_LAYER[rest]}"


def transformers_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Tensors of the main model under transformers' names; routed experts are stacked per layer."""
    c, tensors = config, {}
    for name, spec in official_tensors(c).items():
        if ".ffn.experts." not in name:
            tensors[transformers_name(name)] = spec
    D, E, F = c.hidden_size, c.n_routed_experts, c.moe_intermediate_size
    for layer in range(c.num_hidden_layers):
        experts = f"model.layers.{layer}.mlp.experts"
        tensors[f"{experts}.gate_up_proj"] = TensorSpec((E, 2 * F, D), FLOATS)
        tensors[f"{experts}.down_proj"] = TensorSpec((E, D, F), FLOATS)
    return tensors


def is_drafter(name: str) -> bool:
    """Whether a tensor belongs to the draft block (MTP or DSpark), which the main model does not need."""
    return name.startswith("mtp.")
