"""Conversion keeps every value, survives every interruption, and refuses what it cannot do."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

from mlx_v4flash import convert as conversion
from mlx_v4flash import convert_source, journal, load, load_model
from mlx_v4flash.checkpoint import Checkpoint, read
from mlx_v4flash.cli import main
from mlx_v4flash.converted import INDEX, JOURNAL, PACK, Converted
from mlx_v4flash.errors import CheckpointError, ConfigError, ConvertError
from mlx_v4flash.expert_pack import PAGE
from mlx_v4flash.tiny import TINY, write_tiny
from tests.configs import SMALL_PRO
from tests.golden import CASES
from tests.golden import folder as golden

# Widths that are no multiple of the blocks; two layers are enough to have one after another.
SMALL = {**TINY, "num_hidden_layers": 2, "compress_ratios": [0, 4], "hidden_size": 160, "q_lora_rank": 96}
COMMAND = [sys.executable, "-m", "mlx_v4flash", "convert"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("convert") / "source", SMALL, shard_bytes=100_000, drafter=True)


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("convert") / "target"
    convert(source, target)
    return target


def convert(source: Path, target: Path) -> Converted:
    return conversion.convert(conversion.open_source(source, target), target)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def expect_same_model(found: Path, want: Path) -> None:
    a, b = (load_model(f, simulate_cache_quant=False, dtype="float32") for f in (found, want))
    arrays, wanted = dict(tree_flatten(a.parameters())), dict(tree_flatten(b.parameters()))
    assert arrays.keys() == wanted.keys()
    for path, array in wanted.items():
        # By their bits, so that -0.0 and the types count; equal packed bits dequantise to equal values.
        assert arrays[path].dtype == array.dtype and arrays[path].shape == array.shape, path
        assert mx.array_equal(arrays[path].view(mx.uint8), array.view(mx.uint8)), path
    ids = mx.arange(2, 40)[None] % Checkpoint.open(want).config.vocab_size
    np.testing.assert_array_equal(np.array(a(ids)), np.array(b(ids)))


@pytest.mark.parametrize(
    ("values", "base"),
    [(SMALL, False), (SMALL, True), (SMALL_PRO, False)],
    ids=["fp4-experts", "fp8-experts-f32-scales", "pro"],
)
def test_every_tensor_and_the_logits_are_bit_equal(tmp_path: Path, values: dict[str, Any], base: bool) -> None:
    source = write_tiny(tmp_path / "s", values, base=base, drafter=True)
    convert(source, tmp_path / "t").verify()
    expect_same_model(tmp_path / "t", source)


@pytest.mark.parametrize("case", CASES)
def test_golden_checkpoints_are_bit_equal(tmp_path: Path, case: str) -> None:
    convert(golden(case), tmp_path / "t").verify()
    expect_same_model(tmp_path / "t", golden(case))


@pytest.mark.parametrize("base", [False, True], ids=["fp4-experts", "base"])
def test_drafter_is_carried_over_untouched(source: Path, finished: Path, tmp_path: Path, base: bool) -> None:
    if base:
        source, finished = write_tiny(tmp_path / "s", SMALL, base=True, drafter=True), tmp_path / "t"
        convert(source, finished)
    want, found = Checkpoint.open(source).drafter, Converted.open(finished).drafter
    assert want and found.keys() == want.keys()
    assert ("mtp.0.emb.tok_emb.weight" in found) == base  # V4-Flash-Base has copies of embedding and head there
    for name, tensor in want.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert read(found[name]).tobytes() == read(tensor).tobytes(), name


def test_killed_at_any_moment_gives_the_same_bytes(source: Path, finished: Path, tmp_path: Path) -> None:
    """One child converts again and again and is killed at random moments of its writing."""
    before, want, target = contents(source), contents(finished), tmp_path / "t"
    random.seed(7)
    script = (
        "import os, sys, signal, pathlib\n"
        "from mlx_v4flash import convert as c, journal\n"
        "source, target = map(pathlib.Path, sys.argv[1:])\n"
        "opened = c.open_source(source, target)\n"
        "c.plan(opened)\n"
        "real = os.write\n"
        "for left in map(int, sys.stdin.readline().split()):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        def write(file, data):\n"
        "            global left\n"
        "            if left < len(data):\n"
        "                real(file, data[:left])\n"
        "                os.kill(os.getpid(), signal.SIGKILL)\n"
        "            left -= len(data)\n"
        "            return real(file, data)\n"
        "        os.write = write\n"
        "        c.convert(opened, target)\n"
        "        os._exit(0)\n"
        "    print(os.waitpid(child, 0)[1], (target / 'conversion.journal').exists(), flush=True)\n"
    )
    limits = sorted(random.randrange(0, 1_200_000) for _ in range(24))
    done = subprocess.run([sys.executable, "-c", script, source, target], input=" ".join(map(str, limits)),
                          text=True, capture_output=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    kills = sum(line.startswith("9 ") for line in done.stdout.splitlines())
    assert kills >= 20, done.stdout
    convert(source, target).verify()
    assert contents(target) == want and contents(source) == before


class Disk:
    """What a folder would hold after a crash: everything, what was flushed under its new names, or what was flushed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.flushed, self.names = folder, dict[int, bytes](), dict[str, int]()
        self.images: list[dict[str, bytes]] = []

    def flush(self, file: int) -> None:
        self.crash()
        if os.fstat(file).st_ino == self.folder.stat().st_ino:
            self.names = {path.name: path.stat().st_ino for path in self.folder.iterdir()}
        for path in self.folder.iterdir():
            if path.stat().st_ino == os.fstat(file).st_ino:
                self.flushed[path.stat().st_ino] = path.read_bytes()

    def crash(self) -> None:
        now = {path.name: path.stat().st_ino for path in self.folder.iterdir()}
        for image in (
            contents(self.folder),
            {name: self.flushed.get(inode, b"") for name, inode in now.items()},
            {name: self.flushed.get(inode, b"") for name, inode in self.names.items()},
        ):
            if image not in self.images:
                self.images.append(image)


def test_a_crash_or_a_loss_of_power_at_every_step_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before every flush, rename, removal and truncation; what was not flushed is there, or is not."""
    values = {**SMALL, "hidden_size": 64, "q_lora_rank": 32, "moe_intermediate_size": 32, "n_routed_experts": 3}
    source, target = write_tiny(tmp_path / "s", values, drafter=True), tmp_path / "t"
    disk, opened = Disk(target), conversion.open_source(source, target)
    with monkeypatch.context() as patch:
        patch.setattr(journal, "flush", disk.flush)
        patch.setattr(conversion, "flush", disk.flush)
        for name in ("replace", "unlink", "ftruncate"):
            real = getattr(os, name)
            patch.setattr(os, name, lambda *args, real=real, **options: (disk.crash(), real(*args, **options))[1])
        conversion.convert(opened, target)
    want, steps = contents(target), [image for image in disk.images if image]
    assert len(steps) >= 40 and any(INDEX in image and JOURNAL in image for image in steps)
    for number, image in enumerate(steps):
        again = tmp_path / str(number)
        again.mkdir()
        for name, data in image.items():
            (again / name).write_bytes(data)
        if INDEX not in image:
            with pytest.raises((CheckpointError, ConfigError)):
                load_model(again)
        conversion.convert(opened, again)
        assert contents(again) == want, f"after step {number}, with {sorted(image)}"
        shutil.rmtree(again)


@pytest.mark.slow
def test_killed_by_the_clock(source: Path, finished: Path, tmp_path: Path) -> None:
    random.seed(3)
    for i in range(20):
        target = tmp_path / str(i)
        process = subprocess.Popen([*COMMAND, source, target], stderr=subprocess.DEVNULL)
        time.sleep(random.uniform(0.5, 3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        convert(source, target)
        assert contents(target) == contents(finished)


def fail_after(monkeypatch: pytest.MonkeyPatch, nbytes: int, code: int = errno.ENOSPC) -> None:
    real, left = os.write, [nbytes]

    def write(file: int, data: Any) -> int:
        if left[0] <= 0:
            raise OSError(code, os.strerror(code))
        count = real(file, data[: left[0]])
        left[0] -= count
        return count

    monkeypatch.setattr(journal.os, "write", write)


@pytest.mark.parametrize("nbytes", [10, 30_000, 500_000])
def test_full_disk(source: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    with monkeypatch.context() as patch:
        fail_after(patch, nbytes)
        with pytest.raises(ConvertError, match=r"No space left on device\nhint:.*it continues"):
            convert(source, tmp_path / "t")
    if (tmp_path / "t" / JOURNAL).exists():
        with pytest.raises(CheckpointError, match=r"expected a finished conversion, found conversion.journal"):
            load_model(tmp_path / "t", simulate_cache_quant=False)
        with pytest.raises(CheckpointError, match="expected a finished conversion"):
            load(tmp_path / "t")
    convert(source, tmp_path / "t")
    assert contents(tmp_path / "t") == contents(finished)


def test_too_small_disk_is_refused_before_writing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ConvertError, match=r"GB of free space, found 0.00 GB"):
        conversion.check_space(conversion.plan(conversion.open_source(source, tmp_path / "t")), tmp_path / "t")
    result = CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "t")])
    assert result.exit_code == 1 and "free space" in result.stderr and not (tmp_path / "t").exists()


def test_hidden_files_that_a_desktop_leaves_are_no_obstacle(source: Path, finished: Path, tmp_path: Path) -> None:
    target = tmp_path / "t"
    target.mkdir()
    (target / ".DS_Store").write_bytes(b"Finder")
    convert(source, target)
    (target / ".DS_Store").unlink()
    assert contents(target) == contents(finished)


def test_unwritable_folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConvertError, match="cannot be written: Permission denied"):
        convert(source, tmp_path / "t")


def test_source_that_changed_is_refused(source: Path, finished: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(source, tmp_path / "s")
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, 1_300_000)
        with pytest.raises(ConvertError):
            convert(mine, tmp_path / "t")
    shard = Checkpoint.open(mine).tensors["layers.0.ffn.experts.0.w1.weight"].path
    stat = shard.stat()
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(ConvertError, match=r"changed since layers.0.ffn.experts was converted from it"):
        convert(mine, tmp_path / "t")
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    convert(mine, tmp_path / "t")
    assert contents(tmp_path / "t") == contents(finished)


def test_damaged_shard_is_named_and_can_be_replaced(source: Path, finished: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(source, tmp_path / "s")
    tensor = Checkpoint.open(mine).tensors["layers.1.ffn.experts.3.w2.scale"]
    good = tensor.path.read_bytes()
    tensor.path.write_bytes(good[: tensor.offset] + b"\xff" + good[tensor.offset + 1 :])
    with pytest.raises(CheckpointError, match=r"layers.1.ffn.experts.3.w2.scale: expected a scale byte"):
        convert(mine, tmp_path / "t")
    assert (tmp_path / "t" / JOURNAL).read_text().count('"unit"') >= 3
    tensor.path.write_bytes(good[:-5])
    with pytest.raises(CheckpointError, match="truncated"):
        convert(mine, tmp_path / "t")
    tensor.path.write_bytes(good)
    convert(mine, tmp_path / "t")
    assert contents(tmp_path / "t") == contents(finished)


def test_other_formats_are_refused(finished: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(finished, tmp_path / "t")
    values = json.loads((mine / INDEX).read_text())
    for change, message in (
        ({"version": 2}, "expected format version 1, found 2\nhint: update mlx-v4flash"),
        ({"format": "other"}, "found 'other': another tool wrote this folder"),
        ({"experts": {"layers.0": {}}}, "expected an index as docs/format.md describes"),
    ):
        (mine / INDEX).write_text(json.dumps(values | change))
        with pytest.raises(CheckpointError, match=message):
            load_model(mine, simulate_cache_quant=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_routed_experts": 7}, r"layers.0.ffn.experts.w1.scales: expected \(7, 128, 5\), found \(8, 128, 5\)"),
        ({"num_hidden_layers": 1, "num_hash_layers": 1}, r"layers.1.attn.attn_sink: expected none, found \(4,\)"),
        ({"compress_ratios": [4, 4]}, r"layers.0.attn.\S+: expected \(.*\), found none"),
    ],
    ids=["fewer-experts", "fewer-layers", "another-kind-of-layer"],
)
def test_another_config_is_refused(finished: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    mine = shutil.copytree(finished, tmp_path / "t")
    values = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(CheckpointError, match=message + r"[^\0]*hint: .*config.json was replaced"):
        load_model(mine, simulate_cache_quant=False)


def test_one_conversion_at_a_time(source: Path, finished: Path, tmp_path: Path) -> None:
    target = tmp_path / "t"
    script = (
        "import sys, pathlib\n"
        "from mlx_v4flash.journal import alone\n"
        "with alone(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    target.mkdir()
    command = [sys.executable, "-c", script, target]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(ConvertError, match="another conversion into this folder runs\nhint: wait"):
            convert(source, target)
        assert not contents(target)
        other.kill()
    convert(source, target)
    assert contents(target) == contents(finished)


def test_progress_moves_within_a_layer(source: Path, tmp_path: Path) -> None:
    target, opened = tmp_path / "t", conversion.open_source(source, tmp_path / "t")
    job, calls = conversion.plan(opened), list[tuple[int, int]]()
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, 1_000_000)
        with pytest.raises(ConvertError):
            conversion.convert(opened, target, lambda *call: calls.append(call))
    stopped = len(calls)
    conversion.convert(opened, target, lambda *call: calls.append(call))
    for part in (calls[:stopped], calls[stopped:]):
        assert part == sorted(part) and {total for _, total in part} == {job.total_bytes}
    assert calls[0][0] < 20_000 and calls[-1] == (job.total_bytes, job.total_bytes)
    # What was done before comes first, so that a bar does not take it for its speed.
    units = list(job.units)
    assert any(calls[stopped][0] == PAGE + sum(job.sizes[u] for u in units[:n]) for n in range(2, len(units)))
    largest = max(b - a for (a, _), (b, _) in itertools.pairwise(calls[:stopped] + calls[stopped + 1 :]))
    record = job.sizes["layers.1.ffn.experts"] // SMALL["n_routed_experts"]
    assert record < largest < job.sizes["layers.1.ffn.experts"] / 2
    steps = [b - a for (a, _), (b, _) in itertools.pairwise(calls)]
    assert steps.count(record) >= SMALL["n_routed_experts"]


def test_file_too_large_for_the_system(source: Path, finished: Path, tmp_path: Path) -> None:
    script = (
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (900_000, 900_000))\n"
        "sys.argv[0] = 'mlx-v4flash'\n"
        "runpy.run_module('mlx_v4flash', run_name='__main__')\n"
    )
    command = [sys.executable, "-c", script, "convert", source, tmp_path / "t"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "File too large\nhint" in done.stderr, done.stderr
    convert(source, tmp_path / "t")
    assert contents(tmp_path / "t") == contents(finished)


def test_removed_pack_is_missed(source: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, 1_300_000)
        with pytest.raises(ConvertError):
            convert(source, tmp_path / "t")
    (tmp_path / "t" / (PACK + ".part")).unlink()
    with pytest.raises(ConvertError, match=r"bytes, found 0: it was removed or truncated\nhint: remove"):
        convert(source, tmp_path / "t")


def test_damage_after_conversion_is_found(finished: Path, tmp_path: Path) -> None:
    for name, message in ((PACK, "checksums of 1 of 8 records differ"), ("dense-norm.safetensors", "checksum differs")):
        mine = shutil.copytree(finished, tmp_path / name)
        with (mine / name).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        with pytest.raises(CheckpointError, match=message):
            Converted.open(mine).verify()


def test_targets_that_hold_something_else_are_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(ConvertError, match=r"found photo.jpg"):
        convert(source, tmp_path)
    with pytest.raises(ConvertError, match="another folder than the source"):
        convert(source, source)


def test_command_and_dry_run(source: Path, finished: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "t")
    result = CliRunner().invoke(main, ["convert", str(source), target, "--dry-run"], catch_exceptions=False)
    assert result.exit_code == 0 and "the measured speed of writing" in result.stdout and not Path(target).exists()
    result = CliRunner().invoke(main, ["convert", str(source), target, "--verify"], catch_exceptions=False)
    assert result.exit_code == 0 and "verified" in result.stderr
    assert contents(Path(target)) == contents(finished)


@pytest.mark.parametrize("keep", [False, True])
def test_from_hub_holds_few_shards(
    source: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool
) -> None:
    names, cache, most = sorted(p.name for p in source.iterdir()), tmp_path / "cache", 0

    def download(repository: str, file: str, revision: str, local_dir: Path = cache) -> str:
        nonlocal most
        local_dir.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / file, local_dir / file)
        most = max(most, len(list(local_dir.glob("*.safetensors"))))
        return str(local_dir / file)

    info = SimpleNamespace(sha="c0ffee", siblings=[SimpleNamespace(rfilename=n) for n in names])
    monkeypatch.setattr(convert_source.huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(model_info=lambda *a, **k: info))
    target = tmp_path / "t"
    converted = conversion.convert(conversion.open_source("a/b", target, True, None, keep), target)
    assert converted.source["revision"] == "c0ffee"
    found, want = contents(target), contents(finished)
    assert {n: b for n, b in found.items() if n != INDEX} == {n: b for n, b in want.items() if n != INDEX}
    shards = len(list(source.glob("*.safetensors")))
    assert (most, len(list(cache.glob("*.safetensors")))) == ((shards, shards) if keep else (1, 0))


@pytest.mark.slow
def test_memory_at_real_dimensions(tmp_path: Path) -> None:
    from mlx_v4flash.tiny import real_dims

    source = write_tiny(tmp_path / "s", real_dims([3]))
    subprocess.run([*COMMAND, source, tmp_path / "t"], check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit < 4_000_000_000
