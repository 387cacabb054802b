"""From a folder or a Hugging Face repository to a model that is ready to run."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer_files

from . import doctor
from .chat_tokenizer import with_chat
from .checkpoint import Checkpoint
from .config import ModelConfig
from .converted import Converted, expect_finished, is_converted
from .errors import CheckpointError, RequestError
from .experts.attach import Division, attach, begin, follow, open_source, policy
from .hub import resolve
from .linear import ACTIVATION_BLOCK, Numerics
from .model import Model
from .plan import Plan, plan_for_load
from .weights import Progress, load_weights

DTYPES = {"bfloat16": mx.bfloat16, "float32": mx.float32}


def load_model(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "bfloat16",
    simulate_cache_quant: bool = True,
    quantize_activations: bool = False,
    experts: str = "auto",
    memory: str | int | None = None,
    eviction: str = "lfu",
    max_context: int | None = None,
    prefetch: bool = False,
    verify_reads: bool = False,
    trace: str | Path | None = None,
    progress: Progress | None = None,
) -> Model:
    """Load a checkpoint as DeepSeek published it, with transformers' names, or converted.

    Args:
        path: folder of the checkpoint, or a Hugging Face repository such as `deepseek-ai/DeepSeek-V4-Flash`.
        revision: branch, tag or commit of the repository.
        dtype: of activations and caches, "bfloat16" or "float32".
        simulate_cache_quant: keep the FP8 and FP4 round trips of cached rows that the model was trained with.
        quantize_activations: round the inputs of quantised linear layers to FP8, as the official code does.
        experts: where routed experts live: "resident", all in memory; "stream", from disk, with as many in memory as
            there is room for; "auto", streamed only if they do not fit. The results are the same, bit for bit.
        memory: what the process may take, in bytes or as "48GB". If absent, what the machine can give.
        eviction: which expert gives its place to another, "lru", the one used longest ago, or "lfu", the least often.
        max_context: tokens that a conversation may have, which memory is kept for; with a plan 32,768 if absent.
        prefetch: while a layer computes, read what the next will need, by a guess that is often wrong.
        verify_reads: compare every streamed expert with its checksum; of converted checkpoints.
        trace: file to write the chosen experts of every pass to.
        progress: called with bytes loaded and bytes in all.

    Raises:
        ConfigError, CheckpointError, HubError: what is wrong, where, and what to do.
        RequestError: an argument is none of those above, the memory does not suffice, or the sizes do not allow a
            rounding that was asked for. DeviceError: streaming on a device that cannot.
    """
    if dtype not in DTYPES:
        raise RequestError(
            f"dtype: expected {' or '.join(DTYPES)}, found {dtype!r}\n"
            "hint: float16 is not offered, its range is smaller than that of the bfloat16 weights"
        )
    folder = resolve(path, revision)
    checkpoint = Converted.open(folder) if is_converted(folder) else Checkpoint.open(folder)
    numerics = Numerics(DTYPES[dtype], simulate_cache_quant, quantize_activations)
    _check_roundings(checkpoint, numerics)
    source = cache(lambda: open_source(checkpoint, verify_reads))
    plan = plan_for_load(checkpoint, lambda: source().shapes, experts, memory, max_context, numerics.packed_caches)
    doctor.approve(lambda text: print(text, file=sys.stderr))
    model = Model(checkpoint.config, numerics)
    _follow_plan(model, plan)
    if plan is not None and (plan.streamed or experts == "stream"):
        attach(model, source(), Division(plan.slots, plan.staging), prefetch, eviction=policy(eviction))
    _fill(model, checkpoint, progress or (lambda done, total: None))
    if trace is not None:
        follow(model, Path(trace))
    model.eval()
    return model


def _follow_plan(model: Model, plan: Plan | None) -> None:
    model.plan = plan
    if plan is not None:
        mx.set_cache_limit(plan.parts["free buffers"])


def _fill(model: Model, checkpoint: Checkpoint | Converted, progress: Progress) -> None:
    """Load weights, and the layers that a store holds whole."""
    if model.store is None:
        load_weights(model, checkpoint, progress)
        return
    dense, total = checkpoint.dense_bytes, checkpoint.dense_bytes + model.store.whole_bytes
    load_weights(model, checkpoint, lambda done, _: progress(done, total))
    begin(model, model.store, lambda done: progress(dense + done, total))


def load(
    path: str | Path,
    *,
    revision: str | None = None,
    **options: Any,
) -> tuple[Model, TokenizerWrapper]:
    """`load_model` with its options, and the tokenizer of the same folder in mlx-lm's wrapper."""
    folder = resolve(path, revision)
    tokenizer = load_tokenizer(folder)  # before the weights: it fails in a moment, they take minutes
    return load_model(folder, **options), tokenizer


def load_tokenizer(folder: Path) -> TokenizerWrapper:
    """The tokenizer of a checkpoint folder.

    Raises:
        ConfigError, CheckpointError: the folder is no checkpoint, or has no tokenizer, or a damaged one.
    """
    expect_finished(folder)
    eos = ModelConfig.from_folder(folder).eos_token_id
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder}: expected tokenizer.json, found none\n"
            "hint: copy it from the original checkpoint, or use load_model, which needs no tokenizer"
        )
    try:
        loaded = load_tokenizer_files(folder, eos_token_ids=eos if isinstance(eos, int) else list(eos))
    except Exception as e:  # of three libraries, one of which raises nothing more special
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: expected a tokenizer, found {e!r}\n"
            "hint: copy it from the original checkpoint, with tokenizer_config.json"
        ) from e
    return with_chat(loaded, folder)


def _check_roundings(checkpoint: Checkpoint | Converted, numerics: Numerics) -> None:
    """Refuse sizes that the blocks of a rounding do not divide."""
    c = checkpoint.config
    needed: list[tuple[str, int, int]] = []
    if numerics.simulate_cache_quant:
        needed += [("head_dim - qk_rope_head_dim", c.head_dim - c.qk_rope_head_dim, 64)]
        needed += [("index_head_dim", c.index_head_dim, 32)] if 4 in c.compress_ratios else []
    if numerics.quantize_activations:
        grouped = c.o_groups * c.o_lora_rank
        sizes = {"hidden_size": c.hidden_size, "q_lora_rank": c.q_lora_rank, "o_groups * o_lora_rank": grouped}
        sizes["moe_intermediate_size"] = c.moe_intermediate_size
        needed += [(name, size, ACTIVATION_BLOCK) for name, size in sizes.items()]
    for name, size, block in needed:
        if size % block:
            option = "quantize_activations" if block == ACTIVATION_BLOCK else "simulate_cache_quant"
            raise RequestError(
                f"{option}: expected {name} divisible by {block}, found {size}\nhint: load with {option}=False"
            )
