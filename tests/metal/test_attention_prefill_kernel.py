"""The kernel of sparse_attention for many queries against its reference, on cases made as for the other kernel."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import Session, emulate
from support import FLOATS, expect_equal, expect_match, expect_same, rope_expected, sizes, wide
from test_sparse_attention_kernel import GPU, KINDS, LOW, NAN, RATIO, Case, W, case, expect_as_good

from metal_kernels import _dispatch, attention_prefill, kernels
from metal_kernels.packed_rows import pack_rows, unpack_rows

pytestmark = pytest.mark.usefixtures("emulated", "always")

PREFILL_FROM = attention_prefill.PREFILL_FROM


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of tokens, with 8 keys at a time: several tiles where there are few keys."""
    limit(monkeypatch, PREFILL_FROM=1, _TILE_ROWS=8)


def limit(monkeypatch: pytest.MonkeyPatch, **values: int) -> None:
    for name, value in values.items():
        monkeypatch.setattr(attention_prefill, name, value)


@FLOATS
@KINDS
@sizes("B T position rows", (1, 1, 150, 16), (2, 5, 61, 8))
def test_attention_prefill(
    B: int, T: int, position: int, rows: int, kind: str, dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch,
    emulated: Session,
) -> None:  # fmt: skip
    limit(monkeypatch, _TILE_ROWS=rows)
    expect_as_good(case(B, T, position, kind, H=19, K=70, top=17, W=40, dtype=dtype))
    assert {d.kernel for d in emulated.dispatches} == {"attention_prefill"}


@KINDS
@sizes(
    "B T position", (1, 1, 0), (1, 3, 0), (1, W - 1, 0), (1, 2 * W + 2, 0), (2, 1, 3), (1, 1, W - 1), (2, 1, W),
    (1, 2, 18), (2, W + 1, 17), (1, 16, 50),
)  # fmt: skip
def test_every_position(B: int, T: int, position: int, kind: str) -> None:
    """The first chunk and later ones, before and after the window is full, and where groups close within the call."""
    expect_as_good(case(B, T, position, kind))


@KINDS
@sizes("H K P", (1, 2, 2), (2, 4, 2), (33, 34, 4), (3, 66, 66), (17, 130, 64), (5, 512, 64))
def test_heads_and_widths(H: int, K: int, P: int, kind: str) -> None:
    """Matrices beyond the row or in part, simdgroups and threadgroups with fewer heads, fewer than 8 elements."""
    expect_as_good(case(1, 2, 5 if K == 2 else 30, kind, H=H, K=K, P=P))


@GPU
def test_as_a_gpu_may_run_it(changes: dict[str, Any]) -> None:
    c = case(2, 3, 50, "picked", H=5, K=70)
    with emulate(**changes):
        expect_match(c.found(), c.reference(), mx.float32)


# --- when it is used ----------------------------------------------------------------------------------


def names_of(c: Case) -> set[str]:
    with emulate(repeat=False, checked=False) as session:
        c.found()
    return {d.kernel for d in session.dispatches}


def test_few_tokens_and_wide_rows_are_for_the_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, PREFILL_FROM=PREFILL_FROM)
    assert names_of(case(1, PREFILL_FROM, 61, "all", H=1, K=4, P=2)) == {"attention_prefill"}
    assert "attention_prefill" not in names_of(case(1, PREFILL_FROM - 1, 61, "all", H=1, K=4, P=2))
    limit(monkeypatch, PREFILL_FROM=1)
    assert "attention_prefill" not in names_of(case(1, 1, 5, "window", H=1, K=514))


def test_each_kernel_is_approved_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case(1, 3, 20, "all")
    with kernels("auto"):
        for approved, expected in (
            ({"sparse_attention", "attention_prefill"}, {"attention_prefill"}),
            ({"attention_prefill"}, {"attention_prefill"}),
            ({"sparse_attention"}, {"sparse_attention"}),
            (set(), set()),
        ):
            monkeypatch.setattr(_dispatch, "approved", approved)
            assert names_of(c) == expected
            expect_as_good(c)


# --- sizes of the model -------------------------------------------------------------------------------


@sizes("T position top", (1, 2100, 512), (2, 131, 0))
def test_size_of_the_model(T: int, position: int, top: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seen row is read once for 32 of the 64 heads, as by the kernel for few queries; nothing else is read."""
    limit(monkeypatch, _TILE_ROWS=16)
    c = case(1, T, position, "picked" if top else "all", H=64, K=512, P=64, top=top, dtype=mx.bfloat16, W=128)
    with emulate(counters=True, repeat=False) as session:
        found = c.found()
    launch = session.dispatches[0]
    assert (launch.grid, launch.threadgroup) == ((256, 2, T), (256, 1, 1))
    assert launch.threadgroup_bytes == 16 * (512 + 8) * 2 + 4 * 32 * 16 * 4
    seen = [top or (position + t + 1) // RATIO for t in range(T)]
    traffic = launch.traffic["rows"]
    assert traffic.read_bytes == 2 * sum(seen) * 1024
    assert (
        traffic.read_distinct
        == len(set(range(seen[-1])) if c.picks is None else set(c.picks.flatten().tolist())) * 1024
    )
    assert launch.traffic["window"].read_bytes == 2 * T * 128 * 1024
    assert launch.traffic["q"].read_bytes == launch.traffic["out"].write_bytes == c.q.nbytes
    limit(monkeypatch, PREFILL_FROM=T + 1)
    with emulate(counters=True, repeat=False) as session:
        other = c.found()
    assert session.dispatches[0].traffic["rows"].read_bytes == traffic.read_bytes
    # A key of a slice is read for 16 heads where it was for 2.
    assert launch.threadgroup_traffic < session.dispatches[0].threadgroup_traffic / 7
    reference, exact = c.reference(), c.exact()
    for values in (found, other):
        assert np.linalg.norm(wide(values) - exact) <= 1.1 * np.linalg.norm(reference - exact)


def test_size_of_the_model_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, _TILE_ROWS=16)
    c = case(1, 1, 140, "all", H=64, K=512, P=64, W=128)
    with emulate(repeat=False) as session:
        expect_match(c.found(), c.reference(), mx.float32)
    assert session.dispatches[0].threadgroup_bytes == 8 * (512 + 4) * 4 + 4 * 32 * 8 * 4


@KINDS
@sizes("H K P", (3, 68, 4), (3, 136, 72), (5, 512, 64))
def test_packed_rows(H: int, K: int, P: int, kind: str) -> None:
    """Bit for bit what the same rows give as bfloat16."""
    c = case(2, 3, 60, kind, H=H, K=K, P=P, dtype=mx.bfloat16)
    pairs = [None if a is None else pack_rows(a, P) for a in (c.window, c.rows)]
    plain = [None if a is None else unpack_rows(a, K, P).astype(mx.bfloat16) for a in pairs]
    expect_equal(c.found(window=pairs[0], rows=pairs[1]), c.found(window=plain[0], rows=plain[1]))


def test_packed_rows_of_the_model() -> None:
    """Fewer bytes of each row: its codes, rotated values, and scales, which lanes share."""
    c = case(1, 2, 131, "all", H=64, K=512, P=64, dtype=mx.bfloat16, W=128)
    assert c.rows is not None
    with emulate(counters=True, repeat=False) as session:
        c.found(window=pack_rows(c.window, 64), rows=pack_rows(c.rows, 64))
    traffic = session.dispatches[0].traffic
    assert (session.dispatches[0].kernel, traffic["window"].read_bytes) == (
        "attention_prefill", 2 * 2 * 128 * (448 + 128 + 448 // 8),
    )  # fmt: skip
    assert traffic["rows"].read_distinct == 33 * (448 + 128 + 7)


# --- what is attended ---------------------------------------------------------------------------------


def test_what_may_not_be_seen_is_not_read() -> None:
    """NaN in rows too old, of later tokens, of open groups."""
    c = case(1, 5, 41, "all")
    assert c.rows is not None
    for t in range(5):
        window, rows = c.window * 1.0, c.rows * 1.0
        last = c.window.shape[1] - 5 + t + 1
        window[:, last:], window[:, : last - W], rows[:, (41 + t + 1) // RATIO :] = NAN, NAN, NAN
        expect_equal(c.found(window=window, rows=rows)[:, t], c.found()[:, t])
    longer = mx.concatenate([mx.full((1, 4, 20), NAN), c.window], axis=1)
    more = mx.concatenate([c.rows, mx.full((1, 30, 20), NAN)], axis=1)
    expect_match(c.found(window=longer, rows=more), c.reference(), mx.float32)


def test_picks_of_none() -> None:
    """At the start, in between, at the end, everywhere; row 0 is NaN where nobody picked it."""
    c = case(2, 5, 90, "picked", top=6)
    assert c.picks is not None and c.rows is not None
    picks = mx.maximum(c.picks, 1)
    gap = mx.full((2, 5, 11), -1)
    rows = c.rows * 1.0
    rows[:, 0] = NAN
    expected = replace(c, picks=picks).reference()
    for places in ([gap, picks], [picks, gap], [picks[..., :2], gap, picks[..., 2:]]):
        expect_match(c.found(picks=mx.concatenate(places, axis=-1), rows=rows), expected, mx.float32)
    expect_match(c.found(picks=gap, rows=rows), replace(c, picks=None, rows=None).reference(), mx.float32)


def test_places_of_none_cost_no_reads_and_no_work() -> None:
    c = case(1, 1, 90, "picked", top=6)
    assert c.picks is not None
    picks = mx.concatenate([mx.full((1, 1, 80), -1), c.picks], axis=-1)
    with emulate(counters=True, repeat=False) as session:
        c.found(picks=picks)
        c.found()
    more, _, few, _ = session.dispatches
    assert more.traffic["rows"].read_bytes == 6 * 20 * 4
    assert more.barriers <= few.barriers + few.barriers // 2  # at most one tile more, where the picks begin


def test_picks_in_any_order_and_twice() -> None:
    c = case(2, 5, 90, "picked", top=6)
    assert c.picks is not None
    twice = c.picks[..., mx.array([3, 0, 4, 1, 2, 5, 5])]
    expect_match(c.found(picks=twice), replace(c, picks=twice).reference(), mx.float32)


def test_nan_in_a_row_that_is_seen() -> None:
    """All of the heads that see it, and no other query."""
    c = case(1, 6, 62, "window")
    window = c.window * 1.0
    window[:, -2, 3] = NAN
    found = np.isnan(wide(c.found(window=window)))[0]
    assert [bool(f.any()) for f in found] == [bool(f.all()) for f in found] == [t >= 4 for t in range(6)]


def test_nan_in_a_head_stays_there() -> None:
    c = case(1, 2, 62, "all", H=19)
    c.q[:, 1, 9, 2] = NAN
    lost = np.isnan(wide(c.found()))[0]
    assert lost[1, 9].all() and lost.sum() == 20


def test_rows_of_a_larger_cache() -> None:
    """A part of the rows that were allocated, in a batch: not contiguous."""
    c = case(2, 3, 90, "all")
    assert c.rows is not None
    more = mx.concatenate([c.rows, mx.full((2, 9, 20), NAN)], axis=1)
    expect_equal(c.found(rows=more[:, : c.rows.shape[1]]), c.found())


@KINDS
def test_a_query_alone_equals_the_query_among_others(kind: str) -> None:
    """Of its batch and of its tokens."""
    c = case(2, 4, 90, kind, dtype=mx.bfloat16)
    together = c.found()
    for b in range(2):
        own = {n: a if a is None else a[b : b + 1] for n in ("q", "window", "rows", "picks") for a in (getattr(c, n),)}
        expect_equal(c.found(**own), together[b : b + 1])
    before = replace(
        c, q=c.q[:, :3], window=c.window[:, :-1], picks=c.picks if c.picks is None else c.picks[:, :3],
        cos=c.cos[:3], sin=c.sin[:3],
    )  # fmt: skip
    expect_equal(before.found(), together[:, :3])


# --- softmax ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
def test_logits_that_rise_and_fall(order: int) -> None:
    """The largest so far changes with every tile, or never after the first; e^x overflows between them."""
    c = case(1, 1, 750, "all", H=1, K=16)
    assert c.rows is not None
    rows = c.rows * 1.0
    rows[..., 0] = 3 * mx.arange(1, c.rows.shape[1] + 1, dtype=mx.float32)[::order]
    q = 4 * (mx.arange(16) == 0).astype(mx.float32)  # 4 / sqrt(16) = 1, so that logits are exact
    expect_as_good(replace(c, q=q[None, None, None], rows=rows, window=mx.zeros_like(c.window), sink=mx.array([3.0])))


@pytest.mark.parametrize("value", [-float("inf"), -1e4, 50.0, 1e4])
def test_extreme_sinks(value: float) -> None:
    """Two take nothing, one nearly all, one all."""
    c = case(2, 5, 40, "all")
    expect_as_good(replace(c, sink=mx.full((3,), value)))


def test_large_logits_do_not_overflow() -> None:
    c = case(2, 5, 40, "all")
    c = replace(c, q=c.q * 500)
    # At a logit of 1000 float32 is off by 3e-5, and e^x as much.
    np.testing.assert_allclose(wide(c.found()), c.reference(), rtol=1e-3, atol=1e-3)


def test_keys_that_count_for_nothing() -> None:
    """Logits of minus infinity beside others, and nothing else than them and the sink."""
    c = case(1, 1, 40, "all", H=2)
    assert c.rows is not None
    c = replace(c, q=mx.ones((1, 1, 2, 20)), rows=mx.full(c.rows.shape, -3e38))
    expect_as_good(c)
    expect_as_good(replace(c, window=mx.full(c.window.shape, -3e38)))


@LOW
def test_the_same_roundings_as_the_other_kernel(dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which has its own test of them; sums in another order show in few elements."""
    c = case(1, 5, 40, "all", H=5, K=70, dtype=dtype)
    found = c.found()
    limit(monkeypatch, PREFILL_FROM=6)
    other = sys.modules["metal_kernels.sparse_attention"]
    monkeypatch.setattr(other, "_SPLIT_KEYS", 10**6)
    monkeypatch.setattr(other, "_TILE_ROWS", 8)
    expect_same(found, wide(c.found()), share=0.02)


@LOW
def test_rotated_back_by_the_angle_of_the_query(dtype: mx.Dtype) -> None:
    """Attention without rotation, rounded, and turned afterwards is attention with."""
    c = case(2, 5, 40, "all", H=5, K=34, P=32, dtype=dtype)
    still = wide(c.found(cos=mx.ones_like(c.cos), sin=mx.zeros_like(c.sin)))
    expect_same(c.found(), rope_expected(still, c.cos, -c.sin, dtype), share=0.002)
