"""Registers this model with mlx-lm, so that mlx-lm's own functions and commands run it.

Everything we change in mlx-lm is changed in `register`: one module is added, one class, three functions are wrapped.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm import utils
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .cache import LayerCache
from .chat_tokenizer import with_chat
from .config import MODEL_TYPE, ModelConfig
from .errors import RequestError
from .hub import is_repository, resolve
from .loading import load_model
from .model import Model

# mlx-lm's commands that run a model as it is.
COMMANDS = ("benchmark", "cache_prompt", "chat", "evaluate", "generate", "perplexity", "server")

# Its commands that make new weights. They save a model's parameters as it holds them, which no one reads back.
_WRITE_WEIGHTS = ("awq", "convert", "dwq", "dynamic_quant", "fuse", "gptq", "lora")

# Packages that mlx-lm does not install by itself, and the extra that brings them.
_NEEDS = {"evaluate": ("lm_eval", "mlx-lm[evaluate]"), "perplexity": ("datasets", "mlx-lm[train]")}

# mlx-lm would refuse some of these after minutes of loading, and pass over the others without a word.
_REFUSED_OPTIONS = {
    "--adapter-path": "adapters are not supported for this model",
    "--draft-model": "speculative decoding has to take tokens back, and the caches of this model cannot",
    "--kv-bits": "cached rows already have the precision the model was trained with",
    "--max-kv-size": "the caches have the sizes the model was trained with",
    "--pipeline": "the model runs on one machine",
}

# What commands do with text when neither the checkpoint brings a chat template nor its tokenizer has this model's
# tokens. `chat` has nothing it could do.
_WITHOUT_TEMPLATE = {
    "cache_prompt": "the prompt is taken as raw text",
    "generate": "the prompt is taken as raw text",
    "server": "completions are raw text, and chats become plain lines of 'USER: ...' and 'ASSISTANT: ...'",
}

# What `mlx_lm.load(..., model_config=...)` may ask of us: how to compute, not what.
_MODEL_CONFIG = ("dtype", "experts", "memory", "quantize_activations", "simulate_cache_quant")

_mlx_lm_load_model = utils.load_model
_mlx_lm_load_adapters = utils.load_adapters
_mlx_lm_load_tokenizer = utils.load_tokenizer


@functools.cache  # the second call finds everything done
def register() -> None:
    """Make `mlx_lm.load` and everything built on it accept our checkpoints; other models load as before."""
    # mlx-lm takes the classes of a model from a module of its own, by name. It asks for them even where it does not
    # build the model: when it loads the tokenizer.
    module = types.ModuleType(f"mlx_lm.models.{MODEL_TYPE}", "DeepSeek-V4, from mlx_v4flash.")
    vars(module).update(Model=Model, ModelArgs=ModelConfig)
    sys.modules[module.__name__] = module
    # mlx-lm's function gives a model the tensors under their stored names and types: experts one by one, FP8 with
    # scales of blocks that MLX does not have. `load`, and all commands through it, look the function up here.
    utils.load_model = _load_model
    # A file of cached prompts names the classes of its caches, and mlx-lm looks these names up in this module.
    setattr(mlx_lm_cache, LayerCache.__name__, LayerCache)
    # mlx-lm's LoRA layers take the place of linear layers whose weights we read ourselves: the first token would
    # end in an AttributeError. `load` looks this function up here.
    utils.load_adapters = _load_adapters
    # DeepSeek publishes no chat template, and a template's text would let text of the user become structure.
    utils.load_tokenizer = _load_tokenizer


def run_mlx_lm(command: str, args: list[str]) -> None:
    """Run a command of mlx-lm, such as `generate`, with our model registered.

    Args:
        command: one of `COMMANDS`.
        args: what follows the name of the command on its command line.

    Raises:
        RequestError: another command, an option that cannot be honoured, a package that is not installed, or
            a chat without a chat template.
    """
    if command in _WRITE_WEIGHTS:
        raise RequestError(
            f"{command}: expected a command that runs the model as it is ({', '.join(COMMANDS)}), found one that "
            "changes its weights\nhint: the checkpoint runs as DeepSeek published it, without conversion"
        )
    if command not in COMMANDS:
        raise RequestError(f"command of mlx-lm: expected {', '.join(COMMANDS)}, found {command!r}")
    register()
    _check_arguments(command, args)
    module = _import(command)
    before, sys.argv = sys.argv, [f"mlx-v4flash lm {command}", *args]
    try:
        module.main()
    finally:
        sys.argv = before


def _load_model(
    model_path: Path,
    lazy: bool = False,
    strict: bool = True,
    model_config: dict[str, Any] | None = None,
    get_model_classes: Callable[[dict[str, Any]], tuple[type[nn.Module], type]] = utils._get_classes,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's `load_model`, with our checkpoints going to ours.

    Raises:
        RequestError: an argument that ours cannot honour.
    """
    asked = model_config or {}
    config: dict[str, Any] = utils.load_config(Path(model_path)) | asked
    own_classes = get_model_classes is not utils._get_classes
    if config.get("model_type") != MODEL_TYPE or own_classes:
        others: tuple[nn.Module, dict[str, Any]] = _mlx_lm_load_model(
            model_path, lazy, strict, model_config, get_model_classes, trust_remote_code
        )
        return others
    if lazy:
        raise RequestError(
            "lazy: expected False, found True; weights are read to their final place while the model is loaded\n"
            "hint: mlx-lm sets it to convert, quantise or split a model, which is not supported for this one"
        )
    if not strict:
        raise RequestError("strict: expected True, found False; a checkpoint has every tensor or is refused")
    foreign = sorted(set(asked) - set(_MODEL_CONFIG))
    if foreign:
        raise RequestError(f"model_config: expected {', '.join(_MODEL_CONFIG)}, found {', '.join(foreign)}")
    return load_model(model_path, **asked), config


def _load_adapters(model: nn.Module, adapter_path: str) -> nn.Module:
    """mlx-lm's `load_adapters`, refused for our model."""
    if isinstance(model, Model):
        raise RequestError(f"adapter_path: {_REFUSED_OPTIONS['--adapter-path']}, found {adapter_path}")
    adapted: nn.Module = _mlx_lm_load_adapters(model, adapter_path)
    return adapted


def _load_tokenizer(
    model_path: str | Path, tokenizer_config_extra: dict[str, Any] | None = None, eos_token_ids: Any = None
) -> TokenizerWrapper:
    """mlx-lm's `load_tokenizer`; for our checkpoints with our prompts and our reader of calls."""
    loaded: TokenizerWrapper = _mlx_lm_load_tokenizer(model_path, tokenizer_config_extra, eos_token_ids=eos_token_ids)
    folder = Path(loaded.name_or_path)  # a repository has become a folder here
    if not (folder / "config.json").is_file() or utils.load_config(folder).get("model_type") != MODEL_TYPE:
        return loaded
    return with_chat(loaded, folder)


def _check_arguments(command: str, args: list[str]) -> None:
    """Say now what mlx-lm would say once the weights are loaded, or not at all."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--model", "--chat-template", *_REFUSED_OPTIONS):
        parser.add_argument(name, dest=name, nargs="?", const="")
    parser.add_argument("--trust-remote-code", action="store_true")
    found = vars(parser.parse_known_args(args)[0])
    for name, reason in _REFUSED_OPTIONS.items():
        if found[name] is not None:
            raise RequestError(f"{command}: {name}: {reason}\nhint: leave {name} out")
    if found["--model"] and not is_repository(found["--model"]):
        resolve(found["--model"])  # raises if it is no folder
    if found["--model"] and (command == "chat" or command in _WITHOUT_TEMPLATE):
        settings = {"trust_remote_code": found["trust_remote_code"]}
        if found["--chat-template"]:
            settings["chat_template"] = found["--chat-template"]
        _check_template(command, found["--model"], settings)


def _check_template(command: str, model: str, settings: dict[str, Any]) -> None:
    tokenizer = utils.load_tokenizer(model, settings)
    if tokenizer.has_chat_template:
        return
    start = tokenizer.bos_token
    if command == "chat":
        raise RequestError(
            f"chat: expected the tokens of DeepSeek-V4 in {model}/tokenizer.json, or a chat template, found neither\n"
            "hint: take tokenizer.json from the original checkpoint, or put chat_template.jinja beside this one"
        )
    note = f"note: {model} has no chat template, so {_WITHOUT_TEMPLATE[command]}"
    if tokenizer.encode("a")[:1] != [tokenizer.bos_token_id]:
        note += f"; mlx-lm puts nothing in front, so let a text start with {start}"
    print(note, file=sys.stderr)


def _import(command: str) -> types.ModuleType:
    needed, extra = _NEEDS.get(command, ("mlx_lm", "mlx-lm"))
    try:
        importlib.import_module(needed)
    except ModuleNotFoundError as e:
        raise RequestError(f"{command}: expected the package {needed}, found none\nhint: pip install '{extra}'") from e
    return importlib.import_module(f"mlx_lm.{command}")
