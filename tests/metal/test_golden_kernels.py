"""Golden cases with every kernel emulated: equal to the official code's numbers, and to the reference run."""

from __future__ import annotations

import golden
import mlx.core as mx
import numpy as np
import pytest
from emulator import Session

from metal_kernels import _dispatch, kernels
from mlx_v4flash import Model, doctor, load_model

PREFILL, STEPS = 37, 4


def run(model: Model, ids: mx.array) -> np.ndarray:
    """Logits of a prefill and of single tokens after it, [T, V]."""
    cache = model.make_cache()
    parts = [model(ids[:, :PREFILL], cache)]
    parts += [model(ids[:, t : t + 1], cache) for t in range(PREFILL, PREFILL + STEPS)]
    return np.concatenate([np.array(part)[0] for part in parts])


@pytest.mark.parametrize(
    ("case", "experts"), [("f32-exact", "mlx"), ("official-qat", "mlx"), ("official-qat", "metal")]
)
def test_logits(case: str, experts: str, emulated: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a machine where every kernel was found right.
    monkeypatch.setattr(_dispatch, "approved", set(doctor.with_kernel()))
    want = golden.expected(case)
    model = load_model(golden.folder(case), dtype="float32", simulate_cache_quant=case == "official-qat")
    ids = mx.array(want["input_ids"])[None]
    with kernels("auto"), _dispatch.expert_prefill(experts):
        found = run(model, ids)
    ran = {dispatch.kernel for dispatch in emulated.dispatches}
    assert ran >= {"stream_mix", "key_row", "compress", "sparse_attention", "route", "expert_gate_up"}, ran
    assert "attention_prefill" in ran and ("expert_down_prefill" in ran) == (experts == "metal"), ran
    golden.expect_within(found, want["logits"][: PREFILL + STEPS], golden.tolerance(case)["float32"]["logits"], case)
    with kernels("reference"):
        error = golden.relative_rms(found, run(model, ids))
    assert 0 < error <= 5e-6, f"{case}: {error:.2e} from the reference run"
