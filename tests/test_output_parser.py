"""Answers come apart into reasoning, text and calls, however they are cut, and nothing in them is lost."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import deepseek_recipe
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from official_tokenizer import DSML, END_THINK, EOS, FOLDER, MARKS, THINK, USER, encoding, marked, tokens, vocabulary

from mlx_v4flash.byte_tokenizer import write_byte_tokenizer
from mlx_v4flash.encoding import Encoding
from mlx_v4flash.errors import EncodingError
from mlx_v4flash.events import Event, Reasoning, Text, ToolCall
from mlx_v4flash.markup import Mark, write_calls
from mlx_v4flash.output_parser import OutputParser

Answer = tuple[str, str, list[tuple[str, str]]]


def read(ids: Sequence[int], *, thinks: bool = True, tools: bool = True, ended: bool = True, **more: Any) -> Answer:
    """Reasoning, content and calls of an answer; the events must say the same as the message."""
    parser = encoding().parser(think="high" if thinks else "off", tools=tools, **more)
    return collect(parser, [*ids, 1] if ended else list(ids), (more.get("continue_from") or {}))


def collect(parser: OutputParser, ids: Sequence[int], start: dict[str, Any]) -> Answer:
    events: list[Event] = []
    for token in ids:
        events += parser.feed(token)
    events += parser.finish()
    assert all(event.text for event in events if isinstance(event, Reasoning | Text))
    reasoning = "".join(e.text for e in events if isinstance(e, Reasoning))
    text = "".join(e.text for e in events if isinstance(e, Text))
    calls = [(e.name, e.arguments) for e in events if isinstance(e, ToolCall)]
    message = parser.message
    assert message["content"] == (start.get("content") or "") + text
    assert message.get("reasoning_content", "") == (start.get("reasoning_content") or "") + reasoning
    listed = message.get("tool_calls", [])
    assert [(c["function"]["name"], c["function"]["arguments"]) for c in listed] == calls
    assert [c["id"] for c in listed] == sorted({e.id for e in events if isinstance(e, ToolCall)})
    return reasoning, text, calls


def by_character(text: str) -> list[int]:
    """Tokens of an output, one or more per character."""
    return [i for p in marked(text) for i in (vocabulary().encode([p]) if isinstance(p, Mark) else spelled_out(str(p)))]


def spelled_out(text: str) -> list[int]:
    return [i for character in text for i in vocabulary().encode([character])]


def block(*calls: str, name: str = "tool_calls") -> str:
    return f"<{DSML}{name}>\n" + "\n".join(calls) + f"\n</{DSML}{name}>"


def invoke(name: str, *parameters: str) -> str:
    return f'<{DSML}invoke name="{name}">\n' + "\n".join(parameters) + f"\n</{DSML}invoke>"


def parameter(key: str, value: str, string: str = "true") -> str:
    return f'<{DSML}parameter name="{key}" string="{string}">{value}</{DSML}parameter>'


F = invoke("f", parameter("a", "x"))
F_READ = [("f", '{"a": "x"}')]
NEVER_CLOSED = f'<{DSML}tool_calls>\n<{DSML}invoke name="f">\n<{DSML}parameter name="a" string="true">x'

CASES: list[tuple[str, Answer]] = [
    ("hm\n\n</think>\n\nhello\n", ("hm", "hello\n", [])),
    ("\n\nhm</think>hello", ("hm", "hello", [])),
    (" \thm</think> \r\nhello", (" \thm", " \r\nhello", [])),
    ("</think>hello", ("", "hello", [])),
    ("</think>\n\n", ("", "", [])),
    ("", ("", "", [])),
    ("no end\n", ("no end\n", "", [])),
    ("a</thi", ("a</thi", "", [])),
    ("a</thinks> </ think><b>", ("a</thinks> </ think><b>", "", [])),
    (f"a{THINK}b</think>c{THINK}d", (f"a{THINK}b", f"c{THINK}d", [])),
    ("a</think>b</think>c\n</think>\nd", ("a", "bc\n\nd", [])),
    ("a</think>2 <", ("a", "2 <", [])),
    ("a <\n\n<\n</think>\n<\n", ("a <\n\n<", "<\n", [])),
    (f"a</think>b\n\n{block(F)}", ("a", "b", F_READ)),
    (f"a</think>\n\n{block(F)}", ("a", "", F_READ)),
    (f"a</think>{block(F)}", ("a", "", F_READ)),
    (f"a</think>b.\n{block(F)}\n", ("a", "b.", F_READ)),
    (f"a\n\n{block(F)}", ("a", "", F_READ)),
    (f"a\n{block(F)}</think>", ("a", "", F_READ)),
    (f"</think>{block(F, invoke('g'))}", ("", "", [*F_READ, ("g", "{}")])),
    ("</think>" + block(invoke("g")).replace("\n\n", "\n"), ("", "", [("g", "{}")])),
    ("</think>" + block(F).replace("\n", ""), ("", "", F_READ)),
    ("</think>" + block(F).replace("\n", "\n\t "), ("", "", F_READ)),
    (f"</think>{block(F, name='function_calls')}", ("", "", F_READ)),
    (f"</think>{block(F, name='calls').replace(DSML, DSML + ' ')}", ("", "", F_READ)),
    (f"</think>{F}", ("", "", F_READ)),
    (f"</think>{F}\n</{DSML}tool_calls>", ("", "", F_READ)),
    (f"</think><{DSML}tool_calls>\n{F}", ("", "", F_READ)),
    (f"</think>{block(F.removesuffix(f'</{DSML}invoke>'))}", ("", "", F_READ)),
    # From here on DeepSeek's package gives less: marks in prose are prose.
    (f"a</think>the <{DSML} token", ("a", f"the <{DSML} token", [])),
    (f"a <{DSML}b</think>c {DSML} d", (f"a <{DSML}b", f"c {DSML} d", [])),
    (f"a</think>see\n\n<{DSML}foo> bar", ("a", f"see\n\n<{DSML}foo> bar", [])),
    (f"a</think>see <{DSML}tool_calls> bar", ("a", f"see <{DSML}tool_calls> bar", [])),
    (f"a <{DSML}tool_calls>\n<{DSML}x", (f"a <{DSML}tool_calls>\n<{DSML}x", "", [])),
    (f"a<{DSML}tool_calls>\n</think>b", (f"a<{DSML}tool_calls>", "b", [])),
    (f"a</think>b</{DSML}tool_calls>", ("a", f"b</{DSML}tool_calls>", [])),
    (f"</think><{DSML}<{DSML}\n\n{block(F)}", ("", f"<{DSML}<{DSML}", F_READ)),
    (f"a</think>b{USER}c", ("a", f"b{USER}c", [])),
    # So is what begins like a call and goes on otherwise, and reasoning goes on behind it.
    (f'a\n<{DSML}invoke name="f"> is\n</think>b', (f'a\n<{DSML}invoke name="f"> is', "b", [])),
    (
        f'a\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n</think>b',
        (f'a\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">', "b", []),
    ),
    (f'</think>a\n<{DSML}invoke name="f"\n', ("", f'a\n<{DSML}invoke name="f"\n', [])),
    (f'</think><{DSML}invoke name="{"f" * 400}', ("", f'<{DSML}invoke name="{"f" * 400}', [])),
    (
        f"</think>{block(invoke('f', block(F)))}",
        ("", f'<{DSML}tool_calls>\n<{DSML}invoke name="f"></{DSML}invoke>\n</{DSML}tool_calls>', F_READ),
    ),
    (f"</think>{block(F, parameter('b', 'y'))}", ("", f"{parameter('b', 'y')}\n</{DSML}tool_calls>", F_READ)),
    (f"a\n{block(F, 'oops')}</think>b", ("a", f"oops\n</{DSML}tool_calls>b", F_READ)),
    # Tags that are missing at the end of a call.
    (f"</think>{block(F.removesuffix(f'</{DSML}invoke>'), F)}", ("", "", F_READ * 2)),
    (f"</think>{F.removesuffix(f'</{DSML}invoke>')}", ("", "", F_READ)),
    # Calls that are cut off or malformed are text.
    (f"a</think>b\n\n{NEVER_CLOSED}", ("a", f"b\n\n{NEVER_CLOSED}", [])),
    (f"a\n\n{NEVER_CLOSED}", ("a", f"\n\n{NEVER_CLOSED}", [])),
    (f"</think>{block(F)[:-90]}", ("", block(F)[:-90], [])),
    (f"</think>{block('oops', F)}", ("", f"<{DSML}tool_calls>\noops", F_READ)),
    (f"</think>{block(F, 'oops', F)}", ("", "oops", F_READ * 2)),
    (f"</think>{block(F, 'oops')}", ("", f"oops\n</{DSML}tool_calls>", F_READ)),
    (
        f"</think>{block(invoke('g', 'oops'), F)}",
        ("", f'<{DSML}tool_calls>\n<{DSML}invoke name="g">\noops\n</{DSML}invoke>', F_READ),
    ),
    # Behind the block nothing is a call any more.
    (f"a</think>b\n\n{block(F)} after\n", ("a", "bafter\n", F_READ)),
    (f"a</think>{block(F)}\n\n{block(F)}", ("a", block(F), F_READ)),
]  # fmt: skip


@pytest.mark.parametrize("cut", [tokens, by_character], ids=["tokens", "characters"])
@pytest.mark.parametrize(("text", "answer"), CASES, ids=range(len(CASES)))
def test_answers(text: str, answer: Answer, cut: Any) -> None:
    assert read(cut(text)) == answer


VALUES: list[tuple[str, str, str, str]] = [
    # Text is text as it is: nothing trimmed, nothing escaped.
    ("a", "true", "", '""'),
    ("a", "true", " <b>&amp; \n", '" <b>&amp; \\n"'),
    ("a", "true", '"\\é', '"\\"\\\\é"'),
    ("a b", "true", "x", '"x"'),
    ('a"b', "true", "x", '"x"'),
    ("a", "true", "b</think>c", '"b</think>c"'),
    ("a", "true", f"x</{DSML}y>z", f'"x</{DSML}y>z"'),
    (
        "a",
        "true",
        f"x</{DSML}invoke></{DSML}tool_calls><{DSML}invoke name=",
        f'"x</{DSML}invoke></{DSML}tool_calls><{DSML}invoke name="',
    ),
    ("a", "false", "3", "3"),
    ("a", "false", "1.50", "1.50"),
    ("a", "false", "1e-07", "1e-07"),
    ("a", "false", " [1,  2]\n", "[1,  2]"),
    ("a", "false", "null", "null"),
    # What is not JSON stays inside a JSON object.
    ("a", "false", "True", "true"),
    ("a", "false", "False", "false"),
    ("a", "false", "None", "null"),
    ("a", "false", "", '""'),
    ("a", "false", "{bad", '"{bad"'),
    ("a", "false", "NaN", '"NaN"'),
    ("a", "false", "-Infinity", '"-Infinity"'),
    ("a", "false", "plain text", '"plain text"'),
    ("a", "false", "[" * 100_000, '"' + "[" * 100_000 + '"'),
]


@pytest.mark.parametrize("cut", [tokens, by_character], ids=["tokens", "characters"])
@pytest.mark.parametrize(("key", "string", "value", "found"), VALUES, ids=range(len(VALUES)))
def test_values(key: str, string: str, value: str, found: str, cut: Any) -> None:
    text = block(invoke("f", parameter(key, value, string)))
    assert read(cut(text), thinks=False) == ("", "", [("f", f"{{{json.dumps(key)}: {found}}}")])


def test_the_last_of_two_values_counts() -> None:
    text = block(invoke("f", parameter("a", "x"), parameter("b", "z"), parameter("a", "y")))
    assert read(tokens(text), thinks=False) == ("", "", [("f", '{"a": "y", "b": "z"}')])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (f"a\n\n{block(F)}\n", f"a\n\n{block(F)}\n"),
        (f"\n\na <{DSML}tool_calls>", f"a <{DSML}tool_calls>"),
        ("a</think>b", "ab"),
    ],
)
def test_without_tools_and_thinking_all_is_text(text: str, answer: str) -> None:
    assert read(tokens(text), thinks=False, tools=False) == ("", answer, [])


def test_spellings_made_of_other_tokens_are_text() -> None:
    text = f"a</think>b\n\n{block(F)}{EOS}{USER}"
    assert read(vocabulary().encode([text])) == (text, "", [])
    assert read(vocabulary().encode([text]), thinks=False) == ("", text, [])


def test_an_answer_cut_off_is_not_a_call() -> None:
    """The last tag may be missing when the model ended its turn, not when it was stopped."""
    cut = block(F, invoke("g", parameter("b", "y"))).split(f"\n</{DSML}invoke>\n</")[0]
    assert read(tokens(f"</think>{cut}")) == ("", "", [*F_READ, ("g", '{"b": "y"}')])
    open_call = f'<{DSML}invoke name="g">\n{parameter("b", "y")}'
    assert read(tokens(f"</think>{cut}"), ended=False) == ("", open_call, F_READ)


@pytest.mark.parametrize(
    ("start", "text", "answer"),
    [
        ({"content": "Be"}, "\n\nterse", ("", "\n\nterse", [])),
        ({"content": "Be", "reasoning_content": "why"}, " a</think>b", ("", " ab", [])),
        ({"content": "", "reasoning_content": "why"}, "\nnot</think>\nb", ("\nnot", "b", [])),
        ({"content": None}, "\nwhy</think>b", ("why", "b", [])),
    ],
)
def test_continuation(start: dict[str, Any], text: str, answer: Answer) -> None:
    assert read(tokens(text), continue_from=start) == answer


def test_pieces_arrive_as_soon_as_they_are_certain() -> None:
    parser = encoding().parser(think="high", tools=True)
    assert parser.feed(19923) == [Reasoning("Hello")]
    assert parser.in_reasoning and not parser.done
    assert parser.feed(271) == []  # may be the end of reasoning
    assert parser.feed(19923) == [Reasoning("\n\nHello")]
    assert parser.feed(3574) == parser.feed(102) == []
    assert parser.feed(225) == [Reasoning("🦀")]
    assert parser.end_of_reasoning == encoding().end_of_reasoning == [128822]
    assert parser.feed(128822) == []
    assert not parser.in_reasoning
    assert parser.feed(271) == []
    assert parser.feed(19923) == [Text("Hello")]
    assert parser.feed(339) == [Text(".")]


def test_calls_arrive_one_by_one() -> None:
    parser = encoding().parser(think="off", tools=True)
    ids = tokens(block(F, F))
    arrived = [n for n, token in enumerate(ids) if parser.feed(token)]
    assert [vocabulary().decode(ids[: n + 1]).rstrip() for n in arrived] == [
        f"<{DSML}tool_calls>\n{F}",
        f"<{DSML}tool_calls>\n{F}\n{F}",
    ]
    assert parser.done


def test_without_tools_nothing_is_held_back() -> None:
    parser = encoding().parser(think="off", tools=False)
    assert parser.feed(19923) == [Text("Hello")]
    assert parser.feed(271) == [Text("\n\n")]
    assert parser.feed(30) == [Text("<")]


def test_bytes() -> None:
    """Bytes that are no UTF-8 are shown, except those at the end that lack the rest of their character."""
    a, crab = tokens("a"), tokens("🦀")
    assert read([*crab[:2], *a], thinks=False) == ("", "\ufffda", [])
    assert read([*a, *crab[:2]], thinks=False) == ("", "a", [])
    assert read([*crab[:2], 128822, *a]) == ("\ufffd", "a", [])
    assert read([*crab[:2], *crab], thinks=False) == ("", "\ufffd🦀", [])


def test_unknown_token() -> None:
    with pytest.raises(EncodingError, match=r"token: expected an id that .* has, found 129280"):
        encoding().parser(think="off", tools=False).feed(129280)


@pytest.mark.parametrize(
    ("text", "closed"),
    [
        ("\n\na </think>\n b\n", ""),
        (f"a</think>b.\n{block(F)}\n", ""),
        ("cut off", END_THINK),
        ("a</think>b</think>c", None),
        (f"a</think><{DSML}x", None),
        (f"a</think>b{USER}c", None),
        (f"a</think>{block(F)} after", None),
        (f"a</think>{NEVER_CLOSED}", None),
        (f"a</think>{block('oops', F)}", None),
    ],
)
def test_sampled(text: str, closed: str | None) -> None:
    """Ids may stand in a later prompt unless they hold marks that the message does not have."""
    parser = encoding().parser(think="high", tools=True)
    collect(parser, [*tokens(text), 1], {})
    assert parser.sampled == (None if closed is None else tokens(text) + tokens(closed))


def test_sampled_in_the_middle_of_a_call_and_of_continuations() -> None:
    parser = encoding().parser(think="off", tools=True)
    for token in tokens(NEVER_CLOSED):
        parser.feed(token)
    assert parser.sampled is None
    parser = encoding().parser(think="off", tools=True, continue_from={"content": "Be"})
    parser.feed(19923)
    assert parser.sampled is None
    assert parser.message == {"role": "assistant", "content": "BeHello"}


def test_byte_tokenizer(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, 300)
    small = Encoding.from_folder(tmp_path)
    for text, answer in CASES:
        parser = small.parser(think="high", tools=True)
        assert collect(parser, small.vocabulary.encode([*marked(text), Mark(EOS)]), {}) == answer


# What can be told of any output.

FRAGMENTS = [
    *MARKS, "\n", "\n\n", "<", "</", ">", '"', " ", "a", "é", "🦀", "tool_calls>", "invoke", 'invoke name="f">',
    "invoke>", 'parameter name="k" string="true">', 'parameter name="k" string="false">', "parameter>", 'name="',
    "1", "{", block(F), F, f"<{DSML}", f"</{DSML}", NEVER_CLOSED, "x" * 60,
]  # fmt: skip
outputs = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=5), max_size=25).map("".join)
any_tokens = st.lists(st.integers(0, 129279) | st.sampled_from(tokens(block(F) + "</think>\n\n")), max_size=40)


@settings(max_examples=400, deadline=None)
@given(outputs, st.booleans(), st.booleans(), st.booleans())
def test_cuts_do_not_matter(text: str, thinks: bool, tools: bool, ended: bool) -> None:
    whole = read(tokens(text), thinks=thinks, tools=tools, ended=ended)
    assert read(by_character(text), thinks=thinks, tools=tools, ended=ended) == whole


def kept(text: str) -> str:
    """What may not disappear: all but white space, marks, and what calls are made of."""
    return re.sub(r"\s", "", text.replace("</think>", ""))


@settings(max_examples=400, deadline=None)
@given(any_tokens | outputs.map(tokens), st.booleans(), st.booleans(), st.booleans())
def test_nothing_is_lost(ids: list[int], thinks: bool, tools: bool, ended: bool) -> None:
    ids = [i for i in ids if i != 1]
    reasoning, text, calls = read(ids, thinks=thinks, tools=tools, ended=ended)
    for _, arguments in calls:
        assert type(json.loads(arguments)) is dict
    # Bytes of a character that has not ended are dropped, so what is compared is what can be decoded.
    whole = kept(drop_incomplete_end(ids))
    if not calls:
        assert kept(reasoning + text) == whole
    else:  # what is not in the text is in calls
        rest = iter(whole)
        assert all(character in rest for character in kept(reasoning + text))
        for name, _ in calls:
            assert name in vocabulary().decode(ids)


def drop_incomplete_end(ids: Sequence[int]) -> str:
    """Text of tokens as a stream of UTF-8 shows it: characters do not go on over marks."""
    parts = [""]
    data = b""
    for token in ids:
        found = vocabulary().read(token)
        if isinstance(found, Mark):
            parts += [data.decode(errors="replace"), found]
            data = b""
        else:
            data += found
    for end in range(len(data), max(len(data) - 4, -1), -1):
        try:
            data[end:].decode()
        except UnicodeDecodeError as e:
            if e.reason == "unexpected end of data" and e.start == 0:
                data = data[:end]
                break
    return "".join([*parts, data.decode(errors="replace")])


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
names = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters='\n"'), min_size=1, max_size=8)
some_calls = st.lists(st.tuples(names, st.dictionaries(names, json_values, max_size=4)), min_size=1, max_size=3)


@settings(max_examples=300, deadline=None)
@given(some_calls, st.text(), st.text(), st.booleans())
def test_calls_come_back(
    calls: list[tuple[str, dict[str, Any]]], reasoning: str, content: str, by_characters: bool
) -> None:
    pieces = [reasoning, Mark(END_THINK), content, *write_calls(calls)]
    encode = spelled_out if by_characters else lambda text: vocabulary().encode([text])
    ids = [i for p in pieces for i in (vocabulary().encode([p]) if isinstance(p, Mark) else encode(p))]
    found = read(ids)
    assert found[:2] == (reasoning.strip("\n"), content.strip("\n"))
    assert [(name, json.loads(arguments)) for name, arguments in found[2]] == calls


@cache
def their_tokenizer() -> deepseek_recipe.Tokenizer:
    return deepseek_recipe.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def theirs(ids: Sequence[int], thinks: bool, tools: bool) -> Answer:
    """The answer as DeepSeek's package reads it."""
    conversation = deepseek_recipe.Conversation([deepseek_recipe.UserMessage("x")], thinking_mode=thinks)
    request = deepseek_recipe.ConversationRequest(conversation, deepseek_recipe.ModelVersion.DeepseekV4Pro)
    stage = deepseek_recipe.ThinkingInitialStage.ReasoningStart if thinks else None
    processor = deepseek_recipe.StreamProcessor(
        deepseek_recipe.ChatCompletionRequest.chunk_generator(request, "id", "model"),
        deepseek_recipe.ParsingOptions(parse_tool_calls=tools, thinking_initial_stage=stage),
        their_tokenizer(),
    )
    response = deepseek_recipe.ChatCompletionResponse("id", "model", 0, 0, 0)
    chunks = processor.push(deepseek_recipe.InferenceChunk.ready())
    for token in ids:
        if not processor.finished:
            chunks += processor.push(deepseek_recipe.InferenceChunk.tokens([token]))
    if not processor.finished:
        chunks += processor.push(deepseek_recipe.InferenceChunk.finish(deepseek_recipe.InferenceFinishReason.Stop))
        chunks += processor.finish()
    for chunk in chunks:
        response.accumulate(chunk)
    message = json.loads(response.to_json())["choices"][0]["message"]
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or []]
    return message.get("reasoning_content") or "", message["content"] or "", calls


# Up to the first that the package reads otherwise, and the values that it reads as the reference does.
COMMON = [text for text, _ in CASES[: [text for text, _ in CASES].index(f"a</think>the <{DSML} token")]]
COMMON.remove("</think>\n\n")  # without thinking, it gives out newlines behind the mark that it drops
COMMON += [block(invoke("f", parameter(*VALUES[n][::2], VALUES[n][1]))) for n in (0, 1, 2, 8, 9, 10, 12)]


@pytest.mark.parametrize("text", COMMON, ids=range(len(COMMON)))
@pytest.mark.parametrize("thinks", [True, False])
def test_well_formed_answers_are_read_as_by_deepseeks_package(text: str, thinks: bool) -> None:
    for tools in (True, False):
        assert theirs(tokens(text), thinks, tools) == read(tokens(text), thinks=thinks, tools=tools)
