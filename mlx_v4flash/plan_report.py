"""A plan as a table, with what can be expected of it on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .config import ModelConfig
from .experts.simulation import POLICIES, hit_rate, synthetic
from .experts.trace import Trace
from .plan import Plan, Sizes

_BAR = {"weights": "#", "expert slots": "=", "staging": "+", "caches": "c", "kept caches": "k", "working": "w"}
_OTHERS = (0.5, 0.75, 1.5, 2.0)
_WIDTH = 64


@dataclass(frozen=True)
class Estimate:
    """Expected of a plan: share of hits, and tokens/s by the traffic of memory and disk alone; None if not known."""

    hit_rate: float
    tokens_per_s: float | None


class Machine:
    """Estimates for this machine.

    Args:
        trace: choices of experts; invented ones if absent.
        disk, bandwidth: bytes/s read from disk and from memory; None: not known.
    """

    def __init__(
        self, config: ModelConfig, sizes: Sizes, trace: Trace | None, disk: float | None, bandwidth: float | None
    ) -> None:
        c = self._config = config
        self._sizes, self.disk, self.bandwidth = sizes, disk, bandwidth
        self.invented = trace is None
        self._trace = trace or synthetic(2, c.n_routed_experts, c.num_experts_per_tok, 300)
        self._rates: dict[int, float] = {}

    def estimate(self, plan: Plan) -> Estimate:
        rates = [self._rate(slots) for slots in plan.slots]
        rate = sum(rates) / len(rates)
        if self.disk is None or self.bandwidth is None:
            return Estimate(rate, None)
        uses = [self._config.num_experts_per_tok * record for record in self._sizes.records]
        missed = sum(n * (1 - rate) for n, rate in zip(uses, rates, strict=True))
        read = self._sizes.dense - self._sizes.embedding + sum(uses)
        return Estimate(rate, 1 / (missed / self.disk + read / self.bandwidth))

    def _rate(self, slots: int) -> float:
        if slots >= self._config.n_routed_experts:
            return 1.0  # read before the first token
        if slots not in self._rates:
            self._rates[slots] = hit_rate(self._trace, slots, POLICIES["LRU"])
        return self._rates[slots]


def measure_bandwidth(nbytes: int = 64 << 20) -> float:
    """Bytes/s that one thread of this processor copies: read and written. A GPU may have more."""
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    took = []
    for _ in range(5):
        begun = time.perf_counter()
        np.copyto(target, source)
        took.append(time.perf_counter() - begun)
    return 2 * nbytes / statistics.median(took)


def values(plan: Plan, machine: Machine, plan_for: Callable[[int], Plan]) -> dict[str, Any]:
    """For JSON: the plan, what is expected, and the same for other budgets."""
    found = plan.values() | {"estimate": _estimate(plan, machine)}
    found["other_budgets"] = [
        {"budget": other.budget, "slots": min(other.slots), **_estimate(other, machine)}
        for other in (plan_for(int(plan.budget * share) or 1) for share in _OTHERS)
        if other.fits
    ]
    return found


def _estimate(plan: Plan, machine: Machine) -> dict[str, Any]:
    found = machine.estimate(plan)
    speeds = {"disk_bytes_per_s": machine.disk, "memory_bytes_per_s": machine.bandwidth}
    return {
        "hit_rate": found.hit_rate,
        "tokens_per_s": found.tokens_per_s,
        "routing_invented": machine.invented,
    } | speeds


def table(plan: Plan, machine: Machine, plan_for: Callable[[int], Plan]) -> str:
    """For people."""
    lines = [f"{name:<14} {nbytes / 1e9:>9.3f} GB" for name, nbytes in plan.parts.items() if nbytes]
    lines += [f"{'together':<14} {plan.total / 1e9:>9.3f} GB of {plan.budget / 1e9:.3f}, ", ""]
    lines[-2] = lines[-2].removesuffix(", ")
    lines += [bar(plan), ""]
    context = f"context {plan.max_context:,}, {plan.chunk:,} prompt tokens a pass"
    if not plan.fits:
        return "\n".join([*lines, f"does not fit ({context}): at least {plan.smallest / 1e9:.3f} GB"])
    held = f"{min(plan.slots)} of {plan.experts} experts a layer" if plan.streamed else "all experts in memory"
    lines += [f"fits: {held}; {context}; at least {plan.smallest / 1e9:.3f} GB", ""]
    routing = "invented routing" if machine.invented else "the trace"
    lines += [f"{'memory':>10} {'experts':>8} {'hits':>7} {'tokens/s':>9}"]
    lines += [_line(plan, machine)]
    lines += [_line(other, machine) for other in (plan_for(int(plan.budget * s) or 1) for s in _OTHERS) if other.fits]
    lines += ["", f"Estimates. Hits: by {routing}, first uses missed. tokens/s: the traffic of memory and disk alone,"]
    return "\n".join([*lines, f"no arithmetic, nothing hidden behind it; {_speeds(machine)}."])


def _speeds(machine: Machine) -> str:
    known = [
        f"{name} {speed / 1e9:.2f} GB/s"
        for name, speed in (("disk", machine.disk), ("memory", machine.bandwidth))
        if speed is not None
    ]
    return ", ".join(known) + ("" if machine.disk else "; the disk is not known without files (--disk)")


def _line(plan: Plan, machine: Machine) -> str:
    found = machine.estimate(plan)
    speed = "-" if found.tokens_per_s is None else f"{found.tokens_per_s:.2f}"
    return f"{plan.budget / 1e9:>7.2f} GB {min(plan.slots):>8} {found.hit_rate:>7.1%} {speed:>9}"


def bar(plan: Plan) -> str:
    """Parts as letters, by their share of the budget or of what is needed, whichever is more."""
    scale = _WIDTH / max(plan.budget, plan.total)
    drawn, done = "", 0
    for name, nbytes in plan.parts.items():
        done += nbytes
        drawn += _BAR.get(name, "o") * (round(done * scale) - len(drawn))
    legend = ", ".join(f"{sign} {name}" for name, sign in _BAR.items() if sign in drawn)
    return f"[{drawn:.<{_WIDTH}}]  {legend}, o others"
