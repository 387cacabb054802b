"""Which implementation a call gets, and why."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import mlx.core as mx
import pytest

from metal_kernels import KernelError, _dispatch, active, kernels, query_rope, stream_collapse


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for a Metal device; lists the kernels that were made."""
    made: list[str] = []

    def factory(name: str, **rest: object) -> object:
        made.append(name)
        return lambda **call: [mx.zeros(call["output_shapes"][0], call["output_dtypes"][0])]

    monkeypatch.setattr(_dispatch, "kernel_factory", factory)
    return made


def collapse() -> mx.array:
    return stream_collapse(mx.ones((3, 4, 32)), mx.ones((3, 4)), mx.ones((32,)), 1e-6)


def test_nothing_is_approved_before_it_was_checked_on_this_machine(device: list[str]) -> None:
    assert _dispatch.approved == set() and _dispatch.setting() == "auto" and active() == "reference"
    collapse()
    assert device == []


def test_auto_runs_approved_kernels_and_makes_each_once(device: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "approved", {"stream_collapse"})
    collapse()
    assert collapse().sum().item() == 0 and device == ["stream_collapse"] and active() == "stream_collapse"
    assert not _dispatch.use_kernel("stream_collapse", covers=False)
    assert not _dispatch.use_kernel("route")


@pytest.mark.parametrize("choice", ["stock", "reference"])
def test_kernels_can_be_switched_off(choice: str, device: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "approved", {"stream_collapse"})
    with kernels(choice):
        collapse()
        assert active() == choice
    assert device == []


def test_metal_demands_the_kernel(device: list[str]) -> None:
    with kernels("metal"):
        collapse()
        with pytest.raises(KernelError, match="route: the kernel covers 256 experts\nhint: use the setting auto"):
            _dispatch.use_kernel("route", covers=False, limit="256 experts")
    assert device == ["stream_collapse"]


def primitives(y: mx.array) -> int:
    graph = io.StringIO()
    mx.export_to_dot(graph, y)
    return graph.getvalue().count("shape=rectangle")


def test_stock_is_the_reference_compiled() -> None:
    """Fewer operations, the same bits, whatever the constants."""
    q, cos, sin = mx.random.normal((2, 3, 5, 16)), mx.random.normal((3, 4)), mx.random.normal((3, 4))
    mx.eval(q, cos, sin)
    for eps in (1e-6, 0.5):
        with kernels("reference"):
            want = query_rope(q, cos, sin, eps)
        with kernels("stock"):
            found = query_rope(q, cos, sin, eps)
        assert 0 < primitives(found) < 0.8 * primitives(want)
        assert mx.array_equal(found, want)


@pytest.mark.skipif(mx.metal.is_available(), reason="this machine has a Metal device")
def test_metal_without_a_device_is_an_error() -> None:
    with kernels("metal"), pytest.raises(KernelError, match=r"stream_collapse: .*expected a Metal device, found"):
        collapse()


def test_settings_nest_and_unknown_ones_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with kernels("reference"):
        unknown = pytest.raises(KernelError, match="expected auto or metal or stock or reference, found 'fast'")
        with unknown, kernels("fast"):
            pass
        with kernels("stock"):
            assert _dispatch.setting() == "stock"
        assert _dispatch.setting() == "reference"
    monkeypatch.setenv("MLX_V4FLASH_KERNELS", "off")
    with pytest.raises(KernelError, match=r"MLX_V4FLASH_KERNELS: expected .* found 'off'"):
        _dispatch.setting()


@pytest.mark.parametrize(("given", "found"), [(None, "0"), ("1", "1")])
def test_float32_products_stay_float32_unless_the_user_chose(given: str | None, found: str) -> None:
    env = {k: v for k, v in os.environ.items() if k != "MLX_ENABLE_TF32"} | (
        {"MLX_ENABLE_TF32": given} if given else {}
    )
    code = "import os, metal_kernels; print(os.environ['MLX_ENABLE_TF32'])"
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == found
