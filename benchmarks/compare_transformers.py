"""Prefill and decode on the CPU, ours against transformers' `deepseek_v4`, on one random float32 checkpoint.

    python benchmarks/compare_transformers.py [--prompt 512] [--decode 64] [--rounds 3]

Both run in this process on the same weights, alternating, so that a noisy machine hits both. Prints a table and
writes benchmarks/compare_transformers.json. Needs the `test` extra.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import torch
from safetensors.torch import save_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from mlx_v4flash import Model, load_model

CONFIG = {
    "vocab_size": 2048, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "head_dim": 128,
    "qk_rope_head_dim": 64, "q_lora_rank": 256, "o_groups": 2, "o_lora_rank": 256, "sliding_window": 128,
    "compress_ratios": [0, 0, 4, 128, 4, 128, 4, 128], "num_hash_layers": 3, "index_n_heads": 16,
    "index_head_dim": 128, "index_topk": 64, "moe_intermediate_size": 256, "n_routed_experts": 16,
    "num_experts_per_tok": 4, "max_position_embeddings": 65536,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 4096,
                     "beta_fast": 32, "beta_slow": 1},
}  # fmt: skip


def random_checkpoint(folder: Path) -> DeepseekV4ForCausalLM:
    torch.manual_seed(0)
    config = DeepseekV4Config(**CONFIG)
    config._attn_implementation = "eager"
    model = DeepseekV4ForCausalLM(config).float().eval()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("tid2eid"):
            value.data.copy_(torch.rand(value.shape[0], 16).argsort(1)[:, : value.shape[1]])
        elif value.is_floating_point() and not value.any():
            value.data.normal_(0, 0.1)
    tensors = {k: v.contiguous().clone() for k, v in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))
    return model


def time_transformers(model: DeepseekV4ForCausalLM, prompt: list[int], decode: int) -> tuple[float, float, list[int]]:
    with torch.inference_mode():
        start = time.perf_counter()
        out = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        prefill, tokens = time.perf_counter() - start, [int(out.logits[0, -1].argmax())]
        start = time.perf_counter()
        for _ in range(decode):
            out = model(torch.tensor([tokens[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
    return prefill, (time.perf_counter() - start) / decode, tokens


def time_ours(model: Model, prompt: list[int], decode: int) -> tuple[float, float, list[int]]:
    cache, start = model.make_cache(), time.perf_counter()
    tokens = [int(mx.argmax(model(mx.array([prompt]), cache)[0, -1]).item())]
    prefill, start = time.perf_counter() - start, time.perf_counter()
    for _ in range(decode):
        tokens.append(int(mx.argmax(model(mx.array([tokens[-1:]]), cache)[0, -1]).item()))
    return prefill, (time.perf_counter() - start) / decode, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        theirs = random_checkpoint(Path(folder))
        ours = load_model(folder, dtype="float32", simulate_cache_quant=False)
    prompt = torch.randint(2, CONFIG["vocab_size"], (args.prompt,)).tolist()
    runs: dict[str, list[tuple[float, float, list[int]]]] = {"transformers": [], "mlx_v4flash": []}
    for warm_up in (True, *[False] * args.rounds):
        pair = time_transformers(theirs, prompt, args.decode), time_ours(ours, prompt, args.decode)
        if not warm_up:
            for name, run in zip(runs, pair, strict=True):
                runs[name].append(run)
    agree = sum(a == b for a, b in zip(runs["transformers"][0][2], runs["mlx_v4flash"][0][2], strict=True))
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {p: version(p) for p in ("mlx", "torch", "transformers")},
        "prompt": args.prompt, "decode": args.decode, "rounds": args.rounds,
        "same_greedy_tokens": f"{agree}/{args.decode + 1}",
    }  # fmt: skip
    for name, done in runs.items():
        result[name] = {
            "prefill_tokens_per_s": round(args.prompt / statistics.median(r[0] for r in done), 1),
            "decode_tokens_per_s": round(1 / statistics.median(r[1] for r in done), 1),
        }
    for what in ("prefill_tokens_per_s", "decode_tokens_per_s"):
        result[f"ratio_{what.split('_')[0]}"] = round(result["mlx_v4flash"][what] / result["transformers"][what], 2)
    print(json.dumps(result, indent=2))
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
