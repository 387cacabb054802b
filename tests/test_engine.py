"""Generation: mlx-lm's loop on our model, and clear errors for what cannot be run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_v4flash import Model, generate, load, stream_generate
from mlx_v4flash.engine import prompt_ids, stream_tokens
from mlx_v4flash.errors import DeviceError, NumericsError, RequestError
from mlx_v4flash.sampling import SamplingParams
from mlx_v4flash.tiny import TINY, write_tiny

Loaded = tuple[Model, TokenizerWrapper]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = write_tiny(tmp_path_factory.mktemp("tiny") / "m", {**TINY, "max_position_embeddings": 400})
    return load(folder, dtype="float32")


def greedy(model: Model, ids: list[int], count: int) -> list[int]:
    """Every token from a pass over all tokens before it."""
    found = list(ids)
    for _ in range(count):
        found.append(int(mx.argmax(model(mx.array([found]))[0, -1]).item()))
    return found[len(ids) :]


def tokens(loaded: Loaded, prompt: object, max_tokens: int, **options: object) -> list[int]:
    return [r.token for r in stream_generate(*loaded, prompt, max_tokens, **options)]


@pytest.mark.parametrize("chunk", [1, 5, 128, 2048])
def test_generation_equals_whole_passes(loaded: Loaded, chunk: int) -> None:
    ids = list(range(2, 140))
    assert tokens(loaded, ids, 6, prefill_chunk=chunk) == greedy(loaded[0], ids, 6)


def test_text_gets_one_bos(loaded: Loaded) -> None:
    tokenizer = loaded[1]
    ids = prompt_ids(tokenizer, "abc")
    assert ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in ids[1:]
    assert prompt_ids(tokenizer, ids) == ids == prompt_ids(tokenizer, mx.array(ids))
    assert prompt_ids(tokenizer, tokenizer.bos_token + "abc") == ids


def test_generate_is_the_sum_of_the_stream(loaded: Loaded) -> None:
    pieces = list(stream_generate(*loaded, "Once upon", 20))
    assert generate(*loaded, "Once upon", 20) == "".join(p.text for p in pieces)
    assert pieces[-1].finish_reason in ("length", "stop")
    assert pieces[-1].prompt_tokens == len(prompt_ids(loaded[1], "Once upon"))


def test_a_cache_continues(loaded: Loaded) -> None:
    ids, cache = list(range(3, 60)), loaded[0].make_cache()
    first = tokens(loaded, ids, 4, prompt_cache=cache)
    held = cache[0].position
    # The last token was sampled but may or may not have been fed; the cache says how many it holds.
    fed = (ids + first)[:held]
    rest = tokens(loaded, (ids + first)[held:] + [7, 8], 3, prompt_cache=cache)
    assert rest == greedy(loaded[0], fed + (ids + first)[held:] + [7, 8], 3)


def test_seed_repeats_the_answer(loaded: Loaded) -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = SamplingParams(temp=1.5, top_p=0.95, min_p=0.01, top_k=50, seed=seed).sampler(TINY["vocab_size"])
        return tokens(loaded, [5, 6, 7], 12, sampler=sampler)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_progress_counts_the_prompt(loaded: Loaded) -> None:
    calls: list[tuple[int, int]] = []
    tokens(loaded, list(range(2, 102)), 1, prefill_chunk=32, prompt_progress=lambda *call: calls.append(call))
    assert [c[0] for c in calls] == [0, 32, 64, 96, 99, 100] and {c[1] for c in calls} == {100}


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt: expected at least one token, found none"),
        ([], {}, "prompt: expected at least one token, found none"),
        ([3, 9999, 4], {}, r"expected token ids from 0 to \d+, found 9999 at position 1"),
        ([-1], {}, "found -1 at position 0"),
        ([3] * 400, {}, "expected fewer than 400 tokens.*context of 400, found 400"),
        ([3], {"max_tokens": 0}, "max_tokens: expected 1 or more, found 0"),
        ([3], {"prefill_chunk": 0}, "prefill_chunk: expected 1 or more, found 0"),
    ],
)
def test_requests_that_cannot_be_run(loaded: Loaded, prompt: object, options: dict[str, int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        list(stream_generate(*loaded, prompt, **options))


def test_the_context_ends_the_answer(loaded: Loaded) -> None:
    responses = list(stream_generate(*loaded, [3] * 395, 100))
    assert sum(1 for _ in responses) <= 5 and responses[-1].finish_reason in ("length", "stop")
    cache = loaded[0].make_cache()
    list(stream_generate(*loaded, [3] * 300, 1, prompt_cache=cache))
    with pytest.raises(RequestError, match="room left in the model's context of 400, found 100"):
        list(stream_generate(*loaded, [3] * 100, 1, prompt_cache=cache))


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [("temp", -0.1, "0 or more"), ("top_p", 1.5, "0 to 1"), ("min_p", -1, "0 to 1"), ("top_k", -3, "0 or more"),
     ("seed", -1, "0 to"), ("temp", float("nan"), "0 or more")],
)  # fmt: skip
def test_sampling_out_of_range(name: str, value: float, wanted: str) -> None:
    with pytest.raises(RequestError, match=f"{name}: expected {wanted}.*, found {value}"):
        SamplingParams(**{name: value})


def test_limits_without_temperature_change_nothing(loaded: Loaded) -> None:
    sampler = SamplingParams(temp=0, top_p=0.5, top_k=3).sampler(TINY["vocab_size"])
    assert tokens(loaded, [5, 6, 7], 5, sampler=sampler) == tokens(loaded, [5, 6, 7], 5)


def test_not_a_number_names_layer_and_position(tmp_path: Path) -> None:
    model, tokenizer = load(write_tiny(tmp_path / "m"), dtype="float32")
    table = mx.array(model.layers[2].ffn_norm.weight)
    model.layers[2].ffn_norm.weight = mx.full(table.shape, float("nan"))
    with pytest.raises(NumericsError, match=r"layers\.2: expected finite values, found NaN or infinity by position 1"):
        list(stream_generate(model, tokenizer, [3, 4, 5, 6], 3, prefill_chunk=2))
    cache = model.make_cache()
    with pytest.raises(NumericsError, match=r"layers\.2: "):
        list(stream_generate(model, tokenizer, [3, 4, 5], 3, prompt_cache=cache))
    with pytest.raises(NumericsError, match="layer 3 is the first whose cache holds such values"):
        list(stream_generate(model, tokenizer, [3, 4, 5], 3, prompt_cache=cache))
    model.layers[2].ffn_norm.weight = table
    embedding = model.embed.weight
    embedding[9] = float("inf")
    with pytest.raises(NumericsError, match=r"layers\.0: expected finite values, found NaN or infinity by position 3"):
        list(stream_generate(model, tokenizer, [3, 4, 9, 6], 3))
    model.embed.weight = mx.where(mx.isfinite(embedding), embedding, 0)
    model.head.weight = mx.full(model.head.weight.shape, float("nan"))
    with pytest.raises(NumericsError, match="head: expected finite logits"):
        list(stream_generate(model, tokenizer, [3, 4, 5], 3))


@pytest.mark.parametrize("text", ["[METAL] Command buffer execution failed: Insufficient Memory", "[malloc] Unable to"])
def test_a_device_that_gives_up_ends_the_request(text: str, loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    want = generate(model, tokenizer, "Hello", 4)

    def fail(*_: object) -> None:
        raise RuntimeError(text)

    for step in (stream_generate(model, tokenizer, "Hello", 4), tokens_of(model, tokenizer)):
        with monkeypatch.context() as patched:
            patched.setattr(type(model.layers[1]), "__call__", fail)
            with pytest.raises(DeviceError, match=r"^device: \[(METAL|malloc)\].*\nhint: the request was stopped"):
                next(iter(step))
    assert generate(model, tokenizer, "Hello", 4) == want


def tokens_of(model: Model, tokenizer: TokenizerWrapper) -> Iterator[int]:
    return stream_tokens(model, prompt_ids(tokenizer, "Hello"), 4, prompt_cache=model.make_cache())
