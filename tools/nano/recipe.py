"""What is trained, on what, for how long: everything that decides the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_v4flash.tiny import REAL

from .data import Mix

SEED = 7

VOCABULARY = 4096

# Every mechanism of V4-Flash in 15.2 million parameters, 5.9 million of them at work for a token.
CONFIG: dict[str, Any] = REAL | {
    "compress_ratios": [0, 4, 128, 4, 128, 4],
    "head_dim": 128,
    "hidden_size": 256,
    "index_head_dim": 64,
    "index_n_heads": 16,
    "index_topk": 64,
    "max_position_embeddings": 65536,
    "moe_intermediate_size": 128,
    "n_routed_experts": 16,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hash_layers": 2,
    "num_hidden_layers": 6,
    "num_nextn_predict_layers": 0,
    "o_groups": 2,
    "o_lora_rank": 128,
    "q_lora_rank": 128,
    "rope_scaling": REAL["rope_scaling"] | {"original_max_position_embeddings": 4096},
    "vocab_size": VOCABULARY,
}

# How it is talked to unless told otherwise. It was taught to think in single answers only, and is too small for chance.
CHAT: dict[str, Any] = {"think": "off", "temp": 0}


@dataclass(frozen=True)
class Phase:
    """A stretch of training.

    Args:
        until: the step it ends before.
        mix, rows: what a step's batch is made of, and its sequences.
        sparse: CSA layers attend the rows of their indexer, instead of all.
        rounding: weights and caches as exported.
        end_rate: the learning rate goes there on a straight line, as a share of the full one.
    """

    until: int
    mix: Mix
    rows: int
    sparse: bool
    rounding: bool
    end_rate: float = 1.0


SHORT = Mix(
    length=512, text=0.3,
    kinds={"chat": 3, "sums": 2, "tools": 1.2, "pairs": 3, "glossary": 1, "copy": 0.8, "needle": 1.5, "name": 0.7},
)  # fmt: skip
LONG = Mix(
    length=2048, text=0.25,
    kinds={"chat": 2.5, "sums": 1.5, "tools": 1.5, "pairs": 3, "glossary": 1, "copy": 0.5, "needle": 2, "name": 0.5},
)  # fmt: skip

PHASES = (
    Phase(2000, SHORT, 16, sparse=False, rounding=False),
    Phase(2600, SHORT, 16, sparse=True, rounding=False),
    Phase(3400, LONG, 4, sparse=True, rounding=False, end_rate=0.5),
    Phase(4000, LONG, 4, sparse=True, rounding=True, end_rate=0.0),
)

WARMUP = 60
RATES = {"matrix": 0.02, "embed": 0.02, "head": 0.002, "other": 0.002}
# How far a step moves the bias of an expert that is used more, or less, than the others.
BALANCE = 0.005
# Weight of the indexers' loss; it reaches no other parameter.
INDEX_LOSS = 1.0


def phase_at(step: int, phases: Sequence[Phase] = PHASES) -> tuple[Phase, float]:
    """The phase of a step and its learning rate, as a share of the full one."""
    start, rate = 0, 1.0
    for phase in phases:
        if step < phase.until:
            part = (step - start) / (phase.until - start)
            return phase, (rate + (phase.end_rate - rate) * part) * min(1.0, (step + 1) / WARMUP)
        start, rate = phase.until, phase.end_rate
    raise ValueError(f"step: expected one before {phases[-1].until}, found {step}")


def tokens_before(step: int, phases: Sequence[Phase] = PHASES) -> int:
    """Tokens that the steps before this one learned from."""
    starts = [0, *(phase.until for phase in phases)]
    return sum(
        max(0, min(step, phase.until) - start) * phase.rows * phase.mix.length
        for start, phase in zip(starts, phases, strict=False)
    )
