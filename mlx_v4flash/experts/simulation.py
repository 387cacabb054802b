"""How often experts would be found in memory, by size of memory and policy: no model, no weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DeviceError, RequestError
from .eviction import LFU, LRU, Belady, Eviction
from .residency import Residency
from .trace import Trace

Policy = Callable[[list[list[int]]], Eviction]

POLICIES: dict[str, Policy] = {"LRU": lambda _: LRU(), "LFU": lambda _: LFU(), "Belady": Belady}
# Of the experts of a layer.
SHARES = (0.03, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
# Of `synthetic`: chosen so that LRU over 430 tokens is near the one published curve of this model's routing, which has
# 40, 59, 74, 86 and 91 % of hits with 5.5, 11, 22, 44 and 89 % of the experts in memory.
EXPONENT, RECENCY, HALF_LIFE = 0.45, 2.7, 14.0


@dataclass(frozen=True)
class Curves:
    """Share of uses that were hits, of each policy at each number of slots of a layer; the first uses are misses."""

    experts: int
    tokens: int
    slots: list[int]
    rates: dict[str, list[float]]

    def json(self) -> str:
        found = {"experts": self.experts, "tokens": self.tokens, "slots": self.slots, "hit_rate": self.rates}
        return json.dumps(found, indent=2)

    def table(self) -> str:
        lines = [f"{'slots':>6} {'memory':>7}" + "".join(f"{name:>9}" for name in self.rates)]
        for i, n in enumerate(self.slots):
            rates = "".join(f"{rates[i]:>9.1%}" for rates in self.rates.values())
            lines.append(f"{n:>6} {n / self.experts:>7.1%}{rates}")
        return "\n".join([*lines, "", f"{self.tokens:,} tokens; an expert's first use is a miss."])

    def plot(self, path: Path) -> None:
        """Write a picture.

        Raises:
            DeviceError: matplotlib is not installed.
            RequestError: the file cannot be written.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as e:
            raise DeviceError(
                "plot: expected matplotlib, found none\nhint: pip install 'mlx-v4flash[plot]', or leave out --plot"
            ) from e
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, rates in self.rates.items():
            axes.plot([n / self.experts * 100 for n in self.slots], [r * 100 for r in rates], marker="o", label=name)
        axes.set(xlabel="experts in memory, %", ylabel="hits, %", xlim=(0, 100), ylim=(0, 100))
        axes.grid(alpha=0.3)
        axes.legend()
        try:
            figure.savefig(path, dpi=150)
        except (OSError, ValueError) as e:
            raise RequestError(f"{path}: the plot cannot be written: {e}\nhint: use a name such as hits.png") from e


def hit_rate(trace: Trace, slots: int, policy: Policy) -> float:
    """Share of uses that find their expert in one of the slots of its layer.

    A use is one expert in one pass, however many tokens of the pass chose it. Of a pass that needs more experts than
    there are slots, the rest is read and not kept.
    """
    used = hits = 0
    for number in range(trace.layers):
        calls = trace.layer(number)
        table = Residency(slots, policy(calls))
        for experts in calls:
            table.use(experts)
            missing = table.missing(experts)
            used += len(experts)
            hits += len(experts) - len(missing)
            room = slots - (len(experts) - len(missing))
            for expert in table.claim(missing[:room], experts):
                table.loaded(expert)
    return hits / used if used else 0.0


def curves(trace: Trace, slots: Sequence[int] | None = None) -> Curves:
    """Hit rates of all policies.

    Args:
        slots: of a layer; by SHARES of its experts if absent.

    Raises:
        RequestError: fewer slots than a token needs, more than there are experts, or a trace without a pass.
    """
    E, A = trace.experts, trace.chosen
    chosen = sorted({max(A, round(E * share)) for share in SHARES} if slots is None else set(slots))
    wrong = [n for n in chosen if not A <= n <= E]
    if wrong:
        raise RequestError(f"slots: expected {A} to {E}, found {wrong[0]}\nhint: a token needs {A} experts of a layer")
    if not trace.passes:
        raise RequestError("trace: expected passes of a model, found none\nhint: generate something with --trace")
    rates = {name: [hit_rate(trace, n, policy) for n in chosen] for name, policy in POLICIES.items()}
    return Curves(E, sum(trace.tokens), chosen, rates)


def synthetic(layers: int, experts: int, chosen: int, tokens: int, seed: int = 0) -> Trace:
    """An invented trace, one pass for each token, whose hit rates resemble those that were published.

    In each layer experts have a random rank r and are drawn without replacement in proportion to
    (1 + r)^-EXPONENT * exp(RECENCY * s), where s is 1 after a use and halves every HALF_LIFE tokens. Layers are
    independent of each other. It is not the routing of any model.
    """
    random = np.random.default_rng(seed)
    ranks = random.permuted(np.tile(np.arange(experts), (layers, 1)), axis=1)
    popularity, recent = -EXPONENT * np.log1p(ranks), np.zeros((layers, experts))
    passes = []
    for _ in range(tokens):
        # The largest of log weights with Gumbel noise are a draw without replacement.
        drawn = popularity + RECENCY * recent + random.gumbel(size=recent.shape)
        ids = np.argpartition(-drawn, chosen - 1, axis=1)[:, :chosen]
        recent *= 0.5 ** (1 / HALF_LIFE)
        np.put_along_axis(recent, ids, 1.0, axis=1)
        passes.append(np.sort(ids, axis=1).tolist())
    return Trace(layers, experts, chosen, [1] * tokens, passes)
