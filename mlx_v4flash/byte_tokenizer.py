"""A tokenizer without training: one token per byte, and DeepSeek's special spellings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from .errors import ConfigError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"

# In the order of their ids. As in the original, only the first two are dropped when special tokens are skipped.
SPELLINGS = (BOS, EOS, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜")

FILES = ("tokenizer.json", "tokenizer_config.json")


def write_byte_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write tokenizer.json and tokenizer_config.json with exactly `vocab_size` ids.

    Raises:
        ConfigError: vocab_size has no room for 256 bytes and the special spellings.
    """
    vocab = {token: i for i, token in enumerate((*SPELLINGS, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    _check_size(vocab_size, len(vocab), "a byte-level tokenizer")
    # A random model draws any id, so every one has a text.
    vocab |= {f"<unused{i}>": i for i in range(len(vocab), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in (BOS, EOS)])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in SPELLINGS[2:]])
    tokenizer.save(str(folder / FILES[0]))
    write_settings(folder, vocab)


def expect_tokenizer(source: Path, vocab_size: int) -> Path:
    """The tokenizer.json of a folder, or the file itself.

    Raises:
        ConfigError: there is no such file, or it has ids beyond vocab_size.
    """
    file = source / FILES[0] if source.is_dir() else source
    if not file.is_file():
        raise ConfigError(f"{source}: expected tokenizer.json or a folder with it, found none")
    _check_size(vocab_size, max(_vocabulary(file).values()) + 1, str(file))
    return file


def copy_tokenizer(file: Path, folder: Path) -> None:
    """Copy a tokenizer.json, and tokenizer_config.json if it lies beside it."""
    ids = _vocabulary(file)
    shutil.copyfile(file, folder / FILES[0])
    settings = file.with_name(FILES[1])
    if settings.is_file():
        shutil.copyfile(settings, folder / FILES[1])
    else:
        write_settings(folder, ids)


def _vocabulary(file: Path) -> dict[str, int]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        ids = {**content["model"]["vocab"], **{added["content"]: added["id"] for added in content["added_tokens"]}}
        if not ids or not all(type(i) is int for i in ids.values()):
            raise ValueError("no ids")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{file}: expected a tokenizer.json with a BPE vocabulary, found {e!r}") from e
    return ids


def _check_size(vocab_size: int, needed: int, what: str) -> None:
    if vocab_size < needed:
        raise ConfigError(
            f"vocab_size: expected at least {needed:,} for {what}, found {vocab_size:,}\nhint: raise vocab_size"
        )


def write_settings(folder: Path, vocab: dict[str, int]) -> None:
    settings: dict[str, Any] = {
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1048576,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    # A spelling that is not in the vocabulary would be given an id beyond the model's.
    settings |= {key: text for key, text in (("bos_token", BOS), ("eos_token", EOS)) if text in vocab}
    text = json.dumps(settings, ensure_ascii=False, indent=2, sort_keys=True)
    (folder / FILES[1]).write_text(text + "\n", encoding="utf-8")
