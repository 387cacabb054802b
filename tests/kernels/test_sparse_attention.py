"""sparse_attention against a softmax written out for every query and head."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest
from support import (
    FLOATS,
    expect_equal,
    expect_match,
    expect_refused,
    expect_same,
    generator,
    normal,
    rope_expected,
    rotation,
    rounded,
    run,
    sizes,
    wide,
)

from metal_kernels import sparse_attention

W = 7  # window


@dataclass(frozen=True)
class Case:
    """The arguments of one call."""

    q: mx.array
    window: mx.array
    rows: mx.array | None
    picks: mx.array | None
    sink: mx.array
    cos: mx.array
    sin: mx.array
    position: int
    ratio: int
    window_size: int = W

    def run(self, **changes: object) -> mx.array:
        c = replace(self, **changes)
        return run(
            sparse_attention, c.q, c.window, c.rows, c.picks, c.sink, c.cos, c.sin,
            position=c.position, ratio=c.ratio, window_size=c.window_size,
        )  # fmt: skip

    def expected(self) -> np.ndarray:
        """For each query its keys, one softmax with the sink, the values, and the rotation taken back."""
        q, window, sink = wide(self.q), wide(self.window), wide(self.sink)
        B, T, H, K = q.shape
        before = window.shape[1] - T
        out = np.zeros(q.shape)
        for b, t in np.ndindex(B, T):
            position = self.position + t
            keys = []
            for s in range(window.shape[1]):
                if position - self.window_size < self.position - before + s <= position:
                    keys.append(window[b, s])
            if self.rows is not None:
                visible = range((position + 1) // self.ratio)
                chosen = visible if self.picks is None else [i for i in np.array(self.picks)[b, t] if i >= 0]
                keys += [wide(self.rows)[b, i] for i in chosen]
            for h in range(H):
                logits = np.array(keys) @ q[b, t, h] / np.sqrt(K)
                largest = max(logits.max(), sink[h])
                shares = np.exp(logits - largest)
                shares /= shares.sum() + np.exp(sink[h] - largest)
                out[b, t, h] = rounded(shares, self.q.dtype) @ np.array(keys)
        return rope_expected(rounded(out, self.q.dtype), self.cos, -self.sin, self.q.dtype)


def case(
    B: int, T: int, position: int, H: int = 3, K: int = 20, P: int = 6, ratio: int = 4, top: int | None = 3,
    dtype: mx.Dtype = mx.float32, compressed: bool = True,
) -> Case:  # fmt: skip
    """Random rows as the caches would hold them at this position.

    Args:
        top: rows picked for each query, fewer if fewer are visible; None picks none and attends all.
        compressed: without it the layer has no compressed rows.
    """
    count = (position + T) // ratio if compressed else 0
    picks = None
    if count and top is not None:
        picks = np.full((B, T, top), -1)
        for b, t in np.ndindex(B, T):
            visible = (position + t + 1) // ratio
            some = generator().permutation(visible)[:top]
            picks[b, t, top - len(some) :] = np.sort(some)
    return Case(
        q=normal(B, T, H, K, dtype=dtype, scale=2),
        window=normal(B, min(position, W - 1) + T, K, dtype=dtype),
        rows=normal(B, count, K, dtype=dtype) if count else None,
        picks=None if picks is None else mx.array(picks.astype(np.int32)),
        sink=normal(H),
        **dict(zip(("cos", "sin"), rotation(np.arange(position, position + T), P // 2), strict=True)),
        position=position,
        ratio=ratio,
    )


# Calls shorter and longer than the window, from the start and later on.
LENGTHS = sizes(
    "B T position", (1, 1, 0), (2, 5, 0), (1, W - 1, 0), (2, W, 0), (1, W + 1, 0), (2, 3 * W + 2, 0),
    (2, 1, 3), (1, 1, W - 1), (2, 1, W), (1, 2, W + 1), (2, W - 1, 18), (1, W, 19), (1, W + 1, 17), (2, 23, 50),
)  # fmt: skip


@FLOATS
@LENGTHS
def test_window_only(B: int, T: int, position: int, dtype: mx.Dtype) -> None:
    c = case(B, T, position, dtype=dtype, compressed=False, ratio=1)
    expect_match(c.run(), c.expected(), dtype)


@FLOATS
@LENGTHS
@pytest.mark.parametrize("ratio", [4, 13])
def test_all_compressed_rows(B: int, T: int, position: int, ratio: int, dtype: mx.Dtype) -> None:
    c = case(B, T, position, ratio=ratio, top=None, dtype=dtype)
    expect_match(c.run(), c.expected(), dtype)


@FLOATS
@LENGTHS
@pytest.mark.parametrize("top", [1, 3, 8])
def test_picked_compressed_rows(B: int, T: int, position: int, top: int, dtype: mx.Dtype) -> None:
    c = case(B, T, position, top=top, dtype=dtype)
    expect_match(c.run(), c.expected(), dtype)


@sizes("H K P", (1, 2, 2), (5, 9, 2), (2, 67, 66), (16, 12, 12))
def test_heads_and_widths(H: int, K: int, P: int) -> None:
    c = case(2, 9, 11, H=H, K=K, P=P)
    expect_match(c.run(), c.expected(), mx.float32)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_rounded_shares_result_and_rotation(dtype: mx.Dtype) -> None:
    c = case(2, 23, 50, H=5, K=33, P=32, dtype=dtype)
    expect_same(c.run(), rounded(c.expected(), dtype), share=0.02)


# --- what is attended -------------------------------------------------------------------------------


def attended(c: Case) -> np.ndarray:
    """Which rows matter, [T, rows]: window rows first, then compressed ones. A row matters if it changes the result."""
    plain, found = wide(c.run()), []
    for name in ("window", "rows"):
        for s in range(getattr(c, name).shape[1]):
            changed = getattr(c, name) * 1.0
            changed[:, s] = changed[:, s] + 1
            found.append((wide(c.run(**{name: changed})) != plain).any(axis=(0, 2, 3)))
    return np.array(found).T


@pytest.mark.parametrize("position", [0, 5, 18])
def test_window_holds_the_query_itself_and_the_tokens_before_it(position: int) -> None:
    c = case(1, W + 2, position, top=None, ratio=5)
    first = max(0, position - W + 1)  # position of the first window row
    seen = attended(c)
    for t in range(W + 2):
        rows = set(np.flatnonzero(seen[t, : c.window.shape[1]]) + first)
        assert rows == set(range(max(0, position + t - W + 1), position + t + 1)), f"query at {position + t}"


@pytest.mark.parametrize("ratio", [4, 5])
def test_a_compressed_row_is_visible_from_the_last_token_of_its_group_on(ratio: int) -> None:
    position = 6
    c = case(1, W + 2, position, top=None, ratio=ratio)
    seen = attended(c)[:, c.window.shape[1] :]
    for t in range(W + 2):
        closed = [i for i in range(c.rows.shape[1]) if ratio * i + ratio - 1 <= position + t]
        assert list(np.flatnonzero(seen[t])) == closed, f"query at {position + t}"


def test_rows_that_may_not_be_seen_may_hold_any_finite_number() -> None:
    """Later tokens and later groups, and row 0 where a place is empty."""
    c = case(1, W, 8, top=None)
    for t in range(W):
        window, rows = c.window * 1.0, c.rows * 1.0
        window[:, c.window.shape[1] - W + t + 1 :] = 3e38
        window[:, : c.window.shape[1] - 2 * W + t + 1] = -3e38
        rows[:, (8 + t + 1) // 4 :] = 3e38
        expect_equal(c.run(window=window, rows=rows)[:, t], c.run()[:, t])
    empty = mx.full((1, W, 4), -1)
    huge = mx.full(c.rows.shape, 3e38)
    expect_match(c.run(picks=empty, rows=huge), wide(c.run(picks=None, rows=None)), mx.float32)


def test_picks_of_all_visible_rows_equal_no_picks() -> None:
    c = case(2, 9, 10, top=None)
    count = c.rows.shape[1]
    visible = (np.arange(10, 19) + 1) // 4
    all_rows = np.where(np.arange(count) < visible[:, None], np.arange(count), -1)
    picks = mx.array(np.tile(all_rows, (2, 1, 1)).astype(np.int32))
    expect_match(c.run(picks=picks), wide(c.run()), mx.float32)


def test_order_of_picks_does_not_matter() -> None:
    c = case(2, 9, 40, top=5)
    order = mx.array([3, 0, 4, 1, 2])
    expect_match(c.run(picks=c.picks[:, :, order]), wide(c.run()), mx.float32)


def test_empty_places_are_ignored_wherever_they_are() -> None:
    c = case(2, 9, 40, top=5)
    gap = mx.full((2, 9, 2), -1)
    for places in ([gap, c.picks], [c.picks, gap], [c.picks[..., :2], gap, c.picks[..., 2:]]):
        expect_match(c.run(picks=mx.concatenate(places, axis=-1)), wide(c.run()), mx.float32)


def test_one_token_sees_its_window_in_any_order() -> None:
    """As in a ring, where the newest row is somewhere in the middle."""
    c = case(2, 1, 40)
    assert c.window.shape[1] == W
    for shift in (1, 3, W - 1):
        expect_match(c.run(window=mx.roll(c.window, shift, axis=1)), wide(c.run()), mx.float32)
    c = case(2, 1, W - 2)
    expect_match(c.run(window=c.window[:, ::-1]), wide(c.run()), mx.float32)


def test_window_may_hold_rows_that_are_too_old() -> None:
    c = case(2, 5, 40)
    longer = mx.concatenate([mx.full((2, 4, 20), 1e30), c.window], axis=1)
    expect_match(c.run(window=longer), wide(c.run()), mx.float32)


# --- softmax ----------------------------------------------------------------------------------------


def test_sink_is_only_in_the_denominator() -> None:
    """One key that is all ones: the result is its share, e^l / (e^l + e^sink)."""
    sink = np.array([-1.0, 0.5, 2.0])
    c = case(1, 1, 0, K=4, P=2)
    found = c.run(q=mx.ones((1, 1, 3, 4)), window=mx.ones((1, 1, 4)), sink=mx.array(sink.astype(np.float32)))
    share = np.exp(2.0) / (np.exp(2.0) + np.exp(sink))  # 4 / sqrt(4)
    expect_match(found, np.tile(share[:, None], 4).reshape(1, 1, 3, 4), mx.float32)


@pytest.mark.parametrize("value", [-1e4, 50.0, 1e4])
def test_extreme_sinks(value: float) -> None:
    """One takes nothing, one nearly all, one all."""
    c = case(2, 9, 10)
    c = replace(c, sink=mx.full((3,), value))
    expect_match(c.run(), rounded(c.expected(), mx.float32), mx.float32)


def test_large_logits_do_not_overflow() -> None:
    c = case(2, 9, 10)
    c = replace(c, q=c.q * 500)
    assert np.isfinite(c.expected()).all()
    # At a logit of 1000 float32 is off by 3e-5, and e^x as much.
    np.testing.assert_allclose(wide(c.run()), c.expected(), rtol=1e-3, atol=1e-3)


def test_rows_that_may_not_be_seen_get_nothing_whatever_the_others_have() -> None:
    """A logit of -20,000 for the one visible row; a finite number in place of the others would outweigh it."""
    window = mx.concatenate([mx.full((1, 1, 20), -22.0), mx.ones((1, 1, 20))], axis=1)
    found = run(
        sparse_attention, mx.full((1, 2, 3, 20), 200.0), window, None, None, mx.full((3,), -1e6), mx.ones((2, 1)),
        mx.zeros((2, 1)), position=0, ratio=1, window_size=W,
    )  # fmt: skip
    expect_same(found[:, 0], np.full((1, 3, 20), -22.0))


def test_window_and_compressed_rows_share_one_softmax() -> None:
    """The same row in both, seen twice, weighs as much as two."""
    c = case(1, 1, 3, top=None)
    row = normal(1, 1, 20)
    found = c.run(window=mx.concatenate([row] * 4, axis=1), rows=row)
    logits = wide(c.q)[0, 0] @ wide(row)[0, 0] / np.sqrt(20)
    share = 5 * np.exp(logits) / (5 * np.exp(logits) + np.exp(wide(c.sink)))
    expected = rope_expected((share[:, None] * wide(row)[0, 0]).reshape(1, 1, 3, 20), c.cos, -c.sin, mx.float32)
    expect_match(found, expected, mx.float32)


def test_result_depends_on_distances_only() -> None:
    """Queries and keys at positions p or p + 1000: taking back the rotation makes the results equal."""
    q, window = wide(normal(1, 5, 3, 20)), wide(normal(1, 5, 20))
    results = []
    for position in (0, 1000):
        cos, sin = rotation(np.arange(position, position + 5), 3)
        turned = (mx.array(rope_expected(a, cos, sin, mx.float32).astype(np.float32)) for a in (q, window))
        args = (*turned, None, None, mx.zeros(3), cos, sin)
        results.append(run(sparse_attention, *args, position=0, ratio=1, window_size=W))
    expect_match(results[1], wide(results[0]), mx.float32)


# --- parts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 2, 3])
@pytest.mark.parametrize("kind", ["window", "all", "picked"])
def test_in_parts(kind: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few queries at a time, at positions where groups close inside and between the parts."""
    c = case(2, 17, 14, H=3, K=20, top=4 if kind == "picked" else None, compressed=kind != "window")
    whole = wide(c.run())
    rows = {"window": 0, "all": (14 + 17) // 4, "picked": 4 * (1 + 20 // 3)}[kind]
    work = tile * 4 * 2 * 3 * (rows + 2 * W)
    lengths: list[int] = []
    module = sys.modules["metal_kernels.sparse_attention"]
    attend = module._attend
    monkeypatch.setattr(module, "_WORK_BYTES", work)
    monkeypatch.setattr(module, "_attend", lambda q, *rest: lengths.append(q.shape[1]) or attend(q, *rest))
    found = c.run()
    parts = [tile] * (17 // tile) + [17 % tile] * (17 % tile > 0)
    assert lengths == parts * 2, "not in the parts that this test is about"
    expect_match(found, c.expected(), mx.float32)
    expect_match(found, whole, mx.float32)


def test_a_query_alone_equals_the_query_of_a_prompt() -> None:
    c = case(2, 12, 9, top=None)
    together = wide(c.run())
    before = c.window.shape[1] - 12
    for t in range(12):
        one = slice(t, t + 1)
        alone = c.run(
            q=c.q[:, one], window=c.window[:, max(0, before + t - W + 1) : before + t + 1], cos=c.cos[one],
            sin=c.sin[one], rows=c.rows[:, : (9 + t + 1) // 4], position=9 + t,
        )  # fmt: skip
        expect_match(alone, together[:, one], mx.float32)


@pytest.mark.parametrize("top", [None, 3], ids=["all", "picked"])
def test_a_row_of_a_batch_equals_that_row_alone(top: int | None) -> None:
    c = case(3, 9, 40, top=top, dtype=mx.bfloat16)
    together = wide(c.run())
    for b in range(3):
        row = slice(b, b + 1)
        picks = None if c.picks is None else c.picks[row]
        alone = c.run(q=c.q[row], window=c.window[row], rows=c.rows[row], picks=picks)
        expect_match(alone, together[row], mx.bfloat16)


# --- errors -----------------------------------------------------------------------------------------


def expect_case_refused(argument: str, c: Case, **changes: object) -> None:
    c = replace(c, **changes)
    expect_refused(
        argument, sparse_attention, c.q, c.window, c.rows, c.picks, c.sink, c.cos, c.sin,
        position=c.position, ratio=c.ratio, window_size=c.window_size,
    )  # fmt: skip


def test_refuses_other_shapes() -> None:
    c = case(2, 5, 20)
    expect_case_refused("window", c, window=c.window[:1])
    expect_case_refused("window", c, window=c.window[..., :-1])
    expect_case_refused("window", c, window=c.window[:, :4])
    expect_case_refused("rows", c, rows=c.rows[:1])
    expect_case_refused("rows", c, rows=c.rows[..., :-1])
    expect_case_refused("picks", c, picks=c.picks[:1])
    expect_case_refused("picks", c, picks=c.picks[:, :4])
    expect_case_refused("picks", c, rows=None)
    expect_case_refused("sink", c, sink=c.sink[:1])
    expect_case_refused("cos", c, cos=c.cos[:4])


def test_refuses_sines_of_another_shape() -> None:
    c = case(2, 5, 20)
    expect_case_refused("sin", c, sin=c.sin[:1])
