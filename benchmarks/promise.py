"""The memory a process really takes, beside what --memory gave it.

    python benchmarks/promise.py FOLDER [--prompt 6000] [--tokens 2000] [--shares 0,10,25,50,100]

FOLDER is converted, or is made here: six layers of 256 experts with 4-bit weights, the routing of random weights. For
each budget, from the smallest that works to all experts in memory, a process of its own that the system ends at 1.05
times the budget (memory cgroup where this user may make one, else RLIMIT_DATA) runs a session: a long prompt with as
many tokens after it, the same prompt with another end, and a second conversation of other tokens. Prints the peak of
resident memory, and writes benchmarks/promise.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CGROUPS = (  # version 1, then version 2: parent, and its file of the limit
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max"),
)
LIMIT = 1.05


def make(folder: Path) -> None:
    """A model whose experts are most of it, and cheap to compute with on a CPU."""
    from mlx_v4flash.convert import convert, open_source
    from mlx_v4flash.recipe import CLASSES, Recipe
    from mlx_v4flash.rounding import Rounding
    from mlx_v4flash.tiny import TINY, write_tiny

    config = TINY | {
        "hidden_size": 256, "moe_intermediate_size": 512, "n_routed_experts": 256, "num_experts_per_tok": 4,
        "num_hidden_layers": 6, "compress_ratios": [0, 0, 4, 128, 4, 128], "num_hash_layers": 3,
        "max_position_embeddings": 16384,
    }  # fmt: skip
    source = open_source(write_tiny(folder.with_name(f"{folder.name}.official"), config), folder)
    recipe = Recipe("affine4", classes=dict.fromkeys(CLASSES, "affine4-g64"))
    convert(source, folder, rounding=Rounding(source.checkpoint.config, recipe))


@contextmanager
def limited(nbytes: int) -> Iterator[tuple[str, list[str]]]:
    """What enforces the limit, and the start of a command line that puts a process under it."""
    for parent, name in CGROUPS:
        group = parent / f"mlx_v4flash_{os.getpid()}"
        if not (parent / name).exists() and not (parent / "cgroup.subtree_control").exists():
            continue
        try:
            group.mkdir()
            (group / name).write_text(str(nbytes))
        except OSError:
            if group.exists():
                group.rmdir()
            continue
        try:
            yield "cgroup", ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
        finally:
            group.rmdir()
        return
    yield "RLIMIT_DATA", ["sh", "-c", f'ulimit -d {nbytes // 1024} && exec "$@"', "sh"]


def session(folder: str, budget: int, prompt: int, tokens: int) -> dict[str, Any]:
    """In a process of its own."""
    from mlx_v4flash import load
    from mlx_v4flash.memory import peak_bytes
    from mlx_v4flash.session import Session

    model, tokenizer = load(folder, memory=budget, max_context=prompt + tokens + 16)
    assert tokenizer is not None
    begun, vocabulary = time.perf_counter(), model.config.vocab_size
    run = Session(model)
    slots = None if model.store is None else sum(table.slots for table in model.store.tables)
    words = [(n * n * 31 + n * 7) % vocabulary for n in range(prompt)]
    done = len(list(run.stream(words, tokens)))
    peaks = [peak_bytes()]
    done += len(list(run.stream([*words[:-5], 9, 8, 7], 50)))
    done += len(list(run.stream(words[::-1], 50)))
    peaks.append(peak_bytes())
    found = {"peaks": peaks, "generated": done, "seconds": time.perf_counter() - begun}
    if model.store is not None:
        report = model.store.statistics.report()
        found |= {"hit_rate": report["expert_hit_rate"], "bytes_per_token": report["expert_bytes_per_token"]}
        found["slots_given_up"] = slots - sum(table.slots for table in model.store.tables)
    return found


def measure(folder: Path, budget: int, prompt: int, tokens: int) -> dict[str, Any]:
    with limited(int(budget * LIMIT)) as (kind, start):
        command = [*start, sys.executable, __file__, str(folder), "--child", str(budget)]
        command += ["--prompt", str(prompt), "--tokens", str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"limit": kind, "budget": budget, "failed": f"{done.returncode}: {done.stderr[-500:]}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"limit": kind, "budget": budget, "peak_of_budget": found["peaks"][-1] / budget} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", type=int, default=6000)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument(
        "--shares", default="0,10,25,50,100", help="per cent of the way from the smallest to the largest"
    )
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(session(str(args.folder), args.child, args.prompt, args.tokens)))
        return
    from mlx_v4flash.converted import Converted
    from mlx_v4flash.plan import make_plan, sizes_of

    if not args.folder.exists():
        make(args.folder)
    opened = Converted.open(args.folder)
    sizes = sizes_of(opened.config, opened)
    context = args.prompt + args.tokens + 16
    smallest, whole = (
        make_plan(opened.config, sizes, memory=1, max_context=context, whole=w).smallest for w in (False, True)
    )
    rows = []
    for share in map(int, args.shares.split(",")):
        row = measure(args.folder, smallest + (whole - smallest) * share // 100, args.prompt, args.tokens)
        rows.append({"share": share} | row)
        print(json.dumps(rows[-1]), flush=True)
    result = {"range_bytes": whole - smallest, "prompt": args.prompt, "tokens": args.tokens, "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
