"""The kernels of sparse_attention against their reference."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import Session, emulate
from support import (
    BOUNDS,
    FLOATS,
    expect_equal,
    expect_match,
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

from metal_kernels import KernelError, attention_prefill, kernels, sparse_attention
from metal_kernels.sparse_attention import sparse_attention_reference

pytestmark = pytest.mark.usefixtures("emulated")

W, RATIO = 9, 4
NAN = float("nan")
GPU = pytest.mark.parametrize(
    "changes", [{"contract": True}, {"ftz": True}, {"alignment": 4}], ids=["contract", "ftz", "alignment"]
)
KINDS = pytest.mark.parametrize("kind", ["window", "all", "picked"])
LOW = pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])


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
    window_size: int = W

    def call(self, op: Any) -> mx.array:
        arrays = (self.q, self.window, self.rows, self.picks, self.sink, self.cos, self.sin)
        keywords = {"position": self.position, "ratio": RATIO, "window_size": self.window_size}
        found: mx.array = run(op, *arrays, **keywords) if op is sparse_attention else op(*arrays, **keywords)
        return found

    def found(self, **changes: Any) -> mx.array:
        return replace(self, **changes).call(sparse_attention)

    def reference(self) -> np.ndarray:
        return wide(self.call(sparse_attention_reference))

    def exact(self) -> np.ndarray:
        """Nothing rounded: the reference on the same numbers in float32."""
        arrays = {name: getattr(self, name) for name in ("q", "window", "rows")}
        single = {name: a if a is None else a.astype(mx.float32) for name, a in arrays.items()}
        return replace(self, **single).reference()


def case(
    B: int, T: int, position: int, kind: str, H: int = 3, K: int = 20, P: int = 6, top: int = 7,
    dtype: mx.Dtype = mx.float32, W: int = W,
) -> Case:  # fmt: skip
    """Random rows as the caches hold them at this position; picks come after -1, as index_topk gives them."""
    count = (position + T) // RATIO if kind != "window" else 0
    picks = None
    if count and kind == "picked":
        chosen = np.full((B, T, top), -1, np.int32)
        for b, t in np.ndindex(B, T):
            some = generator().permutation((position + t + 1) // RATIO)[:top]
            chosen[b, t, top - len(some) :] = np.sort(some)
        picks = mx.array(chosen)
    q, window = normal(B, T, H, K, dtype=dtype, scale=2), normal(B, min(position, W - 1) + T, K, dtype=dtype)
    rows = normal(B, count, K, dtype=dtype) if count else None
    return Case(q, window, rows, picks, normal(H), *rotation(np.arange(position, position + T), P // 2), position, W)


def expect_as_good(c: Case) -> None:
    """In float32 the same. Else the reference rounds, too: be as near to the exact result as that is.

    The kernel rounds probabilities before they are divided by their sum, so it cannot be nearer to the reference than
    both are to the exact result.
    """
    found, reference = c.found(), c.reference()
    if found.dtype == mx.float32:
        expect_match(found, reference, mx.float32)
        return
    exact = c.exact()
    size = np.linalg.norm(exact)
    theirs = np.linalg.norm(reference - exact) / size
    ours = np.linalg.norm(wide(found) - exact) / size
    apart = np.linalg.norm(wide(found) - reference) / size
    assert found.dtype == c.q.dtype
    assert ours <= min(1.1 * theirs, BOUNDS[found.dtype]), f"{ours:.2e} from exact, the reference {theirs:.2e}"
    assert apart <= 2 * theirs, f"{apart:.2e} from the reference, which is {theirs:.2e} from exact"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of 5 keys and more, and 4 rows at a time: several of both where there are few keys."""
    limit(monkeypatch, _SPLIT_KEYS=5, _TILE_ROWS=4)


def limit(monkeypatch: pytest.MonkeyPatch, **values: int) -> None:
    for name, value in values.items():
        monkeypatch.setattr(sys.modules["metal_kernels.sparse_attention"], name, value)


@FLOATS
@KINDS
@sizes("B T position", (1, 1, 150), (2, 5, 61))
def test_sparse_attention(B: int, T: int, position: int, kind: str, dtype: mx.Dtype) -> None:
    expect_as_good(case(B, T, position, kind, H=5, K=70, top=17, W=40, dtype=dtype))


@KINDS
@pytest.mark.usefixtures("small")
@sizes(
    "B T position", (1, 1, 0), (1, 3, 0), (1, W - 1, 0), (1, 2 * W + 2, 0), (2, 1, 3), (1, 1, W - 1), (2, 1, W),
    (1, 2, 18), (2, W + 1, 17), (1, 16, 50),
)  # fmt: skip
def test_every_position(B: int, T: int, position: int, kind: str) -> None:
    """Before and after the window is full, and where groups close within the call."""
    expect_as_good(case(B, T, position, kind))


@KINDS
@sizes("H K P", (1, 2, 2), (2, 4, 2), (33, 34, 4), (3, 66, 66), (5, 130, 64))
def test_heads_and_widths(H: int, K: int, P: int, kind: str) -> None:
    """Lanes without a pair, simdgroups and threadgroups with fewer heads, arrays of fewer than 8 elements."""
    expect_as_good(case(1, 2, 5 if K == 2 else 30, kind, H=H, K=K, P=P))


@pytest.mark.parametrize("keys", [1, 5, 20])
def test_splits(keys: int, monkeypatch: pytest.MonkeyPatch, emulated: Session) -> None:
    """More than there are lanes, and of tiles that leave the last ones without a key."""
    limit(monkeypatch, _SPLIT_KEYS=keys, _TILE_ROWS=4)
    expect_as_good(case(1, 1, 150, "all"))
    first, second = emulated.dispatches[:2]
    assert (first.grid[1], second.kernel) == (-(-(W + 37) // keys), "attention_combine")


@KINDS
def test_a_long_call_is_not_split(kind: str, emulated: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_prefill, "PREFILL_FROM", 71)
    expect_as_good(case(1, 70, 61, kind))
    assert {(d.kernel, d.grid[1]) for d in emulated.dispatches} == {("sparse_attention", 1)}


@GPU
@pytest.mark.usefixtures("small")
def test_as_a_gpu_may_run_it(changes: dict[str, Any]) -> None:
    c = case(2, 3, 50, "picked", H=5, K=70)
    with emulate(**changes):
        expect_match(c.found(), c.reference(), mx.float32)


@sizes("T position top", (1, 2100, 512), (2, 131, 0))
def test_size_of_the_model(T: int, position: int, top: int) -> None:
    """A seen row is read once for 32 of the 64 heads, and nothing else is; two launches."""
    c = case(1, T, position, "picked" if top else "all", H=64, K=512, P=64, top=top, dtype=mx.bfloat16, W=128)
    with emulate(counters=True, repeat=False) as session:
        expect_as_good(c)
    first, second = session.dispatches[:2]
    assert (first.threadgroup, first.threadgroup_bytes) == ((512, 1, 1), 16384)
    assert (second.kernel, second.threadgroup, second.threadgroup_bytes) == ("attention_combine", (32, 8, 1), 0)
    assert c.rows is not None
    seen = [top or (position + t + 1) // RATIO for t in range(T)]
    traffic = first.traffic["rows"]
    assert traffic.read_bytes == 2 * sum(seen) * 1024
    assert traffic.read_distinct == max(seen) * 1024
    assert first.traffic["window"].read_bytes == 2 * T * 128 * 1024
    assert second.traffic["sums"].read_bytes == first.traffic["out"].write_bytes == first.grid[1] * T * 64 * 2048


# --- what is attended -------------------------------------------------------------------------------


@pytest.mark.usefixtures("small")
def test_one_token_sees_its_window_in_any_order() -> None:
    c = case(2, 1, 40, "all")
    for shift in (1, 5, W - 1):
        expect_match(c.found(window=mx.roll(c.window, shift, axis=1)), c.reference(), mx.float32)


@pytest.mark.usefixtures("small")
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


@pytest.mark.usefixtures("small")
def test_picks_of_none() -> None:
    """At the start, in between, at the end, everywhere; row 0 is NaN where nobody picked it."""
    c = case(2, 5, 90, "picked", top=6)
    assert c.picks is not None and c.rows is not None
    picks = mx.maximum(c.picks, 1)
    gap = mx.full((2, 5, 5), -1)
    rows = c.rows * 1.0
    rows[:, 0] = NAN
    expected = replace(c, picks=picks).reference()
    for places in ([gap, picks], [picks, gap], [picks[..., :2], gap, picks[..., 2:]]):
        expect_match(c.found(picks=mx.concatenate(places, axis=-1), rows=rows), expected, mx.float32)
    nothing = replace(c, picks=None, rows=None).reference()
    expect_match(c.found(picks=gap, rows=rows), nothing, mx.float32)


def test_places_of_none_cost_no_reads() -> None:
    c = case(1, 1, 90, "picked", top=6)
    assert c.picks is not None
    picks = mx.concatenate([mx.full((1, 1, 80), -1), c.picks], axis=-1)
    with emulate(counters=True) as session:
        c.found(picks=picks)
    assert session.dispatches[0].traffic["rows"].read_bytes == 6 * 20 * 4


def test_picks_in_any_order_and_twice() -> None:
    c = case(2, 5, 90, "picked", top=6)
    assert c.picks is not None
    twice = c.picks[..., mx.array([3, 0, 4, 1, 2, 5, 5])]
    expect_match(c.found(picks=twice), replace(c, picks=twice).reference(), mx.float32)


@KINDS
def test_nan_in_a_row_that_is_seen(kind: str) -> None:
    """All of the heads that see it, and no other query."""
    c = case(1, 6, 62, kind, top=5)
    window, rows = c.window * 1.0, c.rows
    if kind == "window":
        window[:, -2, 3] = NAN
        lost = [t >= 4 for t in range(6)]
    else:
        assert rows is not None
        rows = rows * 1.0
        last = int(np.array(c.picks)[0, 3, -1]) if c.picks is not None else 15  # closed by token 63
        rows[:, last, 3] = NAN
        sees = np.array(c.picks)[0] == last if c.picks is not None else np.arange(6)[:, None] >= 1
        lost = list(sees.any(axis=-1))
    found = np.isnan(wide(c.found(window=window, rows=rows)))[0]
    assert [bool(f.any()) for f in found] == [bool(f.all()) for f in found] == [bool(x) for x in lost]
    assert any(lost)


def test_rows_of_a_larger_cache() -> None:
    """A part of the rows that were allocated, in a batch: not contiguous."""
    c = case(2, 3, 90, "all")
    assert c.rows is not None
    more = mx.concatenate([c.rows, mx.full((2, 9, 20), NAN)], axis=1)
    expect_equal(c.found(rows=more[:, : c.rows.shape[1]]), c.found())


# --- softmax ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
@pytest.mark.parametrize("keys", [2000, 4], ids=["one split", "48 splits"])
def test_logits_that_rise_and_fall(keys: int, order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest so far changes with every tile and split, or never after the first; e^x overflows between them."""
    limit(monkeypatch, _SPLIT_KEYS=keys, _TILE_ROWS=4)
    c = case(1, 1, 750, "all", H=1, K=16)
    assert c.rows is not None
    logits = 3 * mx.arange(1, c.rows.shape[1] + 1, dtype=mx.float32)[::order]
    rows = c.rows * 1.0
    rows[..., 0] = logits
    q = 4 * (mx.arange(16) == 0).astype(mx.float32)  # 4 / sqrt(16) = 1, so that logits are exact
    expect_as_good(replace(c, q=q[None, None, None], rows=rows, window=mx.zeros_like(c.window), sink=mx.array([3.0])))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("value", [-float("inf"), -1e4, 50.0, 1e4])
def test_extreme_sinks(value: float) -> None:
    """Two take nothing, one nearly all, one all."""
    c = case(2, 5, 40, "all")
    expect_as_good(replace(c, sink=mx.full((3,), value)))


@pytest.mark.usefixtures("small")
def test_large_logits_do_not_overflow() -> None:
    c = case(2, 5, 40, "all")
    c = replace(c, q=c.q * 500)
    # At a logit of 1000 float32 is off by 3e-5, and e^x as much.
    np.testing.assert_allclose(wide(c.found()), c.reference(), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("small")
def test_keys_that_count_for_nothing() -> None:
    """Logits of minus infinity beside others, and nothing else than them and the sink."""
    c = case(1, 1, 40, "all", H=2)
    assert c.rows is not None
    c = replace(c, q=mx.ones((1, 1, 2, 20)), rows=mx.full(c.rows.shape, -3e38))
    expect_as_good(c)
    expect_as_good(replace(c, window=mx.full(c.window.shape, -3e38)))


@LOW
def test_probabilities_are_rounded_and_their_sum_is_not(dtype: mx.Dtype) -> None:
    """Two keys: one of logit 0 and value 0, and one whose probability lies just below the middle of two numbers."""
    step = {mx.float16: 2**-11, mx.bfloat16: 2**-8}[dtype]
    window = np.concatenate([[0, 0, 0], 1024 + 8 * np.arange(61.0)])
    q, window = np.zeros((1, 1, 1, 64)), np.stack([np.zeros(64), window])[None]
    q[..., 0], window[:, 1, 0], window[:, 1, 1] = 8, np.log(0.5 + 0.49 * step), 0  # 8 / sqrt(64) = 1
    c = replace(
        case(1, 1, 1, "window", H=1, K=64, P=2, dtype=dtype), q=mx.array(q).astype(dtype), sink=mx.array([-1e4]),
        window=mx.array(window).astype(dtype), cos=mx.ones((1, 1)), sin=mx.zeros((1, 1)),
    )  # fmt: skip
    share, values = np.exp(wide(c.window)[0, 1, 0]), wide(c.window)[0, 1]
    p = rounded(share, dtype)
    expected, plain, both = (
        rounded(weight / total * values, dtype)
        for weight, total in ((p, 1 + share), (share, 1 + share), (p, rounded(1 + share, dtype)))
    )
    assert (expected != plain).any() and (expected != both).any()
    assert np.array_equal(wide(c.found())[0, 0, 0], expected)


@LOW
def test_small_probabilities(dtype: mx.Dtype) -> None:
    """Thousands of keys of the same weight, and a sink that has most of it: shares below the normal ones of float16."""
    c = case(1, 1, 9000, "all", H=1, K=4, P=2, dtype=dtype)
    c = replace(c, q=mx.zeros_like(c.q), sink=mx.array([9.0]))
    ours, theirs = (np.linalg.norm(a - c.exact()) for a in (wide(c.found()), c.reference()))
    assert ours <= 1.1 * theirs


@LOW
@pytest.mark.parametrize("keys", [2000, 5], ids=["one split", "several"])
def test_rotated_back_by_the_angle_of_the_query(keys: int, dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention without rotation, rounded, and turned afterwards is attention with."""
    limit(monkeypatch, _SPLIT_KEYS=keys)
    c = case(2, 5, 40, "all", H=5, K=34, P=32, dtype=dtype)
    still = wide(c.found(cos=mx.ones_like(c.cos), sin=mx.zeros_like(c.sin)))
    expect_same(c.found(), rope_expected(still, c.cos, -c.sin, dtype), share=0.002)


# --- others -----------------------------------------------------------------------------------------


@KINDS
def test_a_row_of_a_batch_equals_that_row_alone(kind: str) -> None:
    """Its keys are in one split either way."""
    c = case(3, 2, 90, kind, dtype=mx.bfloat16)
    together = c.found()
    for b in range(3):
        names = ("q", "window", "rows", "picks")
        own = {n: a if a is None else a[b : b + 1] for n, a in ((n, getattr(c, n)) for n in names)}
        expect_equal(c.found(**own), together[b : b + 1])


def test_what_is_not_covered() -> None:
    for c in (case(1, 2, 9, "all", K=21), replace(case(1, 2, 9, "all"), rows=normal(1, 2, 20, dtype=mx.float16))):
        with pytest.raises(KernelError, match="sparse_attention: the kernel covers an even head width, and rows in"):
            c.found()
        with kernels("auto"):
            expect_match(c.found(), c.reference(), mx.float32)
