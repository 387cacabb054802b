"""The kernel of project_f32 against its reference."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from emulator import emulate
from support import FLOATS, dtype_name, expect_equal, expect_match, normal, run, sizes, wide

from metal_kernels import KernelError, project_f32
from metal_kernels.project_f32 import MANY_ROWS, MAX_TOKENS, TILE, project_f32_reference

pytestmark = pytest.mark.usefixtures("emulated")

WEIGHTS = pytest.mark.parametrize(
    "weight_dtype", [mx.float32, mx.float16, mx.bfloat16], ids=lambda d: f"weight-{dtype_name(d)}"
)


@FLOATS
@WEIGHTS
@sizes("T K M", (1, 72, 9), (5, 136, 35))
def test_project_f32(T: int, K: int, M: int, weight_dtype: mx.Dtype, dtype: mx.Dtype) -> None:
    args = normal(T, K, dtype=dtype), normal(M, K, dtype=weight_dtype)
    expect_match(run(project_f32, *args), wide(args[0]) @ wide(args[1]).T, mx.float32)


@sizes(
    "T K M",
    (1, 8, 1),
    (1, 1032, 3),
    (TILE, 8, 5),
    (TILE + 1, 2056, 2),
    (MAX_TOKENS, 40, 6),
    (1, 8, MANY_ROWS + 5),
    (7, 136, MANY_ROWS),
)
def test_other_sizes(T: int, K: int, M: int) -> None:
    """Lanes and simdgroups without a column and with several, rows and tokens beyond the last, columns not shared."""
    args = normal(T, K), normal(M, K)
    expect_match(run(project_f32, *args), wide(project_f32_reference(*args)), mx.float32)


@pytest.mark.parametrize("shape", [(72,), (3, 72), (2, 3, 72), (1, 1, 72)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    args = normal(*shape, dtype=mx.bfloat16), normal(24, 72, dtype=mx.bfloat16)
    expect_match(run(project_f32, *args), wide(args[0]) @ wide(args[1]).T, mx.float32)


# Rows start at multiples of four elements, which the kernel counts on.
@pytest.mark.parametrize("changes", [{"contract": True}, {"ftz": True}, {"alignment": 8}], ids=str)
@sizes("T", (1,), (6,))
def test_as_a_gpu_may_run_it(changes: dict[str, Any], T: int) -> None:
    args = normal(T, 136, dtype=mx.bfloat16), normal(21, 136, dtype=mx.bfloat16)
    with emulate(**changes):
        expect_match(project_f32(*args), wide(project_f32_reference(*args)), mx.float32)


@pytest.mark.parametrize("M", [35, MANY_ROWS], ids=["shared", "not-shared"])
def test_a_token_does_not_depend_on_the_others(M: int) -> None:
    x, weight = normal(2, 3, 136, dtype=mx.bfloat16), normal(M, 136, dtype=mx.bfloat16)
    together = project_f32(x, weight)
    for b in range(2):
        for t in range(3):
            expect_equal(project_f32(x[b, t], weight), together[b, t])


def test_nan_stays_in_its_token_and_its_row() -> None:
    x, weight = normal(5, 136), normal(21, 136)
    x[3, 135] = float("nan")
    weight[7, 2] = float("nan")
    lost = np.isnan(wide(project_f32(x, weight)))
    assert lost[3].all() and lost[:, 7].all() and lost.sum() == 21 + 5 - 1


def test_large_numbers_do_not_hide_small_ones_in_another_type() -> None:
    """Sums in bfloat16 would lose every one of these after the first."""
    x, weight = mx.ones((1, 2048), mx.bfloat16), mx.full((5, 2048), 1 / 128, mx.bfloat16)
    weight[:, 0] = 256.0
    expect_equal(project_f32(x, weight), mx.full((1, 5), 256.0 + 2047 / 128))


@sizes("M", (256,), (MANY_ROWS,))
def test_sizes_of_the_model(M: int) -> None:
    """Router, and a part of the head: weights are read once, four at a time, and no copy of them is made."""
    K = 4096 if M == 256 else 1024
    x, weight = normal(1, K, dtype=mx.bfloat16), normal(M, K, dtype=mx.bfloat16)
    with emulate(counters=True, repeat=False) as session:
        found = project_f32(x, weight)
    (launch,) = session.dispatches
    shape = ((32, 8, 64), (32, 8, 1)) if M == 256 else ((32, 1, M // 4), (32, 1, 8))
    assert (launch.grid, launch.threadgroup, launch.threadgroup_bytes) == (*shape, 128)
    traffic = launch.traffic["weight"]
    assert traffic.read_bytes == traffic.read_distinct == 8 * traffic.read_accesses == weight.nbytes
    assert launch.traffic["y"].write_bytes == 4 * M
    expect_match(found, wide(project_f32_reference(x, weight)), mx.float32)


def test_threadgroup_memory_of_a_tile() -> None:
    with emulate() as session:
        project_f32(normal(MAX_TOKENS, 72), normal(9, 72))
    (launch,) = session.dispatches
    assert (launch.threadgroup, launch.threadgroup_bytes) == ((32, 8, 1), 512)


@sizes("T K", (MAX_TOKENS + 1, 72), (1, 68), (0, 72))
def test_limits(T: int, K: int) -> None:
    with pytest.raises(KernelError, match="the kernel covers up to"):
        project_f32(normal(T, K), normal(5, K))
