"""The stand-in for the emulator on a Mac, with the emulator in the place of the Mac."""

from __future__ import annotations

import emulator
import mlx.core as mx
import on_device
import pytest

from metal_kernels import _dispatch, kernels, stream_expand

pytestmark = pytest.mark.usefixtures("emulation")


def test_launches_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "factory", emulator.metal_kernel)
    monkeypatch.setattr(_dispatch, "kernel_factory", on_device.metal_kernel)
    x, y = mx.ones((1, 2, 4, 8)), mx.ones((1, 2, 8))
    with kernels("metal"), on_device.record(contract=True) as session:
        mx.eval(stream_expand(x, y, mx.ones((1, 2, 4)), mx.ones((1, 2, 4, 4))))
    (launch,) = session.dispatches
    assert launch.kernel == "stream_expand"
    assert all(size > 0 for size in (*launch.grid, *launch.threadgroup))
    with pytest.raises(pytest.skip.Exception, match="traffic"):
        launch.traffic  # noqa: B018
