"""Attention over the window, compressed rows and a sink, in one softmax."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import KernelError, expect_rotation, expect_shape, kernel, scalar, use_kernel
from .attention_prefill import attention_prefill, use_prefill
from .packed_rows import is_packed, row_bytes, unpack_rows
from .rope import rope_reference

# Bytes of gathered rows and scores held at a time.
_WORK_BYTES = 32 << 20

# Heads of a simdgroup and simdgroups of a threadgroup: a row is read once for 32 heads, whose sums and queries fill
# the registers. Rows in threadgroup memory at a time take half of it, and there is a lane for each.
_HEADS, _SIMDS, _TILE_BYTES, _TILE_ROWS = 2, 16, 16384, 32

# A split has no fewer keys than this, since its sums are as large as 2 * H rows, and there are no more threadgroups.
_SPLIT_KEYS, _THREADGROUPS = 64, 128


def sparse_attention(
    q: mx.array, window: mx.array, rows: mx.array | None, picks: mx.array | None, sink: mx.array,
    cos: mx.array, sin: mx.array, *, position: int, ratio: int, window_size: int,
) -> mx.array:  # fmt: skip
    """softmax over [window | compressed rows | sink], then the rotation taken back (spec 4.2 to 4.4).

    The query at position t sees window rows of positions t - window_size + 1 ... t, and of the compressed rows
    those of closed groups, i < (t + 1) // ratio: all of them, or the picked ones. Keys are also the values. The
    sink only enters the denominator.

    Args:
        q: rotated queries, [B, T, H, K], any float type.
        window: rows of the T tokens of this call, last, and of tokens before them, [B, S, K]. They are in order of
            position, except that with T = 1 and at most window_size rows any order will do.
            Packed rows have row_bytes(K, P) in the place of K.
        rows: compressed rows, [B, S', K], packed if the window is; None if the layer has none yet.
        picks: chosen compressed rows of each query, [B, T, k], int32, -1 for none; None for all visible ones.
        sink: [H], float32.
        cos, sin: of the queries' positions, [T, P/2], float32.
        position: of the first query. ratio: tokens per compressed row.

    Returns:
        [B, T, H, K] in the type of q. Logits and softmax are float32; probabilities are rounded to the type of q
        before they meet the values.
    """
    B, T, H, K = q.shape
    packed = is_packed(window)
    width = row_bytes(K, 2 * cos.shape[-1]) if packed else K
    expect_shape("sparse_attention", "window", window, (B, window.shape[1], width))
    expect_shape("sparse_attention", "sink", sink, (H,))
    expect_rotation("sparse_attention", cos, sin, T, K)
    if rows is not None:
        expect_shape("sparse_attention", "rows", rows, (B, rows.shape[1], width))
        if is_packed(rows) != packed:
            raise KernelError(f"sparse_attention: rows: expected {window.dtype} as the window, found {rows.dtype}")
    if picks is not None:
        expect_shape("sparse_attention", "picks", picks, (B, T, picks.shape[-1]))
        if rows is None:
            raise KernelError("sparse_attention: picks: expected none without compressed rows")
    if not T <= window.shape[1]:
        raise KernelError(f"sparse_attention: window: expected at least {T} rows, found {window.shape[1]}")
    alike = (mx.uint8,) if packed else (q.dtype,)
    covers = K % 2 == 0 and all(a is None or a.dtype in alike for a in (window, rows))
    if packed:  # read in pieces of 8 bytes
        covers &= q.dtype == mx.bfloat16 and cos.shape[-1] % 2 == 0
    limit = "an even head width, and rows in the type of q or packed with queries of bfloat16 and P a multiple of 4"
    prefill = covers and use_prefill(q)
    if not (prefill or use_kernel("sparse_attention", covers=covers, limit=limit)):
        return sparse_attention_reference(
            q, window, rows, picks, sink, cos, sin, position=position, ratio=ratio, window_size=window_size
        )
    count = 0 if rows is None else rows.shape[1] if picks is None else picks.shape[-1]
    sizes = mx.array([position, ratio, window_size, count], mx.int32)
    if prefill:
        return attention_prefill(q, window, rows, picks, sink, cos, sin, sizes)
    keys = min(window.shape[1], window_size) + (count if picks is not None else min(count, (position + T) // ratio))
    return _launch(q, window, rows, picks, sink, cos, sin, sizes, keys)


def _launch(
    q: mx.array, window: mx.array, rows: mx.array | None, picks: mx.array | None, sink: mx.array,
    cos: mx.array, sin: mx.array, sizes: mx.array, keys: int,
) -> mx.array:  # fmt: skip
    """The kernel on the keys of each query, at most `keys`, and a second one if they are split."""
    B, T, H, K = q.shape
    simds = min(_SIMDS, -(-H // _HEADS))
    groups = B * T * -(-H // (_HEADS * simds))
    splits = max(1, min(-(-keys // _SPLIT_KEYS), _THREADGROUPS // groups))
    tile = max(1, min(_TILE_ROWS, _TILE_BYTES // (-(-K // 64) * 64 * q.dtype.size)))
    template = [("Elem", q.dtype), ("H", H), ("K", K), ("P", 2 * cos.shape[-1])]
    names = ("q", "window", "rows", "picks", "sink", "cosines", "sines", "scale", "sizes")
    # In the place of what is absent stands something that is not read.
    places = (window if rows is None else rows, sizes if picks is None else picks)
    out, stats = kernel("sparse_attention", names, ("out", "stats"), header="row decode attention_row")(
        inputs=[q, window, *places, sink, cos, sin, scalar(K**-0.5), sizes],
        template=[
            *template, ("HEADS", _HEADS), ("SIMDS", simds), ("TILE", tile), ("PICKED", picks is not None),
            ("FINAL", splits == 1), ("BYTES", window.shape[-1] if is_packed(window) else 0),
        ],
        grid=(32 * simds, splits, groups),
        threadgroup=(32 * simds, 1, 1),
        output_shapes=[q.shape if splits == 1 else (B * T, splits, H, K), (B * T, splits, H, 2)],
        output_dtypes=[q.dtype if splits == 1 else mx.float32, mx.float32],
    )  # fmt: skip
    if splits > 1:
        (out,) = kernel("attention_combine", ("sums", "stats", "cosines", "sines"), ("out",), header="row")(
            inputs=[out, stats, cos, sin],
            template=template,
            grid=(-(-K // 64) * 32, H, B * T),
            threadgroup=(32, 8, 1),
            output_shapes=[q.shape],
            output_dtypes=[q.dtype],
        )
    return out


def sparse_attention_reference(
    q: mx.array, window: mx.array, rows: mx.array | None, picks: mx.array | None, sink: mx.array,
    cos: mx.array, sin: mx.array, *, position: int, ratio: int, window_size: int,
) -> mx.array:  # fmt: skip
    B, T, H, K = q.shape
    seen = 0 if rows is None else rows.shape[1] if picks is None else picks.shape[-1]
    own = seen if picks is None else seen * (1 + K // H)  # picked rows are gathered for each query
    tile = max(1, min(window_size, _WORK_BYTES // (4 * B * H * (own + 2 * window_size))))
    before = window.shape[1] - T  # rows of earlier tokens
    out = []
    for start in range(0, T, tile):
        stop = min(start + tile, T)
        positions = mx.arange(position + start, position + stop)
        first = max(0, before + start - window_size + 1)
        keys = window[:, first : before + stop]
        age = positions[:, None] - mx.arange(position + first - before, position + stop)
        parts = [(keys, (age >= 0) & (age < window_size))]
        if rows is not None:
            parts.append(_compressed(rows, picks, start, stop, positions, (position + stop) // ratio, ratio))
        out.append(_attend(q[:, start:stop], parts, sink, 2 * cos.shape[-1]))
    o = out[0] if len(out) == 1 else mx.concatenate(out, axis=1)
    return rope_reference(o, cos, -sin)


def _compressed(
    rows: mx.array, picks: mx.array | None, start: int, stop: int, positions: mx.array, visible: int, ratio: int
) -> tuple[mx.array, mx.array]:
    """Compressed rows of the queries start...stop and which of them each may see."""
    if picks is None:
        rows = rows[:, :visible]
        return rows, mx.arange(rows.shape[1]) < ((positions + 1) // ratio)[:, None]
    chosen = picks[:, start:stop]
    index = mx.maximum(chosen, 0) + mx.arange(rows.shape[0])[:, None, None] * rows.shape[1]
    return rows.flatten(0, 1)[index], chosen >= 0


def _attend(q: mx.array, parts: list[tuple[mx.array, mx.array]], sink: mx.array, rotated: int) -> mx.array:
    """One softmax over all parts: keys [B, S, K] shared by the queries, or [B, T, S, K] of each its own, or packed."""
    B, T, H, K = q.shape
    queries = q.astype(mx.float32) * K**-0.5
    logits, values = [sink[None, None, :, None] + mx.zeros((B, T, 1, 1))], []
    for keys, seen in parts:
        keys = unpack_rows(keys, K, rotated) if is_packed(keys) else keys.astype(mx.float32)
        keys = keys[:, None] if keys.ndim == 3 else keys
        seen = seen[None] if seen.ndim == 2 else seen
        logits.append(mx.where(seen[:, :, None], queries @ keys.swapaxes(-1, -2), -mx.inf))
        values.append(keys)
    p = mx.softmax(mx.concatenate(logits, axis=-1), axis=-1).astype(q.dtype).astype(mx.float32)
    sizes = [a.shape[-1] for a in logits]
    offsets = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    shares = mx.split(p, offsets, axis=-1)[1:]
    return sum(share @ v for share, v in zip(shares, values, strict=True)).astype(q.dtype)  # type: ignore[union-attr]
