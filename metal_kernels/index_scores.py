"""How relevant each compressed row is to each query."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import expect_blocks, expect_shape, kernel, use_kernel
from .packed_rows import is_packed, key_bytes, unpack_keys
from .round_trip import FP4_BLOCK

# Bytes of per-head scores held at a time.
_WORK_BYTES = 32 << 20

# Simdgroups of a threadgroup, 16 keys each, and the most heads they take at once, in matrices of 8: what 32 KiB hold.
_SIMDS, _BLOCKS = 4, 8


def index_scores(q: mx.array, w: mx.array, keys: mx.array) -> mx.array:
    """score[t, s] = sum over i of w[t, i] * relu(q[t, i] . keys[s]) (spec 6.1).

    Args:
        q: [B, T, I, J], any float type.
        w: head weights, may be negative, [B, T, I], float32.
        keys: index keys, [B, S, J] or packed [B, S, key_bytes(J)].

    Returns:
        [B, T, S], float32.
    """
    B, T, heads, J = q.shape
    expect_shape("index_scores", "w", w, (B, T, heads))
    packed = is_packed(keys)
    if packed:
        expect_blocks("index_scores", "q", J, FP4_BLOCK)
    expect_shape("index_scores", "keys", keys, (B, keys.shape[1], key_bytes(J) if packed else J))
    S = keys.shape[1]
    if not use_kernel("index_scores", covers=packed or q.dtype == keys.dtype, limit="queries and keys of one type"):
        return index_scores_reference(q, w, keys)
    blocks = min(_BLOCKS, -(-heads // 8))
    (scores,) = kernel("index_scores", ("q", "w", "keys"), ("scores",), header="decode index_keys")(
        inputs=[q, w, keys],
        template=[("I", heads), ("J", J), ("BLOCKS", blocks), ("SIMDS", _SIMDS), ("BYTES", packed * keys.shape[-1])],
        grid=(32 * _SIMDS, -(-S // (16 * _SIMDS)), B * T),
        threadgroup=(32 * _SIMDS, 1, 1),
        output_shapes=[(B, T, S)],
        output_dtypes=[mx.float32],
    )
    return scores


def index_scores_reference(q: mx.array, w: mx.array, keys: mx.array) -> mx.array:
    B, T, heads, J = q.shape
    q = q.astype(mx.float32).reshape(B, T * heads, J)
    rows = max(1, _WORK_BYTES // (4 * B * T * heads))
    scores = []
    for start in range(0, keys.shape[1], rows):
        part = keys[:, start : start + rows]
        part = unpack_keys(part, J) if is_packed(part) else part.astype(mx.float32)
        dots = mx.maximum(q @ part.swapaxes(1, 2), 0).reshape(B, T, heads, -1)
        scores.append((w[:, :, None] @ dots)[:, :, 0])
    return scores[0] if len(scores) == 1 else mx.concatenate(scores, axis=-1)
