"""The kernel of index_topk: exactly the choice of its reference."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import Session, emulate
from support import expect_equal, generator, normal, run, sizes

from metal_kernels import KernelError, index_topk, kernels
from metal_kernels.index_topk import index_topk_reference

pytestmark = pytest.mark.usefixtures("emulated")

NAN, INF = float("nan"), float("inf")
GPU = pytest.mark.parametrize(
    "changes", [{"contract": True}, {"ftz": True}, {"alignment": 4}], ids=["contract", "ftz", "alignment"]
)
SHAPES = sizes(
    "B T S k", (1, 1, 1, 1), (1, 1, 67, 7), (1, 5, 8, 7), (2, 7, 7, 7), (2, 3, 130, 1), (2, 3, 131, 37),
    (1, 2, 1023, 64), (1, 2, 1025, 64), (1, 3, 2500, 512), (1, 1, 5000, 1030),
)  # fmt: skip


def picks_expected(scores: np.ndarray, k: int, visible: np.ndarray) -> np.ndarray:
    out = np.full((*scores.shape[:2], k), -1, np.int32)
    for b, t in np.ndindex(scores.shape[:2]):
        best = np.argsort(-scores[b, t, : visible[t]], kind="stable")[:k]
        out[b, t, k - len(best) :] = np.sort(best)
    return out


def expect_picks(scores: np.ndarray, k: int, visible: Any) -> None:
    """What sorting gives, and what the reference gives."""
    x, limits = mx.array(scores.astype(np.float32)), mx.array(np.array(visible, np.int32))
    found = run(index_topk, x, k, limits)
    np.testing.assert_array_equal(np.array(found), picks_expected(np.array(x), k, np.array(visible)))
    expect_equal(found, index_topk_reference(x, k, limits))


@SHAPES
def test_index_topk(B: int, T: int, S: int, k: int) -> None:
    expect_picks(np.array(normal(B, T, S)), k, generator().integers(0, S + 1, T))


@SHAPES
@pytest.mark.parametrize("values", [(0, 1, 2), (-1.5, -1.25), (7.5,), (-INF, 3, INF)], ids=str)
def test_of_equal_scores_the_lower_row_wins(B: int, T: int, S: int, k: int, values: tuple[float, ...]) -> None:
    expect_picks(generator().choice(values, (B, T, S)), k, generator().integers(S // 2, S + 1, T))


@pytest.mark.parametrize("sign", [1, -1], ids=["rising", "falling"])
def test_neighbours(sign: int) -> None:
    """Scores that differ in their last bit alone, around numbers where upper bits change, and the smallest ones."""
    start = np.array([1.0, 1.99999, -3.99, -0.5, 0.0, 1e-45, 2**-126 - 1e-42, 3e38], np.float32).view(np.int32)
    scores = (start[:, None] + np.arange(1100, dtype=np.int32)).view(np.float32)[:, ::sign][None]
    assert np.isfinite(scores).all()
    expect_picks(generator().permuted(scores, axis=-1), 37, [1100] * 8)
    expect_picks(scores, 37, [1100] * 8)


def test_numbers_of_every_size() -> None:
    """Random bits that are a number: all exponents, both signs, and infinities."""
    bits = generator().integers(0, 2**32, (1, 3, 3000), dtype=np.uint32)
    bits[..., ::50], bits[..., 1::50] = 0x7F800000, 0xFF800000
    scores = np.nan_to_num(bits.view(np.float32), nan=1.0, posinf=INF, neginf=-INF)
    for k in (1, 60, 1500, 3000):
        expect_picks(scores, k, [3000, 2999, 2017])


def test_the_two_zeros_are_equal() -> None:
    scores = generator().choice([-0.0, 0.0], (2, 5, 67))
    assert (np.signbit(scores).mean(axis=-1) > 0.2).all()
    expect_picks(scores, 13, [67, 14, 13, 12, 40])
    expect_picks(np.where(np.arange(67) % 5, scores, -1.0), 13, [67, 14, 13, 12, 40])
    expect_picks(np.where(np.arange(67) % 9, scores, 1e-45), 13, [67, 14, 13, 12, 40])


@pytest.mark.parametrize("visible", [0, 1, 6, 7, 8, 31, 32, 33, 66, 67])
def test_fewer_visible_rows_than_places(visible: int) -> None:
    expect_picks(np.array(normal(2, 1, 67)), 7, [visible])


@pytest.mark.parametrize("sign", [1, -1], ids=["rising", "falling"])
def test_a_row_that_may_not_be_seen_takes_no_place_and_is_not_read(sign: int) -> None:
    """The best rows are the last ones, or the first ones; each query sees one row more."""
    expect_picks(np.tile(sign * np.arange(20.0), (1, 20, 1)), 7, np.arange(20))
    scores = normal(1, 1, 600)
    with emulate(counters=True) as session:
        index_topk(scores, 7, mx.array([100]))
    assert session.dispatches[-1].traffic["scores"].read_distinct == 400


def test_minus_infinity_is_a_score() -> None:
    scores = np.full((1, 3, 9), -INF)
    scores[0, :, 4:] = 3.0
    expect_picks(scores, 4, [2, 6, 9])


def test_nan_takes_no_place_of_a_number() -> None:
    """Nor of a row that may not be seen, which leaves the place empty."""
    scores, visible = np.array(normal(1, 4, 67)), np.array([67, 40, 20, 5])
    scores[..., 3::2] = generator().choice([NAN, -NAN], scores[..., 3::2].shape)
    found = np.array(run(index_topk, mx.array(scores), 13, mx.array(visible.astype(np.int32))))
    expected = picks_expected(np.where(np.isnan(scores), -INF, scores), 13, visible)
    np.testing.assert_array_equal(found[0, :2], expected[0, :2])
    np.testing.assert_array_equal(found[0, 2], [-1] * 2 + [0, 1, *range(2, 20, 2)])
    np.testing.assert_array_equal(found[0, 3], [-1] * 9 + [0, 1, 2, 4])
    x = mx.array([[[1.0, NAN, 2.0, NAN, NAN]]])
    for k, visible_count in ((2, 5), (4, 3), (5, 3), (3, 4), (3, 2)):
        limit = mx.array([visible_count], mx.int32)
        found, theirs = (np.array(op(x, k, limit)) for op in (index_topk, index_topk_reference))
        assert (found == -1).sum() == (theirs == -1).sum()
        assert set(found.flat) & {0, 2} == set(theirs.flat) & {0, 2}
    # Of several NaN there is no better one.
    np.testing.assert_array_equal(np.array(index_topk(x * NAN, 2, mx.array([5]))), [[[0, 1]]])
    np.testing.assert_array_equal(np.array(index_topk(x * NAN, 2, mx.array([0]))), [[[-1, -1]]])


@GPU
def test_as_a_gpu_may_run_it(changes: dict[str, Any]) -> None:
    scores = mx.concatenate([normal(2, 2, 600), mx.round(normal(2, 2, 600)), normal(2, 2, 99, scale=1e-40)], axis=-1)
    args = (scores, 300, mx.array([1299, 1100]))
    with emulate(**changes):
        expect_equal(index_topk(*args), index_topk_reference(*args))


@pytest.mark.parametrize("kind", ["different", "ties"])
def test_size_of_the_model(kind: str) -> None:
    """A context of a million tokens, in one launch of one threadgroup for each query."""
    scores = normal(1, 1, 262_147)
    args = (scores if kind == "different" else mx.round(scores), 512, mx.array([262_144]))
    with emulate(repeat=False) as session:
        expect_equal(index_topk(*args), index_topk_reference(*args))
    (launch,) = session.dispatches
    assert (launch.grid, launch.threadgroup, launch.threadgroup_bytes) == ((1024, 1, 1), (1024, 1, 1), 8464)


def test_a_query_alone_equals_the_query_of_a_batch() -> None:
    scores, visible = mx.array(generator().choice([0.0, 1, 2], (3, 5, 67)).astype(np.float32)), mx.arange(30, 35)
    together = index_topk(scores, 13, visible)
    for b, t in np.ndindex(3, 5):
        alone = index_topk(scores[b : b + 1, t : t + 1], 13, visible[t : t + 1])
        expect_equal(alone, together[b : b + 1, t : t + 1])


def test_limits_beyond_the_rows() -> None:
    expect_equal(index_topk(mx.arange(9.0)[None, None], 4, mx.array([12])), mx.array([[[5, 6, 7, 8]]]))
    expect_equal(index_topk(mx.arange(9.0)[None, None], 4, mx.array([-3])), mx.full((1, 1, 4), -1))


def test_what_is_not_covered(emulated: Session) -> None:
    args = (normal(1, 2, 9, dtype=mx.bfloat16), 3, mx.array([9, 8]))
    with pytest.raises(KernelError, match="index_topk: the kernel covers scores in float32"):
        index_topk(*args)
    with kernels("auto"):
        expect_equal(index_topk(*args), index_topk_reference(*args))
    assert not emulated.dispatches
