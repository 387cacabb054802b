"""Which experts a token uses, and with what weights."""

from __future__ import annotations

import mlx.core as mx

from ._dispatch import expect_shape, kernel, scalar, use_kernel, without_kernel

# One lane of a simdgroup for each.
MAX_CHOSEN = 32


def route(logits: mx.array, bias: mx.array, k: int, scale: float) -> tuple[mx.array, mx.array]:
    """The k experts with the highest sqrt(softplus(logit)) + bias (spec 7).

    Args:
        logits: [..., E], float32.
        bias: [E], float32; decides the choice and does not enter the weights.
        scale: factor of the normalised weights.

    Returns:
        ids [..., k], int32, and weights [..., k], float32, which sum to `scale`.
    """
    expect_shape("route", "bias", bias, logits.shape[-1:])
    E, lead = logits.shape[-1], logits.shape[:-1]
    if not use_kernel("route", covers=k <= min(MAX_CHOSEN, E), limit=f"at most {MAX_CHOSEN} of the experts"):
        return without_kernel(route_reference, logits, bias, k, scale)
    ids, weights = kernel("route", ("logits", "bias", "scale"), ("ids", "weights"), header="route_score")(
        inputs=[logits, bias, scalar(scale)],
        template=[("E", E), ("A", k)],
        grid=(32, logits.size // E, 1),
        threadgroup=(32, 8, 1),
        output_shapes=[(*lead, k), (*lead, k)],
        output_dtypes=[mx.int32, mx.float32],
    )
    return ids, weights


def route_reference(logits: mx.array, bias: mx.array, k: int, scale: float) -> tuple[mx.array, mx.array]:
    scores = _scores(logits)
    ids = mx.argpartition(-(scores + bias), k - 1, axis=-1)[..., :k].astype(mx.int32)
    return ids, _weights(scores, ids, scale)


def route_hash(logits: mx.array, table: mx.array, ids: mx.array, scale: float) -> tuple[mx.array, mx.array]:
    """The experts that a table names for each token id (spec 7).

    Args:
        logits: [..., E], float32.
        table: experts of each token id, [V, A], int32.
        ids: [...], token ids below V, any integer type.
        scale: factor of the normalised weights.

    Returns:
        experts [..., A], int32, and weights [..., A], float32, which sum to `scale`.
    """
    lead, E, A = logits.shape[:-1], logits.shape[-1], table.shape[-1]
    expect_shape("route_hash", "ids", ids, lead)
    covers = A <= MAX_CHOSEN and table.dtype == mx.int32
    if not use_kernel("route_hash", covers=covers, limit=f"at most {MAX_CHOSEN} experts in a table of int32"):
        return without_kernel(route_hash_reference, logits, table, ids, scale)
    inputs = ("logits", "table", "ids", "scale")
    experts, weights = kernel("route_hash", inputs, ("experts", "weights"), header="route_score")(
        inputs=[logits, table, ids.reshape(-1), scalar(scale)],
        template=[("E", E), ("A", A)],
        grid=(32, logits.size // E, 1),
        threadgroup=(32, 8, 1),
        output_shapes=[(*lead, A), (*lead, A)],
        output_dtypes=[mx.int32, mx.float32],
    )
    return experts, weights


def route_hash_reference(logits: mx.array, table: mx.array, ids: mx.array, scale: float) -> tuple[mx.array, mx.array]:
    experts = table[ids]
    return experts, _weights(_scores(logits), experts, scale)


def _scores(logits: mx.array) -> mx.array:
    # ln(1 + e^z) without overflow; where e^z is too small to keep, sqrt(e^z) = e^(z/2) still is a number.
    return mx.where(logits < -20, mx.exp(logits / 2), mx.sqrt(mx.logaddexp(logits, 0.0)))


def _weights(scores: mx.array, ids: mx.array, scale: float) -> mx.array:
    chosen = mx.take_along_axis(scores, ids, axis=-1)
    return chosen / chosen.sum(axis=-1, keepdims=True) * scale
