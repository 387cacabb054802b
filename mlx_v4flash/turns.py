"""From messages as OpenAI's interface has them to the turns of a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .errors import EncodingError
from .markup import ASSISTANT, END_THINK, EOS, REMINDER, TASKS, THINK, USER, Piece, arguments_of, write_calls
from .vocabulary import well_formed

ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")


@dataclass
class Block:
    """Part of a user's turn: what was said, or what the tool of call `call_id` returned."""

    text: str
    is_result: bool = False
    call_id: str | None = None


@dataclass
class UserTurn:
    """Messages of the user and results of tools in a row."""

    blocks: list[Block]
    task: str | None = None

    def pieces(self) -> list[Piece]:
        texts = [f"<tool_result>{b.text}</tool_result>" if b.is_result else b.text for b in self.blocks]
        return [USER, "\n\n".join(texts)]


@dataclass
class ReminderTurn:
    text: str

    def pieces(self) -> list[Piece]:
        return [REMINDER, self.text]


@dataclass
class AssistantTurn:
    """Answer of the model.

    Attributes:
        reasoning: None if it answered without thinking.
        calls: id, name and arguments of each.
        is_open: the model goes on with it.
        sampled: the ids it consists of, as they were generated, without the end-of-sentence token.
    """

    content: str
    reasoning: str | None = None
    calls: list[tuple[str | None, str, dict[str, Any]]] = field(default_factory=list)
    is_open: bool = False
    sampled: Sequence[int] | None = None

    def pieces(self, shows_reasoning: bool) -> list[Piece]:
        """From behind the mark that says whether the turn thinks; `shows_reasoning` is that mark's meaning."""
        if self.is_open:
            thought: list[Piece] = [self.reasoning or ""] if shows_reasoning else []
            closed: list[Piece] = [END_THINK, self.content] if shows_reasoning else [self.content]
            return thought + closed if self.content else thought
        if self.sampled is not None and shows_reasoning == (self.reasoning is not None):
            return [self.sampled, EOS]
        thought = [self.reasoning or "", END_THINK] if shows_reasoning else []
        calls = write_calls([(name, arguments) for _, name, arguments in self.calls]) if self.calls else ()
        return [*thought, self.content, *calls, EOS]


Turn = UserTurn | ReminderTurn | AssistantTurn


def read_messages(
    messages: Sequence[Mapping[str, Any]], sampled: Mapping[int, Sequence[int]]
) -> tuple[list[str], list[Turn]]:
    """Texts for the beginning of the prompt, and turns.

    System messages go to the beginning, wherever they are; so do leading developer messages, later ones are the
    user's. Messages of the user and results of tools in a row are one turn, and so are assistant messages in a row.

    Raises:
        EncodingError: a message that is not one; the text names its place.
    """
    systems: list[str] = []
    turns: list[Turn] = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise EncodingError(f"{where}: expected a message with a role among {', '.join(ROLES)}, found {message!r}")
        text = text_of(message.get("content"), f"{where}.content")
        if role == "system" or (role == "developer" and not turns):
            systems += [text] if text else []
        elif role == "assistant":
            _add_answer(turns, _read_answer(message, text, where, sampled.get(i), i == len(messages) - 1))
        elif role == "latest_reminder":
            turns.append(ReminderTurn(text))
        else:
            call_id = message.get("tool_call_id") if role == "tool" else None
            _add_block(turns, Block(text, role == "tool", call_id), message.get("task"), where)
    _sort_results(turns)
    return systems, turns


def write_turns(turns: Sequence[Turn], thinking: bool, drops_reasoning: bool) -> list[Piece]:
    """The prompt from the first turn to where the model speaks.

    Args:
        drops_reasoning: leave out the reasoning of turns before the last of the user.
    """
    last_user = max((i for i, turn in enumerate(turns) if isinstance(turn, UserTurn)), default=-1)
    out: list[Piece] = []
    task: str | None = None
    for i, turn in enumerate(turns):
        if not isinstance(turn, AssistantTurn):
            out += turn.pieces()
            if isinstance(turn, UserTurn):
                task = turn.task
                out += _task_pieces(task, thinking)
            continue
        shows = thinking and (not drops_reasoning or i > last_user or turn.is_open) and task is None
        if task is None:
            out += [ASSISTANT, THINK if shows else END_THINK]
        out += turn.pieces(shows)
        task = None
    answers = turns and isinstance(turns[-1], AssistantTurn) and turns[-1].is_open
    if not answers and task is None:
        out += [ASSISTANT, THINK if thinking else END_THINK]
    return out


def text_of(content: Any, where: str) -> str:
    """A message's content as text: parts are joined by an empty line, other parts than text are named."""
    if content is None:
        return ""
    if isinstance(content, str):
        return well_formed(content)
    if not isinstance(content, list):
        raise EncodingError(f"{where}: expected text, a list of parts or null, found {type(content).__name__}")
    return "\n\n".join(filter(None, (_part(part, f"{where}[{n}]") for n, part in enumerate(content))))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return well_formed(part)
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise EncodingError(f"{where}: expected a part with a type, found {part!r}")
    if isinstance(part.get("text"), str) and part["type"] in ("text", "input_text", "output_text"):
        return well_formed(part["text"])
    return "[Unsupported Image]" if "image" in part["type"] else f"[Unsupported {part['type']}]"


def _task_pieces(task: str | None, thinking: bool) -> list[Piece]:
    if task is None:
        return []
    return [ASSISTANT, THINK if thinking else END_THINK, TASKS[task]] if task == "action" else [TASKS[task]]


def _add_block(turns: list[Turn], block: Block, task: str | None, where: str) -> None:
    if task is not None and task not in TASKS:
        raise EncodingError(f"{where}.task: expected one of {', '.join(TASKS)}, found {task!r}")
    last = turns[-1] if turns else None
    if isinstance(last, UserTurn) and (last.task is None or block.is_result):
        last.blocks.append(block)
        last.task = last.task or task
    else:
        turns.append(UserTurn([block], task))


def _read_answer(
    message: Mapping[str, Any], text: str, where: str, sampled: Sequence[int] | None, is_last: bool
) -> AssistantTurn:
    found = message.get("reasoning_content", message.get("reasoning"))
    reasoning = None if found is None else text_of(found, f"{where}.reasoning_content")
    calls = [_read_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(message.get("tool_calls") or ())]
    is_open = bool(message.get("prefix"))
    if is_open and (calls or not is_last):
        raise EncodingError(
            f"{where}.prefix: expected it in the last message, without tool_calls; found "
            f"{'tool_calls' if calls else 'messages after it'}\nhint: leave prefix out"
        )
    return AssistantTurn(text, reasoning, calls, is_open, sampled)


def _read_call(call: Any, where: str) -> tuple[str | None, str, dict[str, Any]]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise EncodingError(f"{where}: expected a function with a name and arguments, found {call!r}")
    arguments = arguments_of(function.get("arguments"))
    return call.get("id"), well_formed(function["name"]), arguments


def _add_answer(turns: list[Turn], answer: AssistantTurn) -> None:
    last = turns[-1] if turns else None
    if not isinstance(last, AssistantTurn):
        turns.append(answer)
        return
    turns[-1] = AssistantTurn(
        _join((last.content, answer.content)),
        None if last.reasoning is answer.reasoning is None else _join((last.reasoning, answer.reasoning)),
        last.calls + answer.calls,
        answer.is_open,
    )


def _join(texts: Iterable[str | None]) -> str:
    return "\n\n".join(filter(None, texts))


def _sort_results(turns: list[Turn]) -> None:
    """Put the results in each turn of the user in the order of the calls they answer; other text keeps its place."""
    order: dict[str | None, int] = {}
    for turn in turns:
        if isinstance(turn, AssistantTurn) and turn.calls:
            order = {call_id: n for n, (call_id, _, _) in reversed(list(enumerate(turn.calls))) if call_id is not None}
        elif isinstance(turn, UserTurn) and order:
            places = [n for n, block in enumerate(turn.blocks) if block.is_result]
            results = sorted((turn.blocks[n] for n in places), key=lambda block: order.get(block.call_id, 0))
            for n, block in zip(places, results, strict=True):
                turn.blocks[n] = block
