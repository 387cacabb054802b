"""What each layer remembers: the window, open groups, and compressed rows.

Rows have K values, or are packed in bytes (see metal_kernels/packed_rows.py): nothing here looks inside.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache

from .errors import RequestError

# Rows added to a buffer when it is full. Memory grows by these blocks, not at every step.
ROW_BLOCK = 256

# Of a layer, in a prompt-cache file. Files with another number are of another version.
_STATE_PARTS = 7


@dataclass(frozen=True)
class Groups:
    """Groups of tokens that are now full, as `metal_kernels.compress` takes them.

    Attributes:
        tokens: projected tokens, [B, n, width], float32.
        start: row of the first token of the first group.
        count: how many groups.
        before: whether the group before the first is there, too.
    """

    tokens: mx.array
    start: int
    count: int
    before: bool


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
        self.buffer = _with_rows(buffer, rows, self.count)
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


def _with_rows(buffer: mx.array, rows: mx.array, at: int) -> mx.array:
    """A buffer with rows [B, S, K] in the place of its rows at ... at + S - 1; in place if no one else holds it.

    Assigned to a slice, whose place is then part of the operation: as an array it would be computed on the device.
    """
    changed = copy(buffer)
    changed[:, at : at + rows.shape[1]] = rows
    return changed


class LayerCache(_BaseCache):
    """State of one layer, usable with mlx-lm's generation and its prompt-cache files.

    Args:
        window_size: W, rows of the window's ring.
        ratio: R, tokens per compressed row; 0 for a layer without a compressor.

    Attributes:
        position: tokens seen so far.
        window: ring of the last W rows, [B, W, K]; the row of position p is at p % W. None at first.
        recent: ring of projected tokens, [B, n, width], float32: of the open group and, where groups overlap
            (R = 4, n = 2R, else n = R), of the one before. The token of position p is at p % n. None at first.
        attn, index: compressed rows to attend, and their index keys; None where there are none.
    """

    def __init__(self, window_size: int, ratio: int) -> None:
        self.window_size, self.ratio = window_size, ratio
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.position = 0
        self.window: mx.array | None = None
        self.recent: mx.array | None = None
        self.attn = Rows() if self.ratio else None
        self.index = Rows() if self.ratio == 4 else None

    def extend(self, rows: mx.array, projected: mx.array | None = None) -> tuple[mx.array, Groups | None]:
        """Add T tokens.

        Args:
            rows: of the window, [B, T, K].
            projected: what the compressors take of the tokens, [B, T, width], float32; None without a compressor.

        Returns:
            The rows of the window that the tokens may see, and the groups that are now full, if any.

        Raises:
            RequestError: what the cache holds is of a model that computes in another way; nothing is changed.
        """
        self._expect_layout_of(rows)
        groups = None if projected is None else self._extend_recent(projected)
        window = self._extend_window(rows)
        self.position += rows.shape[1]
        return window, groups

    def _expect_layout_of(self, rows: mx.array) -> None:
        """A restored cache meets its model here. Written into other rows, new ones would be rounded without a word."""
        if self.window is None or (self.window.dtype, self.window.shape[2]) == (rows.dtype, rows.shape[2]):
            return
        expected, found = (f"{str(a.dtype).rpartition('.')[2]} [{a.shape[2]}]" for a in (rows, self.window))
        raise RequestError(
            f"cache: expected rows of {expected}, found {found}\n"
            "hint: load the model with the dtype and simulate_cache_quant of the cache, or make the cache again"
        )

    def _extend_window(self, rows: mx.array) -> mx.array:
        """The new rows after up to W - 1 older ones, in order of position; of a single token the ring as it is,
        whose order does not matter (at most W rows, [B, S, K]).
        """
        B, T, K = rows.shape
        W, start = self.window_size, self.position
        if self.window is None:
            self.window = mx.zeros((B, W, K), rows.dtype)
        if T == 1:
            self.window = _with_rows(self.window, rows, start % W)
            return self.window[:, : min(start + 1, W)]
        seen = mx.concatenate([_last(self.window, start, min(start, W - 1)), rows], axis=1) if start else rows
        self.window = _ring(seen, W, start + T)
        return seen

    def _extend_recent(self, projected: mx.array) -> Groups | None:
        B, T, width = projected.shape
        R, n, start = self.ratio, (2 if self.ratio == 4 else 1) * self.ratio, self.position
        if self.recent is None:
            self.recent = mx.zeros((B, n, width), projected.dtype)
        open_tokens, before = start % R, n > R and start >= R
        count = (open_tokens + T) // R
        if T == 1:
            self.recent = _with_rows(self.recent, projected, start % n)
            return Groups(self.recent, (start + 1 - R) % n, 1, before) if count else None
        kept = open_tokens + R * before
        tokens = mx.concatenate([_last(self.recent, start, kept), projected], axis=1) if kept else projected
        self.recent = _ring(tokens, n, start + T)
        return Groups(tokens, R * before, count, before) if count else None

    def copy(self) -> LayerCache:
        """An independent cache with the same contents; the bytes are shared until one of them changes."""
        return LayerCache.from_state(self.state)  # type: ignore[no-any-return]

    @property
    def state(self) -> tuple[Any, ...]:
        parts = [None if rows is None else rows.state for rows in (self.attn, self.index)]
        return (self.position, self.window_size, self.ratio, self.window, self.recent, *parts)

    @state.setter
    def state(self, state: tuple[Any, ...]) -> None:
        if len(state) != _STATE_PARTS:
            raise RequestError(
                f"prompt cache: expected {_STATE_PARTS} parts in the state of a layer, found {len(state)}\n"
                "hint: it was made by another version of mlx_v4flash; make it again"
            )
        position, window_size, ratio, window, recent, attn, index = state
        self.__init__(window_size, ratio)  # type: ignore[misc]
        self.position, self.window, self.recent = position, window, recent
        for rows, part in ((self.attn, attn), (self.index, index)):
            if rows is not None:
                rows.state = part

    def leaves(self) -> list[mx.array]:
        """Every array the cache holds."""
        buffers = [rows.buffer for rows in (self.attn, self.index) if rows is not None]
        return [leaf for leaf in (self.window, self.recent, *buffers) if leaf is not None]

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves())

    def size(self) -> int:
        return self.position

    def empty(self) -> bool:
        return self.position == 0


def _last(ring: mx.array, position: int, count: int) -> mx.array:
    """The last `count` rows before `position` of a ring, in order."""
    size = ring.shape[1]
    return mx.roll(ring, -(position % size), 1)[:, size - count :]


def _ring(rows: mx.array, size: int, end: int) -> mx.array:
    """A ring of the last `size` rows, of which the last one is that of position end - 1."""
    last = rows[:, -size:]
    missing = size - last.shape[1]
    if missing:
        B, _, K = rows.shape
        last = mx.concatenate([mx.zeros((B, missing, K), rows.dtype), last], axis=1)
    # A copy, not a view: a view would keep the rows of the whole chunk alive.
    return mx.contiguous(mx.roll(last, end % size, 1))
