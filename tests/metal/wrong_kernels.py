"""Kernels with one mistake each, and what the emulator says about it.

All have the inputs `x`, 64 floats in device memory, and `n`, 3 ints in constant memory, and the output `y`, 64 floats.
They run on 64 threads in one threadgroup unless stated otherwise. `i` is the thread.
"""

from __future__ import annotations

from dataclasses import dataclass

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SIMD_BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"


@dataclass(frozen=True)
class Wrong:
    """`says` is a regular expression; `line` the line of the body that is named, None if none is."""

    name: str
    body: str
    says: str
    line: int | None = 2
    header: str = ""
    threads: int = 64
    per_group: int = 64

    @property
    def source(self) -> str:
        return "uint i = thread_position_in_grid.x;\n" + self.body


RUNTIME = [
    # Races in threadgroup memory.
    Wrong(
        "missing barrier",
        "threadgroup float s[64];\ns[i] = x[i];\ny[i] = s[i ^ 32];",
        r"reads byte \d+ of threadgroup variable s, which nobody has written yet",
        4,
    ),
    Wrong(
        "missing barrier, seen in the other direction",
        "threadgroup float s[64];\ns[i] = x[i];\ny[i] = s[i & 32];",
        r"race: reads byte 0 of threadgroup variable s, which thread 0 of this threadgroup wrote without a barrier",
        4,
    ),
    Wrong(
        "barrier of the simdgroup only",
        f"threadgroup float s[64];\ns[i] = x[i];\n{SIMD_BARRIER}\ny[i] = s[0];",
        r"race: reads byte 0 of threadgroup variable s, which thread 0 of this threadgroup wrote",
        5,
    ),
    Wrong(
        "scratch used again without a barrier",
        f"threadgroup float s[64];\ns[i] = x[i];\n{BARRIER}\nif (i < 32) y[i] = s[63 - i];\nelse s[i] = y[i] = x[i];",
        r"race: writes byte \d+ of threadgroup variable s, which thread \d+ of this threadgroup read",
        6,
    ),
    Wrong(
        "scratch read by many, then overwritten by one of them",
        f"threadgroup float s[1];\nif (i == 0) s[0] = 1.0f;\n{BARRIER}\ny[i] = s[0];\nif (i == 63) s[0] = 2.0f;",
        r"race: writes byte 0 of threadgroup variable s, which threads of several simdgroups read",
        6,
    ),
    Wrong(
        "barrier for another memory",
        "threadgroup float s[64];\ns[i] = x[i];\nthreadgroup_barrier(mem_flags::mem_device);\ny[i] = s[i & 32];",
        r"race: reads byte 0 of threadgroup variable s, .* \(of mem_threadgroup\)",
        5,
    ),
    Wrong(
        "lockstep without a barrier",
        "threadgroup float s[64];\ns[i] = simd_sum(x[i]);\ny[i] = s[i & 32];",
        r"race: reads byte 0 of threadgroup variable s",
        4,
    ),
    # Races in device memory.
    Wrong("one output, two writers", "y[i / 2] = x[i];", r"race: writes byte 0 of y, which thread 0 .* wrote"),
    Wrong(
        "device memory exchanged with a barrier for threadgroup memory",
        f"y[i] = x[i];\n{BARRIER}\nfloat a = y[63 - i];\n{BARRIER}\ny[i] = a;",
        r"race: reads byte 252 of y, .* \(of mem_device",
        4,
    ),
    Wrong(
        "one output, two threadgroups",
        "y[i % 32] = x[i];",
        r"race: writes byte 0 of y, which another threadgroup wrote",
        per_group=32,
    ),
    Wrong(
        "a plain read beside an atomic write",
        "device atomic_int* a = (device atomic_int*)y;\natomic_store_explicit(a, 1, memory_order_relaxed);\n"
        "float f = y[0];\ny[i + 1 & 63 | 1] = f;",
        r"race: writes byte 0 of y, which thread 0 of this threadgroup read",
        3,
    ),
    Wrong(
        "a result that depends on the order",
        "device atomic_int* a = (device atomic_int*)y;\natomic_store_explicit(a, int(i), memory_order_relaxed);\n"
        "if (i > 0) y[i] = 0.0f;",
        r"byte 0 of output y, and \d+ others, depend on the order of threads",
        None,
    ),
    Wrong("an element nobody writes", "if (i != 5) y[i] = x[i];", r"byte 20 of output y, and 3 others, depend", None),
    # Out of bounds.
    Wrong("reads one too far", "y[i] = x[i + 1];", r"read out of bounds: buffer x: bytes 256 to 259 of 256"),
    Wrong("writes one too far", "y[i + 1] = x[i];", r"write out of bounds: buffer y: bytes 256 to 259 of 256"),
    Wrong("negative index", "y[i] = x[int(i) - 1];", r"read out of bounds: buffer x: bytes -4 to -1 of 256"),
    Wrong("index far away", "y[i] = x[(long(i) + 1) << 40];", r"read out of bounds: buffer"),
    Wrong(
        "half of a vector outside",
        "y[i] = ((const device packed_float4*)(x + i))->w;",
        r"read out of bounds: buffer x: bytes 256 to 259 of 256|read out of bounds: buffer x: bytes 244 to 259 of 256",
    ),
    Wrong(
        "one threadgroup array into the next",
        "threadgroup float s[64], t[64];\nthreadgroup float* p = s;\nt[i] = 0.0f;\np[i + 1] = x[i];\ny[i] = t[i];",
        r"write out of bounds: threadgroup variable s: bytes 256 to 259 of 256",
        5,
    ),
    Wrong(
        "index beyond a threadgroup array",
        "threadgroup float s[32];\ns[i] = x[i];\ny[i] = s[i];",
        r"index out of bounds of a local array",
        3,
    ),
    Wrong(
        "index beyond a local array", "float a[4] = {1, 2, 3, 4};\ny[i] = a[i];", r"index out of bounds of a local", 3
    ),
    Wrong("writes to an input", "((device float*)x)[i] = 1.0f;\ny[i] = 0.0f;", r"write to input x, byte 0"),
    Wrong(
        "threadgroup memory that nobody wrote",
        f"threadgroup float s[64];\nif (i < 40) s[i] = x[i];\n{BARRIER}\ny[i] = s[i];",
        r"reads byte 160 of threadgroup variable s, which nobody has written yet",
        5,
    ),
    Wrong("reads its output", "y[i] += x[i];", r"reads byte 0 of y, which nobody has written yet"),
    # Threads that part.
    Wrong("barrier for some lanes", f"if (i < 16) {BARRIER}\ny[i] = 0.0f;", r"is not reached by all threads"),
    Wrong(
        "barrier for some lanes, the others go on to another",
        f"if (i < 16) {{\n{BARRIER}\n}} else {{\n{BARRIER}\n}}\ny[i] = 0.0f;",
        r"threads of one threadgroup wait at different barriers: lines 3 and 5",
        5,
    ),
    Wrong(
        "sum of some lanes",
        f"float a = x[i];\nif (i % 32 < 16) a = simd_sum(a);\n{BARRIER}\ny[i] = a;",
        r"divergence inside a simdgroup: lane 0 is at a simdgroup operation on line 3, lane 31 at threadgroup_barrier",
        3,
    ),
    Wrong(
        "two sums",
        "float a;\nif (i % 32 < 16) {\na = simd_sum(x[i]);\n} else {\na = simd_sum(2.0f * x[i]);\n}\ny[i] = a;",
        r"divergent simdgroup operation: lane 0 waits at line 4, lane 16 at line 6",
        6,
    ),
    Wrong("barrier after a return", f"if (i > 40) return;\n{BARRIER}\ny[i] = 0.0f;", r"this one has returned", 3),
    Wrong("shuffle out of range", "y[i] = simd_shuffle(x[i], 32);", r"shuffle reads a lane that is inactive"),
    Wrong("shuffle from a missing lane", "y[i] = simd_shuffle_xor(x[i], 16);", r"shuffle reads a lane", threads=40),
    Wrong(
        "matrix with missing lanes",
        "simdgroup_float8x8 a;\nsimdgroup_load(a, x, 8);\nsimdgroup_store(a, y, 8);",
        r"simdgroup_matrix operation with inactive lanes",
        3,
        threads=40,
    ),
    # Arithmetic that is not defined.
    Wrong("division by zero", "y[i] = 5 / int(i);", r"undefined behaviour: integer division by zero"),
    Wrong("shift by 32", "y[i] = 1u << (i + 1);", r"undefined behaviour: shift by too many bits"),
    Wrong("integer overflow", "y[i] = INT_MAX - 3 + int(i);", r"undefined behaviour: integer overflow in an addition"),
    Wrong("product overflow", "y[i] = 100000000 * int(i);", r"integer overflow in a multiplication"),
    Wrong("float too large for an int", "y[i] = int(1e9f * i);", r"float out of range of the integer type"),
    Wrong(
        "misaligned vector",
        "y[i] = ((const device float4*)(x + i % 8))->x;",
        r"undefined behaviour: misaligned pointer",
    ),
    Wrong(
        "misaligned atomic",
        "atomic_store_explicit((device atomic_int*)((device char*)y + 1), 1, memory_order_relaxed);",
        r"misaligned (pointer|atomic)",
    ),
    # Too much, or for too long.
    Wrong(
        "threadgroup memory",
        "threadgroup float s[9000];\ns[i] = x[i];\ny[i] = s[i];",
        r"threadgroup memory of 36000 bytes, at most 32768",
        None,
    ),
    Wrong(
        "threads of a threadgroup",
        "y[i] = x[i];",
        r"threadgroup of 1056 threads, at most 1024",
        None,
        threads=1056,
        per_group=1056,
    ),
    Wrong(
        "large arrays of a thread",
        "float a[100000];\nfor (int k = 0; k < 100000; k++) a[k] = k * x[i];\ny[i] = a[int(x[i]) & 4095];",
        r"thread stack overflow",
        None,
    ),
    Wrong(
        "waits for another thread",
        "device atomic_int* a = (device atomic_int*)y;\nif (i < 2) atomic_store_explicit(a, i, memory_order_relaxed);\n"
        "while (atomic_load_explicit(a, memory_order_relaxed) != 1) {}",
        r"does not end within 1 s",
        4,
    ),
    Wrong("no end", "volatile int k = 0;\nwhile (k == 0) {}\ny[i] = 0.0f;", r"does not end within 1 s", 3),
]

HELPER = "inline float f({} p) {{ return p[0]; }}\n"
COMPILE = [
    # Address spaces.
    Wrong("pointer without a space", "float* p = y;\np[i] = 1.0f;", r"explicit address space qualifier: `float \* p`"),
    Wrong("cast without a space", "y[i] = *(float*)(x + i);", r"explicit address space qualifier: `float \* \)`"),
    Wrong("parameter without a space", "y[i] = f(x);", r"explicit address space qualifier", 1, HELPER.format("float*")),
    Wrong("device to thread", "y[i] = f(y);", r"no matching function", 2, HELPER.format("thread float*")),
    Wrong("constant to device", "y[i] = f(n);", r"no matching function", 2, HELPER.format("const device int*")),
    Wrong("device to constant", "y[i] = f(x);", r"no matching function", 2, HELPER.format("constant float*")),
    Wrong("const to not const", "y[i] = f(x);", r"no matching function", 2, HELPER.format("device float*")),
    Wrong(
        "threadgroup to device", "threadgroup float s[4];\ndevice float* p = s;\ny[i] = *p;", r"cannot initialize", 3
    ),
    Wrong(
        "device cast to threadgroup",
        "threadgroup float* p = (threadgroup float*)y;\np[0] = 1.0f;",
        r"C-style cast .* mismatching address spaces",
    ),
    Wrong("write to constant memory", "n[0] = 1;\ny[i] = 0.0f;", r"read-only|const"),
    Wrong("write to an input", "x[i] = 1.0f;\ny[i] = 0.0f;", r"read-only|const"),
    Wrong(
        "global variable", "y[i] = t[1];", r"program scope variable|constant address space", 1, "float t[2] = {1, 2};\n"
    ),
    Wrong("global const", "y[i] = t[1];", r"constant address space", 1, "const float t[2] = {1, 2};\n"),
    Wrong("static variable", "static float a = 1.0f;\ny[i] = a;", r"constant address space"),
    Wrong(
        "threadgroup variable in a function",
        "y[i] = f();",
        r"threadgroup variable outside a kernel function: float s\[4\]",
        1,
        "inline float f() { threadgroup float s[4]; s[0] = 1.0f; return s[0]; }\n",
    ),
    # Overloads and conversions.
    Wrong("min of int and uint", "y[i] = min(1, i);", r"call to 'min' is ambiguous"),
    Wrong("min of half and float", "half h = half(x[i]);\ny[i] = min(h, 1.0f);", r"call to 'min' is ambiguous", 3),
    Wrong("max of float and int", "y[i] = max(x[i], 0);", r"call to 'max' is ambiguous"),
    Wrong("exp of an int", "y[i] = exp(2);", r"call to 'exp' is ambiguous"),
    Wrong("sum of long", "long k = i;\ny[i] = simd_sum(k);", r"call to 'simd_sum' is ambiguous", 3),
    Wrong(
        "half4 as float4", "half4 h = half4(1.0h);\nfloat4 f = h;\ny[i] = f.x;", r"cannot initialize|incompatible", 3
    ),
    Wrong(
        "float4 times half4",
        "half4 h = half4(1);\nfloat4 f = float4(1) * h;\ny[i] = f.x;",
        r"convert between vector",
        3,
    ),
    Wrong("half as bfloat", "half h = half(x[i]);\nbfloat b = h;\ny[i] = float(b);", r"cannot initialize .*bfloat", 3),
    Wrong("float as bfloat", "bfloat b = x[i];\ny[i] = float(b);", r"no such conversion, use static_cast"),
    Wrong("float literal as bfloat", "bfloat b = 1.5f;\ny[i] = float(b);", r"no such conversion, use static_cast"),
    Wrong("float4 of three", "float4 v = float4(1, 2, 3);\ny[i] = v.x;", r"wrong number of components"),
    Wrong("position as an index", "uint j = thread_position_in_grid;\ny[j] = 0.0f;", r"cannot initialize"),
    Wrong("number as a pointer", "device float* p = 4;\np[i] = 0.0f;", r"cannot initialize"),
    # What is not in Metal.
    Wrong("double", "double d = x[i];\ny[i] = d;", r"unknown type name '__msl_no_double_in_metal'"),
    Wrong("std", "y[i] = std::max(x[i], 1.0f);", r"undeclared identifier 'std'"),
    Wrong("printf", 'printf("%f", x[i]);\ny[i] = 0.0f;', r"undeclared identifier 'printf'|printf"),
    Wrong("expf", "y[i] = expf(x[i]);", r"expf"),
    Wrong("new", "thread float* p = new float[4];\ny[i] = p[0];", r"'default new' is not supported|operator new"),
    Wrong("uninitialised variable", "float a;\ny[i] = a;", r"variable 'a' is uninitialized", 3),
    Wrong(
        "variable that is only sometimes initialised",
        "float a;\nif (i > 3) {\na = 1.0f;\n}\ny[i] = a;",
        r"variable 'a' is used uninitialized whenever",
        3,
    ),
    Wrong("not ASCII", "y[i] = x[i]; // \u00d7", r"a character beyond ASCII"),
]
