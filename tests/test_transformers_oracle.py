"""The model against transformers' own DeepSeek-V4, on random weights that both read from the same files.

Both compute in float32 without round trips, which transformers does not have. Sizes are small, different and mostly
no powers of two; everything transformers would start at zero or one is random, or it would prove nothing.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import golden
import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

from mlx_v4flash import Model, load_model
from mlx_v4flash import convert as conversion
from mlx_v4flash.checkpoint import Checkpoint
from mlx_v4flash.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("one_torch_thread")
WHY = "NOT COMPARED WITH TRANSFORMERS: install the extra `test`"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", minversion="5.23", reason=WHY)
save_file = pytest.importorskip("safetensors.torch", reason=WHY).save_file

# 5e-7 to 1.2e-6 was measured over fifty seeds of the cases below; it is the order in which sums are taken. Of the
# mistakes in mistakes.py, a missing epsilon costs 6e-6, one Sinkhorn iteration 5e-5, and most others 1e-2 or more.
BOUND = 5e-6
# Closer choices, relative to the largest score, could fall differently in two correct implementations.
MARGIN = 1e-5


def yarn(original: int, factor: float = 16, fast: float = 32, slow: float = 1) -> dict[str, Any]:
    return {
        "type": "yarn", "factor": factor, "original_max_position_embeddings": original,
        "beta_fast": fast, "beta_slow": slow,
    }  # fmt: skip


def hca(ratio: int) -> dict[str, int]:
    """transformers knows the ratios 0, 4 and 128; this is what 128 stands for."""
    return {"compressed_sparse_attention": 4, "heavily_compressed_attention": ratio}


# The ratios and the window of the release, beyond two windows and two HCA groups; 20 of up to 82 rows are chosen.
RELEASE = {
    "vocab_size": 120, "hidden_size": 48, "num_hidden_layers": 5, "compress_ratios": [0, 4, 128, 4, 128],
    "sliding_window": 128, "num_attention_heads": 6, "head_dim": 40, "qk_rope_head_dim": 12, "q_lora_rank": 28,
    "o_groups": 3, "o_lora_rank": 20, "num_hash_layers": 2, "index_n_heads": 17, "index_head_dim": 32,
    "index_topk": 20, "moe_intermediate_size": 36, "n_routed_experts": 7, "num_experts_per_tok": 3, "hc_mult": 4,
    "max_position_embeddings": 8192, "rope_scaling": yarn(512), "swiglu_limit": 0.4,
}  # fmt: skip
# Compressors first; heads that are rotated as a whole; as many groups as heads; two streams; no hash layer.
NARROW = {
    **RELEASE, "compress_ratios": [4, 128, 0, 128, 4], "compress_rates": hca(16), "sliding_window": 9,
    "num_attention_heads": 5, "head_dim": 24, "qk_rope_head_dim": 24, "o_groups": 5, "o_lora_rank": 7,
    "num_hash_layers": 0, "index_n_heads": 16, "index_topk": 3, "n_routed_experts": 11, "num_experts_per_tok": 4,
    "hc_mult": 2, "rope_scaling": yarn(64, 4, 8, 2), "swiglu_limit": 0.1, "routed_scaling_factor": 2.5,
}  # fmt: skip
# Every layer by token id; one group; three streams; more rows allowed than there are; no YaRN; few Sinkhorn steps.
HASHED = {
    **RELEASE, "compress_ratios": [0, 0, 4, 128, 4], "compress_rates": hca(24), "sliding_window": 17,
    "num_attention_heads": 8, "head_dim": 56, "qk_rope_head_dim": 28, "o_groups": 1, "num_hash_layers": 5,
    "index_topk": 512, "num_experts_per_tok": 1, "hc_mult": 3, "hc_sinkhorn_iters": 4, "rope_scaling": None,
    "rope_theta": 500, "compress_rope_theta": 3000, "swiglu_limit": 0.2, "rms_norm_eps": 1e-5, "hc_eps": 1e-4,
}  # fmt: skip
# V4-Pro: compressors first, and the layers that route by token id have them; its proportions where they differ.
PRO = {
    **RELEASE, "compress_ratios": [128, 128, 4, 128, 4], "num_hash_layers": 3, "hidden_size": 56, "q_lora_rank": 24,
    "num_attention_heads": 8, "o_groups": 4, "o_lora_rank": 12, "index_topk": 40, "moe_intermediate_size": 24,
    "n_routed_experts": 12, "num_experts_per_tok": 6, "routed_scaling_factor": 2.5,
}  # fmt: skip
CASES = {
    "pro-5": (PRO, 330, 5),
    "release-5": (RELEASE, 330, 5), "release-6": (RELEASE, 301, 6),
    "narrow-2": (NARROW, 77, 2), "narrow-3": (NARROW, 83, 3), "narrow-4": (NARROW, 64, 4),
    "hashed-5": (HASHED, 103, 5), "hashed-6": (HASHED, 98, 6),
}  # fmt: skip


# --- the other implementation -------------------------------------------------------------------------


def random_values(name: str, shape: tuple[int, ...], random: np.random.Generator, experts: int) -> np.ndarray:
    """Values of a parameter of transformers' model that give every part its say."""
    leaf, normal = name.removesuffix(".weight").split(".")[-1], random.standard_normal(shape)
    if leaf == "tid2eid":
        return random.integers(0, experts, shape)  # some experts twice
    if "norm" in leaf or leaf in ("scale", "hc_scale"):
        return 1 + 0.3 * normal
    if leaf in ("sinks", "position_bias", "base", "hc_base", "embed_tokens"):
        return normal
    if leaf == "e_score_correction_bias":
        return 0.2 * normal
    return 1.5 * normal / np.sqrt(shape[-1])  # products, those of the mixing weights among them


def random_model(settings: dict[str, Any], seed: int) -> Any:
    config = transformers.DeepseekV4Config(**copy.deepcopy(settings))  # it changes what it is given
    config._experts_implementation = "eager"
    model, random = transformers.DeepseekV4ForCausalLM(config).float().eval(), np.random.default_rng(seed)
    for name, tensor in model.state_dict().items():
        values = random_values(name, tuple(tensor.shape), random, config.n_routed_experts)
        tensor.copy_(torch.from_numpy(np.asarray(values)))
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    """As a transformers user does it, and with every default in config.json."""
    model.save_pretrained(folder, save_original_format=False, **options)
    return folder


class Margins:
    """How far the discrete choices of transformers' model were from falling differently."""

    def __init__(self, model: Any) -> None:
        self.smallest, self.config = float("inf"), model.config
        for module in model.modules():
            if type(module).__name__ == "DeepseekV4IndexerScorer":
                module.register_forward_hook(lambda _, args, scores: self._rows(scores[0].double()))
            if type(module).__name__ == "DeepseekV4TopKRouter":
                module.register_forward_hook(self._experts)

    def _rows(self, scores: Any) -> None:
        closed = (torch.arange(len(scores)) + 1) // 4  # called on whole prompts only
        hidden = torch.arange(scores.shape[1]) >= closed[:, None]
        self._note(scores.masked_fill(hidden, -torch.inf), self.config.index_topk)

    def _experts(self, router: Any, args: Any, out: Any) -> None:
        scores = torch.nn.functional.softplus(out[0].double()).sqrt() + router.e_score_correction_bias
        self._note(scores, router.top_k)

    def _note(self, scores: Any, k: int) -> None:
        if k < scores.shape[1]:
            ranked = scores.sort(dim=1, descending=True).values
            margins = (ranked[:, k - 1] - ranked[:, k]) / ranked.masked_fill(ranked.isinf(), 0).abs().amax(1)
            self.smallest = min(self.smallest, float(margins.nan_to_num(torch.inf).min()))


def their_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    """Logits of all positions, of one pass without a cache."""
    margins = Margins(model)
    with torch.inference_mode():
        logits = model(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
    assert margins.smallest > MARGIN, f"a choice by {margins.smallest:.1e}, too close to compare: take another seed"
    return logits


class Pair:
    """A random model, saved by transformers and loaded by us, and the logits of one prompt."""

    def __init__(self, settings: dict[str, Any], length: int, seed: int, folder: Path) -> None:
        self.theirs = random_model(settings, seed)
        self.ids = np.random.default_rng(100 + seed).integers(0, settings["vocab_size"], length)
        self.want = their_logits(self.theirs, self.ids)
        self.ours = load_model(save(self.theirs, folder), dtype="float32", simulate_cache_quant=False)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For arrays this small torch's threads cost more than they bring: 100 times more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(*CASES[request.param], tmp_path_factory.mktemp(request.param))


def our_logits(model: Model, ids: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Logits of all positions, in calls of these sizes."""
    assert sum(sizes) == len(ids)
    cache, ends = model.make_cache(), np.cumsum(sizes)
    parts = [model(mx.array(ids[None, end - size : end]), cache) for size, end in zip(sizes, ends, strict=True)]
    return np.concatenate([np.array(part)[0] for part in parts])


def expect_match(found: np.ndarray, want: np.ndarray) -> None:
    assert found.shape == want.shape, f"expected shape {want.shape}, found {found.shape}"
    rows = golden.rms_by_position(found, want)
    error, worst = golden.relative_rms(found, want), int(np.nan_to_num(rows, nan=np.inf).argmax())
    far = np.flatnonzero(~(rows <= 10 * BOUND))
    since = f", above ten times that from position {far[0]} on" if len(far) else ""
    assert error <= BOUND, f"rms {error:.2e} > {BOUND:.0e}{since}; worst at {worst}: {rows[worst]:.2e}"


# --- logits -------------------------------------------------------------------------------------------


def prefill(length: int) -> list[int]:
    return [length]


def odd_chunks(length: int) -> list[int]:
    """Around the sizes of group and window, in an order that leaves groups open in all ways."""
    sizes = [3, 5, 1, 1, 7, 4, 16, 2, 130, 9, 127, 1]
    ends = np.minimum(np.cumsum(sizes + [length]), length)
    return [int(size) for size in np.diff(ends, prepend=0) if size]


def token_by_token(length: int) -> list[int]:
    """From the middle of a group of four on; more than one group of 16 or 24, and the end of one of 128."""
    start = length - 50
    start += 2 - start % 4
    return [start] + [1] * (length - start)


@pytest.mark.parametrize("sizes", [prefill, odd_chunks, token_by_token], ids=lambda f: f.__name__)
def test_logits(pair: Pair, sizes: Callable[[int], list[int]]) -> None:
    expect_match(our_logits(pair.ours, pair.ids, sizes(len(pair.ids))), pair.want)


# --- what transformers writes -------------------------------------------------------------------------


def rounded_to_bfloat16(model: Any) -> dict[str, Any]:
    """Round the weights of the model in place, and return them as bfloat16."""
    state = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor.clone()
             for name, tensor in model.state_dict().items()}  # fmt: skip
    model.load_state_dict(state)
    return state


FORMATS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "shards": lambda model: {"max_shard_size": "100KB"},
    "bfloat16": lambda model: {"state_dict": rounded_to_bfloat16(model)},
    "bfloat16-shards": lambda model: {"state_dict": rounded_to_bfloat16(model), "max_shard_size": "100KB"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_saved_formats(name: str, tmp_path: Path) -> None:
    model = random_model(NARROW, seed=7)
    save(model, tmp_path, **FORMATS[name](model))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == ("shards" in name)
    stored = {tensor.dtype for tensor in Checkpoint.open(tmp_path).tensors.values()}
    assert stored == {"BF16" if "bfloat16" in name else "F32"}
    ids = np.random.default_rng(7).integers(0, NARROW["vocab_size"], 45)
    ours = load_model(tmp_path, dtype="float32", simulate_cache_quant=False)
    expect_match(our_logits(ours, ids, [len(ids)]), their_logits(model, ids))


def test_a_saved_model_is_converted_to_the_official_formats(tmp_path: Path) -> None:
    """With every default that transformers writes into config.json."""
    sizes = {"hidden_size": 64, "q_lora_rank": 32, "moe_intermediate_size": 96, "num_attention_heads": 4}
    settings = {**RELEASE, **sizes, "head_dim": 64, "o_groups": 2, "o_lora_rank": 32}
    model = random_model(settings, seed=9)
    save(model, tmp_path / "s", **FORMATS["bfloat16"](model))
    conversion.convert(conversion.open_source(tmp_path / "s", tmp_path / "t"), tmp_path / "t").verify()
    ours = load_model(tmp_path / "t", simulate_cache_quant=False)
    assert (ours.config.expert_dtype, ours.config.quantized) == ("fp4", True)
    experts, state = ours.layers[3].ffn.experts, model.state_dict()
    down = mx.dequantize(experts.w2.weight, experts.w2.scales, group_size=32, bits=4, mode="mxfp4", dtype=mx.float32)
    want = state["model.layers.3.mlp.experts.down_proj"].float().numpy()
    # The widest step, from 4 to 6, is two scales, and a scale is less than a third of the largest of its 32.
    largest = np.abs(want).reshape(*want.shape[:2], -1, 32).max(-1).repeat(32, -1)
    assert (np.abs(np.array(down) - want) <= largest / 3).all()
    assert golden.relative_rms(np.array(down), want) < 0.15
    output = ours.layers[3].attn.wo_b
    found = mx.dequantize(output.weight, output.scales, group_size=32, bits=8, mode="mxfp8", dtype=mx.float32)
    assert (
        golden.relative_rms(np.array(found), state["model.layers.3.self_attn.o_b_proj.weight"].float().numpy()) < 0.03
    )


def test_names_of_save_pretrained_alone_are_refused_with_the_way_out(tmp_path: Path) -> None:
    """By default it writes neither its own names nor DeepSeek's: `attn.norm` was `attn.kv_norm`."""
    random_model(NARROW, seed=8).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="save_original_format=False"):
        load_model(tmp_path, dtype="float32", simulate_cache_quant=False)


# --- one model in three formats -----------------------------------------------------------------------

# DeepSeek's names -> transformers' (spec 9.4), first match wins. Written again here: the loader has its own.
NAMES = [
    (r"embed\.", "model.embed_tokens."),
    (r"head\.", "lm_head."),
    (r"norm\.", "model.norm."),
    (r"hc_head_(\w+)", r"model.hc_head.hc_\1"),
    (r"(layers\.\d+\.)hc_(attn|ffn)_(\w+)", r"model.\1\2_hc.\3"),
    (r"(layers\.\d+\.)attn_norm\.", r"model.\1input_layernorm."),
    (r"(layers\.\d+\.)ffn_norm\.", r"model.\1post_attention_layernorm."),
    (r"(layers\.\d+\.)attn\.", r"model.\1self_attn."),
    (r"(layers\.\d+\.)ffn\.", r"model.\1mlp."),
]
INSIDE = {
    "attn_sink": "sinks", "wq_a": "q_a_proj", "q_norm": "q_a_norm", "wq_b": "q_b_proj", "wkv": "kv_proj",
    "wo_a": "o_a_proj", "wo_b": "o_b_proj", "wgate": "gate_proj", "ape": "position_bias",
    "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
}  # fmt: skip
SPECIAL = [
    ("indexer.weights_proj", "compressor.indexer.scorer.weights_proj"),
    ("indexer.q_b_proj", "compressor.indexer.q_b_proj"),
    ("indexer.compressor", "compressor.indexer"),
    ("compressor.norm", "compressor.kv_norm"),
    ("indexer.norm", "indexer.kv_norm"),
    ("gate.bias", "gate.e_score_correction_bias"),
]


def transformers_name(name: str) -> str:
    pattern, into = next((p, i) for p, i in NAMES if re.match(p, name))
    name = ".".join(INSIDE.get(part, part) for part in re.sub(f"^{pattern}", into, name).split("."))
    for official, theirs in SPECIAL:
        name = name.replace(official, theirs)
    return name


def decoded(folder: Path) -> dict[str, np.ndarray]:
    """What the bytes of an official checkpoint mean (spec 9.3), under its own names and without scales."""
    raw, values = (folder / "model.safetensors").read_bytes(), {}
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    types = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E8M0": ml_dtypes.float8_e8m0fnu, "BF16": ml_dtypes.bfloat16,
             "F32": np.float32, "I8": np.uint8, "I64": np.int64}  # fmt: skip
    header.pop("__metadata__", None)
    for name, entry in header.items():
        first, end = entry["data_offsets"]
        values[name] = np.frombuffer(raw[start + first : start + end], types[entry["dtype"]]).reshape(entry["shape"])
    for name, scale in [(n, v) for n, v in values.items() if n.removesuffix(".scale") + ".weight" in values]:
        del values[name]
        weight = values[name := name.removesuffix(".scale") + ".weight"]
        block = (128, 128)
        if weight.dtype == np.uint8:  # the low nibble is the even column
            weight = np.stack([weight & 15, weight >> 4], axis=-1).reshape(len(weight), -1)
            weight, block = weight.view(ml_dtypes.float4_e2m1fn), (1, 32)
        rows, columns = weight.shape
        scale = scale.astype(np.float32).repeat(block[0], 0).repeat(block[1], 1)
        values[name] = weight.astype(np.float32) * scale[:rows, :columns]
    return {n: v if v.dtype == np.int64 else v.astype(np.float32) for n, v in values.items() if "mtp." not in n}


def with_stacked_experts(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    experts = [n for n in values if ".experts." in n]
    out = {transformers_name(n): v for n, v in values.items() if n not in experts}
    for layer in sorted({n.split(".experts.")[0] for n in experts}):
        w1, w2, w3 = (
            np.stack([values[f"{layer}.experts.{e}.{w}.weight"] for e in range(len(experts))
                      if f"{layer}.experts.{e}.{w}.weight" in values])
            for w in ("w1", "w2", "w3")
        )  # fmt: skip
        theirs = transformers_name(layer + ".")
        out[f"{theirs}experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        out[f"{theirs}experts.down_proj"] = w2
    return out


def write(folder: Path, values: dict[str, np.ndarray], config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file({name: torch.from_numpy(value.copy()) for name, value in values.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_official_plain_and_transformers_format_are_one_model(tmp_path: Path) -> None:
    """FP8 and FP4 files, the same values in float32 under either naming, and transformers itself."""
    case = "edge-lengths"
    folder, ids = golden.folder(case), golden.expected(case)["input_ids"][-1]
    config = json.loads((folder / "config.json").read_text())
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "expert_dtype")}
    values = decoded(folder)
    stacked = with_stacked_experts(values)

    theirs = transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(**copy.deepcopy(plain))).float().eval()
    # Strict: every name and shape of ours must be one of theirs.
    theirs.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in stacked.items()})
    want = their_logits(theirs, ids)

    folders = (folder, write(tmp_path / "plain", values, plain), write(tmp_path / "named", stacked, plain))
    models = [load_model(f, dtype="float32", simulate_cache_quant=False) for f in folders]
    official, plain_names, their_names = (our_logits(m, ids, [len(ids)]) for m in models)
    np.testing.assert_array_equal(plain_names, their_names)
    expect_match(official, their_names)  # not bit for bit: products with packed weights add up in another order
    expect_match(official, want)
    expect_match(their_names, want)
