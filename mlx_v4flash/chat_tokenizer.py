"""mlx-lm's tokenizer with our prompts and our reader of calls, so that what is built on it chats as we do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from .call_reader import DSML_SIGN, CallReader, spelled
from .encoding import Encoding, think_level
from .errors import EncodingError
from .markup import DSML


class ChatTokenizer(TokenizerWrapper):
    """A tokenizer of mlx-lm for checkpoints of this model.

    mlx-lm finds the parts of an answer by their text, so there a mark and the same characters typed out are the
    same. In prompts they are not.
    """

    def __init__(self, loaded: TokenizerWrapper, encoding: Encoding) -> None:
        super().__init__(
            loaded._tokenizer,
            lambda _: loaded._detokenizer,
            eos_token_ids=loaded.eos_token_ids,
            tool_call_start=f"<{DSML}tool_calls>",
            tool_call_end=f"</{DSML}tool_calls>",
            tool_parser=parse_tool_call,
        )
        self._encoding = encoding
        self.has_chat_template = True

    def apply_chat_template(  # type: ignore[override]  # theirs takes anything
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        enable_thinking: bool = True,
        thinking: bool = True,
        reasoning_effort: str | None = None,
        return_dict: bool = False,
        **others: Any,
    ) -> list[int] | str:
        """The prompt as ids, or with `tokenize=False` as text; arguments as transformers' method has them.

        Args:
            enable_thinking, thinking: two names of one switch, on unless one of them is False.
            reasoning_effort: as in requests, "high" if None.

        Raises:
            EncodingError: a conversation that cannot be written, or an argument that is not one of these.
        """
        asked = sorted(name for name, value in others.items() if value is not None)
        if asked or return_dict:
            found = ", ".join(asked or ["return_dict"])
            raise EncodingError(f"chat template: expected no argument {found}\nhint: use reasoning_effort for thinking")
        level = think_level(reasoning_effort, self._encoding.release)
        messages = [dict(message) for message in conversation]
        if continue_final_message and messages and messages[-1].get("role") == "assistant":
            messages[-1]["prefix"] = True
        options: dict[str, Any] = {
            "tools": tools or (),
            "think": level if enable_thinking and thinking else "off",
            "opens_answer": add_generation_prompt and not continue_final_message,
        }
        if tokenize:
            return self._encoding.prompt(messages, **options)
        return self._encoding.render(messages, **options)


def with_chat(loaded: TokenizerWrapper, folder: Path) -> TokenizerWrapper:
    """`loaded` as a `ChatTokenizer`, unless its checkpoint brings a chat template or another model's tokenizer."""
    if loaded.has_chat_template:
        return loaded
    try:
        encoding = Encoding.from_folder(folder)
    except EncodingError:
        return loaded
    return ChatTokenizer(loaded, encoding)


def parse_tool_call(text: str, tools: Any = None) -> list[dict[str, Any]]:
    """What mlx-lm wants to know of the text between the tags of a block: name and arguments of each call.

    Raises:
        EncodingError: text that is not made of calls.
    """
    block = CallReader()
    found = [*block.feed(text.strip().replace(DSML, DSML_SIGN)), *block.finish(ended=True)]
    if not found or block.is_broken or any(isinstance(part, str) for part in found):
        raise EncodingError(f"tool calls: expected calls between the tags of a block, found {spelled(text)!r}")
    return [{"name": part[0], "arguments": json.loads(part[1])} for part in found]
