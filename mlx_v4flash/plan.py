"""What a model will take of memory, and what that leaves to its experts: known before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from metal_kernels.packed_rows import key_bytes, row_bytes

from .cache import ROW_BLOCK
from .checkpoint import Checkpoint
from .config import ModelConfig
from .converted import Converted
from .errors import RequestError
from .experts.attach import CHOICES
from .experts.pool import Shapes, record_bytes, share
from .experts.store import STAGING
from .inventory import official_tensors
from .memory import parse_bytes, usable_bytes
from .random_weights import stored_dtype
from .safetensors_header import DTYPES

# Python, the libraries and a tokenizer: 290 MB were measured on Linux with a tokenizer of 272 tokens.
PROCESS_BYTES = 512 << 20
# Working memory of a pass: so much, and so many arrays of each kind that `pass_bytes` counts. Measured peaks on the CPU
# backend are 3 to 6 units in small models, and 3.1 with the true sizes of attention; tests/test_plan.py compares.
PASS_BYTES, PASS_UNITS = 64 << 20, 4
# Of freed memory that MLX may keep for the next pass.
BUFFER_BYTES = 1 << 30
# Threads that read have an expert each, where reads need memory of their own.
READER_RECORDS = 8
# A model that takes no more than this part of what the machine can give is not planned unless somebody asks.
SMALL = 4
MAX_CONTEXT = 32768
CHUNK = 2048


@dataclass(frozen=True)
class Sizes:
    """Bytes of weights as memory holds them.

    Attributes:
        dense: outside the routed experts; embedding: the part of it of which a token reads one row.
        records: one expert of each layer.
        staging: one of each kind of layers that differ in their formats, together.
    """

    dense: int
    embedding: int
    records: tuple[int, ...]
    staging: int


@dataclass(frozen=True)
class Plan:
    """Division of a budget; all in bytes but slots and tokens.

    Attributes:
        parts: name -> bytes, for everything the process holds.
        slots: experts of each layer in memory; as many as there are hold the layer whole.
        record: bytes of the largest expert.
        staging: slots that layers share; 0 if all are whole.
        smallest: least budget that works for this context and chunk.
    """

    budget: int
    max_context: int
    chunk: int
    experts: int
    record: int
    parts: dict[str, int]
    slots: list[int]
    staging: int
    smallest: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.budget >= self.smallest

    @property
    def streamed(self) -> bool:
        return any(n < self.experts for n in self.slots)

    @property
    def array_bytes(self) -> int:
        """What arrays of MLX may take, with the freed ones it keeps: everything but the process and the readers."""
        return self.budget - self.parts["process"] - self.parts["readers"]

    def expect_fits(self) -> None:
        """Raise RequestError if the budget is too small."""
        if not self.fits:
            raise RequestError(
                f"memory: expected at least {self.smallest:,} bytes for a context of {self.max_context:,} tokens, "
                f"found {self.budget:,}\nhint: --memory {math.ceil(self.smallest / 1e7) / 100:.2f}GB works; a smaller "
                "--max-context or --prefill-chunk needs less"
            )

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"total": self.total, "fits": self.fits}


def sizes_of(
    config: ModelConfig, checkpoint: Checkpoint | Converted | None = None, shapes: Sequence[Shapes] | None = None
) -> Sizes:
    """Of a checkpoint's files, or without one as DeepSeek's files have them.

    Args:
        shapes: of the experts of each layer in slots; computed from all bytes of experts, as if alike, if absent.
    """
    c = config
    if shapes is not None:
        records = tuple(map(record_bytes, shapes))
        staging = sum(record_bytes(s) for n, s in enumerate(shapes) if s not in shapes[:n])
    else:
        records = (_record(c, checkpoint),) * c.num_hidden_layers
        staging = records[0]
    stored: Mapping[str, tuple[str, int]]
    if isinstance(checkpoint, Converted):
        dense = {name: ("", tensor.nbytes) for name, tensor in checkpoint.dense.items()}
        stored = dense
    elif checkpoint is not None:
        stored = {name: (tensor.dtype, tensor.nbytes) for name, tensor in checkpoint.tensors.items()}
    else:
        stored = {}
        for name, spec in official_tensors(c).items():
            kind = stored_dtype(name, spec, base=False)
            stored[name] = kind, math.prod(spec.shape) * DTYPES[kind].itemsize
    found = {name: _held(name, *tensor) for name, tensor in stored.items() if ".experts." not in name}
    return Sizes(sum(found.values()), sum(n for name, n in found.items() if "embed" in name), records, staging)


def _record(c: ModelConfig, checkpoint: Checkpoint | Converted | None) -> int:
    """Bytes of an expert, on average."""
    if checkpoint is not None:  # scales of FP8 grow when they are expanded
        routed = checkpoint.nbytes - checkpoint.dense_bytes
        grown = routed // 32 if c.expert_dtype == "fp8" and isinstance(checkpoint, Checkpoint) else 0
        return -(-(routed + grown) // (c.num_hidden_layers * c.n_routed_experts))
    weights, scales = {"fp4": (2, 32), "fp8": (1, 32)}.get(c.expert_dtype or "", (0, 0))
    numbers = 3 * c.hidden_size * c.moe_intermediate_size
    return numbers // weights + numbers // scales if weights else 2 * numbers


def _held(name: str, kind: str, nbytes: int) -> int:
    """A scale of each block becomes one of 32 values; table entries become four bytes."""
    if name.endswith((".scale", "_scale_inv")):
        return 0
    if kind == "F8_E4M3":
        return nbytes + nbytes // 32
    return nbytes // 2 if kind == "I64" else nbytes


def cache_bytes(config: ModelConfig, context: int, packed: bool) -> int:
    """Caches of one conversation, with the largest buffer once more, since growing makes a copy."""
    c, total, largest = config, 0, 0
    row = row_bytes(c.head_dim, c.qk_rope_head_dim) if packed else 4 * c.head_dim
    key = key_bytes(c.index_head_dim) if packed else 4 * c.index_head_dim
    for ratio in c.compress_ratios[: c.num_hidden_layers]:
        total += c.sliding_window * row
        if not ratio:
            continue
        rows = -(-context // ratio // ROW_BLOCK) * ROW_BLOCK + ROW_BLOCK
        width = 4 * (c.head_dim + c.index_head_dim) + c.index_n_heads if ratio == 4 else 2 * c.head_dim
        total += 4 * width * ratio * (2 if ratio == 4 else 1)
        total += rows * (row + (key if ratio == 4 else 0))
        largest = max(largest, rows * row)
    return total + largest


def pass_bytes(config: ModelConfig, chunk: int) -> int:
    """Working memory of a pass of so many tokens, at most."""
    c = config
    width = c.num_attention_heads * c.head_dim + c.hc_mult * c.hidden_size
    width += c.index_n_heads * c.index_head_dim + c.num_experts_per_tok * (c.moe_intermediate_size + c.hidden_size)
    return PASS_BYTES + PASS_UNITS * 4 * chunk * width


def make_plan(
    config: ModelConfig,
    sizes: Sizes,
    *,
    memory: str | int | None = None,
    max_context: int | None = None,
    chunk: int = CHUNK,
    packed: bool = True,
    whole: bool = False,
) -> Plan:
    """Divide a budget; look at `fits` or call `expect_fits` before using it.

    Args:
        memory: bytes or text such as "48GB"; what the machine can give if absent.
        max_context: tokens that one conversation may have; MAX_CONTEXT, or what the model was made for, if absent.
        chunk: tokens of a pass.
        packed: whether caches hold rounded rows as bytes; else four bytes for a value are counted.
        whole: all experts have to be in memory; else as many as fit.

    Raises:
        RequestError: a number that cannot be.
    """
    c, budget = config, parse_bytes(memory) or usable_bytes()
    context = min(MAX_CONTEXT, c.max_position_embeddings) if max_context is None else max_context
    if not 1 <= context <= c.max_position_embeddings:
        raise RequestError(f"max_context: expected 1 to {c.max_position_embeddings:,} tokens, found {context:,}")
    if chunk < 1:
        raise RequestError(f"prefill_chunk: expected 1 or more, found {chunk}")
    L, E, A = c.num_hidden_layers, c.n_routed_experts, c.num_experts_per_tok
    working = pass_bytes(c, min(chunk, context))
    parts = {
        "weights": sizes.dense,
        "expert slots": 0,
        "staging": 0,
        "caches": cache_bytes(c, context, packed),
        "kept caches": cache_bytes(c, context, packed),  # as the last prompt left them: see session.py
        "working": working,
        "readers": 0,
        "free buffers": min(BUFFER_BYTES, working),
        "process": PROCESS_BYTES,
    }
    fixed, records = sum(parts.values()), sizes.records
    streaming = {"staging": min(E, STAGING) * sizes.staging, "readers": READER_RECORDS * max(records)}
    every = E * sum(records)
    smallest = fixed + (every if whole else min(every, A * sum(records) + sum(streaming.values())))
    slots, staging = [E] * L, 0
    if not whole and fixed + every > budget:
        parts |= streaming
        staging = min(E, STAGING)
        slots = share(max(budget - sum(parts.values()), 0), records, A, E)
    parts["expert slots"] = sum(n * record for n, record in zip(slots, records, strict=True))
    return Plan(budget, context, chunk, E, max(records), parts, slots, staging, smallest)


def plan_for_load(
    checkpoint: Checkpoint | Converted,
    shapes: Callable[[], Sequence[Shapes]],
    experts: str,
    memory: str | int | None,
    max_context: int | None,
    packed: bool,
) -> Plan | None:
    """The plan that a model is loaded and run under; None if nobody asked for one and everything fits.

    Args:
        shapes: of the experts of each layer in slots; called only if experts are streamed.
        experts: one of CHOICES.

    Raises:
        RequestError: an argument cannot be, or the memory does not suffice.
    """
    if experts not in CHOICES:
        raise RequestError(f"experts: expected {', '.join(CHOICES)}, found {experts!r}")
    asked = memory is not None or max_context is not None
    small = checkpoint.nbytes <= usable_bytes() // SMALL
    if not asked and (experts == "resident" or (experts == "auto" and small)):
        return None
    config = checkpoint.config

    def make(shapes: Sequence[Shapes] | None) -> Plan:
        sizes = sizes_of(config, checkpoint, shapes)
        return make_plan(
            config, sizes, memory=memory, max_context=max_context, packed=packed, whole=experts == "resident"
        )

    plan = make(None)
    if plan.streamed or experts == "stream":
        plan = make(shapes())
    elif not asked:
        return None
    plan.expect_fits()
    return plan
