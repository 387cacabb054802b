"""What is built on mlx-lm's tokenizer renders and parses conversations as we do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.generate import TextStateMachine, make_text_state_machine
from mlx_lm.server import ToolCallFormatter
from official_tokenizer import FOLDER, encoding, tokens

from mlx_v4flash import load
from mlx_v4flash.chat_tokenizer import ChatTokenizer, parse_tool_call, with_chat
from mlx_v4flash.errors import EncodingError
from mlx_v4flash.loading import load_tokenizer_files
from mlx_v4flash.markup import END_THINK, write_calls
from mlx_v4flash.tiny import write_tiny

MESSAGES = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "2+2? <｜User｜>"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALLS: list[tuple[str, dict[str, Any]]] = [("f", {"a": "x</b> & \n", "n": 1e-07}), ("g", {})]


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    found = with_chat(load_tokenizer_files(FOLDER), FOLDER)
    assert isinstance(found, ChatTokenizer)
    return found


def test_prompts(tokenizer: ChatTokenizer) -> None:
    ours = encoding("v4-preview")

    def apply(*args: Any, **options: Any) -> Any:
        return tokenizer.apply_chat_template(*args, add_generation_prompt=True, **options)

    assert apply(MESSAGES) == ours.prompt(MESSAGES)
    assert apply(MESSAGES, tools=TOOLS) == ours.prompt(MESSAGES, tools=TOOLS)
    assert apply(MESSAGES, TOOLS, tokenize=False) == ours.render(MESSAGES, tools=TOOLS)
    for off in ({"enable_thinking": False}, {"thinking": False}, {"reasoning_effort": "none"}):
        assert apply(MESSAGES, **off) == ours.prompt(MESSAGES, think="off")
    assert apply(MESSAGES, reasoning_effort="xhigh") == ours.prompt(MESSAGES, think="max")


def test_prompts_that_end_otherwise(tokenizer: ChatTokenizer) -> None:
    whole = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(MESSAGES) == whole[:-2]
    assert tokenizer.apply_chat_template(MESSAGES, continue_final_message=True) == whole[:-2]
    answer = {"role": "assistant", "content": "It is"}
    continued = tokenizer.apply_chat_template([*MESSAGES, answer], continue_final_message=True)
    assert continued == encoding("v4-preview").prompt([*MESSAGES, {**answer, "prefix": True}])
    ended = tokenizer.apply_chat_template([*MESSAGES, answer], tokenize=False)
    assert ended.endswith("It is<｜end▁of▁sentence｜>")
    assert "prefix" not in answer


def test_other_arguments_are_refused(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(EncodingError, match="expected no argument chat_template, documents"):
        tokenizer.apply_chat_template(MESSAGES, documents=["x"], chat_template="y", padding=None)
    with pytest.raises(EncodingError, match="expected no argument return_dict"):
        tokenizer.apply_chat_template(MESSAGES, return_dict=True)


def as_mlx_lm_reads(tokenizer: ChatTokenizer, ids: list[int], start: str) -> dict[str, Any]:
    """Parts of an answer as mlx-lm's server finds them."""
    state = make_text_state_machine(tokenizer).make_state(start)
    detokenizer = tokenizer.detokenizer
    found = {"reasoning": "", "normal": "", "tool": ""}
    for token in ids:
        detokenizer.add_token(token)
        state, segments = TextStateMachine.split(state, detokenizer.last_segment)
        for name, text in segments:
            found[name] += text
    detokenizer.finalize()
    state, segments = TextStateMachine.split(state, detokenizer.last_segment)
    for name, text in [*segments, (state[0], TextStateMachine.flush(state)[1])]:
        found[name] += text
    return found | {"calls": ToolCallFormatter(tokenizer.tool_parser, TOOLS)([found["tool"]] if found["tool"] else [])}


def test_answers(tokenizer: ChatTokenizer) -> None:
    ids = tokens("".join(("two files", END_THINK, "Reading.", *write_calls(CALLS))))
    found = as_mlx_lm_reads(tokenizer, ids, "reasoning")
    assert (found["reasoning"], found["normal"].rstrip("\n")) == ("two files", "Reading.")
    functions = [call["function"] for call in found["calls"]]
    assert [(f["name"], json.loads(f["arguments"])) for f in functions] == CALLS
    assert len({call["id"] for call in found["calls"]}) == 2


@pytest.mark.parametrize("text", ["", "no call", '<｜DSML｜invoke name="f">oops</｜DSML｜invoke>'])
def test_text_that_is_no_call(text: str) -> None:
    with pytest.raises(EncodingError, match="tool calls: expected calls between the tags"):
        parse_tool_call(text)


def test_checkpoint(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    _, tokenizer = load(tmp_path)
    assert tokenizer.has_chat_template and tokenizer.has_tool_calling and tokenizer.has_thinking
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert tokenizer.decode(ids) == encoding("v4-preview").render(MESSAGES)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    _, tokenizer = load(tmp_path)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "Be terse.!"
