"""Conversations: what is prefilled, what is kept, and that the caches say the same as a fresh start."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import save_prompt_cache
from pydantic import BaseModel, Field
from scripted import END, Script, thought

from mlx_v4flash import Chat, load
from mlx_v4flash.encoding import Encoding, shared_tokens
from mlx_v4flash.errors import RequestError, V4FlashError
from mlx_v4flash.events import Event, Reasoning, Text, ToolCall, ToolResult, Usage
from mlx_v4flash.model import Model
from mlx_v4flash.plan import Plan
from mlx_v4flash.sampling import SamplingParams, ThinkBudget, card_defaults
from mlx_v4flash.session import Session
from mlx_v4flash.tiny import write_tiny
from mlx_v4flash.tools import Tool

WEATHER = {"name": "weather", "description": "The weather.", "parameters": {"type": "object"}}
GREEDY = SamplingParams()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Encoding]:
    folder = write_tiny(tmp_path_factory.mktemp("tiny") / "m", layers=(1, 2))
    model, tokenizer = load(folder, dtype="float32")
    return model, Chat(model, tokenizer).encoding


def chat_of(loaded: tuple[Model, Encoding], *answers: list[str], **options: Any) -> Chat:
    """A chat whose model says this."""
    model, encoding = loaded
    return Chat(model, encoding, sampling=Script(encoding=encoding, answers=list(answers)), **options)


def text_of(events: Iterator[Event]) -> str:
    return "".join(e.text for e in events if isinstance(e, Text))


def prefilled(usage: Usage) -> int:
    return usage.prompt_tokens - usage.cached_tokens


def test_events_are_typed_and_end_with_figures(loaded: tuple[Model, Encoding]) -> None:
    chat = chat_of(loaded, thought("two and two", "4"))
    *pieces, usage = chat.send("2+2?")
    assert "".join(p.text for p in pieces if isinstance(p, Reasoning)) == "two and two"
    assert "".join(p.text for p in pieces if isinstance(p, Text)) == "4"
    assert isinstance(usage, Usage) and usage.finish_reason == "stop"
    assert usage.generated_tokens == len("two and two") + 1 + 1 + 1  # the marks </think> and the end
    assert chat.messages[1] == {"role": "assistant", "content": "4", "reasoning_content": "two and two"}


@pytest.mark.parametrize("think", ["off", "low", "high", "max"])
@pytest.mark.parametrize("tools", [(), (WEATHER,)], ids=["plain", "tools"])
def test_each_turn_prefills_what_the_last_prompt_did_not_have(
    loaded: tuple[Model, Encoding], think: Any, tools: Any
) -> None:
    say = ["b"] if think == "off" else thought("abc", "b")
    chat = chat_of(loaded, say, say, say, think=think, tools=tools, system="Be terse.", warn=lambda text: None)
    held: list[int] = []
    kept = 0
    for n, text in enumerate(("first", "second one", "x" * 200)):
        prompt = chat.prompt({"role": "user", "content": text})
        *_, usage = chat.send(text)
        assert isinstance(usage, Usage) and usage.prompt_tokens == len(prompt)
        assert usage.cached_tokens == shared_tokens(held, prompt), f"turn {n}"
        assert n == 0 or usage.cached_tokens > kept
        drawn = chat.sampling.drawn  # type: ignore[union-attr]
        # With tools, and without thinking, the answer stays in the prompt; else the prompt is all that stays.
        held, kept = prompt + drawn[: usage.generated_tokens], len(prompt) - 2


def logits_after(chat: Chat, prompt: list[int]) -> mx.array:
    """What the chat's caches, or none, say after a prompt."""
    held = chat.session.known(prompt)
    cache = chat.model.make_cache() if held is None else [layer.copy() for layer in held.cache]
    return chat.model(mx.array(prompt[len(held.tokens) if held else 0 :])[None], cache)[0, -1]


@pytest.mark.parametrize("tools", [(), (WEATHER,)], ids=["plain", "tools"])
def test_logits_equal_those_of_a_fresh_chat(loaded: tuple[Model, Encoding], tools: Any) -> None:
    chat = chat_of(loaded, *[thought("r" * 140, "answer")] * 2, tools=tools)
    for text in ("one", "two " * 10):
        text_of(chat.send(text))
        prompt = chat.prompt({"role": "user", "content": "next"})
        assert chat.session.known(prompt) is not None
        fresh = chat_of(loaded, tools=tools)
        difference = mx.abs(logits_after(chat, prompt) - logits_after(fresh, prompt)).max().item()
        assert difference < 1e-3, f"logits differ by {difference}"


def test_answers_equal_those_of_a_fresh_chat(loaded: tuple[Model, Encoding]) -> None:
    model, encoding = loaded
    chat = Chat(model, encoding, sampling=GREEDY, max_tokens=12, think_budget=3)
    for text in ("one", "two"):
        history = list(chat.messages)
        fresh = Chat(model, encoding, sampling=GREEDY, max_tokens=12, think_budget=3, messages=history)
        assert text_of(chat.send(text)) == text_of(fresh.send(text))
    assert chat.turns[1].cached_tokens > 0 == fresh.turns[0].cached_tokens


def test_thinking_budget_is_fed_and_parsed(loaded: tuple[Model, Encoding]) -> None:
    chat = chat_of(loaded, ["abcdefgh", END, "unseen"], ["ab", END, "own end"], think_budget=5)
    assert text_of(chat.send("x")) == "gh" + "unseen"  # the script is one token ahead: f was drawn and replaced
    assert chat.messages[1]["reasoning_content"] == "abcde"
    live = chat.session._live
    assert live is not None and chat.encoding.vocabulary.decode(live.tokens).endswith(
        "<think>abcde</think>gh</think>unseen<｜end▁of▁sentence｜>"
    )
    assert text_of(chat.send("y")) == "own end" and chat.messages[3]["reasoning_content"] == "ab"


@pytest.mark.parametrize("limit", range(5))
def test_budget_sampler(limit: int) -> None:
    wanted = iter([5, 6, 9, 7, 8, 5, 6])
    draw = ThinkBudget(lambda logprobs: mx.array([next(wanted)]), limit, [9], [9])
    drawn = [draw(mx.zeros((1, 10))).item() for _ in range(7)]
    expected = [5, 6, 9, 7, 8, 5, 6]
    expected[limit] = 9 if limit < 3 else expected[limit]
    assert drawn == expected


def test_copies_are_limited(loaded: tuple[Model, Encoding]) -> None:
    def held(session: Session) -> list[int]:
        return [len(snapshot.tokens) for snapshot in session._snapshots]

    prompts = [[0, 5, *range(20, 20 + n)] for n in (3, 8, 13)]
    few, small = Session(loaded[0], snapshots=2), Session(loaded[0], snapshot_bytes=0)
    for session in (few, small):
        for prompt in prompts:
            session.prefill(prompt)
    assert held(few) == [10, 15] and held(small) == [15]
    assert few.prefill(prompts[0]) == 5 and held(few) == [15, 5]


def test_copies_fit_the_plan(loaded: tuple[Model, Encoding], monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[0, 5, *range(20, 20 + n)] for n in (3, 8, 13)]
    for room, count in ((1, 1), (2.5, 2), (9, 3)):
        session = Session(loaded[0])
        session.prefill(prompts[0])
        size = session._snapshots[0].nbytes
        parts = {"kept caches": int(room * size), "process": 0, "readers": 0}
        monkeypatch.setattr(loaded[0], "plan", Plan(1 << 40, 256, 2048, 1, 1, parts, [], 0, 0))
        for prompt in prompts[1:]:
            session.prefill(prompt)
        assert len(session._snapshots) == count
        monkeypatch.undo()


def test_leaving_a_run_leaves_no_call_open(loaded: tuple[Model, Encoding]) -> None:
    chat = chat_of(loaded, thought("", "", ("add", {"a": 1}), ("add", {"a": 2})), thought("", "fine"), tools=[add])
    for event in chat.run("x"):
        if isinstance(event, ToolCall):
            break
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "tool"]
    assert text_of(chat.send("y")) == "fine"


def test_leaving_the_loop_keeps_the_partial_answer(loaded: tuple[Model, Encoding]) -> None:
    chat = chat_of(loaded, thought("think", "a long answer"), thought("hm", "x"), thought("", "fine"))
    said = ""
    for event in chat.send("x"):
        said += event.text if isinstance(event, Text) else ""
        if said == "a long":
            break
    assert [m["content"] for m in chat.messages] == ["x", "a long"]
    held = chat.send("y")
    next(held)
    assert text_of(chat.send("z")) == "fine"  # settles the answer before it, though somebody still holds it
    assert [m["content"] for m in chat.messages] == ["x", "a long", "y", "", "z", "fine"]
    assert [turn.finish_reason for turn in chat.turns] == ["interrupted", "interrupted", "stop"]


@pytest.mark.parametrize("tokens", [1, 5, 6])
def test_stop_ends_at_the_next_token(loaded: tuple[Model, Encoding], tokens: int) -> None:
    chat = chat_of(loaded, thought("think", "answer"), thought("", "fine"), tools=(WEATHER,))
    events = []
    for event in chat.send("x"):
        events.append(event)
        if len(events) == tokens:
            chat.stop()
    assert isinstance(events[-1], Usage) and events[-1].finish_reason == "interrupted"
    assert len(events) <= tokens + 2
    assert text_of(chat.send("y")) == "fine"
    # All that was fed stays in the caches, and the next prompt goes on from there.
    assert chat.turns[1].cached_tokens == chat.turns[0].prompt_tokens + chat.turns[0].generated_tokens


class Broken(Script):
    """Ctrl-C in the middle of a forward pass."""

    def sampler(self, vocab_size: int) -> Any:
        draw = super().sampler(vocab_size)

        def interrupted(logprobs: mx.array) -> mx.array:
            if len(self.drawn) == 4:
                raise KeyboardInterrupt
            return draw(logprobs)

        return interrupted


def test_ctrl_c_within_a_forward_pass(loaded: tuple[Model, Encoding]) -> None:
    model, encoding = loaded
    chat = Chat(model, encoding, sampling=Broken(encoding=encoding, answers=[["abcdefgh"]]), think="off")
    with pytest.raises(KeyboardInterrupt):
        list(chat.send("x"))
    assert chat.messages[1]["content"] == "abc"
    prompt = chat.prompt({"role": "user", "content": "next"})
    difference = mx.abs(logits_after(chat, prompt) - logits_after(chat_of(loaded), prompt)).max().item()
    assert difference < 1e-3


def test_stopped_prefill_takes_the_turn_back_and_keeps_its_chunks(loaded: tuple[Model, Encoding]) -> None:
    chat = chat_of(loaded, ["answer"], ["answer"], think="off", prefill_chunk=16)
    chat.progress = lambda done, total: chat.stop() if done >= 32 else None
    (usage,) = chat.send("a" * 100)
    assert isinstance(usage, Usage) and usage.finish_reason == "interrupted" and usage.generated_tokens == 0
    assert chat.messages == [] and chat.turns == []
    chat.progress = None
    assert text_of(chat.send("a" * 100)) == "answer" and chat.turns[0].cached_tokens == 32


def test_undo_and_retry(loaded: tuple[Model, Encoding]) -> None:
    chat = chat_of(loaded, *(thought("r", text) for text in ("one", "two", "again", "other")))
    text_of(chat.send("first"))
    text_of(chat.send("second"))
    assert text_of(chat.retry()) == "again" and [m["content"] for m in chat.messages[2:]] == ["second", "again"]
    assert prefilled(chat.turns[-1]) == 1
    assert chat.undo() == "second" and len(chat.messages) == 2
    assert text_of(chat.send("instead")) == "other"
    assert chat.turns[-1].cached_tokens == chat.turns[0].prompt_tokens - 1
    chat.undo(), chat.undo()
    with pytest.raises(RequestError, match="found none"):
        chat.undo()


def test_failed_retry_keeps_the_old_answer(loaded: tuple[Model, Encoding]) -> None:
    chat = chat_of(loaded, thought("r", "one"))
    text_of(chat.send("first"))
    chat.context = 5
    with pytest.raises(RequestError, match=r"expected fewer than 5 tokens.*\nhint: take a turn back"):
        list(chat.retry())
    assert [m["content"] for m in chat.messages] == ["first", "one"]


@pytest.mark.parametrize("think", ["off", "high"])
def test_saved_chat_goes_on_without_prefill(loaded: tuple[Model, Encoding], tmp_path: Path, think: Any) -> None:
    say = thought("r", "one") if think == "high" else ["one"]
    chat = chat_of(loaded, say, say, think=think, system="S")
    text_of(chat.send("word " * 50))
    path = chat.save(tmp_path / "talk")
    assert path.name == "talk.safetensors"
    other = chat_of(loaded, say, think="low")
    restored = other.load(path)
    assert (other.messages, other.system, other.think) == (chat.messages, "S", think)
    text_of(chat.send("next"))
    text_of(other.send("next"))
    assert other.turns[0].cached_tokens == restored == chat.turns[1].cached_tokens > 250


def test_saved_chat_of_another_model(loaded: tuple[Model, Encoding], tmp_path: Path) -> None:
    chat = chat_of(loaded, ["one"], think="off")
    text_of(chat.send("hello"))
    path = chat.save(tmp_path / "talk.safetensors")
    model, _ = load(write_tiny(tmp_path / "m", seed=1, layers=(1, 2)), dtype="float32")
    other = Chat(model, loaded[1])
    assert other.load(path) == 0 and other.messages == chat.messages


def test_a_chat_replaces_no_file_but_a_chat(loaded: tuple[Model, Encoding], tmp_path: Path) -> None:
    chat = chat_of(loaded, ["one"], think="off")
    text_of(chat.send("hello"))
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), {"a": mx.zeros(3)})
    (tmp_path / "text.safetensors").write_text("text")
    for name in ("weights", "text"):
        with pytest.raises(RequestError, match="expected a new name, or a saved conversation to replace"):
            chat.save(tmp_path / name)
    assert list(mx.load(str(tmp_path / "weights.safetensors"))) == ["a"]
    assert chat.save(chat.save(tmp_path / "talk")) == tmp_path / "talk.safetensors"


def test_interrupted_save_leaves_nothing(
    loaded: tuple[Model, Encoding], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(file: str, *others: Any) -> None:
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_v4flash.chat_file.save_prompt_cache", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat_of(loaded).save(tmp_path / "talk")
    assert list(tmp_path.iterdir()) == []


def test_tokens_of_another_model_are_not_taken_over(loaded: tuple[Model, Encoding], tmp_path: Path) -> None:
    chat = chat_of(loaded, ["one"], think="off")
    text_of(chat.send("hello"))
    path = chat.save(tmp_path / "talk")
    # The same text is other tokens there.
    file = tmp_path / "tokenizer.json"
    content = json.loads((Path(loaded[1].vocabulary.where)).read_text())
    vocab, size = content["model"]["vocab"], 7 + 256
    content["model"]["vocab"] = {text: size + 6 - i if 7 <= i < size else i for text, i in vocab.items()}
    file.write_text(json.dumps(content))
    model, _ = load(write_tiny(tmp_path / "m", seed=1, layers=(1, 2)), dtype="float32")
    other = Chat(model, Encoding.from_folder(tmp_path), system="S")
    other.load(path)
    assert other.encoding.vocabulary.decode(other.prompt()) == loaded[1].vocabulary.decode(chat.prompt())


DAMAGE: dict[str, Any] = {
    "tools": None, "messages": [{"content": "x"}], "think": "hard", "sampled": [1], "tokens": "abc", "system": 5,
}  # fmt: skip


@pytest.mark.parametrize("key", DAMAGE)
@pytest.mark.parametrize("missing", [True, False], ids=["missing", "wrong"])
def test_damaged_chat_changes_nothing(
    loaded: tuple[Model, Encoding], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, missing: bool
) -> None:
    chat = chat_of(loaded, ["one"], think="off", tools=[WEATHER], system="S")
    text_of(chat.send("hello"))

    def damaged(file: str, cache: Any, metadata: dict[str, str]) -> None:
        values = {k: json.loads(v) for k, v in metadata.items()}
        for value in values.values():
            del value[key]
            value.update({} if missing else {key: DAMAGE[key]})
        save_prompt_cache(file, cache, {k: json.dumps(v) for k, v in values.items()})

    monkeypatch.setattr("mlx_v4flash.chat_file.save_prompt_cache", damaged)
    path = chat.save(tmp_path / "talk")
    before = (chat.system, chat.think, list(chat.tools), list(chat.messages), chat.prompt())
    with pytest.raises(V4FlashError):
        chat.load(path)
    assert (chat.system, chat.think, chat.tools, chat.messages, chat.prompt()) == before


@pytest.mark.parametrize("content", [None, b"", b"no safetensors", b"\x02\0\0\0\0\0\0\0{}"])
def test_not_a_saved_chat(loaded: tuple[Model, Encoding], tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    chat = chat_of(loaded, messages=[{"role": "user", "content": "kept"}])
    with pytest.raises(RequestError, match=r"x\.safetensors: expected a"):
        chat.load(path)
    assert chat.messages[0]["content"] == "kept"


def test_read_is_prefilled_at_once(loaded: tuple[Model, Encoding]) -> None:
    chat = chat_of(loaded, *[thought("r", "answer")] * 2, system="S")
    took = chat.read("long text. " * 30)
    assert took > 330
    text_of(chat.send("What is it?"))
    assert prefilled(chat.turns[0]) == chat.turns[0].prompt_tokens - took
    chat.undo()
    text_of(chat.send("Another question"))
    assert chat.turns[1].cached_tokens >= took
    assert chat.undo() == "Another question" and chat.undo().startswith("long text")


def add(a: Annotated[int, Field(description="first")], b: int = 2) -> int:
    """Add numbers."""
    return a + b


class Point(BaseModel):
    x: float


def fail(p: Point) -> str:
    raise OSError(f"no disk at {p.x}")


def test_functions_are_described_and_run() -> None:
    tool = Tool.of(add)
    assert tool.definition["function"] == {
        "name": "add",
        "description": "Add numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"description": "first", "type": "integer"}, "b": {"default": 2, "type": "integer"}},
            "required": ["a"],
            "additionalProperties": False,
        },
    }
    run = lambda tool, arguments: Tool.of(tool).run(ToolCall("1", "f", arguments))  # noqa: E731
    assert run(add, '{"a": "40"}') == ToolResult("1", "42")
    assert run(add, '{"a": "x"}').content.startswith("error: a: Input should be a valid integer")
    assert run(add, '{"c": 1}').failed and run(add, "[1]").failed and run(add, "{").failed
    assert run(fail, '{"p": {"x": 2}}') == ToolResult("1", "error: OSError: no disk at 2.0", failed=True)


def options(given: dict[str, Any] = {"title": "kept"}, title: str = "x") -> None: ...  # noqa: B006


def test_values_in_descriptions_stay() -> None:
    assert Tool.of(options).definition["function"]["parameters"]["properties"] == {
        "given": {"additionalProperties": True, "default": {"title": "kept"}, "type": "object"},
        "title": {"default": "x", "type": "string"},
    }


def test_tools_that_cannot_be_described() -> None:
    async def later() -> None: ...

    def placed(a: int, /) -> None: ...

    for wrong, message in (
        (3, "functions or definitions"),
        ({"a": 1}, "with a name"),
        (later, "found a coroutine"),
        (lambda a: a, "expected a function with a name"),
        (functools.partial(add, 1), "expected a function with a name"),
        (placed, "placed: expected parameters that can be named"),
    ):
        with pytest.raises(RequestError, match=message):
            Tool.of(wrong)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="draw: expected annotations that have a JSON schema"):
        Tool.of(draw)


def draw(on: mx.array) -> None: ...


def test_run_calls_functions_until_there_is_an_answer(loaded: tuple[Model, Encoding]) -> None:
    chat = chat_of(
        loaded,
        thought("sum", "", ("add", {"a": 1}), ("nothing", {})),
        thought("again", "", ("add", {"a": "x"})),
        thought("", "It is 3."),
        tools=[add],
    )
    events = list(chat.run("1+2?"))
    results = [e for e in events if isinstance(e, ToolResult)]
    assert [r.content for r in results[:2]] == ["3", "error: expected one of add, found nothing"]
    assert results[2].failed and "valid integer" in results[2].content
    assert text_of(iter(events)) == "It is 3."
    assert [m["role"] for m in chat.messages] == [
        "user",
        *["assistant", "tool", "tool"],
        "assistant",
        "tool",
        "assistant",
    ]
    # Calls and results stay in the prompt as they were generated: only results are new.
    assert all(turn.cached_tokens > before.prompt_tokens for before, turn in itertools.pairwise(chat.turns))


def test_run_ends_at_its_limit(loaded: tuple[Model, Encoding]) -> None:
    calls = [thought("", "", ("add", {"a": n})) for n in range(5)]
    chat = chat_of(loaded, *calls, tools=[add])
    results = [e.content for e in chat.run("x", max_calls=2) if isinstance(e, ToolResult)]
    assert results[:2] == ["2", "3"] and len(results) == 3 and "no more calls" in results[2]
    assert chat.open_calls() == []


def test_stop_within_a_function_ends_the_run(loaded: tuple[Model, Encoding]) -> None:
    def wait() -> str:
        chat.stop()
        return "done"

    answers = (thought("", "", ("wait", {}), ("wait", {})), thought("", "not asked for"))
    chat = chat_of(loaded, *answers, tools=[wait])
    results = [e.content for e in chat.run("go") if isinstance(e, ToolResult)]
    assert results == ["done", "error: interrupted"] and chat.messages[-1]["role"] == "tool"
    assert text_of(chat.answer()) == "not asked for"


@pytest.mark.parametrize("content", [5, None, b"x", [{"text": "x"}]])
def test_results_that_are_no_text(loaded: tuple[Model, Encoding], content: Any) -> None:
    chat = chat_of(loaded, thought("", "", ("weather", {})), thought("", "fine"), tools=[WEATHER])
    (call,) = [e for e in chat.send("x") if isinstance(e, ToolCall)]
    with pytest.raises(RequestError, match="tool_result: expected text as content, found"):
        chat.tool_result(call.id, content)
    chat.tool_result(call.id, "5")
    assert text_of(chat.answer()) == "fine"


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ({"content": "x"}, r"messages\[0\]: expected a message with a role"),
        ("x", r"messages\[0\]: expected a message with a role"),
        ({"role": "user", "content": 5}, r"messages\[0\].content: expected text"),
        ({"role": "assistant", "tool_calls": [{}]}, r"messages\[0\].tool_calls\[0\]: expected a function"),
    ],
)
def test_messages_that_are_none(loaded: tuple[Model, Encoding], message: Any, wrong: str) -> None:
    with pytest.raises(V4FlashError, match=wrong):
        chat_of(loaded, messages=[message])


def test_messages_of_other_programs(loaded: tuple[Model, Encoding]) -> None:
    call = {"name": "weather", "arguments": {"city": "Rome"}}
    chat = chat_of(loaded, messages=[{"role": "assistant", "tool_calls": [{"id": "a", "function": call}]}])
    assert chat.open_calls() == [ToolCall("a", "weather", '{"city": "Rome"}')]
    chat = chat_of(loaded, messages=[{"role": "assistant", "tool_calls": [call]}])  # nothing could answer it by its id
    assert chat.open_calls() == []
    chat = chat_of(loaded, messages=[{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}])
    assert chat.undo() == "a\n\nb" and chat.messages == []


@pytest.mark.parametrize("name", ["context", "max_tokens", "prefill_chunk", "think_budget"])
def test_limits_are_checked_at_once(loaded: tuple[Model, Encoding], name: str) -> None:
    with pytest.raises(RequestError, match=f"^{name}: expected [01] or more, found -3"):
        chat_of(loaded, **{name: -3})
    if name != "think_budget":
        with pytest.raises(RequestError, match=f"^{name}: expected 1 or more, found 0"):
            chat_of(loaded, **{name: 0})


def test_two_tools_of_one_name(loaded: tuple[Model, Encoding]) -> None:
    with pytest.raises(RequestError, match="tools: expected different names, found add twice"):
        chat_of(loaded, tools=[add, {"name": "add"}])


def test_calls_of_definitions_are_the_callers(loaded: tuple[Model, Encoding]) -> None:
    chat = chat_of(loaded, thought("", "", ("weather", {"city": "Rome"})), thought("", "Sunny"), tools=[WEATHER])
    (call,) = [e for e in chat.run("?") if isinstance(e, ToolCall)]
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Rome"})
    assert chat.turns[-1].finish_reason == "tool_calls"
    with pytest.raises(RequestError, match="expected results of weather first"):
        chat.send("hello")
    with pytest.raises(RequestError, match="expected an open call"):
        chat.tool_result("other", "x")
    chat.tool_result(call.id, "25 degrees")
    assert text_of(chat.answer()) == "Sunny"


def test_defaults_of_the_model_cards() -> None:
    assert card_defaults("v4-preview", tools=True) == SamplingParams(temp=1.0)
    assert card_defaults("v4-0731", tools=True) == SamplingParams(temp=1.0, top_p=0.95)
    assert card_defaults("v4-0731", tools=False) == SamplingParams(temp=1.0)


def test_max_warns_of_a_small_context(loaded: tuple[Model, Encoding]) -> None:
    with pytest.warns(UserWarning, match="393,216 tokens, and this one has 65,536"):
        Chat(*loaded, think="max")
    with pytest.raises(RequestError, match="expected off, low, high, max"):
        Chat(*loaded, think="hard")  # type: ignore[arg-type]
