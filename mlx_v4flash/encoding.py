"""Messages to the tokens of a prompt, and back from tokens to an answer.

The beginning of a prompt (effort, system text, tools, form of the response) and the encoding of text are those of
DeepSeek's own package, `deepseek-recipe`. It lacks the effort table of the first release, and it writes turns as
DeepSeek's service does, which is not the form the model was trained on: calls are sorted by id, numbers are spelled
otherwise, a call without arguments loses a line, empty messages disappear, and with tools earlier turns begin as if
they were thinking even when thinking is off. So turns and calls are written here, in `turns.py` and `markup.py`. Its
reader of answers drops what it cannot parse; ours is in `output_parser.py`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import deepseek_recipe

from .errors import ConfigError, EncodingError
from .markup import ASSISTANT, END_THINK, THINK, Mark, Piece
from .output_parser import OutputParser
from .turns import read_messages, text_of, write_turns
from .vocabulary import Vocabulary, well_formed

Think = Literal["off", "low", "high", "max"]
THINK_LEVELS: tuple[Think, ...] = ("off", "low", "high", "max")

RELEASES = ("v4-preview", "v4-0731")

# The package knows the later release. The texts of the first one are the same, one level further up.
_EFFORT: dict[str, dict[Think, Literal["low", "high", "max"]]] = {
    "v4-preview": {"off": "low", "low": "low", "high": "low", "max": "high"},
    "v4-0731": {"off": "low", "low": "low", "high": "high", "max": "max"},
}

# What requests ask for, beside the levels themselves.
_ALIASES: dict[str | None, Think] = {
    None: "high", "none": "off", "minimal": "low", "medium": "high", "xhigh": "high", "ultra": "max",
}  # fmt: skip


def think_level(effort: str | None, release: str) -> Think:
    """The level that a request's `reasoning_effort` means.

    Raises:
        EncodingError: no such effort.
    """
    if effort == "xhigh" and release == "v4-preview":
        return "max"
    for level in THINK_LEVELS:
        if level == effort:
            return level
    if effort not in _ALIASES:
        known = ", ".join([*THINK_LEVELS, *filter(None, _ALIASES)])
        raise EncodingError(f"reasoning_effort: expected one of {known}, found {effort!r}")
    return _ALIASES[effort]


def guess_release(folder: Path) -> str:
    """The release of a checkpoint: what its encoder says if it lies there, else what its folder is called."""
    for file in sorted((folder / "encoding").glob("encoding_dsv4*.py")):
        later = "Beyond maximum" in file.read_text(encoding="utf-8", errors="replace")
        return "v4-0731" if later else "v4-preview"
    # A downloaded repository lies in a folder named after its commit, two below the one named after itself.
    path = folder.resolve()
    name = next((p.name for p in path.parents if p.name.startswith("models--")), path.name)
    return "v4-0731" if any(part in name for part in ("0731", "0813", "Vision-Exp")) else "v4-preview"


@dataclass(frozen=True)
class ChatDefaults:
    """How a model is talked to unless told otherwise; the values here are those of DeepSeek's model card.

    Args:
        temp: temperature.
    """

    think: Think = "high"
    temp: float = 1.0

    @classmethod
    def from_folder(cls, folder: Path) -> ChatDefaults:
        """What `mlx_v4flash.chat` of config.json says; DeepSeek's has none.

        Raises:
            ConfigError: something else than a level of thinking and a temperature.
        """
        try:
            values = json.loads((folder / "config.json").read_text(encoding="utf-8"))["mlx_v4flash"]["chat"]
        except (OSError, ValueError, KeyError, TypeError):
            return cls()
        try:
            chosen = cls(**values)
            if chosen.think in THINK_LEVELS and chosen.temp >= 0:
                return chosen
        except TypeError:
            pass
        raise ConfigError(
            f"{folder / 'config.json'}: mlx_v4flash: chat: expected think ({', '.join(THINK_LEVELS)}) and temp (0 or "
            f"more), found {values!r}\nhint: remove the entry"
        )


def shared_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two prompts have in common at their beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((n for n, (x, y) in pairs if x != y), min(len(a), len(b)))


class Encoding:
    """Prompts and answers of one checkpoint.

    Attributes:
        release: "v4-preview" or "v4-0731"; decides what the levels of thinking say in the prompt.
        defaults: how this checkpoint is talked to.
    """

    def __init__(
        self, vocabulary: Vocabulary, release: str = "v4-preview", defaults: ChatDefaults = ChatDefaults()
    ) -> None:
        if release not in RELEASES:
            raise EncodingError(f"release: expected {' or '.join(RELEASES)}, found {release!r}")
        self.vocabulary = vocabulary
        self.release, self.defaults = release, defaults

    @classmethod
    def from_folder(cls, folder: Path, release: str | None = None) -> Encoding:
        """Read `tokenizer.json` of a checkpoint; `release` is guessed if it is None.

        Raises:
            EncodingError: no such file, another model's tokenizer, or an unknown release.
            ConfigError: defaults of its chats that make no sense.
        """
        folder = Path(folder)
        return cls(Vocabulary.from_folder(folder), release or guess_release(folder), ChatDefaults.from_folder(folder))

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt as text, for people; arguments and errors as for `prompt`.

        A mark in it looks like the same characters typed by a user, so this text is not what to encode.
        """
        pieces = self._pieces(messages, **options)
        return well_formed("".join(p if isinstance(p, str) else self.vocabulary.decode(p) for p in pieces))

    def prompt(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids from the beginning-of-sentence token to where the model speaks.

        Text of messages and tools never becomes a mark, whatever it spells.

        Args:
            messages: as OpenAI's interface has them. An assistant message with `prefix: True` at the end is continued.
            tools: functions the model may call, with or without `{"type": "function"}` around them. With tools all
                reasoning of the conversation stays in the prompt, without them only that after the last user message.
            think: how much the model thinks before it answers: "off", "low", "high" or "max".
            response_format: as OpenAI's interface has it. The model is told; nothing enforces it.
            drop_reasoning: False keeps all reasoning without tools, too.
            opens_answer: False ends the prompt behind the last message.
            sampled: by position of an assistant message, the ids it was generated as (`OutputParser.sampled`). They
                stand in the prompt as they are if its reasoning is there as it was then. So the prompt begins with
                what the caches hold, where rendering the message again might choose other tokens. Take none from
                clients: ids can be marks.

        Raises:
            EncodingError: the place in the messages or tools, what was expected there and what was found.
        """
        return self.vocabulary.encode(self._pieces(messages, **options))

    def stable_prefix(self, prompt: Sequence[int], *, tools: bool) -> int:
        """How many leading tokens of a prompt are in the conversation's next prompt, too.

        Without tools the reasoning is dropped then, and the turn begins with another mark. A copy of the caches
        made at this point serves the next turn.
        """
        think = self.vocabulary.id_of(THINK)
        return len(prompt) if tools or think not in prompt else list(prompt).index(think)

    def parser(self, *, think: Think, tools: bool, continue_from: Mapping[str, Any] | None = None) -> OutputParser:
        """What reads the tokens generated after `prompt` with the same arguments.

        Args:
            tools: whether there were any; without them calls are text.
            continue_from: the assistant message at the end of the prompt that is being continued.
        """
        _check_think(think)
        start = {} if continue_from is None else continue_from
        content = text_of(start.get("content"), "continue_from.content")
        reasoning = text_of(start.get("reasoning_content"), "continue_from.reasoning_content")
        return OutputParser(self.vocabulary, think != "off", tools, content, reasoning)

    @property
    def end_of_reasoning(self) -> list[int]:
        """What to feed the model, and the parser, to make it answer now."""
        return [self.vocabulary.id_of(END_THINK)]

    def _pieces(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        think: Think = "high",
        response_format: Mapping[str, Any] | None = None,
        drop_reasoning: bool = True,
        opens_answer: bool = True,
        sampled: Mapping[int, Sequence[int]] | None = None,
    ) -> list[Piece]:
        _check_think(think)
        for name, value in (("messages", messages), ("tools", tools)):
            if not isinstance(value, list | tuple):
                raise EncodingError(f"{name}: expected a list, found {value!r}")
        if not messages:
            raise EncodingError("messages: expected at least one, found none")
        systems, turns = read_messages(messages, sampled or {})
        beginning = self._beginning(systems, tools, think, response_format or {})
        drops = drop_reasoning and not tools
        rest = write_turns(turns, thinking=think != "off", drops_reasoning=drops, opens_answer=opens_answer)
        return [*beginning, *rest]

    def _beginning(
        self,
        systems: list[str],
        tools: Sequence[Mapping[str, Any]],
        think: Think,
        response_format: Mapping[str, Any],
    ) -> Iterator[Piece]:
        """Everything before the first turn, by DeepSeek's package.

        JSON goes through it as names that stand for it: it spells numbers otherwise than Python, which wrote what
        the model was trained on, and refuses long integers.
        """
        stand_ins: dict[str, str] = {}

        def stand_in(value: Any, where: str) -> str:
            name = secrets.token_hex(16)
            try:
                stand_ins[f'"{name}"'] = json.dumps(value, ensure_ascii=False)
            except (TypeError, ValueError, RecursionError) as e:
                raise EncodingError(f"{where}: expected JSON, found {e}") from e
            return name

        definitions = []
        for n, tool in enumerate(tools):
            name, description, parameters = _function(tool, f"tools[{n}]")
            marker = stand_in(parameters, f"tools[{n}].parameters")
            definitions.append(deepseek_recipe.ToolDefinition(name, description, marker))
        options: dict[str, Any] = {}
        kind, schema = _response_schema(response_format)
        if kind == "json_schema":
            options["response_schema"] = stand_in(schema, "response_format.json_schema.schema")
        elif kind == "json_object":
            options["response_format"] = kind
        conversation = deepseek_recipe.Conversation(
            [deepseek_recipe.SystemMessage(text) for text in systems],
            thinking_mode=think != "off",
            tools=definitions,
            reasoning_effort=_EFFORT[self.release][think],
            **options,
        )
        rendered = deepseek_recipe.DeepseekV4Encoding().render_conversation(conversation)
        pieces = _split(rendered)
        assert pieces[-2:] in ([ASSISTANT, THINK], [ASSISTANT, END_THINK])
        for piece in pieces[:-2]:
            if not isinstance(piece, Mark):
                for name, text in stand_ins.items():
                    piece = piece.replace(name, text, 1)
            yield piece


def _split(rendered: deepseek_recipe.RenderedPrompt) -> list[str]:
    """Marks and the text between them."""
    pieces: list[str] = []
    end = 0
    for start, stop in rendered.special_ranges:
        pieces += [rendered.prompt[end:start], Mark(rendered.prompt[start:stop])]
        end = stop
    return [piece for piece in (*pieces, rendered.prompt[end:]) if piece]


def _function(tool: Any, where: str) -> tuple[str, str, Any]:
    """Name, description and parameters, which is all the model is told of a tool."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name:
        raise EncodingError(f"{where}: expected a function with a name, found {tool!r}")
    assert isinstance(function, Mapping)
    description = function.get("description") or ""
    if not isinstance(description, str):
        raise EncodingError(f"{where}.description: expected text, found {description!r}")
    parameters = function.get("parameters", function.get("input_schema"))
    return well_formed(name), well_formed(description), {} if parameters is None else parameters


def _response_schema(response_format: Mapping[str, Any]) -> tuple[str, Any]:
    kind = response_format.get("type", "text")
    if kind not in ("text", "json_object", "json_schema"):
        raise EncodingError(f"response_format.type: expected text, json_object or json_schema, found {kind!r}")
    if kind != "json_schema":
        return kind, None
    inner = response_format.get("json_schema")
    if not isinstance(inner, Mapping) or "schema" not in inner:
        raise EncodingError(f"response_format.json_schema: expected an object with a schema, found {inner!r}")
    return kind, inner["schema"]


def _check_think(think: str) -> None:
    if think not in THINK_LEVELS:
        raise EncodingError(f"think: expected {', '.join(THINK_LEVELS)}, found {think!r}")
