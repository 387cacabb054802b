"""Caches of packed rows: the logits of the float layout bit for bit, in the bytes the format promises."""

from __future__ import annotations

import itertools
from pathlib import Path

import golden
import mlx.core as mx
import mlx_lm.models.cache as mlx_lm_cache
import numpy as np
import pytest
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from mlx_v4flash import Model, load_model
from mlx_v4flash.attention import Attention
from mlx_v4flash.cache import LayerCache
from mlx_v4flash.config import ModelConfig
from mlx_v4flash.linear import Numerics
from mlx_v4flash.rope import RotaryTables
from mlx_v4flash.tiny import REAL, TINY, write_tiny

# Edges of groups (4, 128) and of the window (128): a prefill, chunks, single tokens past several groups.
ENDS = {"one pass": (0, 290), "chunks": (0, 1, 128, 131, 260, 290), "decode": (0, 250, *range(251, 291))}


@pytest.fixture(scope="module", params=["tiny", "official-qat"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """A model with packed caches, and the same one with the float layout."""
    if request.param == "tiny":
        folder = write_tiny(tmp_path_factory.mktemp("packed"), TINY, seed=5)
    else:
        folder = golden.folder(request.param)
    packed = load_model(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Numerics, "packed_caches", False)
        return packed, load_model(folder)


def ids_of(model: Model, count: int) -> mx.array:
    return mx.random.randint(0, model.config.vocab_size, (2, count), key=mx.random.key(4))


def rows_of(cache: list[LayerCache]) -> list[mx.array]:
    """Windows, compressed rows and index keys."""
    sides = [side.buffer for c in cache for side in (c.attn, c.index) if side is not None]
    return [a for a in [*(c.window for c in cache), *sides] if a is not None]


@pytest.mark.parametrize("way", ENDS)
def test_logits_have_the_same_bits(pair: tuple[Model, Model], way: str) -> None:
    caches, found = [m.make_cache() for m in pair], [[], []]
    for a, b in itertools.pairwise(ENDS[way]):
        for model, cache, parts in zip(pair, caches, found, strict=True):
            parts.append(np.array(model(ids_of(model, 290)[:, a:b], cache)))
    np.testing.assert_array_equal(*(np.concatenate(parts, axis=1) for parts in found))
    assert [{a.dtype for a in rows_of(cache)} for cache in caches] == [{mx.uint8}, {mx.bfloat16}]
    packed, plain = (sum(c.nbytes for c in cache) for cache in caches)
    assert packed < plain


@pytest.mark.parametrize(
    ("numerics", "packed"),
    [
        (Numerics(), True),
        (Numerics(quantize_activations=True), True),
        (Numerics(simulate_cache_quant=False), False),
        (Numerics(dtype=mx.float32), False),
        (Numerics(dtype=mx.float16), False),
    ],
    ids=["default", "rounded-inputs", "no-round-trips", "float32", "float16"],
)
def test_only_what_loses_nothing_is_packed(numerics: Numerics, packed: bool) -> None:
    assert numerics.packed_caches is packed


def test_cache_files_keep_the_layout(
    pair: tuple[Model, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlx_lm_cache, "LayerCache", LayerCache, raising=False)
    model, cache = pair[0], pair[0].make_cache()
    ids = ids_of(model, 150)
    model(ids[:, :147], cache)
    file = str(tmp_path / "cache.safetensors")
    save_prompt_cache(file, cache)
    loaded = load_prompt_cache(file)
    assert {a.dtype for a in rows_of(loaded)} == {mx.uint8}
    np.testing.assert_array_equal(np.array(model(ids[:, 147:], loaded)), np.array(model(ids[:, 147:], cache)))


def test_bytes_of_the_model() -> None:
    """Spec 10.2: what the caches of V4-Flash hold after 128 tokens, from its own compressors, layer by layer."""
    config, numerics = ModelConfig.from_dict(REAL), Numerics()
    rotations = RotaryTables(config).at(0, 128)
    x, rows = mx.zeros((1, 128, config.hidden_size), mx.bfloat16), {}
    for ratio in (0, 4, 128):
        cache = LayerCache(config.sliding_window, ratio)
        Attention(config, numerics, ratio)(x, cache, rotations)
        rows[ratio] = sum(side.all().nbytes for side in (cache.attn, cache.index) if side is not None)
        window = cache.window
    ratios = config.compress_ratios
    assert sum(rows[ratio] for ratio in ratios) / 128 == 3514.25
    assert len(ratios) * window.nbytes == 3_214_336
