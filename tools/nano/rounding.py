"""Round trips through FP8 and FP4 (spec 6.3, 9.3), with the gradient of doing nothing."""

from __future__ import annotations

import torch
from torch import Tensor

FP8_MAX, FP4_MAX = 448.0, 6.0


def round_fp8(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).float()


def round_fp4(x: Tensor) -> Tensor:
    """To 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives, ties to the even mantissa."""
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign((size / step).round() * step, x)


def power_of_two(amax: Tensor, limit: float, floor: float) -> Tensor:
    """The smallest power of two by which amax is divided to be at most the limit."""
    return torch.exp2(torch.ceil(torch.log2(amax.clamp(min=floor) / limit)))


def _through(x: Tensor, rounded: Tensor) -> Tensor:
    return x + (rounded - x).detach()


def _blocks(x: Tensor, size: int, limit: float, floor: float, fp8: bool) -> Tensor:
    b = x.float().unflatten(-1, (-1, size))
    s = power_of_two(b.abs().amax(-1, keepdim=True), limit, floor)
    q = (b / s).clamp(-limit, limit)
    return ((round_fp8(q) if fp8 else round_fp4(q)) * s).flatten(-2)


def cache_fp8(row: Tensor, rotated: int) -> Tensor:
    """Rows [..., K] as the cache holds them: all but the rotated dims in FP8, blocks of 64."""
    K = row.shape[-1]
    kept, turned = row.split((K - rotated, rotated), -1)
    return _through(row, torch.cat((_blocks(kept.detach(), 64, FP8_MAX, 1e-4, True), turned.detach()), -1))


def hadamard(x: Tensor) -> Tensor:
    """Sylvester's transform of the last axis, orthogonal."""
    width = x.shape[-1]
    h = 1
    while h < width:
        a, b = x.unflatten(-1, (-1, 2, h)).unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        h *= 2
    return x * width**-0.5


def cache_fp4(x: Tensor) -> Tensor:
    """The indexer's queries and keys, [..., J]: Hadamard transform, then FP4 in blocks of 32."""
    x = hadamard(x.float())
    return _through(x, _blocks(x.detach(), 32, FP4_MAX, 6 * 2.0**-126, False))


def fp4_scale(w: Tensor) -> Tensor:
    """Scale of each 32 columns, [..., C / 32]."""
    return power_of_two(w.unflatten(-1, (-1, 32)).abs().amax(-1), FP4_MAX, 2.0**-100)


def fp8_scale(w: Tensor) -> Tensor:
    """Scale of each block of 128 x 128 of [rows, columns], the last ones cut short."""
    rows, columns = w.shape
    padded = torch.nn.functional.pad(w, (0, -columns % 128, 0, -rows % 128))
    tiles = padded.unflatten(0, (-1, 128)).unflatten(-1, (-1, 128))
    return power_of_two(tiles.abs().amax((1, 3)), FP8_MAX, 2.0**-100)


def fp4_codes_value(w: Tensor) -> Tensor:
    """What is left of w [..., C] in FP4."""
    s = fp4_scale(w).repeat_interleave(32, -1)
    return round_fp4((w / s).clamp(-FP4_MAX, FP4_MAX)) * s


def fp8_codes_value(w: Tensor) -> Tensor:
    """What is left of w [rows, columns] in FP8."""
    s = fp8_scale(w).repeat_interleave(128, 0).repeat_interleave(128, 1)[: w.shape[0], : w.shape[1]]
    return round_fp8((w / s).clamp(-FP8_MAX, FP8_MAX)) * s


def fp4_weight(w: Tensor) -> Tensor:
    return _through(w, fp4_codes_value(w.detach()))


def fp8_weight(w: Tensor) -> Tensor:
    return _through(w, fp8_codes_value(w.detach()))
