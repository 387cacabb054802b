"""From a checkpoint and an amount of memory to a model whose experts are streamed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..checkpoint import Checkpoint
from ..config import ModelConfig
from ..converted import Converted
from ..errors import RequestError
from .calibration import choose
from .eviction import LFU, LRU, Eviction
from .pool import record_bytes
from .readers import Files
from .source import PackSource, ShardSource, Source
from .store import STAGING, ExpertStore
from .streamed import StreamedExperts
from .trace import TraceWriter

if TYPE_CHECKING:
    from ..model import Model

POLICIES: dict[str, Callable[[], Eviction]] = {"lru": LRU, "lfu": LFU}
CHOICES = ("auto", "resident", "stream")
# Of the memory, what is left to caches, activations and MLX's own buffers.
WORKING_BYTES = 2 << 30
_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_bytes(value: str | int | None) -> int | None:
    """ "48GB", "1.5TiB" or a number of bytes.

    Raises:
        RequestError: anything else.
    """
    if value is None or (type(value) is int and value > 0):
        return value
    text = value if isinstance(value, str) else ""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None or (found[3] and not found[2]):
        raise RequestError(f"memory: expected a number of bytes such as 48GB or 64GiB, found {value!r}")
    units = _BINARY if found[3] else _UNITS
    return int(float(found[1]) * units[found[2].upper()])


def usable_bytes() -> int:
    """What a model may take of this machine's memory: a quarter of it, or 8 GiB, is left to everything else."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    usable = total - max(total // 4, 8 << 30)
    if mx.metal.is_available():
        usable = min(usable, int(mx.device_info()["max_recommended_working_set_size"]))
    return max(usable, total // 4)


@dataclass(frozen=True)
class Division:
    """Slots of each layer and of the staging range."""

    slots: list[int]
    staging: int


def least_bytes(source: Source, config: ModelConfig) -> int:
    """Of slots for one token's experts in every layer and the staging range, or of all experts if they are fewer."""
    layers, E = config.num_hidden_layers, config.n_routed_experts
    slots = min(layers * config.num_experts_per_tok + min(E, STAGING), layers * E)
    return slots * record_bytes(source.shapes)


def divide(source: Source, config: ModelConfig, expert_bytes: int) -> Division:
    """The same number of slots for each layer out of so many bytes.

    Raises:
        RequestError: not enough for one token's experts in every layer.
    """
    layers, E, record = config.num_hidden_layers, config.n_routed_experts, record_bytes(source.shapes)
    if expert_bytes >= layers * E * record:
        return Division([E] * layers, 0)
    least = least_bytes(source, config)
    if expert_bytes < least:
        raise RequestError(f"memory: expected at least {least:,} bytes for routed experts, found {expert_bytes:,}")
    staging = min(E, STAGING)
    each = (expert_bytes // record - staging) // layers
    return Division([min(each, E)] * layers, staging)


def chosen_division(
    checkpoint: Checkpoint | Converted, source: Callable[[], Source], experts: str, memory: int | None
) -> Division | None:
    """How experts are held; None if all of them are, as parameters of the model.

    Args:
        experts: one of CHOICES; "auto" streams what does not fit.
        memory: bytes for weights and work; `usable_bytes` if absent.

    Raises:
        RequestError: experts is something else, or the memory does not suffice.
    """
    if experts not in CHOICES:
        raise RequestError(f"experts: expected {', '.join(CHOICES)}, found {experts!r}")
    if experts == "resident":
        return None
    budget = usable_bytes() if memory is None else memory
    working = min(WORKING_BYTES, budget // 4)
    if experts == "auto" and checkpoint.nbytes + working <= budget:
        return None
    opened = source()
    dense = checkpoint.dense_bytes
    least = dense + least_bytes(opened, checkpoint.config)
    least += min(WORKING_BYTES, -(-least // 3))
    if budget < least:
        raise RequestError(
            f"memory: expected at least {least:,} bytes for this model, found {budget:,}\n"
            "hint: allow more (--memory) if the machine has it; other programs may have to be closed"
        )
    return divide(opened, checkpoint.config, budget - dense - working)


def policy(name: str) -> Callable[[], Eviction]:
    """What decides about the slots of one layer.

    Raises:
        RequestError: there is none of this name.
    """
    if name not in POLICIES:
        raise RequestError(f"eviction: expected {' or '.join(POLICIES)}, found {name!r}")
    return POLICIES[name]


def open_source(checkpoint: Checkpoint | Converted, verify: bool = False) -> Source:
    return PackSource(checkpoint, verify) if isinstance(checkpoint, Converted) else ShardSource(checkpoint, verify)


def attach(model: Model, source: Source, division: Division, prefetch: bool = False, **options: Any) -> ExpertStore:
    """Put streamed experts in the place of resident ones, whose parameters are gone then.

    Args:
        prefetch: load what the next layer will need, as its router guesses from the input of this layer.
        options: of `ExpertStore`; readers are chosen by `calibration` if there are none.
    """
    if "files" not in options:
        choice = choose(source.path, record_bytes(source.shapes))
        options = {"threads": choice.threads} | options | {"files": Files(choice.reader)}
    store = ExpertStore(source, division.slots, model.config.n_routed_experts, staging=division.staging, **options)
    for number, layer in enumerate(model.layers):
        layer.ffn.experts = streamed = StreamedExperts(store, number, model.config, model.numerics)
        if prefetch and number + 1 < len(model.layers) and not store.whole[number + 1]:
            gate = model.layers[number + 1].ffn.gate
            streamed.guess = None if gate.hashed else lambda x, gate=gate: gate(x, mx.zeros((len(x),), mx.int32))[0]
    model.around = store.step
    model.store = store
    return store


def begin(model: Model, store: ExpertStore, progress: Callable[[int], None] | None = None) -> None:
    """After the other weights are loaded: read the layers held whole, and note which layers route by token id.

    Args:
        progress: called with bytes read.

    Raises:
        ExpertReadError, CheckpointError: a record cannot be read or be right.
    """
    store.load_whole(progress)
    gates = {n: layer.ffn.gate for n, layer in enumerate(model.layers) if layer.ffn.gate.hashed}
    store.route_by_token({n: np.array(gate.tid2eid) for n, gate in gates.items()})


def follow(model: Model, path: Path) -> None:
    """Write the experts that every pass chooses to a file.

    Raises:
        RequestError: it cannot be written.
    """
    c, around = model.config, model.around
    trace = TraceWriter(path, c.num_hidden_layers, c.n_routed_experts, c.num_experts_per_tok)

    @contextmanager
    def traced(ids: mx.array) -> Iterator[None]:
        trace.start()
        with around(ids):
            yield
        trace.end()

    model.around = traced
    for layer in model.layers:
        layer.ffn.watch = trace.add
