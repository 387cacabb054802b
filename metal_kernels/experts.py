"""Products with the weights of chosen experts."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ._dispatch import KernelError, expect_shape, kernel, scalar, use_expert_prefill, use_kernel
from .expert_prefill import down_prefill, gate_up_prefill
from .quantized_product import AFFINE_BITS, AFFINE_GROUPS, BITS, FORMATS, quantized_product, summed_in_float32

# The kernels read an expert once for each of its pairs, which pays for few of them; MLX's products are for more.
MAX_PAIRS = 96
# A simdgroup of the sum over experts takes one of them.
MAX_CHOSEN = 16
_LIMIT = f"up to {MAX_PAIRS} pairs and {MAX_CHOSEN} experts per token of quantised weights, of at least 8 words"
_TILED = "mxfp4 or mxfp8 weights of one format, of at least 8 words"
# Rows that a simdgroup takes of each matrix, and the simdgroups of a threadgroup.
_GATE_UP_ROWS, _DOWN_ROWS, _SIMDGROUPS = 2, 4, 4


@dataclass(frozen=True)
class ExpertWeights:
    """One matrix of every expert, [E, rows, columns], or of the shared expert, [rows, columns].

    In place of all experts it may hold those in memory, if pairs name their slots.

    Attributes:
        weight: packed as `mode` says, or plain if scales is None.
        mode: "mxfp4", "mxfp8", "nvfp4", or "affine": whole numbers, times a scale plus a bias for each group.
        biases: of affine weights, in the shape and type of their scales.
        bits, group_size: of affine weights; the other modes fix them.
        shares: whether MLX's products may take sorted pairs of one expert together, if it thinks that pays.
    """

    weight: mx.array
    scales: mx.array | None = None
    mode: str = "mxfp4"
    biases: mx.array | None = None
    bits: int | None = None
    group_size: int | None = None
    shares: bool = True

    @property
    def packing(self) -> tuple[int, int]:
        """Bits of a number, and columns that share a scale.

        Raises:
            KernelError: MLX has no such format.
        """
        if self.mode in FORMATS:
            return FORMATS[self.mode]
        if self.mode != "affine":
            raise KernelError(f"experts: mode: expected affine or one of {list(FORMATS)}, found {self.mode!r}")
        if self.bits not in AFFINE_BITS or self.group_size not in AFFINE_GROUPS:
            raise KernelError(
                f"experts: affine weights: expected bits of {AFFINE_BITS} and a group_size of {AFFINE_GROUPS}, "
                f"found {self.bits} and {self.group_size}"
            )
        return self.bits, self.group_size

    def expect(self, op: str, name: str, lead: tuple[int, ...], columns: int) -> None:
        """Raise KernelError unless the matrices are as many and have as many rows as `lead` says, and these columns."""
        if self.scales is None:
            expect_shape(op, name, self.weight, (*lead, columns))
            return
        bits, group_size = self.packing
        expect_shape(op, name, self.weight, (*lead, columns * bits // 32))
        expect_shape(op, f"{name}.scales", self.scales, (*lead, columns // group_size))
        if (self.biases is not None) != (self.mode == "affine"):
            raise KernelError(f"{op}: {name}.biases: expected them with mode affine alone, found mode {self.mode!r}")
        if self.biases is not None:
            expect_shape(op, f"{name}.biases", self.biases, self.scales.shape)

    def covered(self, columns: int) -> bool:
        """Whether the kernels are made for these weights."""
        if self.scales is None or (self.biases is not None and self.biases.dtype != self.scales.dtype):
            return False
        return columns % max(32, self.packing[1]) == 0 and self.weight.size >= 8

    @property
    def arrays(self) -> list[mx.array | None]:
        """Words, scales and biases for a kernel; it does not read biases of a format that has none."""
        return [self.weight, self.scales, self.scales if self.biases is None else self.biases]

    def template(self, prefix: str = "") -> list[tuple[str, int | bool]]:
        """The format, for a kernel."""
        bits, group_size = self.packing
        return [(f"{prefix}BITS", bits), (f"{prefix}GROUP", group_size), (f"{prefix}AFFINE", self.mode == "affine")]

    def tiled(self, pairs: int, columns: int) -> bool:
        """Whether the kernels for sorted pairs are made for these weights."""
        return self.mode in BITS and self.covered(columns) and pairs >= 1


def expert_gate_up(
    x: mx.array, w1: ExpertWeights, w3: ExpertWeights, token: mx.array, expert: mx.array, weight: mx.array,
    limit: float, sorted_experts: bool, shared: tuple[ExpertWeights, ExpertWeights] | None = None,
) -> mx.array:  # fmt: skip
    """weight * silu(min(w1 x, limit)) * clip(w3 x, -limit, limit) for pairs of token and expert (spec 7).

    Args:
        x: [T, D], any float type.
        token, expert, weight: of each pair, [P] each; int, int, float32.
        sorted_experts: `expert` is ascending, so that runs of one expert can share a matrix product.
        shared: w1 and w3 of the shared expert, to multiply every token by them as well, without a weight.

    Returns:
        [P, F] in the type of x, or [P + T, F] with the shared expert's rows last. The products are rounded to it
        before the activation, which is float32.
    """
    for name, array in (("token", token), ("weight", weight)):
        expect_shape("expert_gate_up", name, array, expert.shape)
    for name, matrix in (("w1", w1), ("w3", w3)):
        matrix.expect("expert_gate_up", name, w1.weight.shape[:2], x.shape[-1])
    for name, matrix in zip(("shared w1", "shared w3"), shared or (), strict=False):
        matrix.expect("expert_gate_up", name, w1.weight.shape[1:2], x.shape[-1])
    P, (T, D), F = expert.size, x.shape, w1.weight.shape[1]
    tiled = shared is None and w1.tiled(P, D) and w3.tiled(P, D) and w1.mode == w3.mode
    if sorted_experts and use_expert_prefill("expert_gate_up_prefill", covers=tiled, limit=_TILED):
        return gate_up_prefill(x, w1, w3, token, expert, weight, limit)
    # Without one the kernel has no use for these, but its text names them.
    s1, s3 = shared or (w1, w3)
    covers = 1 <= P <= MAX_PAIRS and _alike(w1, w3, D) and _alike(s1, s3, D)
    if not use_kernel("expert_gate_up", covers=covers, limit=_LIMIT):
        return expert_gate_up_reference(x, w1, w3, token, expert, weight, limit, sorted_experts, shared)
    names = [f"{kind}{n}" for n in "13" for kind in "wsb"]
    inputs = ("x", *names, *(f"shared_{name}" for name in names), "token", "expert", "weight", "limit")
    rows = P + T if shared else P
    (y,) = kernel("expert_gate_up", inputs, ("y",), header="decode")(
        inputs=[x, *w1.arrays, *w3.arrays, *s1.arrays, *s3.arrays, token, expert, weight, scalar(limit)],
        template=[
            ("Elem", x.dtype), *w1.template(), ("SHARED", shared is not None), *s1.template("SHARED_"), ("D", D),
            ("F", F), ("ROWS", _GATE_UP_ROWS),
        ],
        grid=(32, _simdgroups(F, _GATE_UP_ROWS), rows),
        threadgroup=(32, _SIMDGROUPS, 1),
        output_shapes=[(rows, F)],
        output_dtypes=[x.dtype],
    )  # fmt: skip
    return y


def expert_gate_up_reference(
    x: mx.array, w1: ExpertWeights, w3: ExpertWeights, token: mx.array, expert: mx.array, weight: mx.array,
    limit: float, sorted_experts: bool, shared: tuple[ExpertWeights, ExpertWeights] | None = None,
) -> mx.array:  # fmt: skip
    g = _gather(x, w1, token, expert, sorted_experts)
    u = _gather(x, w3, token, expert, sorted_experts)
    y = (swiglu(g, u, limit) * weight[:, None]).astype(x.dtype)
    if shared is None:
        return y
    g, u = (_product(x, w) for w in shared)
    return mx.concatenate([y, swiglu(g, u, limit).astype(x.dtype)])


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
    if not use_kernel("expert_down", covers=1 <= P <= MAX_PAIRS and w2.covered(F), limit=_LIMIT):
        return expert_down_reference(h, w2, expert, sorted_experts)
    (y,) = kernel("expert_down", ("h", "w2", "s2", "b2", "expert"), ("y",), header="decode")(
        inputs=[h, *w2.arrays, expert],
        template=[("Elem", h.dtype), *w2.template(), ("D", D), ("F", F), ("ROWS", _DOWN_ROWS)],
        grid=(32, _simdgroups(D, _DOWN_ROWS), P),
        threadgroup=(32, _SIMDGROUPS, 1),
        output_shapes=[(P, D)],
        output_dtypes=[h.dtype],
    )
    return y


def expert_down_reference(h: mx.array, w2: ExpertWeights, expert: mx.array, sorted_experts: bool) -> mx.array:
    return _gather(h, w2, mx.arange(h.shape[0]), expert, sorted_experts)


def expert_down_sum(h: mx.array, w2: ExpertWeights, expert: mx.array, shared: ExpertWeights) -> mx.array:
    """Sum over the experts of a token of w2 h, and of the shared expert's.

    Args:
        h: any float type, [T * A + T, F]: a row for each expert of each token, then one for each token.
        expert: [T, A].
        shared: w2 of the shared expert.

    Returns:
        [T, D] in the type of h. The products are rounded to it, their sum is float32 and rounded once.
    """
    (T, A), (_, D), F = expert.shape, w2.weight.shape[:2], h.shape[-1]
    expect_shape("expert_down_sum", "h", h, (T * A + T, F))
    w2.expect("expert_down_sum", "w2", w2.weight.shape[:2], F)
    shared.expect("expert_down_sum", "shared w2", (D,), F)
    covers = 1 <= T * A <= MAX_PAIRS and A <= MAX_CHOSEN and w2.covered(F) and shared.covered(F)
    if not use_kernel("expert_down_sum", covers=covers, limit=_LIMIT):
        return expert_down_sum_reference(h, w2, expert, shared)
    inputs = ("h", "w2", "s2", "b2", "shared_w2", "shared_s2", "shared_b2", "expert")
    (y,) = kernel("expert_down_sum", inputs, ("y",), header="decode")(
        inputs=[h, *w2.arrays, *shared.arrays, expert],
        template=[
            ("Elem", h.dtype), *w2.template(), *shared.template("SHARED_"), ("A", A), ("D", D), ("F", F),
            ("ROWS", _DOWN_ROWS),
        ],
        grid=(32, A + 1, -(-D // _DOWN_ROWS) * T),
        threadgroup=(32, A + 1, 1),
        output_shapes=[(T, D)],
        output_dtypes=[h.dtype],
    )  # fmt: skip
    return y


def expert_down_sum_reference(h: mx.array, w2: ExpertWeights, expert: mx.array, shared: ExpertWeights) -> mx.array:
    pairs = expert.size
    y = expert_down_reference(h[:pairs], w2, expert.flatten(), False)
    return add_shared(y.reshape(*expert.shape, -1), _product(h[pairs:], shared))


def add_shared(routed: mx.array, shared: mx.array) -> mx.array:
    """Products of a token's experts [T, A, D] and of the shared one [T, D] -> their sum [T, D]; float32 inside."""
    return (routed.astype(mx.float32).sum(axis=1) + shared.astype(mx.float32)).astype(shared.dtype)


def _simdgroups(rows: int, each: int) -> int:
    """Simdgroups that take `each` of the rows, in whole threadgroups."""
    return -(-rows // (each * _SIMDGROUPS)) * _SIMDGROUPS


def _alike(w1: ExpertWeights, w3: ExpertWeights, columns: int) -> bool:
    """Whether the kernels are made for the two, which share a format there."""
    if not (w1.covered(columns) and w3.covered(columns)):
        return False
    return (w1.mode, w1.packing) == (w3.mode, w3.packing)


def _gather(x: mx.array, w: ExpertWeights, row: mx.array, expert: mx.array, sorted_experts: bool) -> mx.array:
    # Sorted runs are recognised only when the left side is not indexed.
    x, sorted_experts = x[row][:, None], sorted_experts and w.shares
    if w.scales is None:
        weight = summed_in_float32(w.weight).swapaxes(1, 2)
        y = mx.gather_mm(summed_in_float32(x), weight, rhs_indices=expert, sorted_indices=sorted_experts)
        return y[:, 0].astype(x.dtype)
    bits, group_size = w.packing
    y = mx.gather_qmm(
        summed_in_float32(x), w.weight, w.scales, w.biases, rhs_indices=expert, transpose=True,
        group_size=group_size, bits=bits, mode=w.mode, sorted_indices=sorted_experts,
    )  # fmt: skip
    return y[:, 0].astype(x.dtype)


def _product(x: mx.array, w: ExpertWeights) -> mx.array:
    """x [T, columns] times the shared expert's matrix."""
    if w.scales is None:
        return x @ w.weight.T
    return quantized_product(x, w.weight, w.scales, w.mode, w.biases, w.bits, w.group_size)
