"""Products with the weights of chosen experts."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ._dispatch import expect_shape
from .quantized_product import BITS, GROUP_SIZE, summed_in_float32


@dataclass(frozen=True)
class ExpertWeights:
    """One matrix of every expert: [E, rows, columns], packed as `mode` says, or plain if scales is None."""

    weight: mx.array
    scales: mx.array | None = None
    mode: str = "mxfp4"

    def packed(self, columns: int) -> int:
        """Elements of `weight` that hold this many columns."""
        return columns if self.scales is None else columns * BITS[self.mode] // 32


def expert_gate_up(
    x: mx.array, w1: ExpertWeights, w3: ExpertWeights, token: mx.array, expert: mx.array, weight: mx.array,
    limit: float, sorted_experts: bool,
) -> mx.array:  # fmt: skip
    """weight * silu(min(w1 x, limit)) * clip(w3 x, -limit, limit) for pairs of token and expert (spec 7).

    Args:
        x: [T, D], any float type.
        token, expert, weight: of each pair, [P] each; int, int, float32.
        sorted_experts: `expert` is ascending, so that runs of one expert can share a matrix product.

    Returns:
        [P, F] in the type of x. The products are rounded to it before the activation, which is float32.
    """
    for name, array in (("token", token), ("weight", weight)):
        expect_shape("expert_gate_up", name, array, expert.shape)
    for name, matrix in (("w1", w1), ("w3", w3)):
        expect_shape("expert_gate_up", name, matrix.weight, (*w1.weight.shape[:2], matrix.packed(x.shape[-1])))
    return expert_gate_up_reference(x, w1, w3, token, expert, weight, limit, sorted_experts)


def expert_gate_up_reference(
    x: mx.array, w1: ExpertWeights, w3: ExpertWeights, token: mx.array, expert: mx.array, weight: mx.array,
    limit: float, sorted_experts: bool,
) -> mx.array:  # fmt: skip
    g = _gather(x, w1, token, expert, sorted_experts)
    u = _gather(x, w3, token, expert, sorted_experts)
    return (swiglu(g, u, limit) * weight[:, None]).astype(x.dtype)


def swiglu(g: mx.array, u: mx.array, limit: float) -> mx.array:
    """silu(min(g, limit)) * clip(u, -limit, limit), float32: the gate is clamped from above only."""
    g = mx.minimum(g.astype(mx.float32), limit)
    return g * mx.sigmoid(g) * mx.clip(u.astype(mx.float32), -limit, limit)


def expert_down(h: mx.array, w2: ExpertWeights, expert: mx.array, sorted_experts: bool) -> mx.array:
    """w2 h for each pair.

    Args:
        h: [P, F], any float type; expert: [P].

    Returns:
        [P, D] in the type of h.
    """
    expect_shape("expert_down", "expert", expert, h.shape[:1])
    expect_shape("expert_down", "w2", w2.weight, (*w2.weight.shape[:2], w2.packed(h.shape[-1])))
    return expert_down_reference(h, w2, expert, sorted_experts)


def expert_down_reference(h: mx.array, w2: ExpertWeights, expert: mx.array, sorted_experts: bool) -> mx.array:
    return _gather(h, w2, mx.arange(h.shape[0]), expert, sorted_experts)


def _gather(x: mx.array, w: ExpertWeights, row: mx.array, expert: mx.array, sorted_experts: bool) -> mx.array:
    # Sorted runs are recognised only when the left side is not indexed.
    x = x[row][:, None]
    if w.scales is None:
        weight = summed_in_float32(w.weight).swapaxes(1, 2)
        y = mx.gather_mm(summed_in_float32(x), weight, rhs_indices=expert, sorted_indices=sorted_experts)
        return y[:, 0].astype(x.dtype)
    y = mx.gather_qmm(
        summed_in_float32(x), w.weight, w.scales, rhs_indices=expert, transpose=True, group_size=GROUP_SIZE,
        bits=BITS[w.mode], mode=w.mode, sorted_indices=sorted_experts,
    )  # fmt: skip
    return y[:, 0].astype(x.dtype)
