"""Plans of memory: what they count, what they refuse, and whether a run keeps to them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import huggingface_hub
import mlx.core as mx
import pytest
from click.testing import CliRunner
from huggingface_hub.errors import LocalEntryNotFoundError
from mlx.utils import tree_flatten

from mlx_v4flash import convert as conversion
from mlx_v4flash import load_model
from mlx_v4flash.checkpoint import Checkpoint
from mlx_v4flash.cli import main
from mlx_v4flash.config import ModelConfig
from mlx_v4flash.converted import Converted
from mlx_v4flash.engine import stream_tokens
from mlx_v4flash.errors import RequestError
from mlx_v4flash.experts.trace import TraceWriter
from mlx_v4flash.plan import cache_bytes, make_plan, pass_bytes, sizes_of
from mlx_v4flash.tiny import REAL, TINY, write_tiny

MEDIUM = TINY | {
    "hidden_size": 256, "head_dim": 256, "num_attention_heads": 8, "moe_intermediate_size": 256,
    "num_hidden_layers": 3, "compress_ratios": [0, 4, 128], "num_hash_layers": 1, "n_routed_experts": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("plan")
    made = {"tiny": write_tiny(top / "tiny"), "medium": write_tiny(top / "medium", MEDIUM)}
    conversion.convert(conversion.open_source(made["tiny"], top / "converted"), top / "converted")
    return made | {"converted": top / "converted"}


def split(model):
    """Bytes of parameters outside the routed experts, and of these."""
    sizes = {path: a.nbytes for path, a in tree_flatten(model.parameters())}
    routed = sum(n for path, n in sizes.items() if ".ffn.experts." in path)
    return sum(sizes.values()) - routed, routed


@pytest.mark.parametrize("name", ["tiny", "medium", "converted"])
def test_weights_are_counted_as_memory_holds_them(folders, name):
    dense, routed = split(load_model(folders[name], experts="resident"))
    opened = (Converted if name == "converted" else Checkpoint).open(folders[name])
    c = opened.config
    for sizes in (sizes_of(c, opened), sizes_of(c)):
        assert dense * 0.999 <= sizes.dense <= dense * 1.02
        assert routed <= max(sizes.records) * c.num_hidden_layers * c.n_routed_experts <= routed * 1.02


def test_the_real_model():
    sizes = sizes_of(ModelConfig.from_dict(REAL))
    assert max(sizes.records) == 13_369_344  # spec: 816 pages of 16 KiB
    assert 8.85e9 < sizes.dense < 9.2e9  # 8.85 GB in the files; FP8 scales grow


@pytest.mark.parametrize(("dtype", "packed"), [("bfloat16", True), ("float32", False)])
@pytest.mark.parametrize("name", ["tiny", "medium"])
def test_a_pass_takes_no_more_than_planned(folders, name, dtype, packed):
    model = load_model(folders[name], experts="resident", dtype=dtype)
    cache, chunk, worst = model.make_cache(), 192, 0
    for _ in range(3):
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(model(mx.zeros((1, chunk), mx.int32), cache), *[leaf for c in cache for leaf in c.leaves()])
        worst = max(worst, mx.get_peak_memory() - held)
    assert sum(c.nbytes for c in cache) <= cache_bytes(model.config, 3 * chunk, packed)
    assert worst <= pass_bytes(model.config, chunk)


def test_parts_are_the_total_and_the_budget_is_kept():
    config = ModelConfig.from_dict(REAL)
    sizes = sizes_of(config)
    for memory in range(19, 200, 7):
        plan = make_plan(config, sizes, memory=f"{memory}GB")
        assert plan.fits
        assert plan.total <= plan.budget
        assert all(6 <= n <= 256 for n in plan.slots)
        assert plan.parts["caches"] == plan.parts["kept caches"] == cache_bytes(config, plan.max_context, True)
        if plan.streamed:
            assert plan.budget - plan.total < max(sizes.records)
            assert max(plan.slots) - min(plan.slots) <= 1
    assert not plan.streamed


@pytest.mark.parametrize("context", [1, 4096, 131072, 1048576])
def test_smallest_is_the_border(context):
    config = ModelConfig.from_dict(REAL)
    sizes = sizes_of(config)
    smallest = make_plan(config, sizes, memory="1GB", max_context=context).smallest
    at, below = (make_plan(config, sizes, memory=smallest - n, max_context=context) for n in (0, 1))
    assert (at.fits, at.slots, at.total) == (True, [6] * 43, smallest)
    assert not below.fits
    with pytest.raises(RequestError, match=f"at least {smallest:,} bytes for a context of {context:,}"):
        below.expect_fits()


def test_more_context_leaves_less_to_experts():
    config = ModelConfig.from_dict(REAL)
    sizes = sizes_of(config)
    few, many = (make_plan(config, sizes, memory="64GB", max_context=n) for n in (1048576, 4096))
    assert sum(few.slots) < sum(many.slots)


@pytest.mark.parametrize("wrong", [{"max_context": 0}, {"max_context": 1 << 21}, {"chunk": 0}, {"memory": "lots"}])
def test_numbers_that_cannot_be(wrong):
    config = ModelConfig.from_dict(REAL)
    with pytest.raises(RequestError, match="expected"):
        make_plan(config, sizes_of(config), **wrong)


def test_a_conversation_ends_where_the_plan_does(folders):
    model = load_model(folders["tiny"], memory="4GB", max_context=24)
    assert len(list(stream_tokens(model, [1] * 20, 100, prompt_cache=model.make_cache()))) == 4
    with pytest.raises(RequestError, match="fewer than the 24 tokens that memory was planned for, found 24"):
        next(stream_tokens(model, [1] * 24, 1, prompt_cache=model.make_cache()))
    with pytest.raises(RequestError, match="prefill_chunk: expected at most the planned 2048, found 2049"):
        next(stream_tokens(model, [1], 1, prompt_cache=model.make_cache(), prefill_chunk=2049))


def test_a_small_model_needs_no_plan(folders, monkeypatch):
    nbytes = Checkpoint.open(folders["tiny"]).nbytes
    monkeypatch.setattr("mlx_v4flash.plan.usable_bytes", lambda: 4 * nbytes)
    assert load_model(folders["tiny"]).plan is None
    monkeypatch.setattr("mlx_v4flash.plan.usable_bytes", lambda: 4 * nbytes - 1)
    with pytest.raises(RequestError, match="memory: expected at least"):
        load_model(folders["tiny"])


def test_growth_past_the_plan_stops_the_request(folders):
    model = load_model(folders["tiny"], memory="4GB")
    steps = stream_tokens(model, [1] * 20, 100, prompt_cache=model.make_cache())
    next(steps)
    model.plan = dataclasses.replace(model.plan, budget=model.plan.budget - model.plan.array_bytes + 1000)
    with pytest.raises(RequestError, match=r"memory: expected at most [0-9,]+ bytes, of them 1,000 in arrays"):
        next(steps)


RUN = """
import sys
from mlx_v4flash import load_model
from mlx_v4flash.engine import stream_tokens
from mlx_v4flash.memory import peak_bytes
model = load_model(sys.argv[1], memory=int(sys.argv[2]), max_context=600)
assert model.store is not None and not all(model.store.whole)
assert len(list(stream_tokens(model, [n % 250 for n in range(500)], 20, prompt_cache=model.make_cache()))) == 20
print(peak_bytes())
"""


def test_a_run_keeps_to_its_budget(folders):
    opened = Checkpoint.open(folders["medium"])
    budget = make_plan(opened.config, sizes_of(opened.config, opened), memory=1, max_context=600).smallest
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folders["medium"]), str(budget + 1000)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= budget


def test_command():
    args = ["plan", "--real", "--disk", "5GB", "--bandwidth", "400GB"]
    fits = CliRunner().invoke(main, [*args, "--memory", "64GB", "--json"], catch_exceptions=False)
    found = json.loads(fits.output)
    assert fits.exit_code == 0
    assert found["fits"] and found["total"] == sum(found["parts"].values()) <= 64e9
    miss = 1 - found["estimate"]["hit_rate"]
    read = found["parts"]["weights"] - 129280 * 4096 * 2 + 43 * 6 * found["record"]
    expected = 1 / (miss * 43 * 6 * found["record"] / 5e9 + read / 400e9)
    assert found["estimate"]["tokens_per_s"] == pytest.approx(expected)
    assert [other["budget"] for other in found["other_budgets"]] == [32e9, 48e9, 96e9, 128e9]
    small = CliRunner().invoke(main, [*args, "--memory", "8GB"], catch_exceptions=False)
    assert small.exit_code == 1
    assert "does not fit" in small.output


def test_command_of_a_folder(folders):
    found = CliRunner().invoke(main, ["plan", str(folders["tiny"]), "--memory", "2GB"], catch_exceptions=False)
    assert found.exit_code == 0
    assert "all experts in memory" in found.output
    assert CliRunner().invoke(main, ["plan"]).exit_code == 2


def test_command_refuses_a_trace_of_another_model(folders, tmp_path):
    TraceWriter(tmp_path / "t", 6, 16, 2)
    found = CliRunner().invoke(main, ["plan", str(folders["tiny"]), "--trace", str(tmp_path / "t")])
    assert found.exit_code == 1
    assert "expected a trace of 5 layers with 8 experts, 3 chosen, found one of 6 layers with 16, 2" in found.output


def test_command_of_a_folder_that_is_not_there():
    found = CliRunner().invoke(main, ["plan", "/nowhere"])
    assert found.exit_code == 1
    assert "/nowhere: expected a folder, found nothing" in found.output


def test_command_of_a_repository(folders, monkeypatch):
    asked = []

    def download(repository, file, revision):
        asked.append((repository, file, revision))
        return str(folders["tiny"] / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    args = ["plan", "someone/tiny", "--revision", "v1", "--memory", "2GB", "--json"]
    found = CliRunner().invoke(main, args, catch_exceptions=False)
    assert found.exit_code == 0
    assert asked == [("someone/tiny", "config.json", "v1")]
    config = ModelConfig.from_folder(folders["tiny"])
    assert json.loads(found.output)["parts"]["weights"] == sizes_of(config).dense

    def unreachable(repository, file, revision):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    found = CliRunner().invoke(main, ["plan", "someone/tiny"])
    assert found.exit_code == 1
    assert "someone/tiny: never downloaded before, and Hugging Face cannot be reached" in found.output
    assert "hint: --real plans V4-Flash without any file" in found.output
