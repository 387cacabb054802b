"""stream_enter and stream_head are the mixing weights and the collapse, which have tests of their own."""

from __future__ import annotations

import mlx.core as mx
from support import FLOATS, expect_equal, expect_refused, normal, run

from metal_kernels import stream_collapse, stream_enter, stream_head, stream_head_mix, stream_mix

EPS = (1e-6, 1e-5)


@FLOATS
def test_one_after_the_other(dtype: mx.Dtype) -> None:
    x, fn, base, scale, weight = normal(5, 4, 67, dtype=dtype), normal(24, 268), normal(24), normal(3), normal(67)
    y, post, comb = run(stream_enter, x, fn, base, scale, weight, *EPS, 20)
    pre, *mixed = stream_mix(x, fn, base, scale, *EPS, 20)
    expect_equal(y, stream_collapse(x, pre, weight, EPS[0]))
    for found, expected in zip((post, comb), mixed, strict=True):
        expect_equal(found, expected)
    head = fn[:4], base[:4], scale[:1]
    expected = stream_collapse(x, stream_head_mix(x, *head, *EPS), weight, EPS[0])
    expect_equal(run(stream_head, x, *head, weight, *EPS), expected)


def test_refuses_other_shapes() -> None:
    x, fn, base, scale, weight = normal(5, 4, 67), normal(24, 268), normal(24), normal(3), normal(67)
    expect_refused("fn", stream_enter, x, fn[:-1], base, scale, weight, *EPS, 20)
    expect_refused("base", stream_enter, x, fn, base[:-1], scale, weight, *EPS, 20)
    expect_refused("scale", stream_enter, x, fn, base, scale[:1], weight, *EPS, 20)
    expect_refused("weight", stream_enter, x, fn, base, scale, weight[:-1], *EPS, 20)
    expect_refused("fn", stream_head, x, fn[:3], base[:4], scale[:1], weight, *EPS)
    expect_refused("base", stream_head, x, fn[:4], base[:3], scale[:1], weight, *EPS)
    expect_refused("scale", stream_head, x, fn[:4], base[:4], scale, weight, *EPS)
    expect_refused("weight", stream_head, x, fn[:4], base[:4], scale[:1], weight[:1], *EPS)
