"""A layer's routed experts, of which memory holds some."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from metal_kernels import ExpertWeights, add_shared

from ..config import ModelConfig
from ..linear import Numerics
from .pool import SlotRange
from .products import SHARED_FROM, SORT_FROM, ExpertProducts, SharedExpert, token_of_pair
from .resident import compute_all
from .store import ExpertStore, Loads


class StreamedExperts:
    """Computes bit for bit what `ResidentExperts` computes; has no parameters, the store has them.

    Raises:
        ExpertReadError, CheckpointError: from a call, if an expert cannot be read.
    """

    def __init__(self, store: ExpertStore, layer: int, config: ModelConfig, numerics: Numerics) -> None:
        self._store, self._layer = store, layer
        self._limit, self._round_input = config.swiglu_limit, numerics.round_input
        # Experts [T, A] that the next layer will choose, from this layer's input [T, D]; None to load nothing ahead.
        self.guess: Callable[[mx.array], mx.array] | None = None
        self.bind()
        store.users.add(self)

    def bind(self) -> None:
        """Take the store's arrays."""
        self._own = self._products(self._store.ranges[self._layer])
        staging = self._store.staging[self._layer]
        if staging is not None:
            half = staging.slots // 2 or 1
            self._staging = self._products(staging)
            self._halves = [self._products(staging.part(n * half, (n + 1) * half)) for n in range(2)]
            self._half = half

    def release(self) -> None:
        """Let go of them."""
        for name in ("_own", "_staging", "_halves"):
            vars(self).pop(name, None)

    def __call__(self, x: mx.array, ids: mx.array, weights: mx.array, shared: SharedExpert) -> mx.array:
        """As `ResidentExperts`; waits for ids and for what is not in memory."""
        store, layer = self._store, self._layer
        if store.whole[layer]:
            return compute_all(self._own, x, ids, weights, shared)
        try:
            chosen, guessed = store.known(layer), None
            if chosen is None and self.guess is not None and ids.size < SORT_FROM:
                chosen, guessed = store.chosen(ids, self.guess(x))
            elif chosen is None:
                (chosen,) = store.chosen(ids)
            if chosen.size >= SORT_FROM:
                return self._many(x, chosen, weights, shared)
            if len(np.unique(chosen)) <= store.tables[layer].slots:
                y = self._few(x, chosen, weights, shared)
                if guessed is not None:
                    store.prefetch(layer + 1, np.unique(guessed).tolist())
                return y
            return self._few_apart(x, chosen, weights, shared)
        except BaseException:
            store.abandon()
            raise

    def _few(self, x: mx.array, chosen: np.ndarray, weights: mx.array, shared: SharedExpert) -> mx.array:
        """From the layer's own slots. What they hold already and the shared expert compute while others load."""
        store = self._store
        loads = store.stage(self._layer, np.unique(chosen).tolist())
        table = store.tables[self._layer]
        slots = _lookup(table.resident | table.loading, chosen)
        rows = mx.array(slots)
        loading = np.isin(chosen.ravel(), loads.experts)
        if not loads.experts or loading.all():
            store.finish(loads)
            y = self._own.few(x, rows, weights, shared)
        else:
            h = self._gate_up_in_two(x, slots.ravel(), weights, shared, loading, loads)
            y = self._own.down_sum(h, rows, shared)
        store.reads(self._layer, y)
        return y

    def _gate_up_in_two(
        self, x: mx.array, slots: np.ndarray, weights: mx.array, shared: SharedExpert, loading: np.ndarray, loads: Loads
    ) -> mx.array:
        T, P = x.shape[0], len(slots)
        token, row, weight = token_of_pair(T, P // T), mx.array(slots), weights.flatten()
        here, later = np.flatnonzero(~loading), np.flatnonzero(loading)
        first, second = mx.array(here), mx.array(later)
        early = self._own.gate_up(x, token[first], row[first], weight[first], shared)
        self._store.reads(self._layer, early)
        mx.async_eval(early)
        self._store.finish(loads)
        late = self._own.gate_up(x, token[second], row[second], weight[second], None)
        order = np.empty(P + T, np.int32)
        order[here], order[later] = np.arange(len(here)), np.arange(len(later)) + len(here) + T
        order[P:] = np.arange(T) + len(here)
        return mx.concatenate([early, late])[mx.array(order)]

    def _few_apart(self, x: mx.array, chosen: np.ndarray, weights: mx.array, shared: SharedExpert) -> mx.array:
        """More experts than the layer has slots: all are brought to the staging range."""
        store = self._store
        distinct = np.unique(chosen).tolist()
        store.settle()
        store.count(self._layer, distinct)
        store.finish(store.stage_apart(self._layer, distinct, 0))
        y = self._staging.few(x, mx.array(_lookup({e: n for n, e in enumerate(distinct)}, chosen)), weights, shared)
        store.reads(None, y)
        return y

    def _many(self, x: mx.array, chosen: np.ndarray, weights: mx.array, shared: SharedExpert) -> mx.array:
        """In runs: experts in the layer's own slots, then groups of others, one read while one computes."""
        shared_result = shared(x)
        mx.async_eval(shared_result)
        pairs, results = [], []
        for some, y in self._runs(x, chosen, weights):
            pairs.append(some)
            results.append(y)
        order = mx.array(np.argsort(np.concatenate(pairs)))
        return add_shared(mx.concatenate(results)[order].reshape(*chosen.shape, -1), shared_result)

    def _runs(self, x: mx.array, chosen: np.ndarray, weights: mx.array) -> Iterator[tuple[np.ndarray, mx.array]]:
        """Numbers of pairs and their results [P, D], finished when the iterator is.

        The most used experts take the place of others in the layer's slots, for what comes next.
        """
        store, table = self._store, self._store.tables[self._layer]
        store.settle()
        distinct, counts = np.unique(chosen, return_counts=True)
        missing = store.count(self._layer, distinct.tolist())
        wanted = distinct[np.argsort(-counts, kind="stable")][: table.slots].tolist()
        groups = [missing[n : n + self._half] for n in range(0, len(missing), self._half)]
        loads, seeding = store.stage_apart(self._layer, groups[0], 0) if groups else None, None
        before: list[mx.array] = []
        here = {e: table.resident[e] for e in distinct.tolist() if e in table.resident}
        if here:
            before = [self._run(self._own, x, chosen, weights, here)]
            mx.async_eval(before)
            yield _pairs(chosen, here), before[0]
        for number, group in enumerate(groups):
            half = number % 2
            assert loads is not None
            store.finish(loads)
            slots = {e: n for n, e in enumerate(group)}
            y = self._run(self._halves[half], x, chosen, weights, slots)
            mx.async_eval(y)
            mx.eval(before)  # so that the slots it read may be written
            if seeding is not None:
                store.finish(seeding)
            if number + 1 < len(groups):
                loads = store.stage_apart(self._layer, groups[number + 1], (1 - half) * self._half)
            staged = {e: half * self._half + slots[e] for e in group if e in wanted}
            seeding = store.seed(self._layer, staged, wanted)
            before = [y]
            yield _pairs(chosen, slots), y
        mx.eval(before)
        if seeding is not None:
            store.finish(seeding)

    def _run(
        self, products: ExpertProducts, x: mx.array, chosen: np.ndarray, weights: mx.array, slots: dict[int, int]
    ) -> mx.array:
        """Results [P, D] of the pairs of some experts, in the order of `_pairs`."""
        pairs = _pairs(chosen, slots)
        P, E = len(pairs), products.w1.weight.shape[0]
        if chosen.size < SHARED_FROM * self._store.experts:
            products = products.one_by_one()
        else:  # the last pair again and again, until there are enough of them
            pairs = np.pad(pairs, (0, max(SHARED_FROM * E - P, 16 - P, 0)), mode="edge")
        rows = mx.array(_lookup(slots, chosen.ravel()[pairs]))
        y = products.run(x, mx.array(pairs // chosen.shape[1]), rows, weights.flatten()[mx.array(pairs)])
        return y[:P]

    def _products(self, slots: SlotRange) -> ExpertProducts:
        w1, w3, w2 = (self._weights(slots.arrays, name) for name in ("w1", "w3", "w2"))
        return ExpertProducts(w1, w3, w2, self._limit, self._round_input)

    def _weights(self, arrays: dict[str, mx.array], name: str) -> ExpertWeights:
        format = self._store.source.formats[self._layer][name]
        return ExpertWeights(
            arrays[f"{name}.weight"], arrays.get(f"{name}.scales"), format["mode"], arrays.get(f"{name}.biases"),
            format.get("bits"), format.get("group_size"),
        )  # fmt: skip


def _lookup(slots: dict[int, int], experts: np.ndarray) -> np.ndarray:
    """Slots of experts, in the same shape."""
    table = np.zeros(max(slots) + 1, np.int32)
    table[list(slots)] = list(slots.values())
    found: np.ndarray = table[experts]
    return found


def _pairs(chosen: np.ndarray, slots: dict[int, int]) -> np.ndarray:
    """Numbers of the pairs of these experts, by ascending slot."""
    pairs = np.flatnonzero(np.isin(chosen.ravel(), list(slots)))
    return pairs[np.argsort(_lookup(slots, chosen.ravel()[pairs]), kind="stable")].astype(np.int32)
