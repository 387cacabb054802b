"""From a checkpoint and an amount of memory to a model whose experts are streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..checkpoint import Checkpoint
from ..converted import Converted
from ..errors import RequestError
from .calibration import choose
from .eviction import LFU, LRU, Eviction
from .pool import record_bytes
from .readers import Files
from .source import PackSource, ShardSource, Source
from .store import ExpertStore
from .streamed import StreamedExperts
from .trace import TraceWriter

if TYPE_CHECKING:
    from ..model import Model

POLICIES: dict[str, Callable[[], Eviction]] = {"lru": LRU, "lfu": LFU}
CHOICES = ("auto", "resident", "stream")


@dataclass(frozen=True)
class Division:
    """Slots of each layer and of the staging range."""

    slots: list[int]
    staging: int


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
        choice = choose(source.paths[0], max(map(record_bytes, source.shapes)))
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
