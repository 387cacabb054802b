"""Products with packed weights, summed in float32 on every device."""

from __future__ import annotations

import mlx.core as mx

GROUP_SIZE = 32
BITS = {"mxfp4": 4, "mxfp8": 8}


def quantized_product(x: mx.array, weight: mx.array, scales: mx.array, mode: str) -> mx.array:
    """x @ weight.T for mxfp4 or mxfp8 weights.

    Args:
        x: [..., M, K], any float type.
        weight: [..., N, K * bits / 32], uint32; scales: [..., N, K / 32], uint8.

    Returns:
        [..., M, N] in the type of x; one rounding at the end.
    """
    y = mx.quantized_matmul(
        summed_in_float32(x), weight, scales, transpose=True, group_size=GROUP_SIZE, bits=BITS[mode], mode=mode
    )
    return y.astype(x.dtype)


def summed_in_float32(x: mx.array) -> mx.array:
    """x as MLX needs it to sum a quantised or gathered product in float32.

    Metal and CUDA do so for every type. MLX's CPU backend sums a quantised product in the type of x, which in
    bfloat16 loses most of its digits at a few hundred columns, and has a gathered one in float32 only.
    """
    return x.astype(mx.float32) if mx.default_device() == mx.cpu else x
