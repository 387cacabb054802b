"""Peak memory of prefill at growing context: true attention dimensions, one CSA and one HCA layer, small FFN.

    python benchmarks/prefill_memory.py [--contexts 4096,16384,65536] [--chunk 2048]

The peak may grow by what the cache itself grows, and by nothing else. Weights are random and activations float32
(MLX's CPU backend has no fast bfloat16 product), so a row takes twice the bytes that it takes in bfloat16. Writes
benchmarks/prefill_memory.csv. On Linux an optimised BLAS makes it bearable: LD_PRELOAD=libopenblas.so.0.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_map

from mlx_v4flash import Model, ModelConfig
from mlx_v4flash.linear import Numerics
from mlx_v4flash.tiny import REAL

SMALL_FFN = {
    "num_hidden_layers": 2, "compress_ratios": [4, 128], "num_hash_layers": 0, "moe_intermediate_size": 128,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "vocab_size": 512, "quantization_config": None,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", default="4096,16384,65536")
    parser.add_argument("--chunk", type=int, default=2048)
    args = parser.parse_args()
    model = Model(ModelConfig.from_dict({**REAL, **SMALL_FFN}), Numerics(dtype=mx.float32))
    model.update(tree_map(lambda p: mx.random.normal(p.shape, p.dtype) * 0.02, model.parameters()))
    mx.eval(model.parameters())
    weights = mx.get_active_memory()
    ids = mx.random.randint(0, 512, (1, args.chunk))
    cache, start, rows, done = model.make_cache(), time.perf_counter(), [], 0
    for context in map(int, args.contexts.split(",")):
        while done < context:
            if context - done <= args.chunk:
                mx.reset_peak_memory()  # the last chunk has the most behind it
            part = ids[:, : min(args.chunk, context - done)]
            model(part, cache)
            mx.eval([c.state for c in cache])
            done += part.shape[1]
        rows.append({
            "context": done, "chunk": args.chunk, "cache_bytes": sum(c.nbytes for c in cache),
            "peak_above_weights_bytes": mx.get_peak_memory() - weights, "elapsed_s": round(time.perf_counter() - start),
        })  # fmt: skip
        print(rows[-1], flush=True)
    with Path(__file__).with_suffix(".csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    first, last = rows[0], rows[-1]
    grown = last["peak_above_weights_bytes"] - first["peak_above_weights_bytes"]
    own = last["cache_bytes"] - first["cache_bytes"]
    print(f"cache grew by {own / 1e6:.1f} MB, the peak by {grown / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
