"""Kernels of expert_gate_up and expert_down for many pairs sorted by expert, with the matrices of simdgroups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from ._dispatch import kernel, scalar
from .quantized_product import BITS

if TYPE_CHECKING:
    from .experts import ExpertWeights

# Pairs of a tile, and rows of weights; threads of a threadgroup. As in expert_tile.metal.
_PAIRS, _ROWS, _THREADS = 32, 64, 128


def gate_up_prefill(
    x: mx.array, w1: ExpertWeights, w3: ExpertWeights, token: mx.array, expert: mx.array, weight: mx.array,
    limit: float,
) -> mx.array:  # fmt: skip
    """expert_gate_up, with `expert` ascending and at least one pair."""
    (E, F, _), D = w1.weight.shape, x.shape[-1]
    inputs = ("x", "w1", "s1", "w3", "s3", "token", "offsets", "weight", "limit")
    (y,) = kernel("expert_gate_up_prefill", inputs, ("y",), header="decode matrix expert_tile")(
        inputs=[
            x, w1.weight, w1.scales, w3.weight, w3.scales, token, _offsets(expert, E), weight, scalar(limit),
        ],
        template=_template(x, w1, E, D, F),
        grid=(-(-F // (_ROWS // 2)) * _THREADS, _slots(expert.size, E), 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(expert.size, F)],
        output_dtypes=[x.dtype],
    )  # fmt: skip
    return y


def down_prefill(h: mx.array, w2: ExpertWeights, expert: mx.array) -> mx.array:
    """expert_down, with `expert` ascending and at least one pair."""
    (E, D, _), F = w2.weight.shape, h.shape[-1]
    inputs = ("h", "w2", "s2", "offsets")
    (y,) = kernel("expert_down_prefill", inputs, ("y",), header="decode matrix expert_tile")(
        inputs=[h, w2.weight, w2.scales, _offsets(expert, E)],
        template=_template(h, w2, E, D, F),
        grid=(-(-D // _ROWS) * _THREADS, _slots(expert.size, E), 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(expert.size, D)],
        output_dtypes=[h.dtype],
    )
    return y


def _template(x: mx.array, w: ExpertWeights, E: int, D: int, F: int) -> list[tuple[str, int | mx.Dtype]]:
    # Weights of both formats are numbers of bfloat16. In float16 some are not, so tiles are float32.
    tile = x.dtype if x.dtype == mx.bfloat16 else mx.float32
    return [("Elem", x.dtype), ("Tile", tile), ("BITS", BITS[w.mode]), ("E", E), ("D", D), ("F", F)]


def _offsets(expert: mx.array, E: int) -> mx.array:
    """Where the pairs of each expert begin, and where those of the last end: [E + 1]; the host does not wait."""
    (offsets,) = kernel("expert_offsets", ("expert",), ("offsets",))(
        inputs=[expert],
        template=[],
        grid=(E + 1, 1, 1),
        threadgroup=(min(E + 1, 256), 1, 1),
        output_shapes=[(E + 1,)],
        output_dtypes=[mx.int32],
    )
    return offsets


def _slots(pairs: int, E: int) -> int:
    """Tiles of pairs there may be, whichever experts they have."""
    return (pairs - 1) // _PAIRS + E
