"""The emulator itself: what it must report, what it must accept, and that it compiles what MLX would."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compiler
import emulator
import mlx.core as mx
import numpy as np
import pytest
from emulator import MetalError
from lint import pointers_without_space
from signature import generate
from wrong_kernels import BARRIER, COMPILE, RUNTIME, Wrong

pytestmark = pytest.mark.usefixtures("emulation")

X = mx.arange(64).astype(mx.float32)
N = mx.array([3, 4, 5])


def run(source: str, header: str = "", threads: int = 64, per_group: int = 64, **call: Any) -> mx.array:
    kernel = emulator.metal_kernel("example", ["x", "n"], ["y"], source, header)
    call = {"inputs": [X, N], "output_shapes": [(64,)], "output_dtypes": [mx.float32]} | call
    (y,) = kernel(grid=(threads, 1, 1), threadgroup=(per_group, 1, 1), **call)
    return y


def by_name(wrong: Wrong) -> str:
    return wrong.name


# --- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", RUNTIME, ids=by_name)
def test_mistake_at_run_time_is_reported(wrong: Wrong) -> None:
    with emulator.emulate(timeout_s=1), pytest.raises(MetalError) as caught:
        run(wrong.source, wrong.header, wrong.threads, wrong.per_group)
    assert re.search(wrong.says, caught.value.reason), caught.value
    if wrong.line is not None:
        assert caught.value.line == wrong.line, caught.value
        assert caught.value.thread is not None


@pytest.mark.parametrize("wrong", COMPILE, ids=by_name)
def test_mistake_in_the_text_is_reported(wrong: Wrong) -> None:
    with pytest.raises(MetalError) as caught:
        run(wrong.source, wrong.header)
    assert re.search(wrong.says, caught.value.reason), caught.value
    if wrong.line is not None:
        assert caught.value.line == wrong.line, caught.value


def test_without_checks_what_leaves_a_buffer_is_still_noticed() -> None:
    with emulator.emulate(checked=False):
        for source, says in (
            ("y[thread_position_in_grid.x - 100000] = 1.0f;", "out of bounds"),
            ("((device float*)x)[thread_position_in_grid.x] = 1.0f;", "write to input x"),
        ):
            with pytest.raises(MetalError, match=says):
                run(source)


def test_allowances() -> None:
    same = "y[0] = 1.0f; if (thread_position_in_grid.x > 0) y[thread_position_in_grid.x] = 1.0f;"
    with pytest.raises(MetalError, match="race"):
        run(same)
    with emulator.emulate(allow={"same_value_writes"}):
        assert run(same)[0].item() == 1
        with pytest.raises(MetalError, match="writes another value"):
            run("y[0] = thread_position_in_grid.x;")
    divergent = f"uint i = thread_position_in_grid.x; if (i < 32) {{ {BARRIER} }} y[i] = 1.0f;"
    with emulator.emulate(allow={"divergent_barrier"}):
        assert run(divergent)[0].item() == 1
    unwritten = "threadgroup float s[64]; uint i = thread_position_in_grid.x; y[i] = s[i] < 0 ? 1.0f : 1.0f;"
    with emulator.emulate(allow={"uninit_threadgroup"}):
        assert run(unwritten)[0].item() == 1
    with pytest.raises(ValueError, match="allow: expected some of"), emulator.emulate(allow={"anything"}):
        pass


def test_inputs_of_fewer_than_8_elements_are_constant() -> None:
    header = "inline float f(const device float* p) { return p[0]; }\n"
    source = "y[thread_position_in_grid.x] = f(x);"
    run(source, header)
    with pytest.raises(MetalError, match="no matching function"):
        run(source, header, inputs=[X[:7], N])


# --- right kernels ----------------------------------------------------------------------------------

RMS = """
threadgroup float part[32];
uint lane = thread_index_in_simdgroup, sg = simdgroup_index_in_threadgroup;
uint row = threadgroup_position_in_grid.x, t = thread_index_in_threadgroup, n = threads_per_threadgroup.x;
float s = 0;
for (uint i = t; i < D; i += n) { float v = x[row * D + i]; s += v * v; }
s = simd_sum(s);
if (lane == 0) part[sg] = s;
threadgroup_barrier(mem_flags::mem_threadgroup);
s = simd_sum(lane < simdgroups_per_threadgroup ? part[lane] : 0.0);
float r = metal::rsqrt(s / D + eps);
for (uint i = t; i < D; i += n) y[row * D + i] = static_cast<T>(x[row * D + i] * r * w[i]);
"""


def rms(dtype: mx.Dtype, rows: int = 5, width: int = 391) -> tuple[mx.array, mx.array]:
    """A kernel of two reductions and a barrier, and what MLX computes."""
    mx.random.seed(0)
    x, w = mx.random.normal((rows, width)).astype(dtype), mx.random.normal((width,)).astype(dtype)
    kernel = emulator.metal_kernel("rms", ["x", "w", "eps"], ["y"], RMS)
    (y,) = kernel(
        inputs=[x, w, 1e-5],
        template=[("T", dtype), ("D", width)],
        grid=(rows * 256, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[dtype],
    )
    return y, mx.fast.rms_norm(x, w, 1e-5)


SETTINGS = [
    {},
    {"order": "reverse"},
    {"order": "random", "seed": 7},
    {"poison": 0},
    {"checked": False},
    {"contract": True},
    {"ftz": True},
    {"counters": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_right_kernel_passes(settings: dict[str, Any]) -> None:
    with emulator.emulate(**settings):
        found, expected = rms(mx.float32)
    assert mx.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [(mx.float16, 4e-3), (mx.bfloat16, 4e-2)], ids=str)
def test_right_kernel_passes_in_low_precision(dtype: mx.Dtype, bound: float) -> None:
    found, expected = rms(dtype)
    assert mx.abs(found.astype(mx.float32) - expected.astype(mx.float32)).max().item() < bound


def test_groups_at_the_end_of_the_grid_are_smaller() -> None:
    source = """uint i = thread_position_in_grid.x;
    y[i] = threads_per_threadgroup.x * 10000 + dispatch_threads_per_threadgroup.x * 100 + simdgroups_per_threadgroup;"""
    y = run(source, threads=70, per_group=48, output_shapes=[(70,)])
    assert y.tolist() == [484802.0] * 48 + [224801.0] * 22


def test_denormals_are_flushed_on_request() -> None:
    source = "uint i = thread_position_in_grid.x; y[i] = as_type<float>(1000 * (i + 1)) * 0.5f;"
    assert run(source)[5].item() > 0
    with emulator.emulate(ftz=True):
        assert run(source)[5].item() == 0


def test_order_of_atomics_and_strides() -> None:
    kernel = emulator.metal_kernel(
        "columns",
        ["x"],
        ["y"],
        "uint i = thread_position_in_grid.x;\n"
        "for (int k = 0; k < x_shape[0]; k++)\n"
        "  atomic_fetch_add_explicit(&y[i % 3], x[k * x_strides[0] + i * x_strides[1]], memory_order_relaxed);",
        ensure_row_contiguous=False,
        atomic_outputs=True,
    )
    x = mx.arange(55).reshape(11, 5).T.astype(mx.int32)
    (y,) = kernel(
        inputs=[x],
        grid=(11, 1, 1),
        threadgroup=(4, 1, 1),
        output_shapes=[(3,)],
        output_dtypes=[mx.int32],
        init_value=0,
    )
    assert y.tolist() == [int(np.array(x)[:, k::3].sum()) for k in range(3)]


def test_counters() -> None:
    source = "uint i = thread_position_in_grid.x; y[i] = x[0] + x[i];"
    with emulator.emulate(counters=True) as session:
        run(source, per_group=32)
    (done,) = session.dispatches
    assert (done.kernel, done.grid, done.threadgroup) == ("example", (64, 1, 1), (32, 1, 1))
    x, y = done.traffic["x"], done.traffic["y"]
    assert (x.read_accesses, x.read_bytes, x.read_distinct, x.read_by_group) == (128, 512, 256, 256 + 4)
    assert (y.write_accesses, y.write_bytes, y.write_distinct, y.read_bytes) == (64, 256, 256, 0)
    assert done.traffic["n"].read_bytes == 0
    assert done.threadgroup_traffic == 0


def test_traffic_of_threadgroup_memory() -> None:
    """All threadgroups together, each access of each thread."""
    source = f"""
    uint i = thread_position_in_grid.x, me = thread_index_in_threadgroup;
    threadgroup float s[32];
    s[me] = x[i];
    {BARRIER}
    y[i] = s[me] + s[(me + 1) % 32];"""
    with emulator.emulate() as session:
        run(source, per_group=32)
    assert session.dispatches[0].threadgroup_traffic == 64 * 3 * 4


def test_vectors_of_a_slice_are_misaligned() -> None:
    source = "uint i = thread_position_in_grid.x; if (i < 16) ((device float4*)y)[i] = ((const device float4*)x)[i];"
    run(source)
    with emulator.emulate(alignment=4), pytest.raises(MetalError, match="misaligned"):
        run(source)


# --- the text that MLX generates --------------------------------------------------------------------

BODY = """
uint i = thread_position_in_grid.x + threadgroup_position_in_grid.y * threads_per_threadgroup.x;
// x_shape x_strides n_ndim k_shape thread_index_in_simdgroup simdgroups_per_threadgroup
y[i] = x[i];"""
SIZES = {"1024": (1024,), "8": (8,), "7": (7,), "1": (1,), "none": (), "2x4": (2, 4), "2x3": (2, 3), "0": (0,)}
TEMPLATES: dict[str, list[tuple[str, Any]]] = {
    "no template": [],
    "template": [("Elem", mx.bfloat16), ("Index", mx.uint32), ("T", 128), ("M", -3), ("YES", True), ("NO", False)],
}


def generated_by_mlx(kernel: Any, inputs: list[mx.array], **call: Any) -> str:
    """Inside an export MLX records the call, with the text, and does not ask for a GPU."""
    found = []

    def see(node: dict[str, Any]) -> None:
        if node["type"] == "primitive" and node["name"] == "CustomKernel":
            found.append(node["arguments"][1])

    mx.export_function(see, lambda *arrays: kernel(inputs=list(arrays), **call), *inputs)
    (text,) = found
    return str(text)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("shape", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("atomic", [False, True], ids=["plain", "atomic"])
def test_text_is_the_one_of_mlx(shape: tuple[int, ...], template: list[tuple[str, Any]], atomic: bool) -> None:
    dtypes = [mx.float32, mx.int32] if atomic else [mx.float16, mx.bool_]
    inputs = {"x": mx.zeros(shape, mx.float16), "n": mx.zeros((2, 5), mx.int8), "k": mx.array(3)}
    outputs = dict(zip(["y", "z"], dtypes, strict=True))
    kernel = mx.fast.metal_kernel("some", list(inputs), list(outputs), BODY, "// header\n", atomic_outputs=atomic)
    theirs = generated_by_mlx(
        kernel,
        list(inputs.values()),
        template=template,
        grid=(4, 1, 1),
        threadgroup=(4, 1, 1),
        output_shapes=[(4,), (4,)],
        output_dtypes=dtypes,
    )
    assert generate("some", "// header\n", BODY, inputs, outputs, template, atomic).text == theirs


@pytest.mark.parametrize("dtype", [d for d in generate.__globals__["_TYPES"] if d != mx.complex64], ids=str)
def test_every_type_is_called_as_in_mlx(dtype: mx.Dtype) -> None:
    inputs, outputs = {"x": mx.zeros(16, dtype)}, {"y": dtype}
    kernel = mx.fast.metal_kernel("some", ["x"], ["y"], "y[0] = x[0];")
    call = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1), "output_shapes": [(1,)], "output_dtypes": [dtype]}
    assert generate("some", "", "y[0] = x[0];", inputs, outputs, [], False).text == generated_by_mlx(
        kernel, list(inputs.values()), **call
    )


# --- pointers without an address space --------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reported"),
    [
        ("float* p = y;", True),
        ("void f(float* x) {}", True),
        ("p = (uint*)q;", True),
        ("template <typename T> void g(T* x) {}", True),
        ("static_cast<float*>(p)", True),
        ("vec<float, 4>* v;", True),
        ("void f(thread float* x, device const float* y, const device T& z) {}", False),
        ("x = a * b; y = float(a) * c;", False),
        ("auto q = (const device uint4*)w;", False),
        ("int n = (N * 4 + M) & 3;", False),
    ],
)
def test_lint(text: str, reported: bool) -> None:
    assert bool(list(pointers_without_space(text))) == reported


def test_lint_accepts_the_headers_of_mlx() -> None:
    headers = list((compiler.mlx_headers() / "mlx/backend/metal/kernels").rglob("*.h"))
    assert len(headers) > 50
    found = {p.name: list(pointers_without_space(p.read_text())) for p in headers}
    assert not {name: reports for name, reports in found.items() if reports}


# --- the cache --------------------------------------------------------------------------------------


@pytest.fixture
def no_programs() -> Iterator[None]:
    before = dict(compiler.programs)
    compiler.programs.clear()
    yield
    compiler.programs.update(before)


def test_a_kernel_is_compiled_once(no_programs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    run("y[thread_position_in_grid.x] = 1.0f;")
    compiler.programs.clear()
    monkeypatch.setattr(compiler, "_build", lambda *_: pytest.fail("compiled again"))
    run("y[thread_position_in_grid.x] = 1.0f;")


def test_cache_is_outside_of_the_checkout() -> None:
    assert not compiler.cache_folder().is_relative_to(compiler.HERE.parents[1])


def test_every_checkout_includes_its_own_shim(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "cache"))
    for checkout in (compiler.HERE, tmp_path / "copy"):
        if checkout != compiler.HERE:
            shutil.copytree(compiler.HERE, checkout)
            monkeypatch.setattr(compiler, "HERE", checkout)
        made = compiler.prelude.__wrapped__(compiler.STRICT, False)
        assert str(checkout) in made.header.read_text().splitlines()[0]
