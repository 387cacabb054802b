"""A conversation in a file: mlx-lm's format of prompt caches, with the messages beside the caches."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from pydantic import BaseModel

from .cache import LayerCache
from .encoding import Think
from .errors import RequestError
from .mlx_lm_bridge import register
from .model import Model
from .session import Held
from .tools import Tool
from .turns import read_messages
from .vocabulary import well_formed

if TYPE_CHECKING:
    from .chat import Chat

_KEY = "mlx_v4flash_chat"
_VERSION = 1


class _Values(BaseModel):
    """What is written beside the caches.

    Attributes:
        sampled: by position in `messages`, what the answer was generated as.
        tokens: those in the caches.
    """

    version: int
    model: str
    system: str | None
    think: Think
    tools: list[dict[str, Any]]
    messages: list[dict[str, Any]]
    sampled: dict[int, list[int]]
    tokens: list[int]


def save(chat: Chat, path: Path, sampled: dict[int, list[int]]) -> Path:
    """Write the caches that the next turn will go on from; the path with its suffix.

    Raises:
        RequestError: it cannot be written.
    """
    # Reasoning that the next prompt leaves out would be bytes for nothing.
    held = chat.session.known(chat.prompt({"role": "user", "content": "a"})) or Held([], chat.model.make_cache())
    values = _Values(
        version=_VERSION,
        model=fingerprint(chat.model),
        system=None if chat.system is None else well_formed(chat.system),
        think=chat.think,
        tools=[dict(tool.definition) for tool in chat.tools],
        messages=chat.messages,
        sampled=sampled,
        tokens=held.tokens,
    )
    path = _with_suffix(path)
    part = path.with_name(f".{path.name}.part.safetensors")
    if os.path.exists(path) and not _is_ours(path):
        raise RequestError(f"{path}: expected a new name, or a saved conversation to replace, found another file")
    try:
        save_prompt_cache(str(part), held.cache, {_KEY: json.dumps(values.model_dump())})
        part.replace(path)  # an interrupted write leaves the old file
    except (OSError, RuntimeError) as e:
        raise RequestError(f"{path}: cannot be written: {e}") from e
    finally:
        with suppress(OSError):
            part.unlink()
    return path


def load(chat: Chat, path: Path) -> tuple[int, dict[int, list[int]]]:
    """Give a chat the conversation of a file; tokens in its caches, and what answers were generated as."""
    path = path if os.path.isfile(path) else _with_suffix(path)
    values, cache = _read(path)
    functions = {tool.name: tool.function for tool in chat.tools}
    tools = [Tool.of(definition) for definition in values.tools]
    read_messages(values.messages, {})  # raises if one is none
    chat.tools = [Tool(tool.definition, functions.get(tool.name)) for tool in tools]
    chat.messages, chat.system, chat.think = values.messages, values.system, values.think
    if values.model != fingerprint(chat.model) or len(cache) != len(chat.model.layers):
        chat.session.adopt(Held([], chat.model.make_cache()))
        return 0, {}  # its tokens may be other ones
    tokens = values.tokens if cache[0].position == len(values.tokens) else []
    chat.session.adopt(Held(tokens, cache) if tokens else Held([], chat.model.make_cache()))
    return len(tokens), values.sampled


def fingerprint(model: Model) -> str:
    """Tells models apart whose caches must not be mixed up: by config, numerics and some of the weights."""
    known = hashlib.sha256(repr((model.config, model.numerics)).encode())
    known.update(np.array(model.norm.weight.astype(mx.float32)).tobytes())
    return known.hexdigest()


def _with_suffix(path: Path) -> Path:
    if not path.name:
        raise RequestError(f"{path}: expected the name of a file, found a folder")
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")


def _is_ours(path: Path) -> bool:
    try:
        _, metadata = mx.load(str(path), return_metadata=True)  # arrays are not read before they are used
    except (RuntimeError, ValueError):
        return False
    return any(str(key).endswith(_KEY) for key in metadata)


def _read(path: Path) -> tuple[_Values, list[LayerCache]]:
    wrong = f"{path}: expected a conversation that was saved by this program"
    if not os.path.isfile(path):  # a name that is too long is none, too
        raise RequestError(f"{path}: expected a saved conversation, found no file")
    register()  # mlx-lm looks the class of our caches up by its name
    try:
        cache, metadata = load_prompt_cache(str(path), return_metadata=True)
        found = json.loads(metadata[_KEY])
        version = found["version"]
        values = _Values.model_validate(found) if version == _VERSION else None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise RequestError(f"{wrong}, found {e!r}") from e
    if not all(isinstance(layer, LayerCache) for layer in cache):
        raise RequestError(f"{wrong}, found caches of another kind")
    if values is None:
        raise RequestError(f"{wrong}, version {_VERSION}, found version {version}")
    return values, cache
