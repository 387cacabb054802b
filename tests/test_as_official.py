"""Plain weights become what DeepSeek's own files would hold, and official weights come back from their values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest
import streaming
from click.testing import CliRunner
from mlx.utils import tree_flatten
from test_loading import FP4, stored_value

from mlx_v4flash import as_official, load_model
from mlx_v4flash import convert as conversion
from mlx_v4flash.checkpoint import Checkpoint
from mlx_v4flash.cli import main
from mlx_v4flash.config import ModelConfig
from mlx_v4flash.converted import Converted
from mlx_v4flash.errors import CheckpointError, ConfigError, ConvertError
from mlx_v4flash.inventory import official_tensors, transformers_name
from mlx_v4flash.tiny import TINY, write_tiny
from tests.golden import CASES
from tests.golden import folder as golden

# Widths that are no multiple of the 128 x 128 blocks.
SMALL = {**TINY, "num_hidden_layers": 2, "compress_ratios": [0, 4], "hidden_size": 160, "q_lora_rank": 96}


def write_plain(official: Path, folder: Path, naming: str, change: dict[str, np.ndarray] | None = None) -> Path:
    """The values of an official checkpoint in bfloat16, under transformers' names or DeepSeek's, and its config."""
    folder.mkdir()
    checkpoint, tensors = Checkpoint.open(official), dict[str, tuple[str, np.ndarray]]()
    c = checkpoint.config
    for name, tensor in checkpoint.tensors.items():
        if name.endswith(".scale") and not name.endswith("hc_head_scale"):
            continue
        dtype, value = tensor.dtype, stored_value(checkpoint, name)
        if dtype in ("I8", "F8_E4M3", "BF16"):
            dtype, value = "BF16", exactly_bfloat16(value)
        tensors[name] = dtype, value
    if naming == "transformers":
        named = {transformers_name(n): t for n, t in tensors.items() if ".ffn.experts." not in n}
        for layer in range(c.num_hidden_layers):
            w1, w2, w3 = (
                np.stack([tensors[f"layers.{layer}.ffn.experts.{e}.{w}.weight"][1] for e in range(c.n_routed_experts)])
                for w in ("w1", "w2", "w3")
            )
            experts = f"model.layers.{layer}.mlp.experts"
            named[f"{experts}.gate_up_proj"] = "BF16", np.concatenate([w1, w3], axis=1)
            named[f"{experts}.down_proj"] = "BF16", w2
        tensors = named
    header, end = {}, 0
    for name, (dtype, value) in tensors.items():
        value = (change or {}).get(name, value)
        tensors[name] = dtype, value
        header[name] = {"dtype": dtype, "shape": value.shape, "data_offsets": [end, end := end + value.nbytes]}
    text = json.dumps(header).encode()
    data = b"".join(value.tobytes() for _, value in tensors.values())
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    values = json.loads((official / "config.json").read_text())
    values = {k: v for k, v in values.items() if k not in ("quantization_config", "expert_dtype")}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def exactly_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any(), "an official weight is a bfloat16"
    return (bits >> 16).astype(np.uint16)


def convert(source: Path, target: Path, **options: Any) -> Converted:
    return conversion.convert(conversion.open_source(source, target, **options), target)


def parameters(folder: Path) -> dict[str, mx.array]:
    return dict(tree_flatten(load_model(folder, simulate_cache_quant=False, dtype="float32").parameters()))


@pytest.mark.parametrize("naming", ["transformers", "official"])
@pytest.mark.parametrize("case", ["tiny", *CASES])
def test_official_weights_come_back_from_their_values(tmp_path: Path, case: str, naming: str) -> None:
    official = write_tiny(tmp_path / "s", SMALL) if case == "tiny" else golden(case)
    plain = write_plain(official, tmp_path / "plain", naming)
    convert(official, tmp_path / "want")
    convert(plain, tmp_path / "found").verify()
    want, found = parameters(tmp_path / "want"), parameters(tmp_path / "found")
    assert found.keys() == want.keys()
    same_blocks = all_blocks = 0
    for path in (p for p in want if p.endswith("weight")):
        if (scales := path.replace("weight", "scales")) not in want:
            np.testing.assert_array_equal(np.array(found[path].view(mx.uint8)), np.array(want[path].view(mx.uint8)))
            continue
        mode = "mxfp4" if ".experts." in path else "mxfp8"
        values = [
            np.array(mx.dequantize(p[path], p[scales], group_size=32, bits=int(mode[4:]), mode=mode, dtype=mx.float32))
            for p in (found, want)
        ]
        np.testing.assert_array_equal(*(v.view(np.uint32) for v in values), err_msg=path)  # the sign of 0, too
        codes = [np.array(p[path].view(mx.uint8)) for p in (found, want)]
        steps = [np.array(p[scales]).astype(int) for p in (found, want)]
        same = steps[0] == steps[1]
        per_block = 16 if mode == "mxfp4" else 32
        equal = (codes[0] == codes[1]).reshape(*same.shape, per_block).all(axis=-1)
        # Where the rule finds their scale, their codes come back; elsewhere it finds a smaller one, or all are zero.
        assert equal[same].all(), path
        zero = (values[0] == 0).reshape(*same.shape, 32).all(axis=-1)
        assert (steps[0] <= steps[1])[~zero].all(), path
        if mode == "mxfp4":
            largest = (codes[1] & 7).reshape(*same.shape, 16), (codes[1] >> 4 & 7).reshape(*same.shape, 16)
            needs_it = np.maximum(*(half.max(axis=-1) for half in largest)) >= 6  # 4 or 6 in their scale
            np.testing.assert_array_equal(same[~zero], needs_it[~zero], err_msg=path)
        same_blocks, all_blocks = same_blocks + same.sum(), all_blocks + same.size
    assert same_blocks > 0.5 * all_blocks
    ids = mx.arange(2, 40)[None] % ModelConfig.from_folder(official).vocab_size
    logits = [np.array(load_model(tmp_path / name, simulate_cache_quant=False)(ids)) for name in ("found", "want")]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("seed", range(3))
def test_codes_are_the_nearest(seed: int) -> None:
    """Against the tables of the formats: every code's value, and the neighbours of every value."""
    rng = np.random.default_rng(seed)
    w = (rng.normal(size=(96, 160)) * np.exp2(rng.integers(-20, 20, (96, 1)))).astype(np.float32)
    w[3], w[5, :40], w[7, 3] = 0, -0.0, -0.0
    codes, scales = as_official.round_fp4(w)
    found = np.stack([codes & 15, codes >> 4], axis=-1).reshape(w.shape)
    steps = np.exp2(scales.astype(np.float64) - 127).repeat(32, 1)
    np.testing.assert_array_equal(np.abs(FP4[found] * steps - w), np.abs(FP4 - (w / steps)[..., None]).min(-1) * steps)
    assert (np.signbit(w) == (found > 7)).all()
    largest = np.abs(w).reshape(96, -1, 32).max(-1)
    want = [math.ceil(math.log2(x / 6)) if x else 0 for x in largest.ravel().astype(float)]
    np.testing.assert_array_equal(scales.ravel().astype(int) - 127, want)

    codes, scales = as_official.round_fp8(w)
    assert scales.shape == (1, 2)
    for i, columns in enumerate((slice(0, 128), slice(128, 160))):
        exponent = math.ceil(math.log2(float(np.abs(w[:, columns]).max()) / 448))
        assert scales[0, i] - 127 == exponent
        want = (w[:, columns] * 2.0**-exponent).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(codes[:, columns], want.view(np.uint8))


def test_ties_go_to_the_even_code() -> None:
    w = np.zeros((1, 32), np.float32)
    w[0, :8] = 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6
    codes, scales = as_official.round_fp4(w)
    found = np.stack([codes & 15, codes >> 4], axis=-1).reshape(-1)
    np.testing.assert_array_equal(FP4[found[:8]], [0, 1, 1, 2, 2, 4, 4, 6])
    assert scales == 127
    values = np.exp2(np.arange(-20, 9, 0.125)).astype(np.float32)
    edges = np.concatenate([values, [448.0, 17.0, 18.0, 19.0, 2**-10, 3 * 2**-10, 5 * 2**-10]]).astype(np.float32)
    edges = edges[edges <= 448]
    np.testing.assert_array_equal(as_official.FP8.codes(edges), edges.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


@pytest.mark.parametrize("size", [0.0, 2.0**-149, 2.0**-133, 2.0**-126, 2e38])
def test_smallest_and_largest_weights(size: float) -> None:
    w = np.full((2, 32), size, np.float32)
    codes, scales = as_official.round_fp4(w)
    value = FP4[codes[0, 0] & 15] * 2.0 ** (int(scales[0, 0]) - 127)
    assert abs(value - float(w[0, 0])) <= max(0.25 * float(w[0, 0]), 2.0**-128) and 0 < scales[0, 0] < 255
    codes, scales = as_official.round_fp8(w)
    value = float(codes.view(ml_dtypes.float8_e4m3fn)[0, 0]) * 2.0 ** (int(scales[0, 0]) - 127)
    assert abs(value - float(w[0, 0])) <= max(0.0625 * float(w[0, 0]), 2.0**-136)


def test_plain_weights_can_be_kept(tmp_path: Path) -> None:
    plain = write_plain(write_tiny(tmp_path / "s", SMALL), tmp_path / "plain", "transformers")
    convert(plain, tmp_path / "t", plain=True).verify()
    want, found = parameters(plain), parameters(tmp_path / "t")
    assert found.keys() == want.keys() and not any(path.endswith("scales") for path in want)
    for path in want:
        assert mx.array_equal(found[path].view(mx.uint8), want[path].view(mx.uint8)), path
    with pytest.raises(ConvertError, match="holds the conversion of another source"):
        convert(plain, tmp_path / "t")
    result = CliRunner().invoke(main, ["convert", str(plain), str(tmp_path / "u")], catch_exceptions=False)
    assert result.exit_code == 0 and "experts become FP4 and layers FP8" in result.stderr
    assert ModelConfig.from_folder(tmp_path / "u").expert_dtype == "fp4"


def test_weights_that_are_not_numbers_are_named(tmp_path: Path) -> None:
    official = write_tiny(tmp_path / "s", SMALL)
    bad = np.zeros((160, 256), np.uint16)
    bad[150, 7] = 0x7F80
    name = "model.layers.1.self_attn.o_b_proj.weight"
    plain = write_plain(official, tmp_path / "plain", "transformers", {name: bad})
    with pytest.raises(CheckpointError, match=rf"{name}: expected finite weights, found inf at \[150, 7\]"):
        convert(plain, tmp_path / "t")


def test_sizes_that_blocks_do_not_divide_are_refused(tmp_path: Path) -> None:
    plain = write_plain(write_tiny(tmp_path / "s", SMALL), tmp_path / "plain", "transformers")
    values = json.loads((plain / "config.json").read_text())
    assert not ModelConfig.from_dict(values).quantized
    checkpoint = Checkpoint.open(plain)
    with pytest.raises(ConfigError, match="q_lora_rank must be divisible by 32"):
        as_official.as_official(checkpoint, values | {"q_lora_rank": 97})


def test_every_official_tensor_is_there(tmp_path: Path) -> None:
    """The view has the names, shapes and types of the official inventory."""
    plain = write_plain(write_tiny(tmp_path / "s", SMALL), tmp_path / "plain", "transformers")
    view = as_official.as_official(Checkpoint.open(plain), json.loads((plain / "config.json").read_text()))
    specs = official_tensors(view.config)
    assert view.tensors.keys() == specs.keys()
    for name, spec in specs.items():
        assert view.tensors[name].shape == spec.shape and view.tensors[name].dtype in spec.dtypes, name


@pytest.mark.parametrize("naming", ["transformers", "official"])
def test_plain_weights_are_streamed_as_they_are(tmp_path: Path, naming: str) -> None:
    """transformers holds all experts of a layer in two tensors, w1 and w3 in one of them."""
    plain = write_plain(write_tiny(tmp_path / "official", streaming.SMALL), tmp_path / "plain", naming)
    resident, rng = load_model(plain, experts="resident"), np.random.default_rng(1)
    model = streaming.streamed(plain, [4, 12, 5])
    for T in (1, 9, 60):
        streaming.expect_same(model, resident, streaming.prompt(rng, T))
