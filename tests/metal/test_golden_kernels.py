"""Golden cases with every kernel emulated: equal to the official code's numbers, and to the reference run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import golden
import mlx.core as mx
import numpy as np
import pytest
from emulator import Session

from metal_kernels import _dispatch, kernels
from mlx_v4flash import Model, compressor, doctor, load_model, moe

# Past the window, a group of 128, and the rows that are attended without a choice; the last steps close a group of 4.
PREFILL, STEPS = 133, 4
# Where the model chooses, and which of the results is the choice.
CHOICES = {(compressor, "index_topk"): lambda out: out, (moe, "route"): lambda out: out[0]}


def run(model: Model, ids: mx.array) -> np.ndarray:
    """Logits of a prefill and of single tokens after it, [T, V]."""
    cache = model.make_cache()
    parts = [model(ids[:, :PREFILL], cache)]
    parts += [model(ids[:, t : t + 1], cache) for t in range(PREFILL, PREFILL + STEPS)]
    return np.concatenate([np.array(part)[0] for part in parts])


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """What the model chooses, sorted: rows of each query, experts of each token."""
    found: list[np.ndarray] = []

    def recorded(op: Callable[..., Any], choice: Callable[[Any], mx.array]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            out = op(*args)
            found.append(np.sort(np.array(choice(out)), axis=-1))
            return out

        return call

    for (module, name), choice in CHOICES.items():
        monkeypatch.setattr(module, name, recorded(getattr(module, name), choice))
    return found


@pytest.mark.parametrize(
    ("case", "experts"), [("f32-exact", "mlx"), ("official-qat", "mlx"), ("official-qat", "metal")]
)
def test_logits(
    case: str, experts: str, emulated: Session, chosen: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a machine where every kernel was found right.
    monkeypatch.setattr(_dispatch, "approved", set(doctor.with_kernel()))
    want = golden.expected(case)
    model = load_model(golden.folder(case), dtype="float32", simulate_cache_quant=case == "official-qat")
    ids = mx.array(want["input_ids"])[None]
    with kernels("auto"), _dispatch.expert_prefill(experts):
        found = run(model, ids)
    with_kernels = chosen.copy()
    chosen.clear()
    ran = {dispatch.kernel for dispatch in emulated.dispatches}
    assert ran >= {"stream_enter", "latents", "compress", "sparse_attention", "route", "expert_gate_up"}, ran
    assert "attention_prefill" in ran and ("expert_down_prefill" in ran) == (experts == "metal"), ran
    golden.expect_within(found, want["logits"][: PREFILL + STEPS], golden.tolerance(case)["float32"]["logits"], case)
    with kernels("reference"):
        error = golden.relative_rms(found, run(model, ids))
    assert 0 < error <= 5e-6, f"{case}: {error:.2e} from the reference run"
    assert any(choice.shape[-1] == model.config.index_topk for choice in chosen), "no rows were chosen"
    for one, other in zip(with_kernels, chosen, strict=True):
        np.testing.assert_array_equal(one, other)
