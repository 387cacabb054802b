"""The rotary tables: frequencies of the real model, and which positions they are for."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mlx_v4flash.config import Yarn
from mlx_v4flash.rope import RotaryTables, Rotations, inverse_frequencies

# The released model.
WIDTH, PLAIN, COMPRESS = 64, 10000.0, 160000.0
YARN = Yarn(factor=16, original_max_position_embeddings=65536, beta_fast=32, beta_slow=1)
# By pair: as they are up to pair 15, a sixteenth from pair 25 on, and a straight line between.
MULTIPLIERS = [1.0] * 16 + [0.90625, 0.8125, 0.71875, 0.625, 0.53125, 0.4375, 0.34375, 0.25, 0.15625] + [0.0625] * 7

PLAIN_FREQUENCIES = inverse_frequencies(PLAIN, WIDTH, None)
COMPRESS_FREQUENCIES = inverse_frequencies(COMPRESS, WIDTH, YARN)


class Sizes:
    """What the tables read of a config."""

    qk_rope_head_dim, rope_theta, compress_rope_theta, rope_scaling = WIDTH, PLAIN, COMPRESS, YARN


def powers(theta: float) -> np.ndarray:
    return np.array([theta ** (-2 * i / WIDTH) for i in range(WIDTH // 2)])


def rotations(position: int, T: int) -> Rotations:
    return RotaryTables(Sizes()).at(position, T)


def expect_angles(found: tuple[mx.array, mx.array], positions: list[int], frequencies: np.ndarray) -> None:
    """The product of position and frequency is float32, as in the official code; its cosine is exact to float32."""
    angles = np.array(positions, np.float32)[:, None] * frequencies.astype(np.float32)
    assert angles.dtype == np.float32
    for array, function in zip(found, (np.cos, np.sin), strict=True):
        assert (array.dtype, array.shape) == (mx.float32, angles.shape)
        np.testing.assert_allclose(np.array(array), function(angles.astype(np.float64)), rtol=0, atol=3e-7)


# --- frequencies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [PLAIN, COMPRESS])
def test_plain_frequencies(theta: float) -> None:
    found = inverse_frequencies(theta, WIDTH, None)
    assert (found.dtype, found.shape) == (np.float32, (WIDTH // 2,))
    np.testing.assert_allclose(found, powers(theta), rtol=3e-7)


def test_yarn_slows_down_the_slow_pairs() -> None:
    found = inverse_frequencies(COMPRESS, WIDTH, YARN)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found / powers(COMPRESS), MULTIPLIERS, rtol=5e-7)


def test_yarn_starts_after_pair_15_and_ends_at_pair_25() -> None:
    changed = inverse_frequencies(COMPRESS, WIDTH, YARN) != inverse_frequencies(COMPRESS, WIDTH, None)
    assert list(np.flatnonzero(changed)) == list(range(16, 32))
    slowed = inverse_frequencies(COMPRESS, WIDTH, YARN) * 16 == inverse_frequencies(COMPRESS, WIDTH, None)
    assert list(np.flatnonzero(slowed)) == list(range(25, 32))


def test_yarn_of_transformers() -> None:
    parameters = {
        "rope_type": "yarn", "rope_theta": COMPRESS, "factor": 16.0, "beta_fast": 32, "beta_slow": 1,
        "original_max_position_embeddings": 65536, "attention_factor": 1.0,
    }  # fmt: skip
    config = PretrainedConfig(
        head_dim=WIDTH, hidden_size=WIDTH, num_attention_heads=1, max_position_embeddings=1 << 20,
        rope_parameters=parameters,
    )  # fmt: skip
    theirs, magnitude = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    assert magnitude == 1
    np.testing.assert_allclose(inverse_frequencies(COMPRESS, WIDTH, YARN), theirs.numpy(), rtol=5e-7)


def test_yarn_of_a_short_original_length_starts_at_the_first_pair() -> None:
    width, theta, yarn = 16, 10000.0, Yarn(factor=4, original_max_position_embeddings=64)
    low, high = 0, 3  # pair -1.0 makes 32 turns in 64 positions, pair 2.02 makes one
    ramp = np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)
    expected = theta ** (-2 * np.arange(width // 2) / width) * (1 - ramp + ramp / 4)
    np.testing.assert_allclose(inverse_frequencies(theta, width, yarn), expected, rtol=5e-7)


@pytest.mark.parametrize("theta", [PLAIN, COMPRESS])
def test_frequencies_have_the_bits_that_the_official_arithmetic_gives(theta: float) -> None:
    """torch's float32, step by step: the last bit of a frequency is a hundredth of a radian at position 1,000,000."""
    theirs = (1.0 / (theta ** (torch.arange(0, WIDTH, 2, dtype=torch.float32) / WIDTH))).numpy()
    found, exact = inverse_frequencies(theta, WIDTH, None), powers(theta).astype(np.float32)
    assert (exact != theirs).sum() > 6, "one rounding gives the same"
    np.testing.assert_array_max_ulp(found, theirs, maxulp=1)
    assert (found != theirs).sum() <= 2  # torch's power may differ between machines


# --- tables -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("position", "T"), [(0, 1), (0, 5), (7, 1), (1_048_576 - 7, 7)])
def test_layers_without_compressor_use_the_plain_table(position: int, T: int) -> None:
    expect_angles(rotations(position, T).tokens(False), list(range(position, position + T)), PLAIN_FREQUENCIES)


@pytest.mark.parametrize(("position", "T"), [(0, 1), (0, 5), (7, 1), (1_048_576 - 7, 7)])
def test_layers_with_compressor_use_the_slowed_table(position: int, T: int) -> None:
    found = rotations(position, T).tokens(True)
    expect_angles(found, list(range(position, position + T)), COMPRESS_FREQUENCIES)


@pytest.mark.parametrize("compressed", [False, True])
def test_no_magnitude_factor(compressed: bool) -> None:
    cos, sin = (np.array(a) for a in rotations(0, 50).tokens(compressed))
    np.testing.assert_allclose(cos**2 + sin**2, 1, rtol=1e-6)
    assert (cos[0] == 1).all() and (sin[0] == 0).all()


@pytest.mark.parametrize("position", [255, 257, 999_999, 1_048_575])
def test_neighbouring_positions_far_out_have_angles_of_their_own(position: int) -> None:
    """Pair 0 turns by one radian per token: a table of positions in a low type could not tell them apart."""
    cos, sin = (np.array(a, np.float64) for a in rotations(position, 2).tokens(True))
    turned = np.arctan2(sin, cos)[:, 0]
    assert (turned[1] - turned[0]) % (2 * np.pi) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("first", "count", "ratio"), [(0, 1, 4), (0, 3, 128), (5, 4, 4), (8191, 1, 128), (3, 2, 16)])
def test_a_group_stands_at_its_first_token(first: int, count: int, ratio: int) -> None:
    found = rotations(first * ratio + 3, count * ratio).groups(first, count, ratio)
    positions = [i * ratio for i in range(first, first + count)]
    expect_angles(found, positions, COMPRESS_FREQUENCIES)


def test_groups_of_one_call_do_not_share_tables_of_another_size() -> None:
    """Tables are kept for the other layers of the pass: each size has its own."""
    r, frequencies = rotations(256, 300), COMPRESS_FREQUENCIES
    for _ in range(2):
        expect_angles(r.groups(64, 2, 4), [256, 260], frequencies)
        expect_angles(r.groups(2, 2, 128), [256, 384], frequencies)
        expect_angles(r.tokens(True), list(range(256, 556)), frequencies)
        expect_angles(r.tokens(False), list(range(256, 556)), PLAIN_FREQUENCIES)
    assert r.tokens(True)[0] is r.tokens(True)[0]
