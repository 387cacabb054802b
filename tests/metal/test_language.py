"""What MSL means: each line of a kernel against the same in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import emulator
import mlx.core as mx
import numpy as np
import pytest

from metal_kernels import _dispatch

pytestmark = pytest.mark.usefixtures("emulation")

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
X = np.linspace(-3, 5, 64, dtype=np.float32)
I = np.arange(64)
LANE, GROUP = I % 32, I // 32 * 32


def run(body: str, header: str = "", x: Any = X, dtype: mx.Dtype = mx.float32, threads: int = 64) -> np.ndarray:
    """`float a` is the element of thread `i`; the body sets `r`."""
    kernel = emulator.metal_kernel(
        "example",
        ["x"],
        ["y"],
        f"uint i = thread_position_in_grid.x; float a = float(x[i]); float r = 0;\n{body}\ny[i] = static_cast<T>(r);",
        header,
    )
    (y,) = kernel(
        inputs=[mx.array(x)],
        template=[("T", dtype), ("N", 64)],
        grid=(threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(threads,)],
        output_dtypes=[dtype],
    )
    return np.array(y.astype(mx.float32))


def of_lane(lane: np.ndarray) -> np.ndarray:
    return X[GROUP + lane]


def by_simdgroup(f: Callable[[np.ndarray], Any]) -> np.ndarray:
    return np.concatenate([np.broadcast_to(f(part), 32) for part in np.split(X, 2)])


def both(first: np.ndarray, second: np.ndarray, condition: np.ndarray) -> np.ndarray:
    return np.where(condition, first, second)


EXPRESSIONS: dict[str, tuple[str, Any]] = {
    # Vectors.
    "constructor": ("float4 v = float4(a, 1, 2, 3); r = v.x + v.w;", X + 3),
    "constructor of parts": ("float4 v = float4(float2(a, 1), float2(2)); r = v.x + v.y + v.w;", X + 3),
    "constructor of one": ("float3 v = float3(a); r = v.x + v.y + v.z;", X + X + X),
    "constructor with a name": ("float2 v(a, 2); r = v.x * v.y;", X * 2),
    "braces": ("float4 v = {a, 2}; r = v.x + v.y + v.z;", X + 2),
    "braces without =": ("float2 v{a, 2}; r = v.x + v.y;", X + 2),
    "vec": ("vec<float, 4> v = vec<float, 4>(1, a, 2, 3); r = v[1];", X),
    "alias of vec": ("using V = vec<float, 2>; V v = V(a, 3); r = v.y - v.x;", 3 - X),
    "qualified name": ("metal::float2 v = metal::float2(a, 1); r = metal::max(v.x, v.y);", np.maximum(X, 1)),
    "swizzle": ("float4 v = float4(1, 2, a, 4); v.xy = v.zw; r = v.x + v.y;", X + 4),
    "elementwise": ("float2 v = max(float2(a, 1) * 2, float2(0)); r = v.x + v.y;", np.maximum(X * 2, 0) + 2),
    "compare and select": ("float2 v = select(float2(1), float2(2), float2(a, 9) < 0); r = v.x;", both(2, 1, X < 0)),
    "convert": ("half4 h = half4(float4(a)); float4 f = static_cast<float4>(h); r = f.z;", X.astype(np.float16)),
    "dot": ("r = dot(float3(a, 1, 2), float3(2, a, 1));", X * 2 + X + 2),
    "load of a vector": ("r = ((const device float4*)x)[i / 4].w;", X[I // 4 * 4 + 3]),
    "as_type": ("r = as_type<float>(as_type<uint>(a) & 0x7fffffff);", np.abs(X)),
    "as_type of a vector": ("r = as_type<uchar4>(0x04030201u).z;", 3),
    # Scalars.
    "literals": ("r = 1.0h + half(2) + float(1.5bf) + 0x1fu;", 35.5),
    "float literal without suffix": ("r = a * 0.1;", X * np.float32(0.1)),
    "ternary and loops": ("for (ushort k = 0; k < 3; ++k) r += k % 2 ? a : 1;", X + 2),
    "long": ("long n = long(i) << 33; r = n >> 33;", I),
    "size_t": ("size_t n = i; r = n * sizeof(float);", 4 * I),
    "bits": (
        "r = popcount(i) + 100 * clz(i) + 10000 * ctz(64u);",
        [k.bit_count() + 100 * (32 - k.bit_length()) + 60000 for k in range(64)],
    ),
    "extract_bits": ("r = extract_bits(0xabcdu, 4, 8);", 0xBC),
    "insert_bits": ("r = insert_bits(0xffffu, 0u, 4, 8);", 0xF00F),
    "rotate": ("r = rotate(0x80000001u, 1u);", 3),
    "clamp and mix": ("r = mix(clamp(a, 0.0f, 1.0f), 2.0f, 0.5f);", np.clip(X, 0, 1) * 0.5 + 1),
    "functions": (
        "r = exp(a) + fast::sin(a) + precise::rsqrt(a * a + 1) + metal::floor(a);",
        np.exp(X) + np.sin(X) + 1 / np.sqrt(X * X + 1) + np.floor(X),
    ),
    "isnan": ("r = isnan(a / 0 * 0) ? 1 : 0;", 1),
    "numeric_limits": ("r = a > -numeric_limits<float>::infinity() && INFINITY > FLT_MAX ? 1 : 0;", 1),
    "if constexpr and traits": ("if constexpr (is_same_v<T, float>) { r = a; }", X),
    "lambda": ("auto f = [&](float b) { return a + b; }; r = f(2);", X + 2),
    # Simdgroups.
    "simd_sum": ("r = simd_sum(float(i));", by_simdgroup(lambda p: 0) + both(496, 1520, I < 32)),
    "simd_max and min": ("r = simd_max(a) - simd_min(a);", by_simdgroup(np.ptp)),
    "simd_product": ("r = simd_product(i % 32 == 3 ? 3.0f : 1.0f);", 3),
    "simd_or": ("r = simd_or(1u << (i % 8));", 255),
    "simd_xor": ("r = simd_xor(i % 32 == 1 ? 5u : 0u);", 5),
    "sum of vectors": ("float2 s = simd_sum(float2(1, 2)); r = s.x + s.y;", 96),
    "sum of bfloat": ("r = float(simd_sum(bfloat(1)));", 32),
    "prefix sums": ("r = simd_prefix_inclusive_sum(1) * 100 + simd_prefix_exclusive_sum(1);", (LANE + 1) * 100 + LANE),
    "broadcast": ("r = simd_broadcast(a, 5);", of_lane(5)),
    "broadcast_first": ("r = simd_broadcast_first(a);", of_lane(0)),
    "shuffle": ("r = simd_shuffle(a, 31 - i % 32);", of_lane(31 - LANE)),
    "shuffle_xor": ("r = simd_shuffle_xor(a, 8);", of_lane(LANE ^ 8)),
    "shuffle_down": ("r = simd_shuffle_down(a, 3);", of_lane(both(LANE + 3, LANE, LANE < 29))),
    "shuffle_up": ("r = simd_shuffle_up(a, 3);", of_lane(both(LANE - 3, LANE, LANE >= 3))),
    "rotate_down": ("r = simd_shuffle_rotate_down(a, 3);", of_lane((LANE + 3) % 32)),
    "rotate_up": ("r = simd_shuffle_rotate_up(a, 3);", of_lane((LANE - 3) % 32)),
    "fill_up": ("r = simd_shuffle_and_fill_up(a, 7.0f, 3);", both(of_lane((LANE - 3) % 32), 7, LANE >= 3)),
    "fill_down": ("r = simd_shuffle_and_fill_down(a, 7.0f, 3);", both(of_lane((LANE + 3) % 32), 7, LANE < 29)),
    "ballot": ("r = ulong(simd_ballot(i % 32 < 5));", 31),
    "any and all": ("r = simd_any(i == 40) * 10 + simd_all(i < 32);", both(1, 10, I < 32)),
    "quad_sum": ("r = quad_sum(float(i));", I // 4 * 16 + 6),
    "quad_broadcast": ("r = quad_broadcast(a, 2);", X[I // 4 * 4 + 2]),
    "simd_is_first": ("r = simd_is_first();", LANE == 0),
    "active mask": ("r = popcount(ulong(simd_active_threads_mask()));", 32),
    # Threadgroup memory.
    "threadgroup array": (f"threadgroup float s[N]; s[i] = a; {BARRIER} r = s[N - 1 - i];", X[::-1]),
    "two at once": (
        f"threadgroup float s[N], t[2][N / 2]; s[i] = a; t[i / 32][i % 32] = a; {BARRIER} r = s[i ^ 1] - t[1][0];",
        X[I ^ 1] - X[32],
    ),
    "vectors": (f"threadgroup float4 s[16]; s[i / 4][i % 4] = a; {BARRIER} r = s[i % 16].w;", X[I % 16 * 4 + 3]),
    "vectors of three": (f"threadgroup float3 s[64]; s[i] = float3(a, 1, 2); {BARRIER} r = s[63 - i].x;", X[::-1]),
    "bool": (f"threadgroup bool s[64]; s[i] = a < 0; {BARRIER} r = s[63 - i];", X[::-1] < 0),
    "scalar": (f"threadgroup float s; if (i == 0) {{ s = a; }} {BARRIER} r = s;", X[0]),
    "pointer": (f"threadgroup float s[64]; threadgroup float* p = s + i; *p = a; {BARRIER} r = s[63 - i];", X[::-1]),
    "size with a comparison": (f"threadgroup float s[(N > 8) ? 64 : 8]; s[i] = a; {BARRIER} r = s[i ^ 2];", X[I ^ 2]),
    "atomic": (
        "threadgroup atomic_uint n; if (i == 0) atomic_store_explicit(&n, 3, memory_order_relaxed);"
        f"{BARRIER} atomic_fetch_add_explicit(&n, i, memory_order_relaxed); {BARRIER}"
        "r = atomic_load_explicit(&n, memory_order_relaxed);",
        2019,
    ),
    "used twice": (
        f"threadgroup float s[64];for (int k = 0; k < 3; k++) {{ s[i] = a + k; {BARRIER} r += s[63 - i]; {BARRIER} }}",
        3 * X[::-1] + 3,
    ),
    "matrix": (
        "simdgroup_float8x8 m, d = simdgroup_float8x8(2); simdgroup_load(m, x, 8);"
        "simdgroup_float8x8 c = make_filled_simdgroup_matrix<float, 8>(1); threadgroup float s[64];"
        "simdgroup_multiply_accumulate(c, m, m, c); c = c * d;"
        f"if (i < 32) {{ simdgroup_store(c, s, 8); }} {BARRIER} r = s[i];",
        (2 * (X.reshape(8, 8) @ X.reshape(8, 8) + 1)).ravel(),
    ),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expression(name: str) -> None:
    body, expected = EXPRESSIONS[name]
    found = run(body)
    np.testing.assert_allclose(found, np.broadcast_to(np.asarray(expected, np.float32), 64), rtol=3e-6, atol=1e-6)


HEADER = """
constant float table[4] = {1.0f, 2.0f, 4.0f, 8.0f};
#define SQUARE(v) ((v) * (v))

struct Pair {
    float a;
    float b;
    float sum() const { return a + b; }
};

template <typename P>
inline float first_of(P p) {
    return float(p[0]);
}

template <int K, typename T>
inline T scaled(thread const T& v) {
    T r = v;
    for (int k = 0; k < K; k++) {
        r *= T(2);
    }
    return r;
}

inline float total(threadgroup const float* p, int n) {
    float sum = 0;
    for (int k = 0; k < n; k++) {
        sum += p[k];
    }
    return sum;
}
"""


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("r = table[i % 4];", 2.0 ** (I % 4)),
        ("r = SQUARE(a + 1);", (X + 1) ** 2),
        ("Pair p = {a, 2.0f}; p.b += 1; r = p.sum();", X + 3),
        ("r = first_of(x + i);", X),
        ("r = scaled<3>(a);", 8 * X),
        ("float4 v = scaled<1>(float4(a, 1, 2, 3)); r = v.x + v.w;", 2 * X + 6),
        (f"threadgroup float s[64]; s[i] = a; {BARRIER} r = total(s, 64);", X.sum()),
    ],
    ids=["table", "macro", "struct", "template over a pointer", "template", "template of a vector", "threadgroup"],
)
def test_header(body: str, expected: Any) -> None:
    np.testing.assert_allclose(run(body, HEADER), np.broadcast_to(np.float32(expected), 64), rtol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_every_operation_in_low_precision_is_rounded(dtype: mx.Dtype) -> None:
    x = mx.array(X).astype(dtype)
    found = run("T b = static_cast<T>(a); T c = b * b + b; r = float(c);", x=x, dtype=dtype)
    assert np.array_equal(found, np.array((x * x + x).astype(mx.float32)))


@pytest.mark.parametrize(("name", "dtype"), [("half", mx.float16), ("bfloat", mx.bfloat16)])
def test_matrices_of_a_low_type_are_summed_in_float(name: str, dtype: mx.Dtype) -> None:
    """And loaded from rows that are longer, transposed, and read by their lanes."""
    body = f"""
    threadgroup {name} s[8 * 10];
    threadgroup float sums[64];
    s[i / 8 * 10 + i % 8] = static_cast<{name}>(a);
    {BARRIER}
    simdgroup_matrix<{name}, 8, 8> left, right;
    simdgroup_load(left, s, 10);
    simdgroup_load(right, s, 10, ulong2(0, 0), true);
    simdgroup_float8x8 c = make_filled_simdgroup_matrix<float, 8>(1.0f);
    simdgroup_multiply_accumulate(c, left, right, c);
    if (i < 32) {{
        sums[matrix_row(i) * 8 + matrix_column(i)] = pair_of(c).x;
        sums[matrix_row(i) * 8 + matrix_column(i) + 1] = pair_of(c).y;
    }}
    {BARRIER}
    r = sums[i];"""
    x = np.array(mx.array(X).astype(dtype).astype(mx.float32)).reshape(8, 8)
    found = run(body, _dispatch.source("matrix"))
    np.testing.assert_allclose(found, (x @ x.T + 1).ravel(), rtol=3e-6)


def test_simdgroup_that_is_not_full() -> None:
    found = run("r = simd_sum(1.0f) + 100 * simd_shuffle_down(float(i), 1);", threads=40)
    after = both(I[:40] + 1, I[:40], (I[:40] != 31) & (I[:40] != 39))
    assert found.tolist() == (both(32, 8, I[:40] < 32) + 100 * after).tolist()
