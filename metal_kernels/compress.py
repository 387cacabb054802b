"""A closed group of tokens -> one compressed row."""

from __future__ import annotations

from typing import Literal

import mlx.core as mx

from ._dispatch import expect_blocks, expect_rotation, expect_shape, kernel, scalar, use_kernel
from .key_row import fp8_except_rotated
from .packed_rows import expect_packable, key_bytes, pack_keys, pack_rows, row_bytes
from .rms_norm import rms_norm_reference
from .rope import rope_reference
from .round_trip import FP4_BLOCK, FP8_BLOCK, hadamard, hadamard_fp4

Quant = Literal["none", "fp8", "fp4"]
# Of the kernel: each takes pairs of channels.
MAX_THREADS = 256


def compress(
    kv: mx.array, gate: mx.array, weight: mx.array, cos: mx.array, sin: mx.array, eps: float,
    dtype: mx.Dtype, quant: Quant, packed: bool = False,
) -> mx.array:  # fmt: skip
    """Pool each group, normalise, rotate and round it as it is stored (spec 5).

    e[c] = sum over m of softmax_m(gate[m, c]) * kv[m, c], separately for every channel c. A gate of minus
    infinity leaves its candidate out.

    Args:
        kv, gate: candidates of each group, [B, S, M, K], float32; M is R, or 2R when groups overlap.
        weight: of the norm, [K].
        cos, sin: of the first position of each group, [S, P/2], float32.
        dtype: of the rows.
        quant: "fp8" rounds the dimensions that are not rotated (rows to attend); "fp4" applies the Hadamard
            transform and rounds all dimensions (index keys); "none" neither.
        packed: hand the rows out as bytes; dtype must be bfloat16, and quant not "none".

    Returns:
        [B, S, K] in `dtype`; packed [B, S, row_bytes(K, P)] or [B, S, key_bytes(K)], uint8.
    """
    B, S, M, K = kv.shape
    expect_shape("compress", "gate", gate, kv.shape)
    expect_shape("compress", "weight", weight, (K,))
    expect_rotation("compress", cos, sin, S, K)
    if quant == "fp8":
        expect_blocks("compress", "kv", K - 2 * cos.shape[-1], FP8_BLOCK)
    elif quant == "fp4":
        expect_blocks("compress", "kv", K, FP4_BLOCK)
    if packed:
        expect_packable("compress", "dtype", dtype, quant != "none")
    covers = K.bit_count() == 1 if quant == "fp4" else K % 2 == 0
    limit = f"a number of channels that is {'a power of two' if quant == 'fp4' else 'even'}"
    if not use_kernel("compress", covers=covers, limit=limit):
        return compress_reference(kv, gate, weight, cos, sin, eps, dtype, quant, packed)
    size = 0 if not packed else key_bytes(K) if quant == "fp4" else row_bytes(K, 2 * cos.shape[-1])
    threads = min(MAX_THREADS, -(-K // 64) * 32)
    inputs = ("kv", "gate", "weight", "cosines", "sines", "eps")
    (out,) = kernel("compress", inputs, ("out",), header="row rounding hadamard pack")(
        inputs=[kv, gate, weight, cos, sin, scalar(eps)],
        template=[
            ("Elem", dtype), ("M", M), ("K", K), ("P", 2 * cos.shape[-1]), ("THREADS", threads),
            ("QUANT", ("none", "fp8", "fp4").index(quant)), ("BYTES", size),
        ],
        grid=(threads, B * S, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(B, S, size or K)],
        output_dtypes=[mx.uint8 if packed else dtype],
    )  # fmt: skip
    return out


def compress_reference(
    kv: mx.array, gate: mx.array, weight: mx.array, cos: mx.array, sin: mx.array, eps: float,
    dtype: mx.Dtype, quant: Quant, packed: bool = False,
) -> mx.array:  # fmt: skip
    pooled = (mx.softmax(gate, axis=2) * kv).sum(axis=2).astype(dtype)
    row = rope_reference(rms_norm_reference(pooled, weight, eps), cos, sin)
    if packed:
        return pack_keys(hadamard(row)) if quant == "fp4" else pack_rows(row, 2 * cos.shape[-1])
    if quant == "fp8":
        return fp8_except_rotated(row, 2 * cos.shape[-1])
    if quant == "fp4":
        return hadamard_fp4(row)
    return row
