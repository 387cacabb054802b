"""Conversion that knows a text: what it gains, that it survives interruptions, and experts nobody chooses."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_v4flash import convert as conversion
from mlx_v4flash import journal, load_model
from mlx_v4flash.calibrate import Calibrated, read_text
from mlx_v4flash.cli import main
from mlx_v4flash.converted import INDEX, JOURNAL, Converted
from mlx_v4flash.errors import ConvertError
from mlx_v4flash.formats import format_of, matrices
from mlx_v4flash.linear import Observed
from mlx_v4flash.model import Model
from mlx_v4flash.recipe import CLASSES, Recipe
from mlx_v4flash.rounding import STATE, Rounding
from mlx_v4flash.routed_tokens import RARE, Gram
from mlx_v4flash.tiny import TINY, write_tiny

SMALL = {
    **TINY, "num_hidden_layers": 2, "compress_ratios": [0, 4], "n_routed_experts": 4, "num_hash_layers": 1,
    "num_experts_per_tok": 2, "num_attention_heads": 2,
}  # fmt: skip
THREE = Recipe("three", classes={kind: "affine3-g64" for kind in CLASSES if kind != "embedding"})
FEW = Recipe(
    "few", classes={"routed_w2": "affine2-g128", "attention_q": "mxfp4", "shared": "bf16", "head": "affine4-g128"}
)
# Letters by chance: a random model has no use for words, and the same ones again would say nothing new.
TEXT = "".join(random.Random(0).choices(string.ascii_letters + string.digits, k=1400))
TOKENS = 1200


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("calibrate") / "source", SMALL)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibrate") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def finished(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(source, tmp_path_factory.mktemp("calibrate") / "target", text).folder


@pytest.fixture(scope="module")
def three(source: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(source, tmp_path_factory.mktemp("calibrate") / "target", text, THREE, TOKENS).folder


def convert(source: Path, target: Path, text: Path, recipe: Recipe = FEW, tokens: int = 200) -> Converted:
    opened = conversion.open_source(source, target)
    rounding = Calibrated(opened, target, recipe, read_text(opened, text, tokens))
    return conversion.convert(opened, target, rounding=rounding)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_logits_are_nearer_than_those_of_plain_rounding(source: Path, three: Path, text: Path, tmp_path: Path) -> None:
    opened = conversion.open_source(source, tmp_path / "plain")
    conversion.convert(opened, tmp_path / "plain", rounding=Rounding(opened.checkpoint.config, THREE))
    ids = mx.array(read_text(opened, text, len(TEXT)))[:, TOKENS:]
    want, plain, told = (np.array(load_model(f, dtype="float32")(ids)) for f in (source, tmp_path / "plain", three))
    assert Converted.open(three).nbytes == Converted.open(tmp_path / "plain").nbytes
    assert np.square(told - want).mean() < 0.6 * np.square(plain - want).mean()
    Converted.open(three).verify()
    assert not (three / STATE).exists()
    assert {str(format_of(m)) for p, m in matrices(load_model(three)) if p != "embed"} == {"affine3-g64"}


@pytest.mark.parametrize("nbytes", [2_000, 300_000, 600_000, 800_000])
def test_interrupted_anywhere_gives_the_same_bytes(
    source: Path, finished: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int
) -> None:
    real, left = os.write, [nbytes]

    def write(file: int, data: Any) -> int:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = real(file, data[: left[0]])
        left[0] -= count
        return count

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, "write", write)
        with pytest.raises(ConvertError, match="it continues"):
            convert(source, tmp_path / "t", text)
    assert (tmp_path / "t" / JOURNAL).exists()
    convert(source, tmp_path / "t", text)
    assert contents(tmp_path / "t") == contents(finished)


def test_streams_between_layers_are_those_of_the_converted_model(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer is calibrated with what the model that comes out will really give it."""
    kept = {}
    real = Calibrated.end_experts

    def end(self: Calibrated, module: str) -> dict[str, Any]:
        found = real(self, module)
        number = int(module.split(".")[1]) + 1
        kept[number] = list(self._streams(number))
        return found

    monkeypatch.setattr(Calibrated, "end_experts", end)
    converted = convert(source, tmp_path / "t", text)
    model = load_model(converted.folder, dtype="float32")
    ids = read_text(conversion.open_source(source, tmp_path / "x"), text, 200)
    cache = model.make_cache()
    rotations, x = model.rotations(cache, len(ids[0])), model.streams(mx.array(ids[:1]))
    for number, layer in enumerate(model.layers):
        x = layer(x, mx.array(ids[:1]), cache[number], rotations)
        found = kept[number + 1][0]
        np.testing.assert_allclose(np.array(found), np.array(x), atol=2e-3 * np.abs(np.array(x)).max())


def test_from_hub_shard_by_shard(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tiny(tmp_path / "s", SMALL, shard_bytes=100_000)
    want = contents(convert(source, tmp_path / "want", text).folder)
    names, most = sorted(p.name for p in source.iterdir()), 0

    def download(repository: str, file: str, revision: str, local_dir: Path) -> str:
        nonlocal most
        local_dir.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / file, local_dir / file)
        most = max(most, len(list(local_dir.glob("*.safetensors"))))
        return str(local_dir / file)

    info = SimpleNamespace(sha="c0ffee", siblings=[SimpleNamespace(rfilename=n) for n in names])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=lambda *a, **k: info))
    target = tmp_path / "t"
    opened = conversion.open_source("a/b", target, from_hub=True)
    found = conversion.convert(opened, target, rounding=Calibrated(opened, target, FEW, read_text(opened, text, 200)))
    assert {n: b for n, b in contents(found.folder).items() if n != INDEX} == {
        n: b for n, b in want.items() if n != INDEX
    }
    assert most <= 2 < len(list(source.glob("*.safetensors")))


def test_lost_state_is_named(source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Calibrated, unit: str, arrays: Any) -> Any:
        if unit == "dense-layers.1":
            raise OSError(errno.EIO, "stopped")
        return real(self, unit, arrays)

    real = Calibrated.dense
    with monkeypatch.context() as patch:
        patch.setattr(Calibrated, "dense", stop)
        with pytest.raises(ConvertError):
            convert(source, tmp_path / "t", text)
    state = tmp_path / "t" / STATE / "streams-1"
    state.write_bytes(state.read_bytes()[:-4])
    with pytest.raises(ConvertError, match=r"expected what entered layer 1 .*found another size\nhint: remove"):
        convert(source, tmp_path / "t", text)
    state.unlink()
    with pytest.raises(ConvertError, match="found nothing"):
        convert(source, tmp_path / "t", text)


def test_experts_seen_too_rarely_are_rounded_plainly_and_counted(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("abcdefghijklmnopqrstuvwxyz0123")
    converted = convert(source, tmp_path / "t", text)
    rare = json.loads((converted.folder / INDEX).read_text())["rare_experts"]
    assert set(rare) == {"layers.0.ffn.experts", "layers.1.ffn.experts"} and sum(rare.values()) >= 2
    # 30 tokens choose 2 of 4 experts: 15 each, so not all can reach 16.
    assert RARE == 16
    run = CliRunner().invoke(
        main, ["convert", str(source), str(tmp_path / "u"), "--recipe", "128gb", "--calibrate", str(text)]
    )
    assert run.exit_code == 0 and f"{sum(rare.values())} of 8 experts" in run.stderr, run.stderr


def test_calibration_without_a_recipe_is_refused(source: Path, text: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "t"), "--calibrate", str(text)])
    assert run.exit_code == 2 and "expected a --recipe" in run.stderr


def test_texts_that_say_nothing_are_refused(source: Path, tmp_path: Path) -> None:
    opened = conversion.open_source(source, tmp_path / "t")
    (tmp_path / "a").write_text("short")
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    for name, message in (("a", "found 5 tokens"), ("b", "expected a text in UTF-8")):
        with pytest.raises(ConvertError, match=message):
            read_text(opened, tmp_path / name, 400)


def test_observed_layers_compute_the_same(source: Path) -> None:
    model: Model = load_model(source, dtype="float32")
    ids = mx.arange(3, 40)[None]
    want, grams = np.array(model(ids)), {}
    for name in ("wqkv_a", "wq_b", "wo_a", "wo_b", "wcompress"):
        grams[name] = Gram()
        setattr(model.layers[1].attn, name, Observed(model.layers[1].attn[name], grams[name].add))
    np.testing.assert_array_equal(np.array(model(ids)), want)
    c = model.config
    shapes = {name: gram.sums.shape for name, gram in grams.items()}
    D, inner, U = c.hidden_size, c.o_groups * c.o_lora_rank, c.num_attention_heads * c.head_dim // c.o_groups
    assert shapes == {
        "wqkv_a": (D, D), "wq_b": (c.q_lora_rank,) * 2, "wo_a": (c.o_groups, U, U), "wo_b": (inner, inner),
        "wcompress": (D, D),
    }  # fmt: skip
    assert all(gram.count == 37 for gram in grams.values())
    np.testing.assert_array_equal(grams["wqkv_a"].sums, grams["wcompress"].sums)
