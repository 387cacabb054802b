"""Products with the weights of chosen experts."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ._dispatch import expect_shape, kernel, scalar, use_expert_prefill, use_kernel
from .expert_prefill import down_prefill, gate_up_prefill
from .quantized_product import BITS, GROUP_SIZE, summed_in_float32

# The kernels read an expert once for each of its pairs, which pays for few of them; MLX's products are for more.
MAX_PAIRS = 96
# A simdgroup of the sum over experts takes one of them.
MAX_CHOSEN = 16
_LIMIT = f"up to {MAX_PAIRS} pairs and {MAX_CHOSEN} experts per token of quantised weights, of at least 8 words"
_TILED = "quantised weights of one format, of at least 8 words"
# Rows that a simdgroup takes of each matrix, and the simdgroups of a threadgroup.
_GATE_UP_ROWS, _DOWN_ROWS, _SIMDGROUPS = 2, 4, 4


@dataclass(frozen=True)
class ExpertWeights:
    """One matrix of every expert: [E, rows, columns], packed as `mode` says, or plain if scales is None.

    In place of all experts it may hold those in memory, if pairs name their slots.
    """

    weight: mx.array
    scales: mx.array | None = None
    mode: str = "mxfp4"

    def packed(self, columns: int) -> int:
        """Elements of `weight` that hold this many columns."""
        return columns if self.scales is None else columns * BITS[self.mode] // 32

    def expect(self, op: str, name: str, lead: tuple[int, ...], columns: int) -> None:
        """Raise KernelError unless the matrices are as many and have as many rows as `lead` says, and these columns."""
        expect_shape(op, name, self.weight, (*lead, self.packed(columns)))
        if self.scales is not None:
            expect_shape(op, f"{name}.scales", self.scales, (*lead, columns // GROUP_SIZE))

    def covered(self, pairs: int, columns: int) -> bool:
        """Whether the kernels are made for so many pairs and these weights."""
        return self.tiled(pairs, columns) and pairs <= MAX_PAIRS

    def tiled(self, pairs: int, columns: int) -> bool:
        """Whether the kernels for sorted pairs are made for these weights."""
        packed = self.scales is not None and columns % GROUP_SIZE == 0 and self.weight.size >= 8
        return packed and pairs >= 1


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
        matrix.expect("expert_gate_up", name, w1.weight.shape[:2], x.shape[-1])
    P, D, F = expert.size, x.shape[-1], w1.weight.shape[1]
    if sorted_experts and use_expert_prefill(
        "expert_gate_up_prefill", covers=w1.tiled(P, D) and w3.tiled(P, D) and w1.mode == w3.mode, limit=_TILED
    ):
        return gate_up_prefill(x, w1, w3, token, expert, weight, limit)
    covers = w1.covered(P, D) and w3.covered(P, D) and w1.mode == w3.mode
    if not use_kernel("expert_gate_up", covers=covers, limit=_LIMIT):
        return expert_gate_up_reference(x, w1, w3, token, expert, weight, limit, sorted_experts)
    inputs = ("x", "w1", "s1", "w3", "s3", "token", "expert", "weight", "limit")
    (y,) = kernel("expert_gate_up", inputs, ("y",), header="decode")(
        inputs=[x, w1.weight, w1.scales, w3.weight, w3.scales, token, expert, weight, scalar(limit)],
        template=[("Elem", x.dtype), ("BITS", BITS[w1.mode]), ("D", D), ("F", F), ("ROWS", _GATE_UP_ROWS)],
        grid=(32, _simdgroups(F, _GATE_UP_ROWS), P),
        threadgroup=(32, _SIMDGROUPS, 1),
        output_shapes=[(P, F)],
        output_dtypes=[x.dtype],
    )
    return y


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
    w2.expect("expert_down", "w2", w2.weight.shape[:2], h.shape[-1])
    (P, F), D = h.shape, w2.weight.shape[1]
    if sorted_experts and use_expert_prefill("expert_down_prefill", covers=w2.tiled(P, F), limit=_TILED):
        return down_prefill(h, w2, expert)
    if not use_kernel("expert_down", covers=w2.covered(P, F), limit=_LIMIT):
        return expert_down_reference(h, w2, expert, sorted_experts)
    (y,) = kernel("expert_down", ("h", "w2", "s2", "expert"), ("y",), header="decode")(
        inputs=[h, w2.weight, w2.scales, expert],
        template=[("Elem", h.dtype), ("BITS", BITS[w2.mode]), ("D", D), ("F", F), ("ROWS", _DOWN_ROWS)],
        grid=(32, _simdgroups(D, _DOWN_ROWS), P),
        threadgroup=(32, _SIMDGROUPS, 1),
        output_shapes=[(P, D)],
        output_dtypes=[h.dtype],
    )
    return y


def expert_down_reference(h: mx.array, w2: ExpertWeights, expert: mx.array, sorted_experts: bool) -> mx.array:
    return _gather(h, w2, mx.arange(h.shape[0]), expert, sorted_experts)


def expert_down_sum(h: mx.array, w2: ExpertWeights, expert: mx.array) -> mx.array:
    """Sum over the experts of a token of w2 h; the products are rounded to the type of h, their sum is float32.

    Args:
        h: [T, A, F], any float type; expert: [T, A].

    Returns:
        [T, D], float32.
    """
    expect_shape("expert_down_sum", "expert", expert, h.shape[:2])
    w2.expect("expert_down_sum", "w2", w2.weight.shape[:2], h.shape[-1])
    (T, A, F), D = h.shape, w2.weight.shape[1]
    if not use_kernel("expert_down_sum", covers=w2.covered(T * A, F) and A <= MAX_CHOSEN, limit=_LIMIT):
        return expert_down_sum_reference(h, w2, expert)
    (y,) = kernel("expert_down_sum", ("h", "w2", "s2", "expert"), ("y",), header="decode")(
        inputs=[h, w2.weight, w2.scales, expert],
        template=[("Elem", h.dtype), ("BITS", BITS[w2.mode]), ("A", A), ("D", D), ("F", F), ("ROWS", _DOWN_ROWS)],
        grid=(32, A, -(-D // _DOWN_ROWS) * T),
        threadgroup=(32, A, 1),
        output_shapes=[(T, D)],
        output_dtypes=[mx.float32],
    )
    return y


def expert_down_sum_reference(h: mx.array, w2: ExpertWeights, expert: mx.array) -> mx.array:
    y = expert_down_reference(h.flatten(0, 1), w2, expert.flatten(), False)
    return y.reshape(*expert.shape, -1).astype(mx.float32).sum(axis=1)


def _simdgroups(rows: int, each: int) -> int:
    """Simdgroups that take `each` of the rows, in whole threadgroups."""
    return -(-rows // (each * _SIMDGROUPS)) * _SIMDGROUPS


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
