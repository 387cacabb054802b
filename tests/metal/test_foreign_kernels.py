"""Kernels that we did not write, from the installed mlx and mlx-lm, agree with MLX's operations on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import compiler
import emulator
import mlx.core as mx
import numpy as np
import pytest
from emulator import Argument, Text
from rewrite import OPENCL, STRICT

pytestmark = pytest.mark.usefixtures("emulation")

KERNELS = "mlx/backend/metal/kernels/"
Array = np.ndarray


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape)


@pytest.fixture(autouse=True)
def seed() -> None:
    mx.random.seed(0)


def expect_close(found: Any, expected: mx.array, bound: float = 2e-5) -> None:
    a, b = np.array(mx.array(found).astype(mx.float32)), np.array(expected.astype(mx.float32))
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= bound * np.abs(b).max()


# --- MLX: kernel functions in its headers -----------------------------------------------------------


def run(
    headers: Sequence[str],
    expression: str,
    inputs: dict[str, Any],
    output: tuple[str, tuple[int, ...]],
    groups: tuple[int, ...],
    threadgroup: tuple[int, ...],
    dialect: str = STRICT,
    constants: dict[int, object] | None = None,
) -> Array:
    """Buffers are bound in the order of `inputs`, where the name of the float32 output stands for it."""
    text = "".join(f'#include "{KERNELS}{name}.h"\n' for name in ["utils", *headers])
    arguments = []
    for name, value in inputs.items():
        if name == output[0]:
            arguments.append(Argument(name, None, True, 4 * int(np.prod(output[1]))))
        else:
            arguments.append(Argument(name, np.array(value)))
    source = compiler.Source(text, expression, dialect, False, tuple((constants or {}).items()), second_opinion=False)
    grid = [n * size for n, size in zip(groups, threadgroup, strict=True)]
    (raw,) = emulator.run(Text(expression, text), source, arguments, grid, threadgroup)
    return raw.view(np.float32).reshape(output[1])


def ints(**values: int) -> dict[str, Array]:
    return {name: np.array([value], np.int32) for name, value in values.items()}


NO_BATCH = {
    **ints(x_batch_ndims=0),
    "x_shape": np.zeros(1, np.int32),
    "x_strides": np.zeros(1, np.int64),
    **ints(w_batch_ndims=0),
    "w_shape": np.zeros(1, np.int32),
    "w_strides": np.zeros(1, np.int64),
    "s_strides": np.zeros(1, np.int64),
}


def test_softmax() -> None:
    x = normal(3, 301)
    inputs = {"in": x, "out": None, **ints(axis_size=301)}
    y = run(["softmax"], "softmax_single_row<float, float, 4>", inputs, ("out", x.shape), (3, 1, 1), (96, 1, 1))
    expect_close(y, mx.softmax(x, axis=-1))


def test_logsumexp() -> None:
    x = normal(3, 301)
    inputs = {"in": x, "out": None, **ints(axis_size=301)}
    y = run(["logsumexp"], "logsumexp_looped<float, float, 4>", inputs, ("out", (3,)), (3, 1, 1), (1024, 1, 1))
    expect_close(y, mx.logsumexp(x, axis=-1))


def test_block_sort() -> None:
    x = normal(2, 200)
    strides = {
        "in_stride_sorted_axis": 1,
        "out_stride_sorted_axis": 1,
        "in_stride_segment_axis": 200,
        "out_stride_segment_axis": 200,
    }
    inputs = {"inp": x, "out": None, **ints(size_sorted_axis=200, **strides)}
    y = run(["sort"], "block_sort<float, float, false, 64, 4>", inputs, ("out", x.shape), (1, 2, 1), (64, 1, 1))
    assert np.array_equal(y, np.sort(np.array(x), axis=-1))


@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_vector(causal: bool) -> None:
    q, k, v = normal(1, 4, 1, 64), normal(1, 2, 77, 64), normal(1, 2, 77, 64)
    stride = {"k_head_stride": 77 * 64, "k_seq_stride": 64, "v_head_stride": 77 * 64, "v_seq_stride": 64}
    inputs = {"queries": q, "keys": k, "values": v, "out": None, **ints(gqa_factor=2, N=77)}
    inputs |= {name: np.array([value], np.uint64) for name, value in stride.items()}
    inputs |= {"scale": np.array([0.125], np.float32)}
    inputs |= {name: np.zeros(1, np.int32) for name in ("bmask", "fmask", "m1", "m2", "m3", "sinks", "heads")}
    constants = dict.fromkeys((20, 21, 23, 24, 25), False) | {22: causal, 26: 1}
    y = run(
        ["sdpa_vector"],
        "sdpa_vector<float, 64>",
        inputs,
        ("out", q.shape),
        (4, 1, 1),
        (1024, 1, 1),
        constants=constants,
    )
    expect_close(y, mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125))


def quantized(rows: int, columns: int) -> tuple[mx.array, mx.array]:
    w, scales = mx.quantize(normal(rows, columns), group_size=32, bits=4, mode="mxfp4")
    return w, scales


QUANTIZED = ["steel/gemm/gemm", "quantized_utils", "fp_quantized"]


def test_product_of_mxfp4_and_vector() -> None:
    x, (w, scales) = normal(1, 512), quantized(24, 512)
    inputs = {"w": w, "scales": scales, "global_scale": np.ones(1, np.float32), "x": x, "y": None}
    inputs |= ints(in_vec_size=512, out_vec_size=24) | NO_BATCH
    y = run(QUANTIZED, "fp_qmv_fast<float, 32, 4, false>", inputs, ("y", (1, 24)), (1, 3, 1), (32, 2, 1), OPENCL)
    expect_close(y, mx.quantized_matmul(x, w, scales, group_size=32, bits=4, mode="mxfp4"))


def test_product_of_mxfp4_and_matrix() -> None:
    """Tiles in threadgroup memory, and simdgroup_matrix."""
    x, (w, scales) = normal(37, 96), quantized(64, 96)
    inputs = {"w": w, "scales": scales, "global_scale": np.ones(1, np.float32), "x": x, "y": None}
    inputs |= ints(K=96, N=64, M=37) | NO_BATCH
    y = run(QUANTIZED, "fp_qmm_t<float, 32, 4, true, false>", inputs, ("y", (37, 64)), (2, 2, 1), (32, 2, 2), OPENCL)
    expect_close(y, mx.quantized_matmul(x, w, scales, group_size=32, bits=4, mode="mxfp4"))


def test_steel_gemm() -> None:
    M, N, K = 70, 33, 40
    a, b = normal(M, K), normal(N, K)
    # M, N, K, leading dimensions, tiles, batch strides, swizzle, whole iterations over K, batch dimensions
    parts = (
        np.array([M, N, K, K, K, N, 2, 3], np.int32),
        np.zeros(3, np.int64),
        np.array([0, K // 16, 0, 0], np.int32),
    )
    parameters = np.concatenate([part.view(np.uint8) for part in parts])
    inputs = {
        "A": a,
        "B": b,
        "C": np.zeros(1, np.float32),
        "D": None,
        "params": parameters,
        "addmm": np.zeros(32, np.int8),
    }
    inputs |= {"batch_shape": np.ones(1, np.int32), "batch_strides": np.zeros(2, np.int64)}
    # no batch, no source, no axpby; M, N and K are not multiples of the tile
    constants = dict.fromkeys((10, 100, 110, 200, 201, 202), False)
    y = run(
        ["steel/gemm/gemm", "steel/gemm/kernels/steel_gemm_fused"],
        "gemm<float, 32, 32, 16, 2, 2, false, true, float>",
        inputs,
        ("D", (M, N)),
        (2, 3, 1),
        (32, 2, 2),
        OPENCL,
        constants,
    )
    expect_close(y, a @ b.T)


# --- mlx-lm: bodies for mx.fast.metal_kernel --------------------------------------------------------


@pytest.fixture
def of_mlx_lm(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A copy of a module of mlx-lm that believes it has a GPU: these modules make their kernels when imported."""
    monkeypatch.setattr(mx.fast, "metal_kernel", emulator.metal_kernel)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    mx.disable_compile()

    def load(name: str) -> ModuleType:
        spec = importlib.util.find_spec(f"mlx_lm.{name}")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    mx.enable_compile()


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_gated_delta(of_mlx_lm: Callable[[str], ModuleType], dtype: mx.Dtype, masked: bool) -> None:
    module = of_mlx_lm("models.gated_delta")
    B, T, heads, value_heads, width = 2, 3, 2, 4, 64
    q, k = ((normal(B, T, heads, width) * width**-0.5).astype(dtype) for _ in range(2))
    v = normal(B, T, value_heads, 16).astype(dtype)
    g, beta = mx.sigmoid(normal(B, T, value_heads)), mx.sigmoid(normal(B, T, value_heads)).astype(dtype)
    state = normal(B, value_heads, 16, width)
    mask = mx.array([[True, True, False]] * B) if masked else None
    # All lanes write the same 0 where the mask is false.
    with emulator.emulate(allow={"same_value_writes"} if masked else ()):
        found = module.gated_delta_kernel(q, k, v, g, beta, state, mask)
    bound = 2e-5 if dtype == mx.float32 else 2e-2
    (y, end), (expected, expected_end) = found, module.gated_delta_ops(q, k, v, g, beta, state, mask)
    seen = 2 if masked else 3  # what comes out for a masked token is not defined
    expect_close(y[:, :seen], expected[:, :seen], bound)
    expect_close(end, expected_end, bound)


def test_ssm_update(of_mlx_lm: Callable[[str], ModuleType]) -> None:
    module = of_mlx_lm("models.ssm")
    n, heads, width, size, groups = 2, 4, 64, 64, 2
    x, A, D = normal(n, 1, heads, width), normal(heads), normal(heads)
    B, C = normal(n, 1, groups, size), normal(n, 1, groups, size)
    dt, bias, state = normal(n, 1, heads), normal(heads), normal(n, heads, width, size)
    found = module.ssm_update_kernel(x, A, B, C, D, dt, bias, state, (0.001, 100.0))
    for a, b in zip(found, module.ssm_attn(x, A, B, C, D, dt, bias, state), strict=True):
        expect_close(a, b, 1e-4)


def test_sinkhorn(of_mlx_lm: Callable[[str], ModuleType]) -> None:
    module = of_mlx_lm("models.deepseek_v41")
    comb, eps = mx.softmax(normal(5, 7, 4, 4), axis=-1) + 1e-6, mx.array([1e-6])
    (found,) = module._sinkhorn_kernel(
        inputs=[comb.reshape(-1, 4, 4), eps],
        template=[("HC", 4), ("ITERS", 20)],
        grid=(35, 1, 1),
        threadgroup=(35, 1, 1),
        output_shapes=[(35, 4, 4)],
        output_dtypes=[mx.float32],
    )
    expect_close(found.reshape(comb.shape), module._sinkhorn(comb, iters=20, eps=eps))


def test_expert_routing(of_mlx_lm: Callable[[str], ModuleType]) -> None:
    module = of_mlx_lm("kernels.expert_routing")
    logits, bias = normal(5, 64), normal(64) * 0.1
    chosen, weights = module.expert_routing(logits, bias, top_k=6, multiplier=1.0, score_eps=1e-20, route_scale=2.5)
    scores = mx.sigmoid(logits)
    expected = mx.argsort(-(scores + bias), axis=-1)[:, :6]
    assert [set(row) for row in chosen.tolist()] == [set(row) for row in expected.tolist()]
    picked = mx.take_along_axis(scores, chosen.astype(mx.int32), axis=-1)
    expect_close(weights, 2.5 * picked / picked.sum(axis=-1, keepdims=True))


def test_rms_norm_sigmoid_gate(of_mlx_lm: Callable[[str], ModuleType]) -> None:
    module = of_mlx_lm("kernels.rms_norm_sigmoid_gate")
    x, gate = normal(2, 3, 5, 64).astype(mx.bfloat16), normal(2, 5, 192).astype(mx.bfloat16)
    expected = mx.fast.rms_norm(x.astype(mx.float32), None, 1e-6).swapaxes(1, 2).reshape(2, 5, 192)
    found = module.rms_norm_sigmoid_gate(x, gate, eps=1e-6)
    expect_close(found, expected * mx.sigmoid(gate.astype(mx.float32)), 1e-2)
