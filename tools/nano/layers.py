"""How training computes, and the smallest parts of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .rounding import fp8_weight


@dataclass
class Training:
    """How to compute during training, as opposed to what.

    Args:
        dtype: of matrix products; sums are float32.
        sparse: CSA layers attend only the rows their indexer chose; off, all visible rows.
        rounding: weights and cached rows as the checkpoint and the cache will hold them, gradients unchanged.
        index_stride: the indexer learns from every so-manieth query.
    """

    dtype: torch.dtype = torch.bfloat16
    sparse: bool = True
    rounding: bool = False
    index_stride: int = 8


class Weights(nn.Module):
    """A weight [rows, columns] without bias, named as in the checkpoint; FP8 there if `coded`."""

    def __init__(self, rows: int, columns: int, coded: bool = True, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns) * gain / math.sqrt(columns))
        self.coded = coded

    def of(self, how: Training) -> Tensor:
        w = fp8_weight(self.weight) if how.rounding and self.coded else self.weight
        return w.to(how.dtype)

    def forward(self, x: Tensor, how: Training) -> Tensor:
        return F.linear(x.to(how.dtype), self.of(how))


def rms(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms(x, self.eps, self.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last dims of x [..., K], neighbours in pairs; cos and sin broadcast to [..., P / 2]."""
    P = 2 * cos.shape[-1]
    keep, pairs = x[..., : x.shape[-1] - P], x[..., x.shape[-1] - P :].unflatten(-1, (-1, 2))
    a, b = pairs.unbind(-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    return torch.cat((keep, turned), -1)
