"""Muon for matrices, Adam for everything else; state in plain tensors, so that processes can share it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .recipe import RATES

MOMENTUM, DECAY = 0.95, 0.05
BETAS, EPS = (0.9, 0.95), 1e-8


def kind_of(name: str) -> str:
    """Which learning rate, and whether Muon's: matrices between activations are "matrix"."""
    if name in ("embed.weight", "head.weight"):
        return name.split(".")[0]
    last = name.removesuffix(".weight").split(".")[-1]
    return "matrix" if last.startswith("w") and "weights_proj" not in last else "other"


@dataclass
class Slot:
    """A parameter, its state, and what the processes found for its gradient."""

    name: str
    value: Tensor
    first: Tensor
    second: Tensor | None
    gradients: list[Tensor]


def update(slots: list[Slot], step: int, rate: float) -> None:
    """One step for these parameters; `rate` scales all learning rates."""
    groups: dict[tuple[int, int], list[Slot]] = {}
    for slot in slots:
        gradient = sum(slot.gradients[1:], slot.gradients[0].clone())
        kind = kind_of(slot.name)
        if kind != "matrix":
            _adam(slot, gradient, step, rate * RATES[kind])
            continue
        slot.first.lerp_(gradient, 1 - MOMENTUM)
        rows, columns = sorted(slot.value.shape[-2:])
        groups.setdefault((rows, columns), []).append(slot)
        slot.gradients[0].copy_(gradient.lerp_(slot.first, MOMENTUM))
    for same in groups.values():
        _muon(same, rate * RATES["matrix"])


def _adam(slot: Slot, gradient: Tensor, step: int, rate: float) -> None:
    assert slot.second is not None
    slot.first.lerp_(gradient, 1 - BETAS[0])
    slot.second.lerp_(gradient.square(), 1 - BETAS[1])
    size = (slot.second / (1 - BETAS[1] ** (step + 1))).sqrt_().add_(EPS)
    slot.value.addcdiv_(slot.first, size, value=-rate / (1 - BETAS[0] ** (step + 1)))


def _muon(slots: list[Slot], rate: float) -> None:
    """Matrices of one shape, or its transpose, at once."""
    wide = [s.gradients[0].mT if s.value.shape[-2] > s.value.shape[-1] else s.gradients[0] for s in slots]
    stacks = [w.reshape(-1, *w.shape[-2:]) for w in wide]
    done = orthogonal(torch.cat(stacks)).split([len(s) for s in stacks])
    for slot, w in zip(slots, done, strict=True):
        rows, columns = slot.value.shape[-2:]
        w = (w.mT if rows > columns else w).reshape(slot.value.shape)
        slot.value.mul_(1 - rate * DECAY).add_(w, alpha=-rate * max(1.0, rows / columns) ** 0.5)


def orthogonal(x: Tensor) -> Tensor:
    """Matrices [n, rows <= columns] with all singular values brought near one, by Newton and Schulz."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)).bfloat16()
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * (square @ square)) @ x
    return x.float()
