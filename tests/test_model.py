"""Equalities of the model with itself, and what it must not do to memory, types and time."""

from __future__ import annotations

import copy
import importlib
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import golden
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import save_prompt_cache

from mlx_v4flash import Model, compressor, load_model
from mlx_v4flash.cache import ROW_BLOCK, LayerCache
from mlx_v4flash.errors import RequestError
from mlx_v4flash.tiny import TINY, write_tiny

# By name: the package holds functions of the same names as its modules.
scores_op = importlib.import_module("metal_kernels.index_scores")
attention_op = importlib.import_module("metal_kernels.sparse_attention")

# One of each kind of layer, small everywhere else; 16 index heads, so that scores do not tie at zero.
SMALL = {
    **TINY, "num_hidden_layers": 3, "compress_ratios": [0, 4, 128], "num_hash_layers": 1, "hidden_size": 128,
    "num_attention_heads": 2, "o_groups": 2, "index_topk": 9, "n_routed_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
LENGTH = 300
STEPS = 20_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny(tmp_path_factory.mktemp("small"), SMALL, seed=3))


@pytest.fixture(scope="module")
def model(folder: str) -> Model:
    """Without round trips: they turn a last-bit difference into a step of the grid."""
    return load_model(folder, dtype="float32", simulate_cache_quant=False)


@pytest.fixture(scope="module")
def ids() -> mx.array:
    return mx.random.randint(0, SMALL["vocab_size"], (2, LENGTH), key=mx.random.key(1))


@pytest.fixture(scope="module")
def whole(model: Model, ids: mx.array) -> np.ndarray:
    return np.array(model(ids))


def expect_equal(found: np.ndarray, want: np.ndarray, what: str) -> None:
    error = golden.relative_rms(found, want)
    assert error <= 5e-6, f"{what}: rms {error:.2e}"


# --- chunks, batches, state --------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 2, 297), (127, 1, 1, 171), (128, 128, 44), (129, 3, 4, 5, 159), (299, 1)])
def test_any_chunking_equals_one_pass(model: Model, ids: mx.array, whole: np.ndarray, sizes: tuple[int, ...]) -> None:
    assert sum(sizes) == LENGTH
    cache, done, found = model.make_cache(), 0, []
    for size in sizes:
        found.append(np.array(model(ids[:, done : done + size], cache)))
        done += size
    expect_equal(np.concatenate(found, axis=1), whole, str(sizes))


def test_one_token_at_a_time_equals_one_pass(model: Model, ids: mx.array, whole: np.ndarray) -> None:
    cache = model.make_cache()
    found = [np.array(model(ids[:, t : t + 1], cache)) for t in range(LENGTH)]
    expect_equal(np.concatenate(found, axis=1), whole, "token by token")


def test_row_of_a_batch_equals_that_row_alone(model: Model, ids: mx.array, whole: np.ndarray) -> None:
    for row in range(2):
        expect_equal(np.array(model(ids[row : row + 1]))[0], whole[row], f"row {row}")


def test_two_runs_are_bit_equal(model: Model, ids: mx.array, whole: np.ndarray) -> None:
    np.testing.assert_array_equal(np.array(model(ids)), whole)


@pytest.mark.parametrize("length", [1, 3, 4, 127, 128, 131, 257])
def test_copied_restored_and_saved_caches_continue_alike(
    model: Model, ids: mx.array, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlx_lm.models.cache as mlx_lm_cache

    monkeypatch.setattr(mlx_lm_cache, "LayerCache", LayerCache, raising=False)
    cache = model.make_cache()
    mx.eval(model(ids[:, :length], cache))
    file = f"{tmp_path}/cache.safetensors"
    save_prompt_cache(file, cache, {"model": "small"})
    others = {
        "copy": [c.copy() for c in cache],
        "deepcopy": copy.deepcopy(cache),
        "from_state": [LayerCache.from_state(c.state) for c in cache],
        "loaded": mlx_lm_cache.load_prompt_cache(file),
    }
    sizes = (1, 1, 5, 1, 2)

    def go_on(c: list[LayerCache]) -> np.ndarray:
        ends = np.cumsum((length, *sizes))
        parts = [model(ids[:, a:b], c) for a, b in itertools.pairwise(ends)]
        return np.concatenate([np.array(p) for p in parts], axis=1)

    want = go_on(cache)  # first: what the others hold must not follow
    for name, other in others.items():
        np.testing.assert_array_equal(go_on(other), want, err_msg=name)
        assert [c.position for c in other] == [c.position for c in cache]


def test_a_state_of_another_layout_is_refused(model: Model, ids: mx.array) -> None:
    """Such as of a prompt-cache file written by an earlier version."""
    cache = model.make_cache()
    mx.eval(model(ids[:, :9], cache))
    with pytest.raises(RequestError, match=r"prompt cache: expected 7 parts in the state of a layer, found 6\nhint: "):
        LayerCache.from_state(cache[1].state[:-1])


@pytest.mark.parametrize("T", [1, 3], ids=["one token", "several"])
@pytest.mark.parametrize(
    ("made_by", "used_by", "what"),
    [
        ({"dtype": "bfloat16"}, {"dtype": "float32"}, r"float32 \[\d+\], found uint8 \[\d+\]"),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}, r"uint8 \[\d+\], found float32 \[\d+\]"),
        (
            {"dtype": "bfloat16", "simulate_cache_quant": False},
            {"dtype": "float32", "simulate_cache_quant": False},
            r"float32 \[\d+\], found bfloat16 \[\d+\]",
        ),
    ],
    ids=["packed to float", "float to packed", "low to high precision"],
)
def test_caches_of_another_precision_are_refused(
    folder: str, ids: mx.array, made_by: dict[str, Any], used_by: dict[str, Any], what: str, T: int
) -> None:
    """Written into them, rows would be rounded, or turned into bytes, without a word."""
    maker, user = load_model(folder, **made_by), load_model(folder, **used_by)
    cache = maker.make_cache()
    mx.eval(maker(ids[:, :9], cache))
    with pytest.raises(RequestError, match=f"cache: expected rows of {what}\nhint: "):
        user(ids[:, 9 : 9 + T], cache)
    assert [c.position for c in cache] == [9] * len(cache), "a refused call changed a cache"


def test_reset_forgets_everything(model: Model, ids: mx.array, whole: np.ndarray) -> None:
    cache = model.make_cache()
    mx.eval(model(ids[:, 7:150], cache))
    assert not cache[0].empty() and cache[0].size() == 143
    for c in cache:
        c.reset()
    assert all(c.empty() and c.nbytes == 0 for c in cache)
    np.testing.assert_array_equal(np.array(model(ids, cache)), whole)


def test_nbytes_counts_every_array(model: Model, ids: mx.array) -> None:
    cache = model.make_cache()
    mx.eval(model(ids[:, :130], cache))
    config = model.config
    window = 2 * config.sliding_window * config.head_dim * 4
    assert cache[0].nbytes == window
    widths = config.head_dim, config.index_head_dim
    # Of two sequences the last 8 tokens: values and gates, for the next group and the own one; weights of the heads.
    recent = 2 * 8 * (4 * sum(widths) + config.index_n_heads) * 4
    assert cache[1].nbytes == window + recent + sum(2 * ROW_BLOCK * width * 4 for width in widths)


@pytest.mark.parametrize("shape", [(3,), (1, 0), (1, 2, 3)])
def test_ids_of_another_shape_are_refused(model: Model, shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"expected shape \[B, T\] with at least one token"):
        model(mx.zeros(shape, mx.int32))


# --- types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("simulate", [True, False], ids=["round-trips", "plain"])
@pytest.mark.parametrize("rounded", [True, False], ids=["rounded-inputs", "full-inputs"])
def test_nothing_is_promoted_in_a_bfloat16_model(folder: str, ids: mx.array, simulate: bool, rounded: bool) -> None:
    m = load_model(folder, simulate_cache_quant=simulate, quantize_activations=rounded)
    cache, stored = m.make_cache(), mx.uint8 if simulate else mx.bfloat16  # packed, if that loses nothing
    for part in (ids[:, :137], ids[:, 137:138]):
        x, rotations = m.streams(part), m.rotations(cache, part.shape[1])
        assert x.dtype == mx.bfloat16
        for number, (layer, layer_cache) in enumerate(zip(m.layers, cache, strict=True)):
            x = layer(x, part, layer_cache, rotations)
            assert x.dtype == mx.bfloat16, f"streams after layer {number}"
            assert layer_cache.window.dtype == stored
            for side in (layer_cache.attn, layer_cache.index):
                if side is not None:
                    assert side.buffer is None or side.buffer.dtype == stored
            # Projections of open groups stay float32, as in the official code.
            assert layer_cache.recent is None or layer_cache.recent.dtype == mx.float32
        assert m.logits(x).dtype == mx.float32


def test_weights_keep_their_stored_types(folder: str) -> None:
    m = load_model(folder)
    found = {path: leaf.dtype for path, leaf in tree_flatten(m.parameters())}
    assert found["layers.1.attn.wqkv_a.weight"] == mx.uint32 and found["layers.1.attn.wqkv_a.scales"] == mx.uint8
    assert found["layers.1.ffn.experts.w1.weight"] == mx.uint32
    assert found["head.weight"] == mx.bfloat16 and found["layers.1.hc_attn.fn"] == mx.float32
    assert found["layers.1.ffn.gate.bias"] == mx.float32 and found["layers.0.ffn.gate.tid2eid"] == mx.int32


# --- work and memory ---------------------------------------------------------------------------------


def test_attention_work_stops_growing_with_context(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per query: the window, the chosen rows, the rows of large groups, and nothing that grows otherwise."""
    m, attend, rows = load_model(folder, dtype="float32"), attention_op._attend, []

    def counted(q: mx.array, parts: list[tuple[mx.array, mx.array]], *rest: object) -> mx.array:
        rows.append([keys.shape[-2] for keys, _ in parts])
        return attend(q, parts, *rest)

    monkeypatch.setattr(attention_op, "_attend", counted)
    c = m.config
    for context in (200, 700):
        cache = m.make_cache()
        mx.eval(m(mx.zeros((1, context), mx.int32), cache))
        rows.clear()
        mx.eval(m(mx.zeros((1, 1), mx.int32), cache))
        assert rows == [[c.sliding_window], [c.sliding_window, c.index_topk], [c.sliding_window, (context + 1) // 128]]


def test_prefill_memory_grows_by_the_cache_alone(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Budgets that this small model reaches as well.
    monkeypatch.setattr(attention_op, "_WORK_BYTES", 1 << 20)
    monkeypatch.setattr(scores_op, "_WORK_BYTES", 1 << 20)
    monkeypatch.setattr(compressor, "_SCORE_BYTES", 1 << 16)
    m, chunk, peaks, sizes = load_model(folder, dtype="float32"), 256, [], []
    cache = m.make_cache()
    before = mx.get_active_memory()
    for step in range(1, 25):
        mx.clear_cache()
        mx.reset_peak_memory()
        m(mx.zeros((1, chunk), mx.int32), cache)
        mx.eval([c.state for c in cache])
        if step in (8, 24):  # 2,048 and 6,144 tokens
            peaks.append(mx.get_peak_memory() - before)
            sizes.append(sum(c.nbytes for c in cache))
    grown, own = peaks[1] - peaks[0], sizes[1] - sizes[0]
    # The old and the new buffer of one layer exist together while it grows, and a tile more or less may be in flight.
    slack = max(c.attn.buffer.nbytes for c in cache if c.attn is not None) + (1 << 20)
    assert 0 < own and grown <= own + slack, f"peak grew by {grown:,} bytes, the cache by {own:,}"


def test_no_step_keeps_the_graph_of_earlier_steps(model: Model) -> None:
    """Between groups nothing but the open group may grow, even where the logits alone are evaluated."""
    cache, token = model.make_cache(), mx.zeros((1, 1), mx.int32)
    actives = []
    for _ in range(130):
        mx.eval(model(token, cache))
        actives.append(mx.get_active_memory() - sum(c.nbytes for c in cache))
    # Steps 9 to 119 close groups of 4 again and again and fill the group of 128.
    assert max(actives[8:120]) - min(actives[8:120]) < 200_000, actives[8:120:10]


@pytest.mark.slow
def test_decode_neither_slows_down_nor_leaks(tmp_path: Path) -> None:
    """20,000 steps. Scoring index keys is work that grows with context by design; here it is made small."""
    m = load_model(write_tiny(tmp_path / "m", {**SMALL, "index_n_heads": 2, "index_head_dim": 64}))
    cache, token, extra = m.make_cache(), mx.zeros((1, 1), mx.int32), {}

    def seconds(cache: list[LayerCache], steps: int) -> list[float]:
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            mx.eval(mx.argmax(m(token, cache)[:, -1], axis=-1))
            times.append(time.perf_counter() - start)
        return times

    seconds(cache, 2_500)
    extra["early"] = mx.get_active_memory() - sum(c.nbytes for c in cache)
    young = [c.copy() for c in cache]
    seconds(cache, STEPS - 2_500)
    extra["late"] = mx.get_active_memory() - sum(c.nbytes for c in (*cache, *young))
    # In turns, so that a busy machine slows both: other work shifted medians minutes apart by half.
    rounds = [(seconds(young, 50), seconds(cache, 50)) for _ in range(20)]
    early, late = (statistics.median(t for r in rounds for t in r[i]) for i in (0, 1))
    print(f"\nmedian step {early * 1e3:.2f} ms, after {STEPS} {late * 1e3:.2f} ms; memory beyond the caches {extra}")
    assert late <= 1.1 * early, f"median step {early * 1e3:.2f} ms, after {STEPS} {late * 1e3:.2f} ms"
    assert abs(extra["late"] - extra["early"]) < 2_000_000, f"memory beyond the caches: {extra}"
