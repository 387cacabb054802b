"""Rows and index keys as caches hold them: codes, what is not rounded, scales (spec 6.3 and 10.1).

A packed row of K values, the last P of them rotated, is (K - P) bytes of e4m3, P values of bfloat16, a byte of E8M0 for
each block of 64, and zeros up to a multiple of 8 bytes: 584 for 512 and 64. A packed index key of J values is J / 2
bytes of e2m1, the even value in the low bits, a byte of E8M0 for each block of 32, and zeros up to a multiple of 4: 68
for 128.

Arrays of packed rows are uint8, and nothing else in a cache is: the type says how to read it. Packing rounds as
`fp8_round_trip` and `fp4_round_trip` do, and what was rounded before stays as it is, bit for bit. A block that holds
infinity or NaN has the scale 255 and codes of 0, and is NaN throughout when it is read.
"""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import KernelError, expect_blocks
from .round_trip import FP4_BLOCK, FP4_FLOOR, FP4_MAX, FP8_BLOCK, FP8_FLOOR, FP8_MAX, on_grid

_BROKEN = 255  # E8M0's NaN


def row_bytes(K: int, P: int) -> int:
    """Bytes of a packed row of K values, P of them rotated."""
    return -(-((K - P) + 2 * P + (K - P) // FP8_BLOCK) // 8) * 8


def key_bytes(J: int) -> int:
    """Bytes of a packed index key of J values."""
    return -(-(J // 2 + J // FP4_BLOCK) // 4) * 4


def is_packed(rows: mx.array) -> bool:
    """Whether an array holds packed rows or keys."""
    return rows.dtype == mx.uint8


def expect_packable(op: str, name: str, dtype: mx.Dtype, rounded: bool) -> None:
    """Raise KernelError unless rows of this type lose nothing when they are packed."""
    if dtype != mx.bfloat16 or not rounded:
        found = f"{dtype}{'' if rounded else ', not rounded'}"
        raise KernelError(f"{op}: {name}: expected rounded rows of bfloat16 to pack, found {found}")


def pack_rows(x: mx.array, rotated: int) -> mx.array:
    """FP8 but for the last `rotated` values, as bytes.

    Args:
        x: [..., K], bfloat16; K - rotated is a multiple of 64.

    Returns:
        [..., row_bytes(K, rotated)], uint8.
    """
    expect_packable("pack_rows", "x", x.dtype, True)
    expect_blocks("pack_rows", "x", x.shape[-1] - rotated, FP8_BLOCK)
    still, turned = mx.split(x, [x.shape[-1] - rotated], axis=-1)
    blocks, scale = on_grid(still, FP8_BLOCK, FP8_MAX, FP8_FLOOR)
    exponents = _exponents(scale)
    codes = mx.where(exponents == _BROKEN, 0, mx.to_fp8(blocks)).flatten(-2)
    return _joined(codes, mx.contiguous(turned).view(mx.uint8), exponents, row_bytes(x.shape[-1], rotated))


def unpack_rows(rows: mx.array, K: int, rotated: int) -> mx.array:
    """What packed rows [..., row_bytes(K, rotated)] stand for: [..., K], float32."""
    ends = [K - rotated, K + rotated, K + rotated + (K - rotated) // FP8_BLOCK]
    codes, turned, exponents, _ = mx.split(rows, ends, axis=-1)
    still = _scaled(_numbers(codes, mantissa=3, bias=7, spare=0), exponents, FP8_BLOCK)
    return mx.concatenate([still, turned.view(mx.bfloat16).astype(mx.float32)], axis=-1)


def pack_keys(x: mx.array) -> mx.array:
    """FP4, as bytes.

    Args:
        x: [..., J], bfloat16; J is a multiple of 32.

    Returns:
        [..., key_bytes(J)], uint8.
    """
    expect_packable("pack_keys", "x", x.dtype, True)
    expect_blocks("pack_keys", "x", x.shape[-1], FP4_BLOCK)
    blocks, scale = on_grid(x, FP4_BLOCK, FP4_MAX, FP4_FLOOR)
    exponents = _exponents(scale)
    # The grid's steps are 0.5, 1 and 2; the codes below a piece of it are 0, 2 and 4 more than the steps to there.
    size, sign = mx.abs(blocks), (blocks.view(mx.uint32) >> 31 << 3).astype(mx.uint8)
    step = mx.where(size < 2, 0.5, mx.where(size < 4, 1.0, 2.0))
    before = mx.where(size < 2, 0.0, mx.where(size < 4, 2.0, 4.0))
    codes = (mx.round(size / step) + before).astype(mx.uint8) | sign
    codes = mx.where(exponents == _BROKEN, 0, codes).flatten(-2)
    return _joined(codes[..., 0::2] | codes[..., 1::2] << 4, codes[..., :0], exponents, key_bytes(x.shape[-1]))


def unpack_keys(keys: mx.array, J: int) -> mx.array:
    """What packed index keys [..., key_bytes(J)] stand for: [..., J], float32."""
    pairs, exponents, _ = mx.split(keys, [J // 2, J // 2 + J // FP4_BLOCK], axis=-1)
    codes = mx.stack([pairs << 4, pairs], axis=-1).flatten(-2)  # in the high bits; what is below is masked
    return _scaled(_numbers(codes, mantissa=1, bias=1, spare=4), exponents, FP4_BLOCK)


def _numbers(codes: mx.array, mantissa: int, bias: int, spare: int) -> mx.array:
    """The numbers of codes that begin at the top of a byte and leave `spare` bits below; float32.

    A code's bits become the same fields of a wider float, whose subnormals stand for its own; the difference of the
    biases is made good by a product. GPUs flush subnormals of bfloat16, and CPUs are slow to convert float16.
    """
    float_type, wide_mantissa, wide_bias = (
        (mx.bfloat16, 7, 127) if mx.default_device() == mx.cpu else (mx.float16, 10, 15)
    )
    shift = wide_mantissa - mantissa - spare
    # As signed numbers, so that the sign is at the top of the wider one, too.
    fields = (0x7F >> spare << spare << shift) - 0x8000
    bits = (codes.view(mx.int8).astype(mx.int16) << shift) & mx.array(fields, mx.int16)
    return bits.view(float_type).astype(mx.float32) * 2.0 ** (wide_bias - bias)


def _scaled(values: mx.array, exponents: mx.array, block: int) -> mx.array:
    scale = (exponents.astype(mx.uint32) << 23).view(mx.float32)
    return (values.reshape(*exponents.shape, block) * scale[..., None]).reshape(values.shape)


def _exponents(scale: mx.array) -> mx.array:
    """E8M0 of powers of two [..., 1]; of the scale of a block with infinity or NaN, 255."""
    return mx.minimum(scale.view(mx.uint32) >> 23, _BROKEN).astype(mx.uint8)


def _joined(codes: mx.array, plain: mx.array, exponents: mx.array, size: int) -> mx.array:
    parts = [codes, plain, exponents[..., 0]]
    missing = size - sum(part.shape[-1] for part in parts)
    return mx.concatenate([*parts, mx.zeros((*codes.shape[:-1], missing), mx.uint8)], axis=-1)
