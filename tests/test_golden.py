"""The model against the official code's own numbers, case by case."""

from __future__ import annotations

import functools

import golden
import mlx.core as mx
import numpy as np
import pytest

from mlx_v4flash import Model, load_model
from mlx_v4flash.cache import LayerCache

LONG = ("f32-exact", "official-qat", "mtp", "dspark")
OUTPUTS = [(case, "logits") for case in LONG] + [("official-qat", "logits_linear")]
# Edges of groups (4, 128) and window (128), and what lies between.
CHUNKS = (1, 3, 4, 5, 114, 1, 2, 31, 97, 13, 127, 129)


@functools.cache
def model(case: str, output: str = "logits", dtype: str = "float32") -> Model:
    return load_model(
        golden.folder(case),
        dtype=dtype,
        simulate_cache_quant=case == "official-qat",
        quantize_activations=output == "logits_linear",
    )


def token_ids(case: str) -> mx.array:
    return mx.array(golden.expected(case)["input_ids"])[None]


def run(m: Model, ids: mx.array, cache: list[LayerCache] | None = None) -> np.ndarray:
    return np.array(m(ids, cache))[0]


def limits(case: str, output: str, dtype: str = "float32") -> dict[str, float]:
    return golden.tolerance(case)[dtype][output]


@pytest.mark.parametrize(("case", "output"), OUTPUTS)
def test_prefill(case: str, output: str) -> None:
    found = run(model(case, output), token_ids(case))
    golden.expect_within(found, golden.expected(case)[output], limits(case, output), case)


@pytest.mark.parametrize("case", LONG)
def test_prefill_then_one_token_at_a_time(case: str) -> None:
    m, ids, prefill = model(case), token_ids(case), golden.prefill_length(case)
    cache = m.make_cache()
    run(m, ids[:, :prefill], cache)
    found = np.concatenate([run(m, ids[:, t : t + 1], cache) for t in range(prefill, ids.shape[1])])
    golden.expect_within(found, golden.expected(case)["logits_decode"], limits(case, "logits"), case)


@pytest.mark.parametrize(("case", "output"), OUTPUTS)
def test_odd_chunks(case: str, output: str) -> None:
    m, ids, done, found = model(case, output), token_ids(case), 0, []
    cache = m.make_cache()
    for size in CHUNKS:
        if done < ids.shape[1]:
            found.append(run(m, ids[:, done : done + size], cache))
            done += size
    assert done >= ids.shape[1]
    golden.expect_within(np.concatenate(found), golden.expected(case)[output], limits(case, output), case)


@pytest.mark.parametrize("case", LONG)
def test_bfloat16(case: str) -> None:
    found = run(model(case, dtype="bfloat16"), token_ids(case))
    golden.expect_within(found, golden.expected(case)["logits"], limits(case, "logits", "bfloat16"), case)


@pytest.mark.parametrize("step", [False, True], ids=["prefill", "last-token-alone"])
@pytest.mark.parametrize("index", range(11))
def test_edge_lengths(index: int, step: bool) -> None:
    case = "edge-lengths"
    want, m = golden.expected(case), model(case)
    length = int(want["lengths"][index])
    ids, cache = mx.array(want["input_ids"])[index : index + 1, :length], m.make_cache()
    if step and length > 1:
        run(m, ids[:, :-1], cache)
        ids = ids[:, -1:]
    found = run(m, ids, cache)[-1:]
    golden.expect_within(found, want["logits"][index : index + 1], limits(case, "logits"), f"length {length}")


# --- intermediates: they say where a mistake is -----------------------------------------------------


class Trace:
    """What each part of a model computes during one pass, by layer."""

    def __init__(self, m: Model, ids: mx.array, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache, self.seen = m.make_cache(), {}
        for number, layer in enumerate(m.layers):
            self._watch(monkeypatch, layer.attn, f"{number}.attn")
            self._watch(monkeypatch, layer.ffn, f"{number}.ffn")
            self._watch(monkeypatch, layer.ffn.gate, f"{number}.gate")
            if layer.attn.indexer is not None:
                self._watch(monkeypatch, layer.attn.indexer, f"{number}.indexer")
        x, rotations = m.streams(ids), m.rotations(self.cache, ids.shape[1])
        self.streams = [x]
        for layer, cache in zip(m.layers, self.cache, strict=True):
            x = layer(x, ids, cache, rotations)
            self.streams.append(x)
        mx.eval(self.streams)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> None:
        plain = type(module).__call__

        class Watched(type(module)):  # type: ignore[misc]
            def __call__(inner, *args: object) -> object:
                out = plain(inner, *args)
                self.seen[name] = (args, out)
                return out

        monkeypatch.setattr(module, "__class__", Watched)


@pytest.fixture(params=LONG)
def traced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Model, Trace]:
    m = model(request.param)
    return request.param, m, Trace(m, token_ids(request.param), monkeypatch)


def test_intermediates(traced: tuple[str, Model, Trace]) -> None:
    case, m, trace = traced
    want = golden.expected(case)

    def close(found: mx.array, name: str, *at: int, limit: float = 1e-4) -> None:
        target = want[name][at] if at else want[name]
        error = golden.relative_rms(np.array(found), target)
        assert error <= limit, f"{case}: {name}{list(at)}: rms {error:.2e}"

    for number, layer in enumerate(m.layers):
        close(trace.streams[number][0, -1], "last.streams", number)
        for part in ("attn", "ffn"):
            args, out = trace.seen[f"{number}.{part}"]
            close(args[0][0, -1], f"last.{part}_in", number)
            close(out[0, -1], f"last.{part}_out", number)
        if layer.attn.ratio:
            close(trace.cache[number].attn.all()[0], f"layers.{number}.compressed")
        if layer.attn.indexer is not None:
            keys = trace.cache[number].index.all()[0]
            keys = keys if m.numerics.simulate_cache_quant else mx.hadamard_transform(keys)
            close(keys, f"layers.{number}.index_keys")
    close(trace.streams[-1][0, -1], "last.streams", len(m.layers))


def test_choices(traced: tuple[str, Model, Trace]) -> None:
    """The same rows and the same experts at every position; the token ids leave no close calls."""
    case, m, trace = traced
    want = golden.expected(case)
    for number, layer in enumerate(m.layers):
        (_, _), (experts, weights) = trace.seen[f"{number}.gate"]
        order, target = np.argsort(np.array(experts), axis=1), want[f"layers.{number}.experts"]
        target_order = np.argsort(target, axis=1)
        np.testing.assert_array_equal(
            np.take_along_axis(np.array(experts), order, 1), np.take_along_axis(target, target_order, 1)
        )
        np.testing.assert_allclose(
            np.take_along_axis(np.array(weights), order, 1),
            np.take_along_axis(want[f"layers.{number}.expert_weights"], target_order, 1),
            rtol=1e-4,
        )
        if layer.attn.indexer is not None:
            _, picks = trace.seen[f"{number}.indexer"]
            target = np.sort(want[f"layers.{number}.topk"], axis=1)
            assert picks is not None, f"{case}: layer {number} never had to choose"
            np.testing.assert_array_equal(np.sort(np.array(picks[0]), axis=1), target)
