"""What a decode step launches, counted in the traced graph; no kernel is run."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_v4flash import Model, load_model
from mlx_v4flash.tiny import write_tiny


@pytest.fixture(scope="module")
def tool() -> Any:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
    try:
        return importlib.import_module("count_launches")
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def model(tool: Any, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(write_tiny(tmp_path_factory.mktemp("model") / "m", tool.CONFIG))


@pytest.mark.parametrize(("number", "router"), [(0, "route_hash"), (1, "route")], ids=["by token id", "by score"])
def test_the_expert_sublayer_is_seven_kernels_and_nothing_else(
    number: int, router: str, tool: Any, model: Model
) -> None:
    x = model.streams(mx.zeros((1, 1), mx.int32))
    mx.eval(x)
    with tool.as_on_a_mac():
        found = tool.with_kernels(tool.expert_sublayer(model, number), x)
    entry, experts = ["stream_project", "stream_enter"], ["expert_gate_up", "expert_down_sum"]
    assert found == dict.fromkeys([*entry, "project_f32", router, *experts, "stream_expand"], 1)


@pytest.mark.parametrize(
    ("number", "position", "launches"),
    [(1, 257, 19), (2, 257, 24), (2, 259, 28), (3, 257, 21)],
    ids=["window", "CSA", "CSA, a group closes", "HCA"],
)
def test_launches_of_a_layer(number: int, position: int, launches: int, tool: Any, model: Model) -> None:
    x = model.streams(mx.zeros((1, 1), mx.int32))
    mx.eval(x)
    step = tool.decode_step(model, number, position)
    with tool.as_on_a_mac():
        assert tool.with_kernels(step, x).total() == launches


def test_kernels_launch_less_than_a_tenth_of_stock_mlx(tool: Any, model: Model) -> None:
    """In a layer with only the window; and what mlx-lm's model launches is counted, not assumed."""
    x = model.streams(mx.zeros((1, 1), mx.int32))
    mx.eval(x)
    steps = [tool.decode_step(model, 1, 257) for _ in range(2)]
    with tool.as_on_a_mac():
        ours, stock = tool.with_kernels(steps[0], x), tool.with_stock(steps[1], x)
    theirs = tool.in_mlx_lm(0, 257, x)
    assert 10 * ours.total() < stock.total()
    assert theirs["sinkhorn"] == 2 and theirs["attention"] == 1 and theirs["GatherQMM"] == 4
