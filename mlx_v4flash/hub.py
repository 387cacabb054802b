"""From what the user calls a model to a folder on this machine."""

from __future__ import annotations

import errno
import re
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import cast

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import CheckpointError, HubError, RequestError

_WANTED = ["*.json", "*.safetensors", "tokenizer*", "experts.pack"]
_NOT_WANTED = ["*/*"]  # the official code, and weights for other programs

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)

# The root of the HTTP client's errors. Which client it is depends on the version of huggingface_hub.
_HTTPError = cast("type[Exception]", HfHubHTTPError.__bases__[0])

# What a download raises. Transfers in the hub's native module fail with RuntimeError.
FAILURES = (OSError, HFValidationError, RuntimeError, _HTTPError)


def nano_folder() -> Path:
    """The checkpoint in this package: a small trained model, see its README.md.

    Raises:
        CheckpointError: this copy of the package lacks its weights.
    """
    folder = Path(__file__).parent / "nano"
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(
            f"{folder}: expected the weights of the small model, model.safetensors, found none\n"
            "hint: install mlx-v4flash again, or name another model"
        )
    return folder


def is_repository(name: str) -> bool:
    """Whether a name is spelled OWNER/NAME."""
    return _REPOSITORY.fullmatch(name) is not None


def resolve(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint, downloaded if it is a Hugging Face repository.

    Downloads can be interrupted and go on where they stopped. Without a connection what was downloaded before is used.

    Args:
        model: an existing folder, or OWNER/NAME of a repository.
        revision: branch, tag or commit of the repository; `main` if absent.

    Raises:
        CheckpointError: a path that does not exist, or is a file.
        RequestError: a revision of a folder.
        HubError: the repository cannot be found, reached or stored.
    """
    path = Path(model).expanduser()
    if str(model) and path.is_dir():  # an empty name would be the folder we are in
        if revision is not None:
            raise RequestError(
                f"revision: expected none for a folder, found {revision!r} with {path}\n"
                "hint: leave it out, or name a Hugging Face repository"
            )
        return path
    if isinstance(model, Path) or path.exists() or not is_repository(model):
        found = "a file" if path.is_file() else "nothing there"
        raise CheckpointError(
            f"{model}: expected a checkpoint folder, found {found}\n"
            "hint: check the path, or name a Hugging Face repository such as deepseek-ai/DeepSeek-V4-Flash"
        )
    folder = _download(model, revision)
    print(f"{model} at revision {folder.name}", file=sys.stderr)
    return folder


def _download(model: str, revision: str | None) -> Path:
    try:
        _check_space(model, revision)
        return Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, allow_patterns=_WANTED, ignore_patterns=_NOT_WANTED
            )
        )
    except FAILURES as e:
        raise HubError(explain(model, revision, e)) from e


def explain(model: str, revision: str | None, error: Exception) -> str:
    """One sentence on what failed in a download, and a hint."""
    if isinstance(error, GatedRepoError):
        return f"{model}: access has to be granted\nhint: ask for it on the model's page, then run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{model}: neither a folder here nor a repository on Hugging Face that you may read\n"
            "hint: check the spelling; for a private repository run `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{model}: no revision {revision!r}\nhint: use a branch, tag or commit of that repository"
    if isinstance(error, LocalEntryNotFoundError):
        if getattr(error, "snapshot_path", None):
            return f"{model}: only part of it was downloaded before, and Hugging Face cannot be reached\n{_CONNECT}"
        return f"{model}: never downloaded before, and Hugging Face cannot be reached\n{_CONNECT}"
    if isinstance(error, HFValidationError):
        return f"{model}: not a valid name of a repository\nhint: expected OWNER/NAME"
    if getattr(error, "errno", None) == errno.ENOSPC:
        return f"{model}: the disk of {constants.HF_HUB_CACHE} is full\n{_SPACE}"
    if isinstance(error, HfHubHTTPError):
        return f"{model}: Hugging Face answered {error.response.status_code}\nhint: try again later"
    what = str(error).strip().split("\n")[0] or type(error).__name__
    return f"{model}: the download failed: {what}\nhint: run the command again; what was downloaded is kept"


_CONNECT = "hint: connect to the internet and unset HF_HUB_OFFLINE, or pass a folder"
_SPACE = "hint: free some space, or set HF_HOME to a folder on another disk"


def _check_space(model: str, revision: str | None) -> None:
    """Refuse a download that cannot fit; anything else that is wrong is left to the download."""
    try:
        info = huggingface_hub.HfApi().model_info(model, revision=revision, files_metadata=True)
    except (OSError, _HTTPError):
        return
    blobs = Path(constants.HF_HUB_CACHE, f"models--{model.replace('/', '--')}", "blobs")
    needed = 0
    for file in info.siblings or []:
        name = file.rfilename
        if any(fnmatch(name, p) for p in _WANTED) and not any(fnmatch(name, p) for p in _NOT_WANTED):
            blob = file.lfs.sha256 if file.lfs else file.blob_id
            needed += 0 if blob and (blobs / blob).exists() else file.size or 0
    needed -= sum(p.stat().st_size for p in blobs.glob("*.incomplete"))
    free = shutil.disk_usage(next(p for p in (blobs, *blobs.absolute().parents) if p.exists())).free
    if needed > free:
        raise HubError(
            f"{model}: expected {needed / 1e9:.1f} GB of free space for {constants.HF_HUB_CACHE}, "
            f"found {free / 1e9:.1f} GB\n{_SPACE}"
        )
