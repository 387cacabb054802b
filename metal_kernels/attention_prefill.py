"""The kernel of sparse_attention for many queries, with the matrices of simdgroups."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import kernel, scalar, use_kernel
from .packed_rows import is_packed

# From this many tokens on there are threadgroups enough without splitting the keys of a query.
PREFILL_FROM = 33

# Simdgroups of a threadgroup, four for 16 heads: 32 heads, whose queries and sums take 96 registers of each lane in a
# 16-bit type. Twice as many simdgroups would need more than the registers of a core of the first generations.
_SIMDS = 8
# Keys in threadgroup memory at a time: as many as 16 KiB hold, in eights, and not more than a simdgroup has lanes.
_TILE_BYTES, _TILE_ROWS = 16384, 16
_WIDEST = 512


def use_prefill(q: mx.array) -> bool:
    """Whether sparse_attention, which covers this call, leaves it to the kernel for many queries."""
    _, T, _, K = q.shape
    return T >= PREFILL_FROM and K <= _WIDEST and use_kernel("attention_prefill")


def attention_prefill(
    q: mx.array, window: mx.array, rows: mx.array | None, picks: mx.array | None, sink: mx.array,
    cos: mx.array, sin: mx.array, sizes: mx.array,
) -> mx.array:  # fmt: skip
    """sparse_attention in one launch; sizes are position, ratio, window_size and the number of rows or picks."""
    B, T, H, K = q.shape
    simds = min(_SIMDS, -(-H // 16) * 4)
    fitting = _TILE_BYTES // (-(-K // 64) * 64 * q.dtype.size)
    names = ("q", "window", "rows", "picks", "sink", "cosines", "sines", "scale", "sizes")
    # In the place of what is absent stands something that is not read.
    places = (window if rows is None else rows, sizes if picks is None else picks)
    (out,) = kernel("attention_prefill", names, ("out",), header="row decode attention_row matrix")(
        inputs=[q, window, *places, sink, cos, sin, scalar(K**-0.5), sizes],
        template=[
            ("Elem", q.dtype), ("H", H), ("K", K), ("P", 2 * cos.shape[-1]), ("SIMDS", simds),
            ("TILE", max(8, min(_TILE_ROWS, fitting) // 8 * 8)), ("PICKED", picks is not None),
            ("BYTES", window.shape[-1] if is_packed(window) else 0),
        ],
        grid=(32 * simds, -(-H // (4 * simds)), B * T),
        threadgroup=(32 * simds, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=[q.dtype],
    )  # fmt: skip
    return out
