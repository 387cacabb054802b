"""Recipes: which formats they give, what they weigh, and models that compute with them."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_v4flash import convert as conversion
from mlx_v4flash import load_model
from mlx_v4flash.cli import main
from mlx_v4flash.config import ModelConfig
from mlx_v4flash.converted import INDEX, Converted
from mlx_v4flash.errors import CheckpointError, ConvertError
from mlx_v4flash.experts.attach import open_source
from mlx_v4flash.formats import Format, adapt, format_of, matrices
from mlx_v4flash.plan import make_plan, sizes_of
from mlx_v4flash.quantize import decode
from mlx_v4flash.recipe import CLASSES, RECIPES, Recipe, read_recipe
from mlx_v4flash.recipe_sizes import GPU_SHARE, listing, real_sizes
from mlx_v4flash.rounding import Rounding
from mlx_v4flash.tiny import REAL, TINY, write_tiny

SMALL = {**TINY, "num_hidden_layers": 2, "compress_ratios": [0, 4], "n_routed_experts": 4, "num_hash_layers": 1}
FORMATS = ["bf16", "mxfp8", "mxfp4", "nvfp4", *(f"affine{b}-g{g}" for b, g in
           ((2, 64), (2, 128), (3, 32), (4, 64), (5, 32), (6, 128), (8, 64)))]  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("recipes") / "source", SMALL)


def convert(source: Path, target: Path, recipe: Recipe) -> Converted:
    opened = conversion.open_source(source, target)
    return conversion.convert(opened, target, rounding=Rounding(opened.checkpoint.config, recipe))


def everywhere(name: str) -> Recipe:
    return Recipe("test", classes=dict.fromkeys(CLASSES, name))


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_the_decoded_weights(source: Path, tmp_path: Path, name: str) -> None:
    converted = convert(source, tmp_path / "t", everywhere(name))
    converted.verify()
    model = load_model(tmp_path / "t", dtype="float32")
    assert {format_of(module) for _, module in matrices(model)} == {Format.named(name)}
    plain = load_model(source, dtype="float32")
    adapt(plain, dict.fromkeys(dict(matrices(plain)), Format("plain")))
    for (_, module), (_, twin) in zip(matrices(model), list(matrices(plain)), strict=True):
        arrays = {n: module[n] for n in ("weight", "scales", "biases") if module.get(n) is not None}
        twin.weight = decode(arrays, format_of(module))
    for ids in (mx.arange(2, 49)[None], mx.array([[7]])):  # many pairs of token and expert, and few
        found, want = np.array(model(ids)), np.array(plain(ids))
        np.testing.assert_allclose(found, want, atol=2e-3 * np.abs(want).max())


def test_mixed_formats_by_layer(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'routed_w1_w3 = "affine2-g64"\nattention_q = "nvfp4"\n[layers."-1"]\nrouted_w1_w3 = "native"\n'
        'routed_w2 = "affine6-g32"\n'
    )
    model = load_model((convert(source, tmp_path / "t", read_recipe(str(path)))).folder)
    found = {p: str(format_of(m)) for p, m in matrices(model)}
    assert [found[f"layers.{n}.ffn.experts.w3"] for n in (0, 1)] == ["affine2-g64", "mxfp4"]
    assert [found[f"layers.{n}.ffn.experts.w2"] for n in (0, 1)] == ["mxfp4", "affine6-g32"]
    assert [found[f"layers.{n}.attn.wq_b"] for n in (0, 1)] == ["nvfp4"] * 2
    assert found["layers.0.attn.wo_a"] == "mxfp8" and found["head"] == "bf16"
    assert np.isfinite(np.array(model(mx.array([[3, 4, 5]])))).all()


STREAMED = {
    **{name: Recipe("t", classes={"routed_w1_w3": name, "routed_w2": "affine4-g64"})
       for name in ("affine2-g64", "affine3-g32", "nvfp4", "bf16")},
    "mixed": Recipe("t", classes={"routed_w2": "affine3-g32"}, layers=(((1,), {"routed_w1_w3": "affine2-g64"}),)),
}  # fmt: skip


@pytest.mark.parametrize("name", STREAMED)
def test_streamed_experts_compute_the_same_bits(tmp_path: Path, name: str) -> None:
    experts = 100 if name == "mixed" else 40
    many = write_tiny(tmp_path / "s", {**SMALL, "n_routed_experts": experts})
    converted = convert(many, tmp_path / "t", STREAMED[name])
    shapes = open_source(converted).shapes
    sizes = sizes_of(converted.config, converted, shapes)
    assert len(set(sizes.records)) == (2 if name == "mixed" else 1)
    assert sizes.staging == (sum(sizes.records) if name == "mixed" else sizes.records[0])
    memory = make_plan(converted.config, sizes, memory=1).smallest + 2 * sum(sizes.records)
    ids = mx.arange(2, 60)[None]
    resident, streamed = load_model(converted.folder), load_model(converted.folder, memory=memory, experts="stream")
    assert streamed.store is not None and not any(streamed.store.whole)
    for part in (ids, ids[:, :1], ids[:, :9], ids):
        np.testing.assert_array_equal(np.array(resident(part)), np.array(streamed(part)))
    assert streamed.store.shrink(1, 2)
    for part in (ids[:, :1], ids):
        np.testing.assert_array_equal(np.array(resident(part)), np.array(streamed(part)))


@pytest.mark.parametrize("name", [*RECIPES, "affine3-g32"])
def test_computed_size_is_what_is_written(source: Path, tmp_path: Path, name: str) -> None:
    recipe = RECIPES.get(name) or everywhere(name)
    job = conversion.plan(conversion.open_source(source, tmp_path / "t"), recipe)
    converted = convert(source, tmp_path / "t", recipe)
    records = sum(layer.end - layer.offset for layer in converted.layers.values())
    dense = sum(tensor.nbytes for tensor in converted.dense.values())
    assert job.total_bytes - 16384 == records + dense
    assert converted.nbytes <= records + dense


def test_named_recipes_fit_their_machines() -> None:
    rows = {row["name"]: row for row in listing()}
    assert {row["machine"] for row in rows.values()} == {64, 96, 128, 192, 256}
    for row in rows.values():
        held = row["dense"] + row["experts"] * row["resident"]
        assert held <= row["machine"] * GPU_SHARE and row["resident"] > 0.5, row
        assert row["resident"] == 1 or row["machine"] < 128, row
    # The numbers of the specification: 147.2 GB of experts, 156.0 in all, and 0.2 of repeated scales (9.2, 11.2).
    assert rows["256gb"]["experts"] == pytest.approx(147.2, abs=0.1)
    assert rows["256gb"]["total"] == pytest.approx(156.2, abs=0.1)
    assert rows["256gb"]["token"] == pytest.approx(11.40, abs=0.01)
    # Routed 2.5 bits a weight, rest native: 95.4 GB and 9.797 + 0.182 a token.
    formats = Recipe("t", classes={"routed_w1_w3": "affine2-g64", "routed_w2": "affine2-g64"}).formats(
        ModelConfig.from_dict(REAL, "config")
    )
    assert real_sizes(formats).total / 1e9 == pytest.approx(95.4 + 0.2, abs=0.15)
    assert real_sizes(formats).token / 1e9 == pytest.approx(9.797 + 0.182, abs=0.02)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("indexer = 'mxfp4'", "found 'indexer'\nhint: its queries are part of attention_q"),
        ("attention_kv = 'mxfp4'", "hint: wkv is part of attention_in"),
        ("router = 'mxfp4'", "found 'router'"),
        ("head = 'affine7-g64'", "head: expected native, bf16, .*found 'affine7-g64'"),
        ("head = 4", "head: expected .*found 4"),
        ("head = 'affine4-g48'", "found 'affine4-g48'"),
        ("[layers.one]\nshared = 'mxfp4'", "expected numbers and ranges such as 0-2,-1, found 'one'"),
        ("[layers.0]\nhead = 'mxfp4'", "layers 0: expected .*found 'head'"),
        ("layers = 3", "layers: expected tables"),
        ("x = ", "expected TOML"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_said(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(ConvertError, match=f"(?s){message}"):
        read_recipe(str(path))


def test_recipes_that_do_not_fit_the_model(source: Path, tmp_path: Path) -> None:
    config = ModelConfig.from_folder(source)
    with pytest.raises(ConvertError, match="layers: expected -2 to 1, found 2"):
        Recipe("t", layers=(((2,), {"shared": "mxfp4"}),)).formats(config)
    narrow = ModelConfig.from_dict({**SMALL, "q_lora_rank": 96}, "config")
    with pytest.raises(
        ConvertError, match=r"attention_q: expected a format whose groups divide 96 columns of layers.\d"
    ):
        Recipe("t", classes={"attention_q": "affine4-g64"}).formats(narrow)
    with pytest.raises(ConvertError, match=r"expected 64gb, .* or a TOML file, found 'none'"):
        read_recipe("none")


def test_another_recipe_is_refused(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "t", everywhere("affine4-g64"))
    with pytest.raises(ConvertError, match="by another recipe"):
        convert(source, tmp_path / "t", everywhere("affine4-g32"))
    values = json.loads((tmp_path / "t" / INDEX).read_text())
    values["formats"]["head"]["bits"] = 7
    (tmp_path / "t" / INDEX).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="no such format: affine, 7 bits, groups of 64"):
        load_model(tmp_path / "t")


def test_commands(source: Path, tmp_path: Path) -> None:
    run = CliRunner()
    listed = run.invoke(main, ["convert", "--list"], catch_exceptions=False).stdout
    assert all(name in listed for name in RECIPES)
    rows = json.loads(run.invoke(main, ["convert", "--list", "--json"], catch_exceptions=False).stdout)
    assert [row["name"] for row in rows] == list(RECIPES)
    assert run.invoke(main, ["convert", str(source)]).exit_code == 2
    target = str(tmp_path / "t")
    sizes = [
        run.invoke(main, ["convert", str(source), target, "--dry-run", "--recipe", name]).stdout.split(" GB, ")[0]
        for name in ("native", "128gb")
    ]
    assert sizes[0] != sizes[1] and not Path(target).exists()
    done = run.invoke(main, ["convert", str(source), target, "--recipe", "128gb", "--verify"], catch_exceptions=False)
    assert done.exit_code == 0 and "verified" in done.stderr
    answer = run.invoke(main, ["generate", "x", "--model", target, "--max-tokens", "2"], catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
