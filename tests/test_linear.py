"""Which inputs of linear layers are rounded to FP8 when activations are quantised (spec 6.4), and how."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from metal_kernels import fp8_round_trip
from mlx_v4flash import attention, load_model, moe
from mlx_v4flash.experts import products
from mlx_v4flash.linear import ACTIVATION_BLOCK, Linear, Numerics, QuantizedLinear, WideLinear, stacked_linear
from mlx_v4flash.tiny import TINY, write_tiny

# One layer of each kind; the indexer chooses 9 of 11 rows.
SMALL = {
    **TINY, "num_hidden_layers": 3, "compress_ratios": [0, 4, 128], "num_hash_layers": 1, "hidden_size": 128,
    "num_attention_heads": 2, "o_groups": 2, "index_topk": 9, "n_routed_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
# wo_b and three of the shared expert in each layer; and stacked ones, wqkv_a and wq_b.
QUANTIZED_LINEARS, STACKED = 3 * 4, 3 * 2


def test_blocks_are_128_values() -> None:
    """A large value makes what is tiny beside it vanish: in its own block, and in no other."""
    large, tiny = 448.0, 2.0**-9 * 0.3
    x = np.full(384, tiny, np.float32)
    x[128] = large
    found = np.array(Numerics(quantize_activations=True).round_input(mx.array(x)))
    assert found[128] == large
    assert not found[129:256].any(), "the block of the large value ends early"
    np.testing.assert_allclose(np.delete(found, np.s_[128:256]), tiny, rtol=2**-4, err_msg="another block is affected")


def test_inputs_stay_as_they_are_unless_asked() -> None:
    x = mx.random.normal((3, 128), key=mx.random.key(0))
    assert Numerics().round_input(x) is x


@pytest.mark.parametrize("T", [1, 7])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("quantized", [True, False], ids=["mxfp8", "plain"])
def test_stacked_layers_give_the_bits_of_each_alone(quantized: bool, dtype: mx.Dtype, T: int) -> None:
    """The sizes of a layer's first product, halved: query latent and row."""
    D, sizes = 2048, (512, 256)
    x, weight = normal(1, T, D).astype(dtype), normal(sum(sizes), D).astype(dtype) * D**-0.5

    def layer(rows: slice) -> Linear:
        plain = nn.Linear(D, len(weight[rows]), bias=False)
        plain.weight = weight[rows]
        if not quantized:
            return plain
        scaled = QuantizedLinear(D, len(weight[rows]))
        scaled.weight, scaled.scales = mx.quantize(weight[rows], group_size=32, bits=8, mode="mxfp8")
        return scaled

    found = stacked_linear(layer(slice(None)), x, sizes)
    for part, rows in zip(found, (slice(512), slice(512, None)), strict=True):
        np.testing.assert_array_equal(np.array(part.astype(mx.float32)), np.array(layer(rows)(x).astype(mx.float32)))


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape)))


class Inputs:
    """What reaches the products of a model, by kind of product."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: dict[str, list[mx.array]] = {}
        for owner, name, position in (
            (QuantizedLinear, "__call__", 1),
            (WideLinear, "__call__", 1),
            (products, "expert_gate_up", 0),
            (products, "expert_down", 0),
            (attention, "grouped_linear", 1),
            (attention, "stacked_linear", 1),
            (moe, "project_f32", 0),
        ):
            kind = owner.__name__ if name == "__call__" else name
            monkeypatch.setattr(owner, name, self._watched(getattr(owner, name), kind, position))

    def _watched(self, product: Callable[..., Any], kind: str, position: int) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            self.seen.setdefault(kind, []).append(args[position])
            return product(*args)

        return watched

    def rounded(self, kind: str) -> list[bool]:
        """Of each product, whether its input is on the FP8 grid already."""
        return [bool(mx.array_equal(fp8_round_trip(x, ACTIVATION_BLOCK), x)) for x in self.seen[kind]]


@pytest.mark.parametrize("asked", [True, False], ids=["asked", "not-asked"])
def test_inputs_of_quantised_products_are_rounded(asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m = load_model(write_tiny(tmp_path / "m", SMALL), dtype="float32", quantize_activations=asked)
    inputs = Inputs(monkeypatch)
    mx.eval(m(mx.arange(47)[None] % SMALL["vocab_size"]))
    assert len(inputs.seen["QuantizedLinear"]) == QUANTIZED_LINEARS
    assert len(inputs.seen["stacked_linear"]) == STACKED
    for kind in ("QuantizedLinear", "stacked_linear", "expert_gate_up", "expert_down"):
        assert all(found == asked for found in inputs.rounded(kind)), f"{kind}: {inputs.rounded(kind)}"
    # The head, compressors, head weights of the indexer; wo_a; the router.
    for kind in ("WideLinear", "grouped_linear", "project_f32"):
        assert not any(inputs.rounded(kind)), f"{kind}: {inputs.rounded(kind)}"
