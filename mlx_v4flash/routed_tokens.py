"""Inputs of matrices while a text is calibrated with: their products, and which tokens each routed expert has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from metal_kernels import swiglu

from .quantize import feedback_matrix

# An expert chosen for fewer tokens is rounded without its inputs.
RARE = 16
# What is expected of inputs counts as much as this share of as many tokens as there are columns.
_PRIOR = 1 / 2

Back = Callable[[mx.array], mx.array]
Matrix = np.ndarray[Any, Any]


class Gram:
    """Sums of products of inputs, [columns, columns], or of each of G groups of them."""

    def __init__(self) -> None:
        self.sums: Matrix = np.zeros(0, np.float32)
        self.count = 0

    def add(self, x: mx.array) -> None:
        """Inputs [B, T, columns] or [B, T, G, columns], or [T, columns]."""
        rows = np.array(x.astype(mx.float32))
        rows = rows.reshape(-1, *rows.shape[2:]) if rows.ndim > 2 else rows
        products = rows.T @ rows if rows.ndim == 2 else np.stack([g.T @ g for g in rows.swapaxes(0, 1)])
        self.sums = self.sums + products if self.sums.size else products
        self.count += len(rows)

    def feedback(self, damping: float = 0.03) -> mx.array:
        """As `quantize.requantize` takes it."""
        if self.sums.ndim == 2:
            return feedback_matrix(self.sums, damping)
        return mx.stack([feedback_matrix(part, damping) for part in self.sums])


class RoutedTokens:
    """Tokens of a layer in front of its routed experts, and the sum of what the experts make of them."""

    def __init__(self, limit: float) -> None:
        self._limit, self.rare = limit, 0
        self._parts: list[tuple[Matrix, Matrix, Matrix, mx.array, Back]] = []

    def add(self, x: mx.array, experts: mx.array, weights: mx.array, shared: mx.array, back: Back) -> None:
        """One sequence: inputs and shared expert's outputs [T, D], choice and weights [T, A], way back to streams."""
        mx.eval(shared)
        held = np.array(x.astype(mx.float32)), np.array(experts), np.array(weights)
        self._parts.append((*held, shared, back))

    def begin(self) -> None:
        """All sequences are there."""
        self.x, self._experts, self._weights = (np.concatenate([part[i] for part in self._parts]) for i in range(3))
        self.expected = self.x.T @ self.x / np.float32(len(self.x))
        self.sum = np.zeros_like(self.x)

    def of(self, expert: int) -> ExpertTokens:
        row, place = np.nonzero(self._experts == expert)
        self.rare += len(row) < RARE
        return ExpertTokens(self, row, self._weights[row, place], self._limit)

    def streams(self) -> list[mx.array]:
        """What leaves the layer, [1, T, N, D] of each sequence."""
        ends = np.cumsum([len(part[0]) for part in self._parts])[:-1]
        return [
            back((mx.array(routed) + shared)[None])
            for routed, (*_, shared, back) in zip(np.split(self.sum, ends), self._parts, strict=True)
        ]


class ExpertTokens:
    """Those tokens that one expert is chosen for."""

    def __init__(self, layer: RoutedTokens, row: Matrix, weights: Matrix, limit: float) -> None:
        self._layer, self._row, self._weights, self._limit = layer, row, weights[:, None], limit
        self.count = len(row)

    def inputs(self, known: Mapping[str, mx.array]) -> Gram:
        """Of w1 and w3, or, if these are known, of w2: weighted as its output is, and drawn to what is expected.

        That is the inputs of the whole layer for w1 and w3; for w2 nothing but their size.
        """
        rows = self._hidden(known) if known else self._layer.x[self._row] * self._weights
        total = len(rows) if known else float(np.square(self._weights).sum())
        found = rows.T @ rows / np.float32(total)
        columns = len(found)
        expected = np.eye(columns, dtype=np.float32) * (np.trace(found) / columns) if known else self._layer.expected
        gram, prior = Gram(), _PRIOR * columns
        gram.sums, gram.count = (found * self.count + expected * prior) / np.float32(self.count + prior), self.count
        return gram

    def finish(self, known: Mapping[str, mx.array]) -> None:
        """Add what the expert gives, with all its matrices known, to the layer's sum."""
        if self.count:
            self._layer.sum[self._row] += self._hidden(known) @ np.array(known["w2"]).T

    def _hidden(self, known: Mapping[str, mx.array]) -> Matrix:
        x = self._layer.x[self._row]
        g, u = (mx.array(x @ np.array(known[name]).T) for name in ("w1", "w3"))
        h: Matrix = np.array(swiglu(g, u, self._limit)) * self._weights
        return h
