"""latents: norm of the latent; norm, rotation of the last dimensions and FP8 round trip of the others of the row."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from support import (
    FLOATS,
    expect_equal,
    expect_match,
    expect_refused,
    expect_same,
    fp8_expected,
    key_row,
    norm_expected,
    normal,
    rope_expected,
    rotation,
    rounded,
    run,
    sizes,
    wide,
)

from metal_kernels import latents

EPS = 1e-6
# K - P is a multiple of 64.
SHAPES = sizes("B T K P", (1, 1, 66, 2), (1, 5, 70, 6), (2, 3, 138, 10), (1, 2, 512, 64))


def uneven(B: int, T: int, K: int) -> mx.array:
    """Rows whose runs of 32 differ much in size, so that a scale per 32, 64 or 128 gives other numbers."""
    size = np.array([1, 1e-5, 1e-5, 1e-5, 1, 1, 1e-5, 1e-5])
    return normal(B, T, K) * mx.array(size[np.arange(K) // 32 % 8], mx.float32)


def row_expected(kv: mx.array, weight: mx.array, cos: mx.array, sin: mx.array, block: int | None) -> np.ndarray:
    normed = rounded(norm_expected(wide(kv), wide(weight), EPS), kv.dtype)
    row = rope_expected(normed, cos, sin, kv.dtype)
    still = kv.shape[-1] - 2 * cos.shape[-1]
    if block is not None:
        row[..., :still] = rounded(fp8_expected(row[..., :still], block), kv.dtype)
    return row


@FLOATS
@SHAPES
def test_without_round_trip(B: int, T: int, K: int, P: int, dtype: mx.Dtype) -> None:
    kv, weight, (cos, sin) = normal(B, T, K, dtype=dtype), normal(K), rotation(T, P // 2)
    expect_match(run(key_row, kv, weight, cos, sin, EPS, False), row_expected(kv, weight, cos, sin, None), dtype)


@FLOATS
@SHAPES
def test_with_round_trip(B: int, T: int, K: int, P: int, dtype: mx.Dtype) -> None:
    kv, weight, (cos, sin) = uneven(B, T, K).astype(dtype), normal(K), rotation(T, P // 2)
    found, expected = run(key_row, kv, weight, cos, sin, EPS, True), row_expected(kv, weight, cos, sin, 64)
    expect_same(found[..., : K - P], expected[..., : K - P], share=0.001)
    expect_match(found[..., K - P :], expected[..., K - P :], dtype)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])
def test_rounded_after_the_norm_and_after_the_rotation(dtype: mx.Dtype) -> None:
    kv, weight, (cos, sin) = normal(2, 17, 64, dtype=dtype), normal(64), rotation(17, 32)
    expect_same(run(key_row, kv, weight, cos, sin, EPS, True), row_expected(kv, weight, cos, sin, None), share=0.01)


@pytest.mark.parametrize("other", [32, 128])
def test_blocks_of_64_not_others(other: int) -> None:
    kv, weight, (cos, sin) = uneven(1, 5, 256 + 6), mx.ones(262), rotation(5, 3)
    expected, wrong = (row_expected(kv, weight, cos, sin, block)[..., :256] for block in (64, other))
    assert (expected != wrong).mean() > 0.1, "these numbers cannot tell the block sizes apart"
    expect_same(run(key_row, kv, weight, cos, sin, EPS, True)[..., :256], expected, share=0.001)


def test_rotated_dimensions_are_not_rounded() -> None:
    kv, weight, (cos, sin) = normal(1, 5, 134), normal(134), rotation(5, 3)
    rough, fine = (key_row(kv, weight, cos, sin, EPS, fp8) for fp8 in (True, False))
    expect_equal(rough[..., 128:], fine[..., 128:])
    assert (wide(rough) != wide(fine))[..., :128].mean() > 0.9


def test_a_row_of_a_batch_equals_that_row_alone() -> None:
    kv, weight, (cos, sin) = normal(3, 5, 70, dtype=mx.bfloat16), normal(70), rotation(5, 3)
    together = key_row(kv, weight, cos, sin, EPS, True)
    for b in range(3):
        expect_equal(key_row(kv[b : b + 1], weight, cos, sin, EPS, True), together[b : b + 1])


def test_latent_and_row_are_normalised_apart() -> None:
    q, kv, (cos, sin) = normal(2, 5, 34), normal(2, 5, 70), rotation(5, 3)
    q_weight, kv_weight = normal(34), normal(70)
    latent, row = run(latents, q, kv, q_weight, kv_weight, cos, sin, EPS, True)
    expect_match(latent, norm_expected(wide(q), wide(q_weight), EPS), mx.float32)
    expect_equal(row, key_row(kv, kv_weight, cos, sin, EPS, True))
    rest = (kv_weight, cos, sin, EPS, True)
    expect_refused("q_weight", latents, q, kv, q_weight[:-1], *rest)
    expect_refused("kv", latents, q[:, :4], kv, q_weight, *rest)


def latents_row(kv: mx.array, *rest: object) -> None:
    latents(mx.ones((*kv.shape[:-1], 2)), kv, mx.ones(2), *rest)


latents_row.__name__ = "latents"  # which is what its errors are about


def test_refuses_other_shapes() -> None:
    kv, weight, (cos, sin) = normal(1, 5, 70), normal(70), rotation(5, 3)
    expect_refused("kv_weight", latents_row, kv, weight[:-1], cos, sin, EPS, True)
    expect_refused("cos", latents_row, kv, weight, cos[:4], sin, EPS, True)


def test_refuses_sines_of_another_shape() -> None:
    kv, weight, (cos, sin) = normal(1, 5, 70), normal(70), rotation(5, 3)
    expect_refused("sin", latents_row, kv, weight, cos, sin[:1], EPS, True)


def test_refuses_a_part_of_a_block() -> None:
    kv, weight, (cos, sin) = normal(1, 5, 70), normal(70), rotation(5, 4)
    expect_refused("kv", latents_row, kv, weight, cos, sin, EPS, True)
