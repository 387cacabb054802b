"""What each layer remembers: the window, open groups, and compressed rows.

Rows have K values, or are packed in bytes (see metal_kernels/packed_rows.py): nothing here looks inside.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache

# Rows added to a buffer when it is full. Memory grows by these blocks, not at every step.
ROW_BLOCK = 256


class Rows:
    """Compressed rows in a buffer that grows in blocks."""

    def __init__(self) -> None:
        self.buffer: mx.array | None = None  # [B, capacity, K]
        self.count = 0

    def append(self, rows: mx.array) -> None:
        """Add rows [B, S, K]."""
        B, S, K = rows.shape
        buffer = mx.zeros((B, 0, K), rows.dtype) if self.buffer is None else self.buffer
        if self.count + S > buffer.shape[1]:
            grown = -(-(self.count + S) // ROW_BLOCK) * ROW_BLOCK
            empty = mx.zeros((B, grown - self.count, K), rows.dtype)
            buffer = mx.concatenate([buffer[:, : self.count], empty], axis=1)
        self.buffer = mx.slice_update(buffer, rows, mx.array([self.count]), (1,))
        self.count += S

    def all(self) -> mx.array | None:
        """[B, S, K], or None before the first row."""
        return None if self.buffer is None else self.buffer[:, : self.count]

    @property
    def state(self) -> mx.array | None:
        return self.all()

    @state.setter
    def state(self, rows: mx.array | None) -> None:
        self.buffer, self.count = rows, 0 if rows is None else rows.shape[1]


class CompressorCache:
    """Rows of one compressor, the tokens of its open group, and what the last closed group hands on.

    Attributes:
        open_kv, open_gate: projected tokens of the open group, [B, n, width], float32; None when n = 0.
        last_kv, last_gate: first halves of the last closed group, [B, R, K], float32; None before it, or if
            groups do not overlap.
    """

    LEAVES = ("open_kv", "open_gate", "last_kv", "last_gate")

    def __init__(self, ratio: int) -> None:
        self.ratio = ratio
        self.rows = Rows()
        self.open_kv: mx.array | None = None
        self.open_gate: mx.array | None = None
        self.last_kv: mx.array | None = None
        self.last_gate: mx.array | None = None

    def close_groups(self, kv: mx.array, gate: mx.array) -> tuple[mx.array, mx.array] | None:
        """Add projected tokens [B, T, width]; hand out the groups that are now full, [B, S, R, width] each."""
        if self.open_kv is not None and self.open_gate is not None:
            kv = mx.concatenate([self.open_kv, kv], axis=1)
            gate = mx.concatenate([self.open_gate, gate], axis=1)
        B, n, width = kv.shape
        full = n - n % self.ratio
        # A copy, not a view: a view would keep the projections of the whole chunk alive.
        self.open_kv = mx.contiguous(kv[:, full:]) if full < n else None
        self.open_gate = mx.contiguous(gate[:, full:]) if full < n else None
        if not full:
            return None
        shape = (B, full // self.ratio, self.ratio, width)
        return kv[:, :full].reshape(shape), gate[:, :full].reshape(shape)

    @property
    def state(self) -> tuple[Any, ...]:
        return (self.ratio, self.rows.state, *(getattr(self, name) for name in self.LEAVES))

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        self.__init__(state[0])  # type: ignore[misc]
        self.rows.state = state[1]
        for name, leaf in zip(self.LEAVES, state[2:], strict=True):
            setattr(self, name, leaf)

    def leaves(self) -> list[mx.array]:
        found = [self.rows.buffer, *(getattr(self, name) for name in self.LEAVES)]
        return [leaf for leaf in found if leaf is not None]


class LayerCache(_BaseCache):
    """State of one layer, usable with mlx-lm's generation and its prompt-cache files.

    Args:
        window_size: W, rows of the ring.
        ratio: tokens per compressed row; 0 for a layer without a compressor.

    Attributes:
        position: tokens seen so far.
        window: ring of the last W rows, [B, W, K]; the row of position p is at p % W. None at first.
    """

    def __init__(self, window_size: int, ratio: int) -> None:
        self.window_size, self.ratio = window_size, ratio
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.position = 0
        self.window: mx.array | None = None
        self.attn = CompressorCache(self.ratio) if self.ratio else None
        self.index = CompressorCache(self.ratio) if self.ratio == 4 else None

    def extend_window(self, rows: mx.array) -> mx.array:
        """Add the rows of T tokens, [B, T, K], and return those their queries may see.

        Returns:
            The new rows after up to W - 1 older ones, in order of position; of a single token the ring as it is,
            whose order does not matter (at most W rows, [B, S, K]).
        """
        B, T, K = rows.shape
        W, start = self.window_size, self.position
        self.position += T
        if self.window is None:
            self.window = mx.zeros((B, W, K), rows.dtype)
        if T == 1:
            self.window = mx.slice_update(self.window, rows, mx.array([start % W]), (1,))
            return self.window[:, : min(start + 1, W)]
        ordered = mx.roll(self.window, -(start % W), 1)[:, W - min(start, W - 1) :] if start else rows[:, :0]
        seen = mx.concatenate([ordered, rows], axis=1) if start else rows
        last = seen[:, -W:]
        missing = W - last.shape[1]
        if missing:
            last = mx.concatenate([last, mx.zeros((B, missing, K), rows.dtype)], axis=1)
            self.window = last  # fewer than W tokens in all: row p is at p already
        else:
            self.window = mx.roll(last, self.position % W, 1)
        return seen

    def copy(self) -> LayerCache:
        """An independent cache with the same contents; the bytes are shared until one of them changes."""
        return LayerCache.from_state(self.state)  # type: ignore[no-any-return]

    @property
    def state(self) -> tuple[Any, ...]:
        parts = [None if c is None else c.state for c in (self.attn, self.index)]
        return (self.position, self.window_size, self.ratio, self.window, *parts)

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        position, window_size, ratio, window, attn, index = state
        self.__init__(window_size, ratio)  # type: ignore[misc]
        self.position, self.window = position, window
        for cache, part in ((self.attn, attn), (self.index, index)):
            if cache is not None:
                cache.state = part

    def leaves(self) -> list[mx.array]:
        """Every array the cache holds."""
        parts = [c.leaves() for c in (self.attn, self.index) if c is not None]
        return sum(parts, [] if self.window is None else [self.window])

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves())

    def size(self) -> int:
        return self.position

    def empty(self) -> bool:
        return self.position == 0
