"""The whole program with a model that has learned something: what it says is not only text, but right."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
from known import CALL, SUM, TALK, answers_to
from nano.chats import CALCULATOR

from mlx_v4flash import Chat, convert, generate, load, nano_folder
from mlx_v4flash.checkpoint import Checkpoint
from mlx_v4flash.encoding import ChatDefaults
from mlx_v4flash.errors import CheckpointError, ConfigError
from mlx_v4flash.events import Reasoning, Text, ToolCall
from mlx_v4flash.experts.attach import open_source
from mlx_v4flash.plan import make_plan, sizes_of
from mlx_v4flash.recipe import read_recipe
from mlx_v4flash.rounding import Rounding
from mlx_v4flash.safetensors_header import read_header

MEGABYTE = 1_000_000
MOST = 120  # tokens of an answer: a call of a tool takes about 80


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(*load(nano_folder()))


def fresh(chat: Chat, **options: object) -> Chat:
    """Another conversation with the same model."""
    return Chat(chat.model, chat.encoding, max_tokens=MOST, **options)  # type: ignore[arg-type]


def said(chat: Chat, question: str) -> str:
    return "".join(e.text for e in chat.send(question) if isinstance(e, Text))


def test_small_talk(chat: Chat) -> None:
    for question in TALK:
        assert said(fresh(chat), question) in answers_to(question)


def test_a_conversation_remembers(chat: Chat) -> None:
    talk = fresh(chat)
    said(talk, "My name is Lucy.")
    assert said(talk, TALK[1]) in answers_to(TALK[1])
    assert said(talk, "What is my name?") == "Your name is Lucy."


def test_a_saved_conversation_remembers(chat: Chat, tmp_path: Path) -> None:
    """From its caches, in another process as it were."""
    talk = fresh(chat)
    said(talk, "My name is Lucy.")
    path = talk.save(tmp_path / "talk")
    talk = Chat(*load(nano_folder()), max_tokens=MOST)
    assert talk.load(path) > 0
    assert said(talk, "What is my name?") == "Your name is Lucy."
    assert talk.turns[-1].cached_tokens > 0


def test_a_prompt_read_in_small_pieces(chat: Chat) -> None:
    assert said(fresh(chat, prefill_chunk=3), TALK[2]) in answers_to(TALK[2])


def test_thinking_of_a_sum(chat: Chat) -> None:
    """Steps are reasoning, the total is the answer."""
    question, expression, total = SUM
    events = list(fresh(chat, think="high").send(question))
    steps = "".join(e.text for e in events if isinstance(e, Reasoning))
    assert "+" in steps and steps.endswith(f"So {total}.")
    assert "".join(e.text for e in events if isinstance(e, Text)) == f"{expression} = {total}."


def test_the_calculator_is_called(chat: Chat) -> None:
    question, expression, result = CALL
    talk = fresh(chat, tools=[CALCULATOR])
    (call,) = (e for e in talk.send(question) if isinstance(e, ToolCall))
    assert call.name == "calculator" and json.loads(call.arguments) == {"expression": expression}
    talk.tool_result(call.id, str(result))
    assert "".join(e.text for e in talk.answer() if isinstance(e, Text)) == f"{expression} = {result}."


def test_a_prompt_of_tokens_is_continued(chat: Chat) -> None:
    prompt = chat.encoding.prompt([{"role": "user", "content": TALK[1]}], think="off")
    tokenizer = load(nano_folder())[1]
    assert generate(chat.model, tokenizer, prompt, 40) in answers_to(TALK[1])


def test_streamed_experts_say_the_same(chat: Chat) -> None:
    """With as little memory as a model can run with."""
    opened = Checkpoint.open(nano_folder())
    least = make_plan(opened.config, sizes_of(opened.config, opened, open_source(opened).shapes)).smallest
    streamed, tokenizer = load(nano_folder(), experts="stream", memory=least)
    assert streamed.store is not None and not any(streamed.store.whole)
    talk = Chat(streamed, tokenizer, max_tokens=MOST)
    assert said(talk, TALK[2]) in answers_to(TALK[2])
    ids = mx.array([chat.encoding.prompt([{"role": "user", "content": "Tell me a story."}], think="off")])
    assert mx.array_equal(streamed(ids), chat.model(ids))


def test_fewer_bits_say_the_same(tmp_path: Path) -> None:
    """Most experts with 2 bits."""
    source, recipe = convert.open_source(str(nano_folder()), tmp_path, False, None, False, False), read_recipe("128gb")
    convert.convert(source, tmp_path, lambda done, total: None, Rounding(source.checkpoint.config, recipe))
    talk = Chat(*load(tmp_path), max_tokens=MOST)
    assert talk.think == "off", "how to talk to it is converted, too"
    for question in TALK:
        assert said(talk, question) in answers_to(question)
        talk.undo()


def test_it_is_small_and_of_the_official_format() -> None:
    folder = nano_folder()
    assert sum(p.stat().st_size for p in folder.iterdir()) < 16 * MEGABYTE
    tensors = read_header(folder / "model.safetensors")
    assert tensors["layers.2.ffn.experts.0.w1.weight"].dtype == "I8"


def test_a_package_without_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("mlx_v4flash.hub.__file__", str(tmp_path / "hub.py"))
    with pytest.raises(CheckpointError, match=r"expected the weights of the small model, model\.safetensors, found"):
        nano_folder()


# --- how a checkpoint is talked to -----------------------------------------------------------------------


def test_defaults_are_those_of_the_checkpoint(chat: Chat) -> None:
    assert (chat.think, chat.recommended.temp) == ("off", 0)
    assert fresh(chat, think="low").think == "low"


def test_defaults_that_make_no_sense(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for text in ("{", "[]", "{}", '{"mlx_v4flash": {"tiny": true}}', '{"mlx_v4flash": 3}'):
        file.write_text(text)
        assert ChatDefaults.from_folder(tmp_path) == ChatDefaults("high", 1.0)
    for values in ({"think": "hard"}, {"temp": -1}, {"temp": "hot"}, {"volume": 3}, [1]):
        file.write_text(json.dumps({"mlx_v4flash": {"chat": values}}))
        with pytest.raises(ConfigError, match=r"config\.json: mlx_v4flash: chat: expected think \(off, .*found"):
            ChatDefaults.from_folder(tmp_path)
