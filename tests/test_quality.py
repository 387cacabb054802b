"""Divergence and perplexity are what numpy computes; interruptions change nothing; what does not fit is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner, Result

from mlx_v4flash import load, quality, reference
from mlx_v4flash.checkpoint import Checkpoint
from mlx_v4flash.cli import main
from mlx_v4flash.errors import NumericsError
from mlx_v4flash.passage import Passage
from mlx_v4flash.quality_report import Report
from mlx_v4flash.reference import Reference
from mlx_v4flash.tiny import TINY, write_tiny

SMALL = {**TINY, "num_hidden_layers": 1, "num_hash_layers": 0, "compress_ratios": [4]}
TOKENS, CONTEXT, CHUNK = 211, 140, 45
SIZES = ("--tokens", TOKENS, "--context", CONTEXT, "--prefill-chunk", CHUNK)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("quality")
    other = write_tiny(folder / "other", SMALL)
    judged = shutil.copytree(other, folder / "judged")
    head = Checkpoint.open(judged).tensors["head.weight"]
    data = bytearray(head.path.read_bytes())
    codes = np.frombuffer(data, np.uint16, head.nbytes // 2, head.offset)
    codes ^= np.random.default_rng(0).integers(0, 128, codes.shape).astype(np.uint16)  # all but sign and exponent
    head.path.write_bytes(data)
    return judged, other


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{n} squared is {n * n}, é. " for n in range(40)), encoding="utf-8")
    return path


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=False)


def compare(model: Path, against: Path, text: Path, *args: object) -> dict[str, Any]:
    result = run("quality", model, "--against", against, "--text", text, "--json", *args)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def compared(models: tuple[Path, Path], text: Path) -> dict[str, Any]:
    return compare(*models, text, *SIZES)


def refused(model: Path, against: Path, text: Path, *args: object) -> str:
    result = run("quality", model, "--against", against, "--text", text, *args)
    assert result.exit_code == 1
    return result.stderr


def brute_force(folder: Path, text: Path, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [tokens, V] in float64 and the tokens, each context in one forward pass."""
    model, tokenizer = load(folder, **options)
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False)[:TOKENS]
    parts = []
    for first in range(0, TOKENS, CONTEXT):
        inputs = [tokenizer.bos_token_id, *ids[first : first + CONTEXT]][: len(ids[first : first + CONTEXT])]
        parts.append(np.array(model(mx.array([inputs]))[0]).astype(np.float64))
    x = np.concatenate(parts)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True)), np.array(ids)


def test_figures_are_those_of_numpy(models: tuple[Path, Path], text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "_ROWS", 20)
    found = compare(*models, text, *SIZES, "--dtype", "float32", "--no-cache-quant")
    exact = {"dtype": "float32", "simulate_cache_quant": False}
    (p, ids), (q, _) = brute_force(models[1], text, **exact), brute_force(models[0], text, **exact)
    divergence = (np.exp(p) * (p - q)).sum(axis=1)
    same = p.argmax(axis=1) == q.argmax(axis=1)
    depth = np.arange(TOKENS) % CONTEXT
    assert [(d["first"], d["last"]) for d in found["depths"]] == [(1, 128), (129, CONTEXT)]
    for figures in [found["all"], *found["depths"]]:
        here = (depth >= figures["first"] - 1) & (depth < figures["last"])
        rows = np.flatnonzero(here)
        want = {
            "tokens": len(rows),
            "kld": divergence[here].mean(),
            "kld_p99": np.percentile(divergence[here], 99),
            "kld_max": divergence[here].max(),
            "kld_error": divergence[here].std(ddof=1) / len(rows) ** 0.5,
            "same_top": same[here].mean(),
            "perplexity": np.exp(-q[rows, ids[rows]].mean()),
            "reference_perplexity": np.exp(-p[rows, ids[rows]].mean()),
        }
        for name, value in want.items():
            np.testing.assert_allclose(figures[name], value, rtol=3e-4, err_msg=name)
    assert 0 < found["all"]["same_top"] < 1 and found["model_bytes"] > 100_000


def test_a_model_equals_itself(models: tuple[Path, Path], text: Path) -> None:
    found = compare(models[0], models[0], text, *SIZES)
    assert found["all"]["same_top"] == 1 and found["all"]["kld_max"] < 1e-7
    assert found["all"]["perplexity"] == pytest.approx(found["all"]["reference_perplexity"], rel=1e-6)


def test_text_shorter_than_a_chunk(models: tuple[Path, Path], tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Hi", encoding="utf-8")
    found = compare(*models, short)
    assert (found["tokens"], found["context"], found["chunk"]) == (2, 4096, 2048)
    assert [(d["first"], d["last"], d["tokens"]) for d in found["depths"]] == [(1, 2, 2)]
    assert "1 - 2" in run("quality", models[0], "--against", models[1], "--text", short).stdout


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("spread", [0.5, 20.0])
def test_rounding_is_within_what_the_docs_promise(rows: int, spread: float) -> None:
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, 999)).astype(np.float32) * spread
    y = (x + rng.normal(size=x.shape) * 0.1).astype(np.float32)
    targets = rng.integers(0, 999, rows)
    stored = reference.encode(x, targets)
    p, q = (v - np.log(np.exp(v).sum(1, keepdims=True)) for v in (x.astype(np.float64), y.astype(np.float64)))
    half = (p.max(axis=1) - p.min(axis=1)) / 131070
    raw = stored["low"][:, None] + stored["step"][:, None] * stored["codes"].astype(np.float64)
    assert (np.abs(raw - p).max(axis=1) <= half * 1.02).all()
    np.testing.assert_allclose(np.exp(reference.decode(stored)).sum(axis=1), 1, rtol=1e-12)
    kld = (np.exp(p) * (p - q)).sum(axis=1)
    found = quality._scores(stored, y, targets)["divergence"]
    bound = half**2 / 2 + np.expm1(2 * half) * (kld + np.sqrt(2 * kld))
    assert (np.abs(found - kld) <= bound).all()
    np.testing.assert_allclose(stored["chosen"], p[np.arange(rows), targets], rtol=1e-6)


class Stop(BaseException):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int) -> None:
    real, left = getattr(owner, name), [calls]

    def stopping(*args: Any, **options: Any) -> Any:
        if not left[0]:
            raise Stop
        left[0] -= 1
        return real(*args, **options)

    monkeypatch.setattr(owner, name, stopping)


@pytest.mark.parametrize("where", ["reference", "half-a-block", "scores", "end"])
def test_interrupted_and_continued_is_identical(
    models: tuple[Path, Path],
    text: Path,
    compared: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    output = tmp_path / "found.json"
    args = ("quality", models[0], "--against", models[1], "--text", text, *SIZES, "--output", output)
    owner, name, calls = {
        "reference": (Reference, "append", 5),
        "half-a-block": (reference, "write_all", 3),
        "scores": (quality.Journal, "finish", 5),
        "end": (quality, "write_file", 0),
    }[where]
    with monkeypatch.context() as patch:
        stop_after(patch, owner, name, calls)
        with pytest.raises(Stop):
            run(*args)
    assert not output.exists()
    forward = [0]
    with monkeypatch.context() as patch:
        inputs = quality.Text.inputs

        def counted(*args: Any) -> mx.array:
            forward[0] += 1
            return inputs(*args)

        patch.setattr(quality.Text, "inputs", counted)
        assert run(*args).exit_code == 0
    chunks = len(Passage(TOKENS, CONTEXT, CHUNK).spans)
    # Both models once without an interruption; what was done is done again from the start of its context alone.
    assert (
        forward[0] == {"reference": 2 * chunks - 4, "half-a-block": 2 * chunks, "scores": chunks - 4, "end": 0}[where]
    )
    assert json.loads(output.read_text()) == compared
    assert [p.name for p in tmp_path.iterdir()] == ["found.json"]


def test_a_kept_reference_serves_several_models(
    models: tuple[Path, Path],
    text: Path,
    compared: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = tmp_path / "other.reference"
    assert compare(*models, text, *SIZES, "--save-reference", kept) == compared
    assert kept.stat().st_size == pytest.approx(TOKENS * (16 + 2 * SMALL["vocab_size"]), rel=0.01)
    monkeypatch.setattr(quality, "_fill", None)
    assert compare(models[0], kept, text) == compared
    assert compare(*models, text, *SIZES, "--save-reference", kept) == compared
    assert compare(models[1], kept, text)["all"]["same_top"] == 1


def test_references_that_do_not_fit_are_refused(models: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    compare(*models, text, *SIZES, "--save-reference", kept)
    other = tmp_path / "other.txt"
    other.write_text("x" * 400, encoding="utf-8")
    assert f"expected the {TOKENS} tokens of the reference, found {TOKENS} others" in refused(models[0], kept, other)
    assert f"tokens: expected {TOKENS} as in" in refused(models[0], kept, text, "--tokens", 5)
    assert "save_reference: expected none" in refused(models[0], kept, text, "--save-reference", tmp_path / "x")
    assert "found another ids_crc32" in refused(*models, other, *SIZES, "--save-reference", kept)
    good = kept.read_bytes()
    kept.write_bytes(good[: len(good) // 2] + b"\xff" + good[len(good) // 2 + 1 :])
    assert "its checksum differs" in refused(models[0], kept, text)
    kept.write_bytes(good[:-1])
    assert "it continues" in refused(models[0], kept, text)
    kept.write_bytes(good.replace(b'"version": 1', b'"version": 2', 1))
    assert "version 1, found" in refused(models[0], kept, text)
    assert "expected a file that quality --save-reference wrote" in refused(models[0], text, text)


def test_a_full_disk_is_explained(
    models: tuple[Path, Path], text: Path, compared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, real = [90_000], os.write

    def write(file: int, data: Any) -> int:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data)

    options = (*SIZES, "--save-reference", tmp_path / "kept", "--output", tmp_path / "found.json")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        assert "No space left on device\nhint: check the space" in refused(*models, text, *options)
    assert compare(*models, text, *options) == compared
    message = refused(*models, text, "--save-reference", tmp_path / "nowhere" / "kept")
    assert "nowhere/kept.part: No such file or directory" in message


def test_other_vocabularies_and_tokenizers_are_refused(models: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    larger = write_tiny(tmp_path / "larger", {**SMALL, "vocab_size": 300})
    assert "expected a vocabulary of 272" in refused(larger, models[1], text)
    other = shutil.copytree(models[0], tmp_path / "tokenizer")
    values = json.loads((other / "tokenizer.json").read_text())
    vocab = values["model"]["vocab"]
    vocab["a"], vocab["s"] = vocab["s"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(values))
    output = tmp_path / "found.json"
    message = refused(other, models[1], text, *SIZES, "--output", output)
    assert "the text or the tokenizer is another one" in message
    assert not list(tmp_path.glob("found*"))


def test_another_model_does_not_continue_a_comparison(
    models: tuple[Path, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "found.json"
    with monkeypatch.context() as patch:
        stop_after(patch, quality.Journal, "finish", 3)
        with pytest.raises(Stop):
            compare(*models, text, *SIZES, "--output", output)
    assert "expected a comparison of the same models" in refused(models[1], models[1], text, *SIZES, "--output", output)
    with monkeypatch.context() as patch:
        looked_at = models[0] / ".DS_Store"
        looked_at.write_bytes(b"Finder")
        stop_after(patch, quality.Journal, "finish", 1)
        with pytest.raises(Stop):  # it goes on
            compare(*models, text, *SIZES, "--output", output)
        looked_at.unlink()
    message = refused(*models, text, *SIZES, "--output", output, "--dtype", "float32")
    assert "expected a reference of the same model and text, found another loading" in message


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", (), "expected at least one token"),
        (b"\xff\xfe", (), "expected text in UTF-8"),
        (b"text", ("--tokens", 0), "tokens: expected 1 or more, found 0"),
        (b"text", ("--prefill-chunk", -1), "prefill_chunk: expected 1 or more"),
        (b"x" * 99, ("--context", 70000, "--output", "nowhere/x.json"), "existing folder"),
    ],
    ids=["empty", "binary", "tokens", "chunk", "folder"],
)
def test_bad_input(
    models: tuple[Path, Path], tmp_path: Path, content: bytes, options: tuple[object, ...], message: str
) -> None:
    (tmp_path / "text").write_bytes(content)
    assert message in refused(*models, tmp_path / "text", *options)


def test_context_and_disk_are_checked_first(
    models: tuple[Path, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "_fill", None)
    with monkeypatch.context() as patch:
        patch.setattr(quality.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
        assert "GB of free space" in refused(*models, text, *SIZES)
    short = write_tiny(tmp_path / "short", {**SMALL, "max_position_embeddings": 128})
    assert "context: expected at most 128" in refused(short, models[1], text, *SIZES)


@pytest.mark.parametrize("broken", [0, 1], ids=["model", "reference"])
def test_not_a_number_is_refused(
    models: tuple[Path, Path], text: Path, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    real = quality.Run.load

    def load(name: str, **options: Any) -> Any:
        run = real(name, **options)
        if Path(name) == models[broken]:
            run.model.head.weight[3, 5] = mx.nan
        return run

    monkeypatch.setattr(quality.Run, "load", load)
    with pytest.raises(NumericsError, match="logits of tokens 0 to 44: expected finite values"):
        quality.compare(
            *map(str, models), text, tokens=TOKENS, context=CONTEXT, prefill_chunk=CHUNK, progresses=silent, **LOADING
        )


LOADING = {"dtype": "bfloat16", "cache_quant": True, "activation_quant": False}


def test_progress_counts_both_models(models: tuple[Path, Path], text: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}

    class Noting(silent):
        def __enter__(self) -> Any:
            calls = seen.setdefault(self.what, [])
            return lambda done, total: calls.append((done, total))

    quality.compare(*map(str, models), text, tokens=50, prefill_chunk=20, progresses=Noting, **LOADING)
    assert seen == {
        f"reference {models[1]}": [(20, 50), (40, 50), (50, 50)],
        f"judging {models[0]}": [(20, 50), (40, 50), (50, 50)],
    }


class silent:
    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> Any:
        return lambda done, total: None

    def __exit__(self, *error: object) -> None:
        pass


def test_plot(models: tuple[Path, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [tmp_path / f"{n}.json" for n in range(2)]
    for model, output in zip(models, results, strict=True):
        compare(model, models[1], text, "--tokens", 20, "--output", output)
    assert Report.read(results[1]).all.kld < 1e-6
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "matplotlib.figure", None)
        result = run("quality-plot", *results, "--output", tmp_path / "plot.png")
        assert result.exit_code == 1 and "pip install 'mlx-v4flash[plot]'" in result.stderr
    pytest.importorskip("matplotlib", reason="NOT CHECKED, PLOT: install the extra `test`")
    assert run("quality-plot", *results, "--output", tmp_path / "plot.png").exit_code == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "cannot be written" in run("quality-plot", *results, "--output", tmp_path / "plot.unknown").stderr
    compare(*models, text, "--tokens", 10, "--output", results[0])
    assert (
        "expected comparisons with one model over one text"
        in run("quality-plot", *results, "--output", tmp_path / "plot.png").stderr
    )
    results[0].write_text("{}")
    assert (
        "expected a file that quality --output wrote"
        in run("quality-plot", results[0], "--output", tmp_path / "plot.png").stderr
    )


def test_only_one_model_is_in_memory(models: tuple[Path, Path], text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    alive: list[weakref.ref[Any]] = []
    real = quality.Run.load

    def load(name: str, **options: Any) -> Any:
        assert all(model() is None for model in alive)
        run = real(name, **options)
        alive.append(weakref.ref(run.model))
        return run

    monkeypatch.setattr(quality.Run, "load", load)
    compare(*models, text, *SIZES)
    assert len(alive) == 2
