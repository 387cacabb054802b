"""Matrix products of sorted rows, one matrix for each group of them."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("nano::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    """The first counts[0] rows of x [S, K] times w[0] [N, K] transposed, and so on: [S, N]."""
    out = x.new_empty(x.shape[0], w.shape[1])
    for rows, result, matrix in zip(_split(x, counts), _split(out, counts), w, strict=True):
        torch.mm(rows, matrix.T, out=result)
    return out


@torch.library.custom_op("nano::grouped_outer", mutates_args=())
def grouped_outer(dy: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """Gradient of the matrices: [E, N, K] from dy [S, N] and x [S, K]."""
    out = x.new_empty(counts.shape[0], dy.shape[1], x.shape[1])
    for a, b, result in zip(_split(dy, counts), _split(x, counts), out, strict=True):
        torch.mm(a.T, b, out=result)
    return out


def _split(x: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    return x.split(counts.tolist())


@grouped_mm.register_fake
def _(x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


@grouped_outer.register_fake
def _(dy: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], dy.shape[1], x.shape[1])


def _backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
    x, w, counts = ctx.saved_tensors
    dy = dy.contiguous()
    return grouped_mm(dy, w.mT.contiguous(), counts), grouped_outer(dy, x, counts), None


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


grouped_mm.register_autograd(_backward, setup_context=_setup)
