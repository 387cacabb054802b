"""One model and its caches: prompts in, tokens out. The loop is mlx-lm's; what may go wrong is caught here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import GenerationResponse, generate_step, generation_stream, wired_limit
from mlx_lm.generate import stream_generate as mlx_lm_stream_generate
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .cache import LayerCache
from .errors import DeviceError, NumericsError, RequestError
from .memory import give_back, held_bytes
from .model import Model
from .plan import Plan

PREFILL_CHUNK = 2048

Prompt = str | Sequence[int] | mx.array


def stream_generate(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    max_tokens: int = 256,
    *,
    sampler: Callable[[mx.array], mx.array] | None = None,
    prompt_cache: list[LayerCache] | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    prompt_progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Iterator[GenerationResponse]:
    """Yield mlx-lm's responses, a piece of text each.

    Args:
        prompt: text, which gets the beginning-of-sequence token in front, or token ids as they are.
        max_tokens: at most this many; fewer if the model's context ends.
        sampler: from logprobs [1, V] to a token; None takes the most likely one.
        prompt_cache: from `model.make_cache()`; the prompt continues what it holds, and it is updated.
        prefill_chunk: tokens of the prompt per forward pass; working memory grows with it.
        prompt_progress: called with prompt tokens done and in all.
        options: passed on to mlx-lm's `generate_step`.

    Raises:
        RequestError: an empty prompt, ids outside the vocabulary, no room in the context, a bad number.
        NumericsError: the model produced a value that is not a number; the message names the layer.
        DeviceError: the device ran out of memory or time.
    """
    ids = prompt_ids(tokenizer, prompt)
    cache = prompt_cache if prompt_cache is not None else model.make_cache()
    fresh = cache[0].empty()
    room = _check(model, ids, cache[0].position, max_tokens, prefill_chunk)
    responses = mlx_lm_stream_generate(
        model,
        tokenizer,
        ids,
        max_tokens=min(max_tokens, room),
        sampler=sampler,
        prompt_cache=cache,
        prefill_step_size=prefill_chunk,
        prompt_progress_callback=_guarded(model, prompt_progress),
        **options,
    )
    seen = list(ids)
    with _explained():
        for response in responses:
            _expect_planned(model)
            _expect_number(model, response.token, response.logprobs, seen if fresh else None, cache, prefill_chunk)
            seen.append(response.token)
            yield response


def stream_tokens(
    model: Model,
    ids: Sequence[int],
    max_tokens: int,
    *,
    prompt_cache: list[LayerCache],
    sampler: Callable[[mx.array], mx.array] | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    prompt_progress: Callable[[int, int], None] | None = None,
) -> Iterator[int]:
    """Yield generated ids, without an end: the caches hold those that were yielded, the last one included.

    Arguments and errors as for `stream_generate`; max_tokens 0 fills the caches with the prompt and yields nothing.
    """
    ids = list(ids)
    fresh = prompt_cache[0].empty()
    room = _check(model, ids, prompt_cache[0].position, max(max_tokens, 1), prefill_chunk)
    with _explained(), wired_limit(model, [generation_stream]):  # type: ignore[list-item]
        steps = generate_step(
            mx.array(ids),
            model,
            max_tokens=min(max_tokens, room),
            sampler=sampler,
            prompt_cache=prompt_cache,
            prefill_step_size=prefill_chunk,
            prompt_progress_callback=_guarded(model, prompt_progress),
        )
        step: tuple[Any, mx.array]
        for step in steps:  # mlx-lm annotates the ids as arrays; they are numbers
            token, logprobs = int(step[0]), step[1]
            _expect_planned(model)
            _expect_number(model, token, logprobs, ids if fresh else None, prompt_cache, prefill_chunk)
            ids.append(token)
            yield token


def generate(model: Model, tokenizer: TokenizerWrapper, prompt: Prompt, max_tokens: int = 256, **options: Any) -> str:
    """The whole answer as text; arguments and errors as for `stream_generate`."""
    return "".join(r.text for r in stream_generate(model, tokenizer, prompt, max_tokens, **options))


def wired(model: Model) -> AbstractContextManager[None]:
    """While the model is called directly: on Metal its memory stays resident, as it does in generation."""
    return wired_limit(model, [mx.default_stream(mx.default_device())])


def prompt_ids(tokenizer: TokenizerWrapper, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; text gets the beginning-of-sequence token in front, once."""
    if isinstance(prompt, mx.array):
        return list(np.array(prompt).tolist())
    if not isinstance(prompt, str):
        return [int(i) for i in prompt]
    if not prompt:
        return []
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


@contextmanager
def _explained() -> Iterator[None]:
    """What Metal or the allocator cannot do ends the request, not the program."""
    try:
        yield
    except RuntimeError as e:
        if not str(e).startswith(("[METAL]", "[malloc]", "[metal::malloc]")):
            raise
        with suppress(RuntimeError):  # it may be said once more for each stream
            mx.synchronize(generation_stream)
        raise DeviceError(
            f"device: {e}\nhint: the request was stopped; shorten it, close other programs, or load with less --memory"
        ) from e


def _check(model: Model, ids: list[int], position: int, max_tokens: int, prefill_chunk: int) -> int:
    """Refuse what cannot be run; the number of tokens the context has room for."""
    config = model.config
    if not ids:
        raise RequestError("prompt: expected at least one token, found none\nhint: pass some text")
    if max_tokens < 1:
        raise RequestError(f"max_tokens: expected 1 or more, found {max_tokens}")
    if prefill_chunk < 1:
        raise RequestError(f"prefill_chunk: expected 1 or more, found {prefill_chunk}")
    outside = [i for i in ids if not 0 <= i < config.vocab_size]
    if outside:
        raise RequestError(
            f"prompt: expected token ids from 0 to {config.vocab_size - 1}, found {outside[0]} at "
            f"position {ids.index(outside[0])}\nhint: the tokenizer may belong to another model"
        )
    planned = _planned_room(model, position + len(ids), prefill_chunk)
    room = config.max_position_embeddings - position - len(ids)
    if room < 1:
        raise RequestError(
            f"prompt: expected fewer than {config.max_position_embeddings - position} tokens, the room left in the "
            f"model's context of {config.max_position_embeddings}, found {len(ids)}\nhint: shorten the prompt"
        )
    return min(room, planned)


def _planned_room(model: Model, tokens: int, prefill_chunk: int) -> int:
    """Tokens after these that the plan of memory has room for. Refuses what it has none for."""
    plan = model.plan
    if plan is None:
        return model.config.max_position_embeddings
    if prefill_chunk > plan.chunk:
        raise RequestError(f"prefill_chunk: expected at most the planned {plan.chunk}, found {prefill_chunk}")
    if tokens >= plan.max_context:
        raise RequestError(
            f"prompt: expected fewer than the {plan.max_context:,} tokens that memory was planned for, found {tokens:,}"
            "\nhint: load with a larger max_context (--max-context), or shorten the prompt"
        )
    return plan.max_context - tokens


def _guarded(model: Model, progress: Callable[[int, int], None] | None) -> Callable[[int, int], None]:
    """Looks after memory at every chunk of a prompt."""

    def step(done: int, total: int) -> None:
        _expect_planned(model)
        if progress is not None:
            progress(done, total)

    return step


def _expect_planned(model: Model) -> None:
    """Keep memory to the plan: freed memory goes first, then experts' slots; RequestError if that does not suffice."""
    plan = model.plan
    if plan is None or not _excess(plan):
        return
    # Metal lets go of the buffers of a pass when all of it is over, later than its results are there.
    mx.synchronize(generation_stream)
    mx.synchronize()
    give_back()
    excess = _excess(plan)
    if excess and model.store is not None and model.store.shrink(excess, model.config.num_experts_per_tok):
        give_back()
        excess = _excess(plan)
    if excess:
        raise RequestError(
            f"memory: expected at most {plan.budget:,} bytes, of them {plan.array_bytes:,} in arrays, found "
            f"{excess:,} more\n"
            "hint: the request was stopped; close other conversations, shorten this one, or load with more --memory"
        )


def _excess(plan: Plan) -> int:
    """Bytes above the plan, by what the system says of the process and by what MLX says of arrays."""
    arrays = mx.get_active_memory() + mx.get_cache_memory()
    return max(0, held_bytes() - plan.budget, arrays - plan.array_bytes)


def _expect_number(
    model: Model, token: int, logprobs: mx.array, seen: list[int] | None, cache: list[LayerCache], chunk: int
) -> None:
    # One NaN among the logits makes every log-probability NaN. On the host: the device is busy with the next step.
    if math.isnan(memoryview(logprobs)[token]):  # type: ignore[arg-type]
        raise NumericsError(_where_not_a_number(model, seen, cache, chunk))


def _where_not_a_number(model: Model, ids: list[int] | None, cache: list[LayerCache], chunk: int) -> str:
    """Name the first layer whose result is not finite, by running the tokens again and looking after each."""
    hint = "hint: check the files against their published checksums; if they are right, please report this"
    if ids is None:
        for number, layer_cache in enumerate(cache):
            if not all(mx.isfinite(leaf).all().item() for leaf in layer_cache.leaves()):
                return f"logits: not a number; layer {number} is the first whose cache holds such values\n{hint}"
        return f"logits: not a number, though the caches of all layers are in order\n{hint}"
    again = model.make_cache()
    for start in range(0, len(ids), chunk):
        part = mx.array(ids[start : start + chunk])[None]
        rotations, x = model.rotations(again, part.shape[1]), model.streams(part)
        for number, layer in enumerate(model.layers):
            x = layer(x, part, again[number], rotations)
            if not mx.isfinite(x).all().item():
                last = start + part.shape[1] - 1
                return f"layers.{number}: expected finite values, found NaN or infinity by position {last}\n{hint}"
    return f"head: expected finite logits, found NaN or infinity after finite layers\n{hint}"
