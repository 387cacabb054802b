"""Products with packed weights, summed in float32 on every device."""

from __future__ import annotations

import mlx.core as mx

# Bits and columns for each scale, of the formats that fix them; those of affine weights.
FORMATS = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}
AFFINE_BITS, AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
# Formats whose scales are powers of two.
BITS = {"mxfp4": 4, "mxfp8": 8}


def quantized_product(
    x: mx.array, weight: mx.array, scales: mx.array, mode: str, biases: mx.array | None = None,
    bits: int | None = None, group_size: int | None = None,
) -> mx.array:  # fmt: skip
    """x @ weight.T for packed weights.

    Args:
        x: [..., M, K], any float type.
        weight: [..., N, K * bits / 32], uint32; scales: [..., N, K / group_size], uint8, or floats if affine.
        mode: "mxfp4", "mxfp8", "nvfp4", or "affine" with biases in the shape of the scales.
        bits, group_size: of affine weights; the other modes fix them.

    Returns:
        [..., M, N] in the type of x; one rounding at the end.
    """
    if mode in FORMATS:
        bits, group_size = FORMATS[mode]
    y = mx.quantized_matmul(
        summed_in_float32(x), weight, scales, biases, transpose=True, group_size=group_size, bits=bits, mode=mode
    )
    return y.astype(x.dtype)


def summed_in_float32(x: mx.array) -> mx.array:
    """x as MLX needs it to sum a quantised or gathered product in float32.

    Metal and CUDA do so for every type. MLX's CPU backend sums a quantised product in the type of x, which in
    bfloat16 loses most of its digits at a few hundred columns, and has a gathered one in float32 only.
    """
    return x.astype(mx.float32) if mx.default_device() == mx.cpu else x
