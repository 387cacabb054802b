"""Checkpoints: what is read is what was written, and every kind of damage is named before any data is used."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest
from configs import BASE, FLASH, MICRO
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_v4flash.checkpoint import INDEX, Checkpoint, StoredTensor, read, read_into, scale_bytes
from mlx_v4flash.config import ModelConfig
from mlx_v4flash.errors import CheckpointError, ConfigError
from mlx_v4flash.inventory import mtp_tensors, official_tensors, transformers_tensors
from mlx_v4flash.random_weights import stored_dtype
from mlx_v4flash.safetensors_header import DTYPES, read_header
from mlx_v4flash.tiny import write_tiny

ONE = "model.safetensors"
LAYER_1 = "model-00003-of-00005.safetensors"
Header = dict[str, Any]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    write_tiny(root / "single", MICRO)
    write_tiny(root / "sharded", MICRO, shard_bytes=0)
    return root


@pytest.fixture
def single(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "single", tmp_path / "single"))


@pytest.fixture
def sharded(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "sharded", tmp_path / "sharded"))


def parts_of(path: Path) -> tuple[Header, bytes]:
    """Header and data."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def put(path: Path, header: Header | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def edit(path: Path, change: Callable[[Header], object]) -> None:
    """Change a header and leave the data."""
    header, data = parts_of(path)
    change(header)
    put(path, header, data)


def drop(path: Path, *names: str) -> dict[str, bytes]:
    """Take tensors out of a file, which stays sound; returns their data."""
    header, data = parts_of(path)
    taken, kept, rest = {}, {}, b""
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if name in names:
            taken[name] = data[begin:end]
        else:
            kept[name] = entry | {"data_offsets": [len(rest), len(rest) + end - begin]}
            rest += data[begin:end]
    assert taken.keys() == set(names)
    put(path, kept, rest)
    return taken


def add(path: Path, name: str, dtype: str, shape: list[int]) -> None:
    header, data = parts_of(path)
    size = prod(shape) * DTYPES[dtype].itemsize
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + size]}
    put(path, header, data + bytes(size))


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def expect_refused(folder: Path, *parts: str) -> str:
    """The refusal's text, which must hold all parts and a hint."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    text = str(caught.value)
    missing = [part for part in (*parts, "\nhint: ") if part not in text]
    assert not missing, f"{missing} not in: {text}"
    assert len(text) < 1000, "too long to read"
    return text


# --- sound checkpoints ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_opens(originals: Path, kind: str) -> None:
    checkpoint = Checkpoint.open(str(originals / kind))
    assert checkpoint.folder == originals / kind
    assert checkpoint.config == ModelConfig.from_dict(MICRO)
    assert checkpoint.naming == "official"
    assert checkpoint.drafter == {}
    expected = official_tensors(checkpoint.config)
    assert {n: t.shape for n, t in checkpoint.tensors.items()} == {n: s.shape for n, s in expected.items()}
    files = sum(p.stat().st_size for p in checkpoint.folder.glob("*.safetensors"))
    headers = sum(8 + len(json.dumps(parts_of(p)[0])) for p in checkpoint.folder.glob("*.safetensors"))
    assert 0 <= files - headers - checkpoint.nbytes < 8 * len(list(checkpoint.folder.glob("*.safetensors")))


def test_reads_what_safetensors_reads(single: Path) -> None:
    """The same bytes as the reader of another project, for every type in the file."""
    load = pytest.importorskip("safetensors.numpy", reason="READER NOT COMPARED: safetensors is not installed").load
    # It knows no E8M0, so that bytes are declared as bytes.
    edit(single / ONE, lambda h: [e.update(dtype="U8") for e in h.values() if e.get("dtype", "").startswith("F8")])
    edit(single / ONE, lambda h: [e.update(dtype="U16") for e in h.values() if e.get("dtype") == "BF16"])
    theirs = load((single / ONE).read_bytes())
    ours = read_header(single / ONE)
    assert ours.keys() == theirs.keys()
    assert {t.dtype for t in ours.values()} == {"U8", "U16", "I8", "F32", "I64"}
    for name, tensor in ours.items():
        values = read(tensor)
        assert (values.dtype, values.shape) == (theirs[name].dtype, theirs[name].shape)
        np.testing.assert_array_equal(values, theirs[name])


def test_several_files_without_an_index(sharded: Path) -> None:
    whole = Checkpoint.open(sharded)
    (sharded / INDEX).unlink()
    # What macOS leaves on some disks is no shard.
    (sharded / "._model-00001-of-00005.safetensors").write_bytes(b"not a shard")
    assert Checkpoint.open(sharded).tensors == whole.tensors


def test_other_files_do_not_matter(single: Path, sharded: Path) -> None:
    for folder in (single, sharded):
        (folder / "expected.safetensors").write_bytes(b"of another program")
        assert Checkpoint.open(folder).tensors


def test_drafter_is_left_aside(tmp_path: Path) -> None:
    plain = Checkpoint.open(write_tiny(tmp_path / "plain", MICRO))
    april = Checkpoint.open(write_tiny(tmp_path / "april", MICRO, drafter=True))
    assert april.drafter.keys() == mtp_tensors(april.config).keys()
    assert (april.tensors.keys(), april.nbytes) == (plain.tensors.keys(), plain.nbytes)
    base = Checkpoint.open(write_tiny(tmp_path / "base", MICRO, drafter=True, base=True))
    assert base.drafter.keys() - april.drafter.keys() == {"mtp.0.emb.tok_emb.weight", "mtp.0.head.weight"}
    assert base.tensors.keys() == plain.tensors.keys()
    assert base.tensors["layers.0.attn.wq_a.scale"].dtype == "F32"
    # Whatever a later draft block may hold.
    add(tmp_path / "plain" / ONE, "mtp.2.markov_head.markov_w1.weight", "F16", [3])
    assert list(Checkpoint.open(tmp_path / "plain").drafter) == ["mtp.2.markov_head.markov_w1.weight"]


@pytest.mark.checkpoint
@pytest.mark.parametrize(
    ("case", "tensors", "drafter"),
    [
        ("f32-exact", 421, 0),
        ("official-qat", 244, 0),
        ("mtp", 252, 87),
        ("dspark", 252, 241),
        ("edge-lengths", 180, 0),
    ],
)
def test_golden_cases_open(case: str, tensors: int, drafter: int) -> None:
    checkpoint = Checkpoint.open(golden.folder(case))
    assert (len(checkpoint.tensors), len(checkpoint.drafter)) == (tensors, drafter)


def bytes_of(specs: dict[str, Any], base: bool = False) -> int:
    return sum(prod(s.shape) * DTYPES[stored_dtype(n, s, base)].itemsize for n, s in specs.items())


def test_counts_of_v4_flash() -> None:
    """The published totals of the real files, of which the last shard is the draft block."""
    config = ModelConfig.from_dict(FLASH)
    main, draft = official_tensors(config), mtp_tensors(config)
    assert len(main) == 69_187 - 1_575
    assert len(draft) == 1_575
    assert bytes_of(main) == 159_609_485_896 - 3_593_787_756
    assert bytes_of(draft) == 3_593_787_756
    types = Counter(stored_dtype(n, s, base=False) for n, s in (main | draft).items())
    assert types == {"BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34_167, "I64": 3, "I8": 33_792}
    layers = Counter(name.split(".")[1] for name in main if name.startswith("layers."))
    assert [layers[n] for n in "0123"] == [1565, 1565, 1576, 1569]


def test_bytes_of_v4_flash_base() -> None:
    config = ModelConfig.from_dict(BASE)
    copies = 2 * 129280 * 4096 * 2
    total = bytes_of(official_tensors(config), base=True) + bytes_of(mtp_tensors(config), base=True) + copies
    assert round(total / 2**30, 2) == 274.44


# --- transformers' names --------------------------------------------------------------------------


def write_transformers_form(folder: Path) -> Path:
    folder.mkdir()
    values = {k: v for k, v in MICRO.items() if k != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(values))
    put(folder / ONE, {}, b"")
    for name, spec in transformers_tensors(ModelConfig.from_dict(values)).items():
        add(folder / ONE, name, spec.dtypes[0], list(spec.shape))
    return folder


def test_transformers_names(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_transformers_form(tmp_path / "hf"))
    assert checkpoint.naming == "transformers"
    assert checkpoint.tensors["model.layers.1.mlp.experts.gate_up_proj"].shape == (3, 320, 64)


def test_quantised_transformers_names_are_refused(tmp_path: Path) -> None:
    folder = write_transformers_form(tmp_path / "hf")
    set_config(folder, quantization_config=FLASH["quantization_config"])
    expect_refused(folder, "expected plain weights under transformers' names", "quantization_config")


def test_model_saved_by_transformers(tmp_path: Path) -> None:
    """As save_pretrained writes it with save_original_format=False; its default mixes both namings and is refused."""
    transformers = pytest.importorskip("transformers", reason="TRANSFORMERS' FILES NOT CHECKED: it is not installed")
    torch = pytest.importorskip("torch", reason="TRANSFORMERS' FILES NOT CHECKED: torch is not installed")
    values = {k: v for k, v in MICRO.items() if k not in ("quantization_config", "torch_dtype")}
    config = transformers.DeepseekV4Config(**json.loads(json.dumps(values)))
    model = transformers.DeepseekV4ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", save_original_format=False)
    checkpoint = Checkpoint.open(tmp_path / "theirs")
    assert checkpoint.naming == "transformers"
    stored = read(checkpoint.tensors["model.norm.weight"])
    assert stored.tolist() == model.model.norm.weight.detach().view(torch.uint16).tolist()
    model.save_pretrained(tmp_path / "mixed")
    expect_refused(tmp_path / "mixed", "save_pretrained(folder, save_original_format=False)")


# --- folders and files ----------------------------------------------------------------------------


def test_no_folder(tmp_path: Path) -> None:
    expect_refused(tmp_path / "nowhere", f"{tmp_path / 'nowhere'}: expected a folder, found nothing")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    expect_refused(tmp_path / "x.gguf", "x.gguf: expected a folder, found a file")


def test_empty_folder(tmp_path: Path) -> None:
    expect_refused(tmp_path, f"{tmp_path}: expected a checkpoint, found an empty folder")


def test_config_is_read_first(single: Path) -> None:
    (single / "config.json").unlink()
    (single / ONE).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"expected a checkpoint folder with config\.json, found none"):
        Checkpoint.open(single)


def test_no_weights(single: Path) -> None:
    (single / ONE).rename(single / "model.gguf")
    expect_refused(single, "expected .safetensors files, found model.gguf, tokenizer.json, tokenizer_config.json")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "expected a safetensors file, found 0 bytes, too short"),
        (b"1234567", "expected a safetensors file, found 7 bytes, too short"),
        (b"PK\x03\x04 a zip file of some other kind", r"begins with b'PK\x03\x04 a z', which is not the length"),
        ((2).to_bytes(8, "little") + b"[]", "is not the length of a header"),
        ((1).to_bytes(8, "little") + b"{", "is not the length of a header"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "is not the length of a header"),
        ((9000).to_bytes(8, "little") + b'{"a":', "truncated: expected at least 9,008 bytes, found 13"),
        ((5).to_bytes(8, "little") + b'{"a":', "expected a header of JSON, found Expecting value"),
        ((4).to_bytes(8, "little") + b'{"\xff"', "expected a header of JSON, found 'utf-8' codec"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "found a Git LFS pointer of 63 bytes"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "expected safetensors data, found a web page"),
    ],
    ids=["empty", "short", "zip", "list", "tiny", "absurd", "cut", "not JSON", "not text", "LFS", "HTML"],
)
def test_not_safetensors(single: Path, content: bytes, named: str) -> None:
    (single / ONE).write_bytes(content)
    expect_refused(single, f"{single / ONE}: ", named)


@given(content=st.binary(max_size=80), json_like=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_read_or_refused(tmp_path: Path, content: bytes, json_like: bool) -> None:
    path = tmp_path / "fuzz.safetensors"
    if json_like:
        content = len(content).to_bytes(8, "little") + b"{" + content[1:]
    path.write_bytes(content)
    try:
        assert read_header(path) == {}
    except CheckpointError as e:
        assert str(e).startswith(f"{path}: ")


entry_values = (
    st.none() | st.integers(-2, 2**70) | st.sampled_from(["F32", "U8", ""]) | st.lists(st.integers(-1, 2**64))
)


@given(entry=entry_values | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), entry_values))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_entry_is_read_or_refused(tmp_path: Path, entry: object) -> None:
    path = tmp_path / "fuzz.safetensors"
    put(path, json.dumps({"a": entry}), b"1234")
    try:
        assert read_header(path)["a"].nbytes == 4
    except CheckpointError as e:
        assert str(e).startswith(f"{path}: ")


def test_truncated(single: Path) -> None:
    content = (single / ONE).read_bytes()
    (single / ONE).write_bytes(content[:-1])
    expect_refused(
        single, f"{single / ONE}: truncated: expected at least {len(content):,} bytes, found {len(content) - 1:,}"
    )


def test_trailing_bytes(single: Path) -> None:
    content = (single / ONE).read_bytes()
    (single / ONE).write_bytes(content + b"abc")
    expect_refused(
        single, f"{single / ONE}: expected {len(content):,} bytes, found {len(content) + 3:,}: 3 belong to no tensor"
    )


def test_header_entries(single: Path) -> None:
    sound = (single / ONE).read_bytes()

    def change(**changes: Any) -> None:
        (single / ONE).write_bytes(sound)
        edit(single / ONE, lambda header: header["norm.weight"].update(changes))

    where = f"{single / ONE}: norm.weight: "
    begin, end = parts_of(single / ONE)[0]["norm.weight"]["data_offsets"]
    assert end - begin == 128
    change(data_offsets=[begin, end - 2])
    expect_refused(single, where, "expected 128 bytes for BF16 (64,), found 126 in data_offsets")
    change(shape=[65])
    expect_refused(single, where, "expected 130 bytes for BF16 (65,), found 128 in data_offsets")
    change(data_offsets=[begin - 2, end - 2])
    expect_refused(single, "expected data at byte", "overlaps the tensor before it")
    change(dtype="F4")
    expect_refused(single, where, "expected a type of DeepSeek's checkpoints, found F4")
    endless = [2**62] * 1000  # its product has more digits than Python prints
    for broken in (
        {"shape": endless},
        {"shape": 64},
        {"shape": [-64]},
        {"shape": [64.0]},
        {"data_offsets": [0]},
        {"dtype": None},
    ):
        change(**broken)
        expect_refused(single, where, "expected dtype, shape and data_offsets, found {")


def test_gap_in_a_file(single: Path) -> None:
    header, data = parts_of(single / ONE)
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [n + 4 for n in entry["data_offsets"]]
    put(single / ONE, header, bytes(4) + data)
    expect_refused(single, "expected data at byte", "leaves a gap before it")


def test_name_twice_in_a_header(single: Path) -> None:
    header, data = parts_of(single / ONE)
    text = json.dumps(header)
    put(single / ONE, text[:-1] + ', "head.weight": ' + json.dumps(header["head.weight"]) + "}", data)
    expect_refused(single, f"{single / ONE}: expected each name once, found head.weight twice in the header")


def test_name_in_two_files(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    shutil.copy(sharded / LAYER_1, sharded / "old.safetensors")
    expect_refused(sharded, "layers.1.", f"expected in one file, found in {LAYER_1} and old.safetensors")


def test_unreadable_file(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: Permission denied"):
        read_header(single / ONE)


# --- the index ------------------------------------------------------------------------------------


def test_absent_shards(sharded: Path) -> None:
    (sharded / LAYER_1).unlink()
    (sharded / "model-00001-of-00005.safetensors").unlink()
    names = f"model-00001-of-00005.safetensors, {LAYER_1}"
    expect_refused(
        sharded, f"{sharded / INDEX}: expected 5 files, 2 of them absent: {names}\n", "the download is incomplete"
    )


def test_index_and_files_differ(sharded: Path) -> None:
    index, name = (sharded / INDEX).read_text(), "layers.1.attn_norm.weight"
    edit_index(sharded, lambda files: files.update({name: "model-00001-of-00005.safetensors"}))
    expect_refused(sharded, f"{sharded / INDEX}: {name}: expected in model-00001-of-00005.safetensors, found {LAYER_1}")
    (sharded / INDEX).write_text(index)
    edit_index(sharded, lambda files: files.update({"layers.1.more": LAYER_1}))
    expect_refused(sharded, f"{sharded / INDEX}: layers.1.more: expected in {LAYER_1}, found in no file")
    (sharded / INDEX).write_text(index)
    edit_index(sharded, lambda files: files.pop(name))
    expect_refused(sharded, f"{sharded / LAYER_1}: {name}: expected only tensors that {INDEX} lists")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"weight_map": ', "expected JSON, found Expecting value"),
        ("[]", "expected JSON, found list indices"),
        ("{}", "expected a file for each tensor, found no weight_map"),
        ('{"weight_map": {}}', "expected a file for each tensor, found none"),
        ('{"weight_map": 3}', "expected a file for each tensor, found none"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "expected a file for each tensor, found a twice"),
        ('{"weight_map": {"a": 1}}', "a: expected the name of a file in this folder, found 1"),
        ('{"weight_map": {"a": "../x"}}', "a: expected the name of a file in this folder, found '../x'"),
    ],
)
def test_broken_index(sharded: Path, content: str, named: str) -> None:
    (sharded / INDEX).write_text(content)
    expect_refused(sharded, f"{sharded / INDEX}: ", named)


def test_index_beside_another_checkpoint(single: Path, sharded: Path) -> None:
    shutil.copy(single / ONE, sharded / ONE)
    expect_refused(
        sharded, f"{sharded}: expected one checkpoint, found {INDEX} and a model.safetensors that it does not name"
    )


# --- tensors --------------------------------------------------------------------------------------


def test_foreign_names(single: Path) -> None:
    def rename(header: Header) -> None:
        header["token_embd.weight"] = header.pop("embed.weight")

    edit(single / ONE, rename)
    expect_refused(
        single, f"{single}: expected DeepSeek's names (embed.weight)", "found hc_head_base, hc_head_fn, ", "more\n"
    )


def test_missing_and_unexpected(single: Path) -> None:
    drop(single / ONE, "layers.2.ffn.gate.weight", "norm.weight")
    expect_refused(single, "expected 162 tensors, found 160; 2 missing: layers.2.ffn.gate.weight, norm.weight\n")
    add(single / ONE, "final_norm.weight", "F32", [64])
    expect_refused(single, "2 missing: layers.2.ffn.gate.weight, norm.weight; 1 unexpected: final_norm.weight\n")


def test_missing_layer_is_one_entry(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    layer = len(parts_of(sharded / LAYER_1)[0]) - 1
    (sharded / LAYER_1).unlink()
    expect_refused(sharded, f"expected 162 tensors, found {162 - layer}; {layer} missing: all {layer} of layers.1\n")


def test_layer_too_many_is_one_entry(single: Path) -> None:
    layer = sum(name.startswith("layers.2.") for name in parts_of(single / ONE)[0])
    set_config(single, num_hidden_layers=2)
    expect_refused(single, f"expected {162 - layer} tensors, found 162; {layer} unexpected: all {layer} of layers.2\n")


def test_many_missing_tensors_are_counted(single: Path) -> None:
    names = [name for name in parts_of(single / ONE)[0] if name.endswith(".scale")]
    drop(single / ONE, *names)
    text = expect_refused(single, f"{len(names)} missing: layers.0.attn.wq_a.scale, ", f" and {len(names) - 4} more\n")
    assert text.count(".scale") == 4


def test_another_size(single: Path) -> None:
    """One sentence on the first shape, not thousands of names."""
    set_config(single, n_routed_experts=30, hidden_size=128)
    expect_refused(
        single, "embed.weight: expected shape (270, 128), found (270, 64) in model.safetensors\n", "another size"
    )


def test_wrong_type(single: Path) -> None:
    set_config(single, expert_dtype="fp8")
    expect_refused(single, "layers.0.ffn.experts.0.w1.weight: expected shape (160, 64), found (160, 32)")
    set_config(single, expert_dtype="fp4")
    edit(single / ONE, lambda header: header["norm.weight"].update(dtype="F16"))
    expect_refused(single, "norm.weight: expected BF16 or F32, found F16 in model.safetensors\n")
    set_config(single, quantization_config=None)
    expect_refused(single, "layers.0.attn.wq_a.weight: expected BF16 or F32, found F8_E4M3 in model.safetensors\n")


# --- data -----------------------------------------------------------------------------------------


def stored(path: Path, dtype: str, values: np.ndarray) -> StoredTensor:
    path.write_bytes(b"xxx" + values.tobytes())
    return StoredTensor("some.weight", dtype, values.shape, path, 3, values.nbytes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_read(tmp_path: Path, dtype: str) -> None:
    values = np.arange(15, dtype=np.uint8).reshape(3, 5).astype(DTYPES[dtype])
    found = read(stored(tmp_path / "x", dtype, values))
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


def test_read_into_takes_any_buffer_of_that_size(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.uint16).reshape(3, 4)
    tensor = stored(tmp_path / "x", "BF16", values)
    rows = np.zeros((5, 12), np.uint16)
    read_into(tensor, rows[2])
    assert rows[2].tolist() == values.ravel().tolist()
    assert not rows[[0, 1, 3, 4]].any()
    buffer = bytearray(24)
    read_into(tensor, memoryview(buffer))
    assert bytes(buffer) == values.tobytes()
    with pytest.raises(AssertionError, match=r"some\.weight: 24 bytes into a buffer of 22"):
        read_into(tensor, memoryview(bytearray(22)))
    with pytest.raises((TypeError, ValueError)):
        read_into(tensor, np.zeros((12, 2), np.uint16)[:, 0])


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    assert read(stored(tmp_path / "x", "F32", np.float32(2.5).reshape(()))) == 2.5
    assert read(stored(tmp_path / "x", "F32", np.zeros((0, 3), np.float32))).shape == (0, 3)


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(1000, dtype=np.int64)
    tensor, sizes = stored(tmp_path / "x", "I64", values), []
    original = Path.open

    class Slow:
        def __init__(self, path: Path, *args: Any, **options: Any) -> None:
            self.file = original(path, *args, **options)

        def __enter__(self) -> Slow:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def seek(self, offset: int) -> None:
            self.file.seek(offset)

        def readinto(self, buffer: memoryview) -> int:
            sizes.append(self.file.readinto(buffer[:777]))
            return sizes[-1]

    monkeypatch.setattr(Path, "open", lambda path, *args, **options: Slow(path, *args, **options))
    np.testing.assert_array_equal(read(tensor), values)
    assert len(sizes) == 11


def test_file_that_shrinks(tmp_path: Path) -> None:
    tensor = stored(tmp_path / "x", "I64", np.arange(10, dtype=np.int64))
    tensor.path.write_bytes(bytes(3 + 50))
    with pytest.raises(CheckpointError) as caught:
        read(tensor)
    assert str(caught.value).startswith(
        f"{tensor.path}: some.weight: expected 80 bytes, found 50: the file was changed or"
    )
    tensor.path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        read(tensor)


def test_scale_bytes_are_exact() -> None:
    codes = np.arange(255, dtype=np.uint8).reshape(5, 51)
    assert scale_bytes(codes, "x") is codes
    values = 2.0 ** (codes.astype(np.float64) - 127)
    assert values.astype(np.float32).astype(np.float64).tolist() == values.tolist()
    found = scale_bytes(values.astype(np.float32), "x")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, codes)
    np.testing.assert_array_equal(scale_bytes(values.astype(np.float32).T, "x"), codes.T)


NOT_SCALES = [0.0, -0.0, -2.0, 3.0, 1.0000001, np.inf, -np.inf, np.nan, 2.0**-128, 2.0**-149, 1.5 * 2.0**-127]


@pytest.mark.parametrize("value", NOT_SCALES, ids=str)
def test_scales_that_no_byte_expresses(value: float) -> None:
    scales = np.full((3, 4), 0.25, np.float32)
    scales[1, 2] = value
    with pytest.raises(CheckpointError) as caught:
        scale_bytes(scales, "layers.0.attn.wkv.scale")
    text = str(caught.value)
    assert text.startswith("layers.0.attn.wkv.scale: expected a power of two from 2^-127 to 2^127, found ")
    assert f"found {scales[1, 2]} at [1, 2]\nhint: the file is damaged" in text


def test_scale_byte_255_is_refused() -> None:
    codes = np.array([[1, 2, 254], [3, 255, 255]], np.uint8)
    with pytest.raises(CheckpointError) as caught:
        scale_bytes(codes, "layers.0.ffn.experts.1.w2.scale")
    expected = "layers.0.ffn.experts.1.w2.scale: expected a scale byte from 0 to 254, found 255 at [1, 1]\nhint: "
    assert str(caught.value).startswith(expected)
