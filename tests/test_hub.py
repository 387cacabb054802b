"""What the user calls a model -> a folder, with the network replaced."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from mlx_v4flash import hub
from mlx_v4flash.errors import CheckpointError, HubError, RequestError, V4FlashError
from mlx_v4flash.hub import resolve

NAME = "deepseek-ai/DeepSeek-V4-Flash"
COMMIT = "60d8d70770c6776ff598c94bb586a859a38244f1"


class Hub:
    """Stands in for Hugging Face; `files` are size and hash by name."""

    def __init__(self, root: Path) -> None:
        self.cache = root / "hub"
        self.folder = self.cache / "models--deepseek-ai--DeepSeek-V4-Flash"
        self.files: dict[str, tuple[int, str]] = {"config.json": (1700, "c1"), "model.safetensors": (5000, "w1")}
        self.error: BaseException | None = None
        self.downloads: list[tuple[str, dict[str, Any]]] = []
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(self, name: str, **options: Any) -> str:
        self.downloads.append((name, options))
        if self.error is not None:
            raise self.error
        snapshot = self.folder / "snapshots" / COMMIT
        snapshot.mkdir(parents=True, exist_ok=True)
        return str(snapshot)

    def model_info(self, name: str, **options: Any) -> SimpleNamespace:
        self.asked.append((name, options))
        if self.error is not None:
            raise self.error
        siblings = [
            SimpleNamespace(
                rfilename=n, size=size, blob_id=blob, lfs=SimpleNamespace(sha256=blob) if size > 2000 else None
            )
            for n, (size, blob) in self.files.items()
        ]
        return SimpleNamespace(siblings=siblings)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(fake.cache))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=fake.model_info))
    return fake


def answer(kind: Callable[..., HfHubHTTPError], status: int = 404) -> HfHubHTTPError:
    response: Any = SimpleNamespace(headers={}, request=None, status_code=status)
    return kind("what the server said\nin many lines", response=response)


def expect_refused(error: type[V4FlashError], model: str | Path, revision: str | None = None) -> str:
    with pytest.raises(error) as caught:
        resolve(model, revision)
    text = str(caught.value)
    first, hint = text.split("\n")
    assert first.startswith(f"{model}: ") or error is RequestError
    assert hint.startswith("hint: ")
    return text


# --- folders --------------------------------------------------------------------------------------


def test_folder_is_itself(fake: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some" / "model").mkdir(parents=True)
    assert resolve(tmp_path / "some" / "model") == tmp_path / "some" / "model"
    # Also where it could be the name of a repository.
    assert resolve("some/model") == Path("some/model")
    assert not fake.downloads
    assert not fake.asked
    assert capsys.readouterr() == ("", "")


def test_home_is_expanded(fake: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model") == tmp_path / "model"


def test_revision_of_a_folder(fake: Hub, tmp_path: Path) -> None:
    text = expect_refused(RequestError, tmp_path, "main")
    assert text.startswith(f"revision: expected none for a folder, found 'main' with {tmp_path}\n")


PATHS = [
    "model",
    "./some/model",
    "../some/model",
    "/some/model",
    "~/some/model",
    "some/model/",
    "a/b/c",
    "a\\b",
    "some/",
]


@pytest.mark.parametrize("model", [*PATHS, "", ".some/model", "some model/x", Path("some/model")], ids=repr)
def test_path_without_anything(fake: Hub, model: str | Path) -> None:
    assert "expected a checkpoint folder, found nothing there\n" in expect_refused(CheckpointError, model)
    assert not fake.downloads, "a path must not be looked for on the network"
    assert not fake.asked


def test_path_of_a_file(fake: Hub, tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "model.gguf").write_text("")
    assert "expected a checkpoint folder, found a file\n" in expect_refused(CheckpointError, "some/model.gguf")
    assert not fake.downloads


# --- repositories ---------------------------------------------------------------------------------


def test_download(fake: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    folder = resolve(NAME)
    assert folder == fake.folder / "snapshots" / COMMIT
    assert capsys.readouterr() == ("", f"{NAME} at revision {COMMIT}\n")
    ((name, options),) = fake.downloads
    assert (name, options["revision"]) == (NAME, None)
    assert fake.asked == [(NAME, {"revision": None, "files_metadata": True})]


def test_revision_is_passed_on(fake: Hub) -> None:
    resolve(NAME, "release")
    assert fake.downloads[0][1]["revision"] == fake.asked[0][1]["revision"] == "release"


def test_what_is_downloaded(fake: Hub) -> None:
    """By the rules of the hub's own filter."""
    resolve(NAME)
    options = fake.downloads[0][1]
    wanted = ["config.json", "generation_config.json", "model-00001-of-00046.safetensors",
              "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"]  # fmt: skip
    others = [
        "README.md",
        "inference/model.py",
        "inference/config.json",
        "encoding/tokenizer.json",
        "x.gguf",
        "pytorch.bin",
    ]
    patterns = {key: options[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(huggingface_hub.utils.filter_repo_objects(wanted + others, **patterns)) == wanted


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (answer(GatedRepoError, 403), "access has to be granted\nhint: ask for it on the model's page"),
        (answer(RepositoryNotFoundError), "neither a folder here nor a repository on Hugging Face that you may read\n"),
        (answer(RevisionNotFoundError), "no revision 'v9'\nhint: use a branch, tag or commit"),
        (answer(HfHubHTTPError, 503), "Hugging Face answered 503\n"),
        (LocalEntryNotFoundError("long\ntext"), "never downloaded before, and Hugging Face cannot be reached\n"),
        (HFValidationError("x"), "not a valid name of a repository\n"),
        (OfflineModeIsEnabled("offline"), "the download failed: offline\n"),
        (OSError(errno.ENOSPC, "No space left on device"), "is full\nhint: free some space"),
        (PermissionError(13, "Permission denied"), "the download failed: [Errno 13] Permission denied\n"),
        (RuntimeError("Data processing error: x\nbacktrace"), "the download failed: Data processing error: x\n"),
        (HfHubHTTPError.__bases__[0]("peer closed"), "the download failed: peer closed\nhint: run the command again"),
    ],
    ids=["gated", "not found", "no revision", "server", "offline", "bad name", "offline mode", "disk full",
         "permission", "native", "connection"],
)  # fmt: skip
def test_failures_are_one_sentence(fake: Hub, error: Exception, named: str) -> None:
    fake.error = error
    assert named in expect_refused(HubError, NAME, "v9")


def test_partly_downloaded_and_offline(fake: Hub) -> None:
    fake.error = LocalEntryNotFoundError("x")
    fake.error.snapshot_path = "/somewhere"  # type: ignore[attr-defined]  # as IncompleteSnapshotError, of newer versions
    assert "only part of it was downloaded before" in expect_refused(HubError, NAME)


def test_a_mistake_of_ours_is_not_hidden(fake: Hub) -> None:
    fake.error = TypeError("unexpected argument")
    with pytest.raises(TypeError):
        resolve(NAME)


def test_interruption_passes(fake: Hub) -> None:
    fake.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        resolve(NAME)


# --- without a connection, with the hub's own code ------------------------------------------------


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The real huggingface_hub with HF_HUB_OFFLINE=1; returns where its cache keeps the repository."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "models--deepseek-ai--DeepSeek-V4-Flash"


def test_offline_uses_what_was_downloaded(offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (offline / "snapshots" / COMMIT).mkdir(parents=True)
    (offline / "snapshots" / COMMIT / "config.json").write_text("{}")
    (offline / "refs").mkdir()
    (offline / "refs" / "main").write_text(COMMIT)
    assert resolve(NAME) == offline / "snapshots" / COMMIT
    assert resolve(NAME, COMMIT) == offline / "snapshots" / COMMIT
    assert capsys.readouterr().err.count(f"{NAME} at revision {COMMIT}\n") == 2
    assert "never downloaded before" in expect_refused(HubError, NAME, "other")


def test_offline_without_a_download(offline: Path) -> None:
    text = expect_refused(HubError, NAME)
    assert text.endswith(
        "and Hugging Face cannot be reached\nhint: connect to the internet and unset HF_HUB_OFFLINE, or pass a folder"
    )


# --- space ----------------------------------------------------------------------------------------


@pytest.fixture
def disk(fake: Hub, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    usage = SimpleNamespace(free=6699)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage if Path(path).exists() else None)
    return usage


def test_too_little_space(fake: Hub, disk: SimpleNamespace) -> None:
    fake.files |= {"README.md": (10**12, "r1"), "original/model.safetensors": (10**12, "o1")}
    assert expect_refused(HubError, NAME).startswith(
        f"{NAME}: expected 0.0 GB of free space for {fake.cache}, found 0.0 GB\n"
    )
    assert not fake.downloads
    disk.free += 1
    resolve(NAME)
    assert len(fake.downloads) == 1


def test_what_is_there_needs_no_space(fake: Hub, disk: SimpleNamespace) -> None:
    """A download that was interrupted can go on where a new one would not fit."""
    blobs = fake.folder / "blobs"
    blobs.mkdir(parents=True)
    disk.free = 100
    (blobs / "c1").write_bytes(b"")
    (blobs / "w1.incomplete").write_bytes(bytes(4899))
    assert "of free space" in expect_refused(HubError, NAME)
    (blobs / "w1.incomplete").write_bytes(bytes(4900))
    resolve(NAME)
    (blobs / "w1.incomplete").rename(blobs / "w1")
    disk.free = 0
    resolve(NAME)
    assert len(fake.downloads) == 2


def test_unknown_sizes_do_not_matter(fake: Hub, disk: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename="config.json", size=None, blob_id=None, lfs=None)])
    monkeypatch.setattr(fake, "model_info", lambda *_, **__: info)
    resolve(NAME)
    info.siblings = None
    resolve(NAME)
    assert len(fake.downloads) == 2
