"""Which compressed rows a query attends."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import KernelError, expect_shape, kernel, use_kernel

_THREADS = 1024  # as in the body


def index_topk(scores: mx.array, k: int, visible: mx.array) -> mx.array:
    """The k visible rows with the highest scores (spec 6.1); of equal scores the lower row wins.

    Args:
        scores: [B, T, S], float32, S >= k.
        visible: how many leading rows each query may see, [T], int32.

    Returns:
        [B, T, k], int32, ascending, after -1 where fewer than k rows are visible.
    """
    if scores.shape[-1] < k:
        raise KernelError(f"index_topk: scores: expected at least {k} rows, found {scores.shape}")
    expect_shape("index_topk", "visible", visible, scores.shape[1:2])
    B, T, _ = scores.shape
    if not use_kernel("index_topk", covers=scores.dtype == mx.float32, limit="scores in float32"):
        return index_topk_reference(scores, k, visible)
    (picks,) = kernel("index_topk", ("scores", "visible", "places"), ("picks",), header="index_order")(
        inputs=[scores, visible, mx.array([k], mx.int32)],
        grid=(_THREADS, B * T, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(B, T, k)],
        output_dtypes=[mx.int32],
    )
    return picks


def index_topk_reference(scores: mx.array, k: int, visible: mx.array) -> mx.array:
    rows = mx.arange(scores.shape[-1])
    # The limit comes before the selection: a row that may not be seen must not take a place.
    ranked = mx.where(rows < visible[:, None], -scores, mx.inf)
    picks = mx.argpartition(ranked, k - 1, axis=-1)[..., :k].astype(mx.int32)
    picks = mx.where(picks < visible[:, None], picks, -1)
    return mx.sort(picks, axis=-1)
