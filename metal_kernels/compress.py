"""A closed group of tokens -> one compressed row."""

from __future__ import annotations

from typing import Literal

import mlx.core as mx

from ._dispatch import expect_blocks, expect_rotation, expect_shape, kernel, scalar, use_kernel
from .latents import fp8_except_rotated
from .packed_rows import expect_packable, key_bytes, pack_keys, pack_rows, row_bytes
from .rms_norm import rms_norm
from .rope import rope_reference
from .round_trip import FP4_BLOCK, FP8_BLOCK, hadamard, hadamard_fp4

Quant = Literal["none", "fp8", "fp4"]
# Of the kernel: each takes pairs of channels.
MAX_THREADS = 256


def compress(
    tokens: mx.array, ape: mx.array, weight: mx.array, cos: mx.array, sin: mx.array, eps: float,
    dtype: mx.Dtype, quant: Quant, packed: bool = False,
    *, kv: int, gate: int, start: int, before: bool,
) -> mx.array:  # fmt: skip
    """Pool groups of R tokens, normalise, rotate and round each as it is stored (spec 5).

    e[c] = sum over m of softmax_m(gate[m, c]) * kv[m, c], separately for every channel c. If a token is projected to
    2K channels, groups overlap: m are the first halves of the group before, then the second halves of the own group.

    Args:
        tokens: projected tokens, [B, n, width], float32. Rows go round: after the last comes the first.
        ape: added to the gates of a group's tokens, [R, K] or [R, 2K].
        weight: of the norm, [K].
        cos, sin: of the first position of each of the S groups, [S, P/2], float32.
        dtype: of the rows.
        quant: "fp8" rounds the dimensions that are not rotated (rows to attend); "fp4" applies the Hadamard
            transform and rounds all dimensions (index keys); "none" neither.
        packed: hand the rows out as bytes; dtype must be bfloat16, and quant not "none".
        kv, gate: columns of `tokens` where values and gates begin.
        start: row of the first token of the first group; the others follow.
        before: whether the rows of the group before the first are there; if not, it takes no part.

    Returns:
        [B, S, K] in `dtype`; packed [B, S, row_bytes(K, P)] or [B, S, key_bytes(K)], uint8.
    """
    (B, n, width), K, S, P = tokens.shape, weight.size, cos.shape[0], 2 * cos.shape[-1]
    R, channels = ape.shape
    expect_shape("compress", "weight", weight, (K,))
    expect_shape("compress", "ape", ape, (R, 2 * K if channels != K else K))
    expect_rotation("compress", cos, sin, S, K)
    expect_shape("compress", "tokens", tokens, (B, n, max(width, kv + channels, gate + channels)))
    if quant == "fp8":
        expect_blocks("compress", "weight", K - P, FP8_BLOCK)
    elif quant == "fp4":
        expect_blocks("compress", "weight", K, FP4_BLOCK)
    if packed:
        expect_packable("compress", "dtype", dtype, quant != "none")
    covers = K.bit_count() == 1 if quant == "fp4" else K % 2 == 0
    limit = f"a number of channels that is {'a power of two' if quant == 'fp4' else 'even'}"
    if not use_kernel("compress", covers=covers, limit=limit):
        return compress_reference(
            tokens, ape, weight, cos, sin, eps, dtype, quant, packed, kv=kv, gate=gate, start=start, before=before
        )
    size = 0 if not packed else key_bytes(K) if quant == "fp4" else row_bytes(K, P)
    threads = min(MAX_THREADS, -(-K // 64) * 32)
    inputs = ("tokens", "ape", "weight", "cosines", "sines", "eps", "place")
    (out,) = kernel("compress", inputs, ("out",), header="row rounding hadamard pack")(
        inputs=[tokens, ape, weight, cos, sin, scalar(eps), mx.array([start, before], mx.int32)],
        template=[
            ("Elem", dtype), ("R", R), ("M", R * (channels // K)), ("K", K), ("P", P), ("THREADS", threads),
            ("QUANT", ("none", "fp8", "fp4").index(quant)), ("BYTES", size),
            ("WIDTH", width), ("KV", kv), ("GATE", gate),
        ],
        grid=(threads, B * S, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(B, S, size or K)],
        output_dtypes=[mx.uint8 if packed else dtype],
    )  # fmt: skip
    return out


def compress_reference(
    tokens: mx.array, ape: mx.array, weight: mx.array, cos: mx.array, sin: mx.array, eps: float,
    dtype: mx.Dtype, quant: Quant, packed: bool = False,
    *, kv: int, gate: int, start: int, before: bool,
) -> mx.array:  # fmt: skip
    values, gates = candidates(tokens, ape, weight.size, cos.shape[0], kv, gate, start, before)
    pooled = (mx.softmax(gates, axis=2) * values).sum(axis=2).astype(dtype)
    row = rope_reference(rms_norm(pooled, weight, eps), cos, sin)
    if packed:
        return pack_keys(hadamard(row)) if quant == "fp4" else pack_rows(row, 2 * cos.shape[-1])
    if quant == "fp8":
        return fp8_except_rotated(row, 2 * cos.shape[-1])
    if quant == "fp4":
        return hadamard_fp4(row)
    return row


def candidates(
    tokens: mx.array, ape: mx.array, K: int, S: int, kv: int, gate: int, start: int, before: bool
) -> tuple[mx.array, mx.array]:
    """Values and gates of each group's candidates, [B, S, M, K] each."""
    R, channels = ape.shape
    overlap = channels != K
    rows = _rows(tokens, start - R * overlap, (S + overlap) * R)
    split = (tokens.shape[0], S + overlap, R, channels)
    values = rows[..., kv : kv + channels].reshape(split)
    gates = rows[..., gate : gate + channels].reshape(split) + ape
    if not overlap:
        return values, gates
    last_values, last_gates = values[:, :-1, :, :K], gates[:, :-1, :, :K]
    if not before:  # it takes no part in the softmax, whatever lies in its place
        last_values = mx.concatenate([mx.zeros_like(last_values[:, :1]), last_values[:, 1:]], axis=1)
        last_gates = mx.concatenate([mx.full(last_gates[:, :1].shape, -mx.inf), last_gates[:, 1:]], axis=1)
    return (
        mx.concatenate([last_values, values[:, 1:, :, K:]], axis=2),
        mx.concatenate([last_gates, gates[:, 1:, :, K:]], axis=2),
    )


def _rows(tokens: mx.array, first: int, count: int) -> mx.array:
    n = tokens.shape[1]
    if 0 <= first <= n - count:
        return tokens[:, first : first + count]
    return tokens[:, mx.array([(first + i) % n for i in range(count)])]
