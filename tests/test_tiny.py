"""Random checkpoints: the right files, reproducible, varied, and small numbers wherever the model looks."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from configs import FLASH, MICRO

from mlx_v4flash import random_weights, tiny
from mlx_v4flash.byte_tokenizer import SPELLINGS
from mlx_v4flash.checkpoint import INDEX, Checkpoint, read
from mlx_v4flash.config import ModelConfig
from mlx_v4flash.errors import CheckpointError, ConfigError
from mlx_v4flash.safetensors_header import DTYPES
from mlx_v4flash.tiny import TINY, choose_layers, real_dims, write_tiny


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_tiny(tmp_path_factory.mktemp("tiny")))


def digests(checkpoint: Checkpoint) -> dict[str, str]:
    tensors = checkpoint.tensors | checkpoint.drafter
    return {name: hashlib.sha256(read(tensor).tobytes()).hexdigest() for name, tensor in tensors.items()}


def floats(checkpoint: Checkpoint, name: str) -> np.ndarray:
    """Values of a BF16 or F32 tensor."""
    tensor = checkpoint.tensors[name]
    values = read(tensor)
    return (values.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "BF16" else values


def e4m3(codes: np.ndarray) -> np.ndarray:
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    values = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent.astype(int) - 7))
    return np.where(codes & 127 == 127, np.nan, np.where(codes & 128, -values, values))


def e2m1(packed: np.ndarray) -> np.ndarray:
    packed = packed.view(np.uint8)
    nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[nibbles & 7]
    return np.where(nibbles & 8, -values, values)


def dequantised(checkpoint: Checkpoint, name: str) -> np.ndarray:
    weight, scale = (checkpoint.tensors[f"{name}.{part}"] for part in ("weight", "scale"))
    codes, scales = read(weight), read(scale)
    scales = 2.0 ** (scales.astype(int) - 127) if scale.dtype == "F8_E8M0" else scales.astype(np.float64)
    if weight.dtype == "I8":
        return e2m1(codes) * scales.repeat(32, 1)
    rows, columns = codes.shape
    return e4m3(codes) * scales.repeat(128, 0)[:rows].repeat(128, 1)[:, :columns]


# --- files ----------------------------------------------------------------------------------------


def test_default_checkpoint(default: Checkpoint) -> None:
    config = default.config
    assert set(config.compress_ratios) == {0, 4, 128}
    assert 0 < config.num_hash_layers < config.num_hidden_layers
    assert sorted(p.name for p in default.folder.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    assert default.nbytes < 10e6
    written = json.loads((default.folder / "config.json").read_text())
    assert written.keys() - FLASH.keys() == {"mlx_v4flash"}
    assert {k: written[k] for k in TINY} == TINY
    types = {"F8_E4M3", "F8_E8M0", "I8", "BF16", "F32", "I64"}
    assert {tensor.dtype for tensor in default.tensors.values()} == types
    assert not [t for t in default.tensors.values() if t.offset % DTYPES[t.dtype].itemsize], "not aligned"


def test_reproducible_and_independent_of_sharding(tmp_path: Path) -> None:
    first = digests(Checkpoint.open(write_tiny(tmp_path / "a", MICRO, seed=3)))
    assert digests(Checkpoint.open(write_tiny(tmp_path / "b", MICRO, seed=3))) == first
    assert digests(Checkpoint.open(write_tiny(tmp_path / "c", MICRO, seed=3, shard_bytes=0))) == first
    seed_4 = Checkpoint.open(write_tiny(tmp_path / "d", MICRO, seed=4))
    other = digests(seed_4)
    # A few bytes may be equal by chance.
    assert not {name for name in first if first[name] == other[name] and seed_4.tensors[name].nbytes > 11}
    more = digests(Checkpoint.open(write_tiny(tmp_path / "e", MICRO, seed=3, drafter=True)))
    assert {name: more[name] for name in first} == first


def test_reproducible_on_any_machine(tmp_path: Path) -> None:
    """Numbers must not change with numpy or the processor, as other tests and reports rely on them."""
    found = digests(Checkpoint.open(write_tiny(tmp_path, MICRO)))
    whole = hashlib.sha256("".join(found[name] for name in sorted(found)).encode()).hexdigest()
    assert whole == "740a595547cbc5ced85e26aac71d98c398299e7db7e13e827d06a11be5d5f6b4"


def test_pieces_do_not_change_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = digests(Checkpoint.open(write_tiny(tmp_path / "a", MICRO)))
    monkeypatch.setattr(random_weights, "PIECE", 512)
    pieces = digests(Checkpoint.open(write_tiny(tmp_path / "b", MICRO)))
    assert pieces == whole


def test_one_file_per_layer(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "x", MICRO, shard_bytes=1000, drafter=True)
    assert len(list(folder.glob("*.safetensors"))) == 6
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    place = {
        file: {n.split(".")[1] if n.startswith("layers.") else n for n, f in files.items() if f == file}
        for file in set(files.values())
    }
    assert place["model-00001-of-00006.safetensors"] == {"embed.weight"}
    assert [place[f"model-{i:05d}-of-00006.safetensors"] for i in (2, 3, 4)] == [{"0"}, {"1"}, {"2"}]
    assert {"norm.weight", "head.weight", "hc_head_fn"} <= place["model-00005-of-00006.safetensors"]
    assert all(name.startswith("mtp.0.") for name in place["model-00006-of-00006.safetensors"])
    checkpoint = Checkpoint.open(folder)
    drafter = sum(tensor.nbytes for tensor in checkpoint.drafter.values())
    assert json.loads((folder / INDEX).read_text())["metadata"]["total_size"] == checkpoint.nbytes + drafter
    single = write_tiny(tmp_path / "x", MICRO, shard_bytes=10**9)
    assert [p.name for p in single.glob("model*")] == ["model.safetensors"], "what the first call wrote is gone"


def test_config_says_what_is_written(tmp_path: Path) -> None:
    dspark = MICRO | {"compress_ratios": [0, 4, 128, 0, 0, 0], "dspark_block_size": 5, "num_nextn_predict_layers": 1}
    for drafter in (False, True):
        folder = write_tiny(tmp_path / str(drafter), dspark, drafter=drafter)
        written = json.loads((folder / "config.json").read_text())
        assert written["compress_ratios"] == [0, 4, 128] + [0] * drafter
        assert written["num_nextn_predict_layers"] == int(drafter)
        assert "dspark_block_size" not in written
        assert bool(Checkpoint.open(folder).drafter) == drafter


def test_base_format(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_tiny(tmp_path, MICRO, base=True, drafter=True))
    assert checkpoint.config.expert_dtype == "fp8"
    types = {name: tensor.dtype for name, tensor in (checkpoint.tensors | checkpoint.drafter).items()}
    assert {t for n, t in types.items() if n.endswith(".scale")} == {"F32"}
    assert types["layers.1.ffn.experts.2.w2.weight"] == "F8_E4M3"
    assert "I8" not in types.values()
    for copy, original in (("emb.tok_emb", "embed"), ("head", "head")):
        copied = read(checkpoint.drafter[f"mtp.0.{copy}.weight"])
        np.testing.assert_array_equal(copied, read(checkpoint.tensors[f"{original}.weight"]))


def test_plain_weights(tmp_path: Path) -> None:
    plain = {k: v for k, v in MICRO.items() if k != "quantization_config"}
    checkpoint = Checkpoint.open(write_tiny(tmp_path, plain))
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"BF16", "F32", "I64"}
    assert 0.5 < floats(checkpoint, "layers.0.ffn.experts.0.w1.weight").std() * 8 < 2
    with pytest.raises(ConfigError, match="quantization_config: expected one"):
        write_tiny(tmp_path, plain, base=True)


def test_progress(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    folder = write_tiny(tmp_path, MICRO, drafter=True, progress=lambda done, total: calls.append((done, total)))
    checkpoint = Checkpoint.open(folder)
    total = sum(tensor.nbytes for tensor in (checkpoint.tensors | checkpoint.drafter).values())
    assert {t for _, t in calls} == {total}
    done = [d for d, _ in calls]
    assert done == sorted(set(done))
    assert done[-1] == total
    assert len(done) > 100


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [False, True], ids=["fp4", "base"])
def test_values_are_finite_and_varied(tmp_path: Path, base: bool) -> None:
    checkpoint = Checkpoint.open(write_tiny(tmp_path, base=base))
    for name, tensor in checkpoint.tensors.items():
        if tensor.dtype in ("BF16", "F32") and not name.endswith(".scale"):
            values = floats(checkpoint, name)
            assert np.isfinite(values).all(), name
            assert len(np.unique(values)) > min(values.size, 50) // 2, f"{name} has few values"
    for module in (name.removesuffix(".scale") for name in checkpoint.tensors if name.endswith(".scale")):
        values = dequantised(checkpoint, module)
        assert np.isfinite(values).all(), module
        size = values.std() * np.sqrt(values.shape[1])
        assert 0.1 < size < 8, f"{module}: one input of size 1 gives outputs of size {size}"
        assert len(np.unique(values)) > 10
        scales = read(checkpoint.tensors[f"{module}.scale"])
        assert len(np.unique(scales)) >= min(scales.size // 100, 3), f"{module}: block scales are all alike"


def test_fp8_codes(default: Checkpoint) -> None:
    codes = np.concatenate([read(t).ravel() for t in default.tensors.values() if t.dtype == "F8_E4M3"])
    assert len(np.unique(codes)) > 90
    assert not ((codes & 127) == 127).any(), "not a number"
    assert ((codes & 0x78 == 0) & (codes & 7 != 0)).any(), "no subnormal"
    assert 0.45 < (codes >> 7).mean() < 0.55
    assert abs(e4m3(codes).std() - 1) < 0.05


def test_fp4_codes(default: Checkpoint) -> None:
    packed = np.concatenate([read(t).ravel() for t in default.tensors.values() if t.dtype == "I8"]).view(np.uint8)
    counts = np.bincount(packed, minlength=256)
    assert counts.min() > 0.8 * counts.mean(), "some pairs of codes are rare"


def test_scales_have_the_wanted_size() -> None:
    for rms in (0.01, 0.037, 0.05, 1.0, 1.9):
        codes = random_weights._scale_table("F8_E8M0", rms)
        values = random_weights._scale_table("F32", rms)
        np.testing.assert_array_equal(2.0 ** (codes.astype(int) - 127), values)
        assert abs(np.sqrt(np.mean(values.astype(np.float64) ** 2)) / rms - 1) < 0.02
        assert 3 <= len(np.unique(codes)) <= 4


@pytest.mark.parametrize(
    "name", ["attn.attn_sink", "hc_attn_base", "hc_ffn_fn", "attn.compressor.ape", "ffn.gate.bias"]
)
def test_tables_are_not_trivial(default: Checkpoint, name: str) -> None:
    values = floats(default, f"layers.3.{name}")
    assert 0.01 < np.abs(values).mean() < 2
    assert values.std() > 0.01


def test_norms_differ_from_one(default: Checkpoint) -> None:
    names = [name for name in default.tensors if name.endswith("norm.weight")]
    values = np.concatenate([floats(default, name) for name in names])
    assert len(names) == 1 + 5 * 4 + 4 + 2
    assert 0.15 < values.std() < 0.25
    assert abs(values.mean() - 1) < 0.05
    assert values.min() > 0


def test_experts_of_a_token_are_distinct(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_tiny(tmp_path, TINY | {"vocab_size": 4001, "n_routed_experts": 7}, layers=[1]))
    table = read(checkpoint.tensors["layers.0.ffn.gate.tid2eid"])
    assert (table.shape, table.dtype) == ((4001, 3), np.int64)
    assert all(len(set(row)) == 3 for row in table.tolist())
    counts = np.bincount(table.ravel(), minlength=7)
    assert counts.shape == (7,)
    assert counts.min() > 0.9 * counts.mean()
    assert len(np.unique(table, axis=0)) == 7 * 6 * 5


def test_model_is_well_behaved(default: Checkpoint) -> None:
    """Logits of standard deviation two in every position, streams of order one, and some inputs clamped."""
    import mlx.core as mx

    from mlx_v4flash.loading import load_model

    model = load_model(default.folder, dtype="float32")
    ids = mx.array(np.random.default_rng(0).integers(0, default.config.vocab_size, (1, 300)))
    logits = np.array(model(ids))[0]
    assert logits.shape == (300, default.config.vocab_size)
    assert np.isfinite(logits).all()
    assert 1.5 < logits.std() < 2.5
    assert 1 < logits.std(axis=1).min()
    assert np.abs(logits).max() < 20
    # Different texts, different predictions: nothing saturates.
    assert len(np.unique(logits.argmax(axis=1))) > 100


def test_clamping_acts_at_any_limit() -> None:
    for limit in (0.5, 1.0, 10.0):
        gain = random_weights._inner_gain(ModelConfig.from_dict(MICRO | {"swiglu_limit": limit}))
        clamped = np.mean(np.abs(gain * random_weights._quantiles(4096)) > limit)
        assert 0.003 < clamped < 0.7


# --- choosing layers and sizes --------------------------------------------------------------------


def test_real_dims() -> None:
    values = real_dims()
    assert values["compress_ratios"] == [4, 128, 0]
    assert (values["num_hidden_layers"], values["num_hash_layers"]) == (2, 1)
    assert {k for k in values if values[k] != FLASH[k]} == {"compress_ratios", "num_hidden_layers", "num_hash_layers"}
    assert ModelConfig.from_dict(values).compress_ratios == (4, 128)
    assert real_dims([0, 2, 42])["compress_ratios"] == [0, 4, 4, 0]
    assert real_dims([0, 2, 42])["num_hash_layers"] == 2
    assert real_dims(range(43)) == FLASH


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ([], "layers: expected numbers from 0 to 42, found []"),
        ([43], "layers: expected numbers from 0 to 42, found [43]"),
        ([-1], "layers: expected numbers from 0 to 42, found [-1]"),
        ([3, 2], "layers: expected those below 3, which route by token id, to come first, found [3, 2]"),
    ],
)
def test_impossible_layers(layers: list[int], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        real_dims(layers)
    assert str(caught.value) == named


def test_layers_argument(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_tiny(tmp_path, MICRO, layers=[0, 2]))
    assert checkpoint.config == ModelConfig.from_dict(choose_layers(MICRO, [0, 2]))
    assert checkpoint.config.compress_ratios == (0, 128)


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Less than one tensor is in memory, however many are written."""
    changes = {"moe_intermediate_size": 1 << 19, "n_routed_experts": 1, "num_experts_per_tok": 1}
    tracemalloc.start()
    try:
        folder = write_tiny(tmp_path, MICRO | changes, layers=[0])
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    largest = max(tensor.nbytes for tensor in Checkpoint.open(folder).tensors.values())
    assert largest == 64 << 19
    assert 1e6 < peak_bytes < 0.8 * largest


# --- refusals -------------------------------------------------------------------------------------


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    precious = {"config.json": json.dumps(FLASH), "model.safetensors": "weights"}
    for name, content in precious.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        write_tiny(tmp_path, MICRO)
    expected = f"{tmp_path}: expected an empty folder or a random checkpoint written before, found config.json, model."
    assert str(caught.value).startswith(expected)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == precious


def test_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(CheckpointError, match="expected a folder, found a file"):
        write_tiny(tmp_path / "x", MICRO)


def test_earlier_checkpoint_is_replaced(tmp_path: Path) -> None:
    write_tiny(tmp_path, MICRO, shard_bytes=0)
    (tmp_path / "notes.txt").write_text("mine")
    write_tiny(tmp_path, MICRO | {"vocab_size": 280}, seed=1)
    assert Checkpoint.open(tmp_path).config.vocab_size == 280
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", "model.safetensors", "notes.txt", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip


def test_interrupted_checkpoint_can_be_written_again(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tiny(tmp_path, MICRO, progress=interrupt)
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint.open(tmp_path)
    assert Checkpoint.open(write_tiny(tmp_path, MICRO)).tensors


def test_disk_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(tiny.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"expected [\d,]+ bytes of free space, found 1,000\nhint: "):
        write_tiny(tmp_path, MICRO)


def test_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiny, "_write_weights", full)
    with pytest.raises(CheckpointError, match="cannot be written: No space left on device\nhint: "):
        write_tiny(tmp_path, MICRO)


def test_config_is_checked_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config: n_group: settings this version does not know"):
        write_tiny(tmp_path / "x", MICRO | {"n_group": 8})
    assert not (tmp_path / "x").exists()


# --- tokenizer ------------------------------------------------------------------------------------

TEXTS = [
    "",
    "hello",
    " two  spaces\n\n\ttab",
    "Zoë 🦀👩‍👩‍👧 漢字 ∑",
    "\x00\x7f\u2028",
    "".join(map(chr, range(0x20, 0x250))),
]
MARKED = "".join(f"{spelling} é" for spelling in SPELLINGS)


def expect_byte_tokenizer(tokenizer: Any) -> None:
    assert [tokenizer.convert_tokens_to_ids(s) for s in SPELLINGS] == list(range(7))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.encode()), "one token per byte, nothing added"
        assert tokenizer.decode(ids) == text
    ids = tokenizer.encode(MARKED)
    assert [i for i in ids if i < 7] == list(range(7))
    assert tokenizer.decode(ids) == MARKED
    # As in the original, only the ends of a text are dropped.
    assert tokenizer.decode(ids, skip_special_tokens=True) == MARKED.replace(SPELLINGS[0], "").replace(SPELLINGS[1], "")


def test_tokenizer_in_transformers(default: Checkpoint) -> None:
    transformers = pytest.importorskip("transformers", reason="TOKENIZER NOT CHECKED: transformers is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(default.folder)
    assert len(tokenizer) == default.config.vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(default.config.vocab_size))
    expect_byte_tokenizer(tokenizer)


def test_tokenizer_in_mlx_lm(default: Checkpoint) -> None:
    from mlx_lm.tokenizer_utils import load

    tokenizer = load(default.folder)
    expect_byte_tokenizer(tokenizer)
    assert tokenizer.eos_token_ids == {1}
    assert (tokenizer.think_start, tokenizer.think_end) == ("<think>", "</think>")
    detokenizer = tokenizer.detokenizer
    for token in tokenizer.encode("a 🦀" + MARKED):
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == "a 🦀" + MARKED
    # A random model draws these as well.
    detokenizer.reset()
    for token in range(default.config.vocab_size):
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text.endswith("<unused271>")


def test_tokenizer_is_copied(default: Checkpoint, tmp_path: Path) -> None:
    file = default.folder / "tokenizer.json"
    for i, source in enumerate((default.folder, file, str(file))):
        folder = write_tiny(tmp_path / str(i), MICRO | {"vocab_size": 272}, tokenizer=source)
        assert (folder / "tokenizer.json").read_bytes() == file.read_bytes()
        assert (folder / "tokenizer_config.json").read_bytes() == (
            default.folder / "tokenizer_config.json"
        ).read_bytes()
    # Alone, and without our special tokens.
    content = json.loads(file.read_text())
    content["added_tokens"] = []
    content["model"]["vocab"] = {t: i for t, i in content["model"]["vocab"].items() if i > 6}
    (tmp_path / "own.json").write_text(json.dumps(content))
    folder = write_tiny(tmp_path / "own", MICRO | {"vocab_size": 272}, tokenizer=tmp_path / "own.json")
    assert json.loads((folder / "tokenizer.json").read_text()) == content
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert "tokenizer_class" in settings
    assert "eos_token" not in settings


def test_vocabulary_must_hold_the_tokenizer(default: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="vocab_size: expected at least 263 for a byte-level tokenizer, found 262\nhint: "
    ):
        write_tiny(tmp_path / "a", MICRO | {"vocab_size": 262})
    with pytest.raises(
        ConfigError, match=r"vocab_size: expected at least 272 for .*tokenizer\.json, found 271\nhint: "
    ):
        write_tiny(tmp_path / "b", MICRO | {"vocab_size": 271}, tokenizer=default.folder)
    assert Checkpoint.open(write_tiny(tmp_path / "c", MICRO | {"vocab_size": 263})).config.vocab_size == 263


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"vocab": []}, "added_tokens": []}'])
def test_not_a_tokenizer(tmp_path: Path, content: str) -> None:
    with pytest.raises(ConfigError, match=r"expected tokenizer\.json or a folder with it, found none"):
        write_tiny(tmp_path / "a", MICRO, tokenizer=tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=r"expected a tokenizer\.json with a BPE vocabulary"):
        write_tiny(tmp_path / "a", MICRO, tokenizer=tmp_path)
