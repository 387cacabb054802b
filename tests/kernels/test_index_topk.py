"""index_topk against sorting the visible rows by score and number."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from support import expect_equal, expect_refused, generator, normal, run, sizes

from metal_kernels import index_topk


def picks_expected(scores: np.ndarray, k: int, visible: np.ndarray) -> np.ndarray:
    out = np.full((*scores.shape[:2], k), -1)
    for b in range(scores.shape[0]):
        for t in range(scores.shape[1]):
            best = sorted(range(visible[t]), key=lambda s: (-scores[b, t, s], s))[:k]
            out[b, t] = [-1] * (k - len(best)) + sorted(best)
    return out


def expect_picks(scores: np.ndarray, k: int, visible: np.ndarray | list[int]) -> None:
    visible = np.array(visible)
    scores = scores.astype(np.float32)
    found = run(index_topk, mx.array(scores), k, mx.array(visible.astype(np.int32)))
    assert found.dtype == mx.int32
    np.testing.assert_array_equal(np.array(found), picks_expected(scores, k, visible))


SHAPES = sizes(
    "B T S k",
    (1, 1, 1, 1),
    (1, 1, 67, 7),
    (1, 5, 8, 7),
    (2, 7, 7, 7),
    (2, 3, 130, 1),
    (2, 3, 131, 37),
    (1, 3, 2500, 512),
)


@SHAPES
def test_index_topk(B: int, T: int, S: int, k: int) -> None:
    expect_picks(np.array(normal(B, T, S)), k, generator().integers(0, S + 1, T))


@SHAPES
@pytest.mark.parametrize("values", [(0, 1, 2), (-1.5, -1.25), (0,), (7.5,)], ids=str)
def test_of_equal_scores_the_lower_row_wins(B: int, T: int, S: int, k: int, values: tuple[float, ...]) -> None:
    expect_picks(generator().choice(values, (B, T, S)), k, generator().integers(S // 2, S + 1, T))


def test_the_two_zeros_are_equal() -> None:
    scores = generator().choice([-0.0, 0.0], (2, 5, 67))
    assert (np.signbit(scores).mean(axis=-1) > 0.2).all()
    expect_picks(scores, 13, [67, 14, 13, 12, 40])
    expect_picks(np.where(np.arange(67) % 5, scores, -1.0), 13, [67, 14, 13, 12, 40])


@pytest.mark.parametrize("sign", [1, -1], ids=["rising", "falling"])
def test_a_row_that_may_not_be_seen_takes_no_place(sign: int) -> None:
    """The best rows are the last ones, or the first ones; each query sees one row more."""
    expect_picks(np.tile(sign * np.arange(20.0), (1, 20, 1)), 7, np.arange(20))


@pytest.mark.parametrize("visible", [0, 1, 6, 7, 8, 66, 67])
def test_fewer_visible_rows_than_places(visible: int) -> None:
    expect_picks(np.array(normal(2, 1, 67)), 7, [visible])


def test_every_query_has_its_own_limit() -> None:
    """Four tokens per row, from a position in the middle of a group."""
    expect_picks(np.array(normal(2, 33, 20)), 7, (np.arange(33) + 46 + 1) // 4)


def test_minus_infinity_is_a_score() -> None:
    """A visible row of score minus infinity comes before rows that may not be seen."""
    scores = np.full((1, 3, 9), -np.inf)
    scores[0, :, 4:] = 3.0
    expect_picks(scores, 4, [2, 6, 9])


def test_all_rows_have_places() -> None:
    expect_picks(np.array(normal(2, 3, 7)), 7, [7, 7, 7])


def test_a_query_alone_equals_the_query_of_a_batch() -> None:
    scores, visible = mx.array(generator().choice([0.0, 1, 2], (3, 5, 67)).astype(np.float32)), mx.arange(30, 35)
    together = index_topk(scores, 13, visible)
    for b in range(3):
        for t in range(5):
            alone = index_topk(scores[b : b + 1, t : t + 1], 13, visible[t : t + 1])
            expect_equal(alone, together[b : b + 1, t : t + 1])


def test_refuses_fewer_scores_than_places() -> None:
    expect_refused("scores", index_topk, normal(1, 3, 6), 7, mx.array([6, 6, 6]))


def test_refuses_limits_of_another_shape() -> None:
    expect_refused("visible", index_topk, normal(1, 3, 8), 7, mx.array([6]))
