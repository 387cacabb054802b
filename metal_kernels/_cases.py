"""Calls that show whether a kernel is right on this machine: one list for each op, at odd and at real sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ._dispatch import expert_prefill
from .compress import Quant, compress
from .experts import ExpertWeights, expert_down, expert_down_sum, expert_gate_up
from .index_query import index_query
from .index_scores import index_scores
from .index_topk import index_topk
from .latents import latents
from .packed_rows import pack_keys, pack_rows, unpack_keys, unpack_rows
from .project_f32 import project_f32
from .query_rope import query_rope
from .route import route, route_hash
from .sparse_attention import sparse_attention
from .stream_enter import stream_enter, stream_head
from .stream_expand import stream_expand

EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        rounds: the result lies on a coarse grid (FP8, FP4), where a last-bit difference may become a whole step.
        exact: the result is a choice, and must be the same.
        real: the sizes are those of V4-Flash, of a decode step or, in prefill, a chunk; the others are odd.
        large: too much to be emulated.
    """

    op: str
    label: str
    call: Callable[[], Any]
    rounds: bool = False
    exact: bool = False
    real: bool = True
    large: bool = False


def cases() -> Iterator[Case]:
    """Every case; arrays are made when a case is asked for, and dropped with it."""
    for real in (False, True):
        for dtype in (mx.bfloat16, mx.float32):
            yield from _streams(real, dtype)
            yield from _rows(real, dtype)
            yield from _index(real, dtype)
            yield from _attention(real, dtype)
            yield from _attention_prefill(real, dtype)
            yield from _experts(real, dtype)
            yield from _experts_prefill(real, dtype)
        yield from _packed_rows(real)


def ops() -> list[str]:
    """Names of all ops that have cases, in order."""
    return list(dict.fromkeys(case.op for case in cases()))


def _normal(*shape: int, dtype: mx.Dtype = mx.float32, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed + sum(shape))).astype(dtype)


def _rotation(T: int, pairs: int) -> tuple[mx.array, mx.array]:
    angles = (mx.arange(T) + 1000.0)[:, None] * 0.7 ** mx.arange(1, pairs + 1)
    return mx.cos(angles), mx.sin(angles)


def _label(real: bool, dtype: mx.Dtype) -> str:
    return f"{'real' if real else 'odd'} sizes, {str(dtype).rpartition('.')[2]}"


def _streams(real: bool, dtype: mx.Dtype) -> Iterator[Case]:
    T, N, D = (1, 4, 4096) if real else (5, 4, 67)
    label, x = _label(real, dtype), _normal(1, T, N, D, dtype=dtype)
    weight, y = _normal(D, dtype=dtype), _normal(1, T, D, dtype=dtype)
    fn, base, scale = _normal((2 + N) * N, N * D) / (N * D) ** 0.5, _normal((2 + N) * N), mx.ones((3,))
    post, comb = _normal(1, T, N), mx.softmax(_normal(1, T, N, N), -1)
    mixing = fn, base, scale
    head = fn[:N], base[:N], scale[:1]
    yield Case("stream_enter", label, lambda: stream_enter(x, *mixing, weight, EPS, EPS, 20), real=real)
    yield Case("stream_head", label, lambda: stream_head(x, *head, weight, EPS, EPS), real=real)
    yield Case("stream_expand", label, lambda: stream_expand(x, y, post, comb), real=real)


def _rows(real: bool, dtype: mx.Dtype) -> Iterator[Case]:
    T, H, K, P = (1, 64, 512, 64) if real else (3, 5, 70, 6)
    label, (cos, sin) = _label(real, dtype), _rotation(T, P // 2)
    q, kv, weight = _normal(1, T, H, K, dtype=dtype), _normal(1, T, K, dtype=dtype), _normal(K, dtype=dtype)
    latent = _normal(1, T, 1024 if real else 66, dtype=dtype)
    norms = mx.ones(latent.shape[-1]), weight
    yield Case("query_rope", label, lambda: query_rope(q, cos, sin, EPS), real=real)
    yield Case("latents", label, lambda: latents(latent, kv, *norms, cos, sin, EPS, True), rounds=True, real=real)
    for R, overlap in ((4, True), (128, False)):
        call = _compress(R, overlap, weight, cos, sin, dtype, "fp8")
        yield Case("compress", f"{label}, groups of {R}", call, rounds=True, real=real)
    logits, bias = _normal(T, 256 if real else 11), _normal(256 if real else 11)
    yield Case("route", label, lambda: route_by_expert(logits, bias, 6), real=real)
    V = 129280 if real else 13
    table, ids = (mx.arange(V * 6).reshape(V, 6) % logits.shape[-1]).astype(mx.int32), V - 1 - mx.arange(T)
    yield Case("route_hash", label, lambda: route_hash(logits, table, ids, 1.5), real=real)


def _compress(
    R: int,
    overlap: bool,
    weight: mx.array,
    cos: mx.array,
    sin: mx.array,
    dtype: mx.Dtype,
    quant: Quant,
    packed: bool = False,
) -> Callable[[], mx.array]:
    """As many groups as there are angles, with one before them, in a ring that ends within a group."""
    S, channels = cos.shape[0], (1 + overlap) * weight.size
    tokens, ape = _normal(1, (S + 1) * R, 2 * channels + 1), _normal(R, channels)
    kv, gate, start = 1, 1 + channels, R - 1
    return lambda: compress(
        tokens, ape, weight, cos, sin, EPS, dtype, quant, packed, kv=kv, gate=gate, start=start, before=True
    )


def route_by_expert(logits: mx.array, bias: mx.array, k: int) -> mx.array:
    """Weights [T, E], 0 where an expert is not chosen: the same whatever order the experts come in."""
    ids, weights = route(logits, bias, k, 1.5)
    return mx.put_along_axis(mx.zeros_like(logits), ids, weights, axis=-1)


def _index(real: bool, dtype: mx.Dtype) -> Iterator[Case]:
    T, heads, J, S, k = (1, 64, 128, 4096, 512) if real else (3, 5, 128, 130, 37)
    label, (cos, sin) = _label(real, dtype), _rotation(T, 32)
    q, w, keys = _normal(1, T, heads, J, dtype=dtype), _normal(1, T, heads), _normal(1, S, J, dtype=dtype)
    scores, visible = _normal(1, T, S), mx.arange(S - T + 1, S + 1)
    call = _compress(4, True, mx.ones(J), cos, sin, dtype, "fp4")
    yield Case("index_query", label, lambda: index_query(q, cos, sin, True), rounds=True, real=real)
    yield Case("compress", f"{label}, index keys", call, rounds=True, real=real)
    yield Case("index_scores", label, lambda: index_scores(q, w, keys, 0.01), real=real)
    yield Case("index_topk", label, lambda: index_topk(scores, k, visible), exact=True, real=real)
    ties = mx.round(scores)
    yield Case("index_topk", f"{label}, ties", lambda: index_topk(ties, k, visible), exact=True, real=real)


def _attention(real: bool, dtype: mx.Dtype) -> Iterator[Case]:
    T, H, K, S, k = (1, 64, 512, 2048, 512) if real else (3, 5, 70, 130, 37)
    return _attend("sparse_attention", T, H, K, S, k, real, dtype)


def _attention_prefill(real: bool, dtype: mx.Dtype) -> Iterator[Case]:
    T, H, K, S, k = (256, 64, 512, 2048, 512) if real else (35, 5, 70, 130, 37)
    return _attend("attention_prefill", T, H, K, S, k, real, dtype, large=real)


def _attend(
    op: str, T: int, H: int, K: int, S: int, k: int, real: bool, dtype: mx.Dtype, large: bool = False
) -> Iterator[Case]:
    label, (cos, sin) = _label(real, dtype), _rotation(T, 32)
    q, sink = _normal(1, T, H, K, dtype=dtype), _normal(H)
    window, rows = _normal(1, 127 + T, K, dtype=dtype), _normal(1, S, K, dtype=dtype)
    picks = mx.sort(mx.argpartition(_normal(1, T, S), k, axis=-1)[..., :k], axis=-1).astype(mx.int32)

    def attend(rows: mx.array | None, picks: mx.array | None) -> mx.array:
        return sparse_attention(
            q, window, rows, picks, sink, cos, sin, position=4 * S, ratio=4, window_size=128
        )  # fmt: skip

    for keys, arrays in (("window", (None, None)), ("all rows", (rows, None)), ("picked rows", (rows, picks))):
        yield Case(op, f"{label}, {keys}", lambda arrays=arrays: attend(*arrays), real=real, large=large)  # type: ignore[misc]


def _packed_rows(real: bool) -> Iterator[Case]:
    """Written and read; what is written is compared as the numbers it stands for."""
    T, H, K, P, J, S = (1, 64, 512, 64, 128, 2048) if real else (3, 5, 140, 12, 64, 130)
    label, dtype, (cos, sin) = f"{_label(real, mx.bfloat16)}, packed", mx.bfloat16, _rotation(T, P // 2)
    kv, sink = _normal(1, T, K, dtype=dtype), _normal(H)
    window, rows = (pack_rows(_normal(1, n, K, dtype=dtype), P) for n in (127 + T, S))
    keys = pack_keys(_normal(1, S, J, dtype=dtype))
    q, index_q, w = _normal(1, T, H, K, dtype=dtype), _normal(1, T, H, J, dtype=dtype), _normal(1, T, H)

    def write_row() -> mx.array:
        row = latents(kv, kv, mx.ones(K), mx.ones(K), cos, sin, EPS, True, True)[1]
        return unpack_rows(row, K, P).astype(dtype)

    write_key = _compress(4, True, mx.ones(J), cos, sin, dtype, "fp4", True)

    def attend() -> mx.array:
        return sparse_attention(
            q, window, rows, None, sink, cos, sin, position=4 * S, ratio=4, window_size=128
        )  # fmt: skip

    yield Case("latents", label, write_row, rounds=True, real=real)
    yield Case("compress", f"{label}, index keys", lambda: unpack_keys(write_key(), J), rounds=True, real=real)
    yield Case("index_scores", label, lambda: index_scores(index_q, w, keys), real=real)
    yield Case("sparse_attention", label, attend, real=real)


def _experts(real: bool, dtype: mx.Dtype) -> Iterator[Case]:
    E, A, D, F = (16, 6, 4096, 2048) if real else (5, 3, 96, 64)
    label, x, h = _label(real, dtype), _normal(1, D, dtype=dtype), _normal(A + 1, F, dtype=dtype)
    w1, w3, w2 = (_packed(E, rows, columns) for rows, columns in ((F, D), (F, D), (D, F)))
    token, expert, weight = mx.zeros((A,), mx.int32), mx.arange(E - A, E).astype(mx.int32), mx.abs(_normal(A))
    s1, s3, s2 = (_packed_shared(rows, columns) for rows, columns in ((F, D), (F, D), (D, F)))
    pairs = token, expert, weight, 10.0, False
    yield Case("expert_gate_up", label, lambda: expert_gate_up(x, w1, w3, *pairs, (s1, s3)), real=real, large=real)
    yield Case("expert_down", label, lambda: expert_down(h[:A], w2, expert, False), real=real, large=real)
    yield Case("expert_down_sum", label, lambda: expert_down_sum(h, w2, expert[None], s2), real=real, large=real)
    for bits in () if real else (2, 3, 4, 5, 6, 8):
        a1, a3 = (_affine(E, F, D, bits) for _ in range(2))
        yield Case(
            "expert_gate_up", f"{label}, affine {bits} bits",
            lambda a1=a1, a3=a3: expert_gate_up(x, a1, a3, *pairs), real=real,  # type: ignore[misc]
        )  # fmt: skip
    head = _normal(16384 if real else 67, D, dtype=mx.bfloat16)
    yield Case("project_f32", label, lambda: project_f32(x, head), real=real)


def _experts_prefill(real: bool, dtype: mx.Dtype) -> Iterator[Case]:
    E, T, P, D, F = (16, 512, 3072, 4096, 2048) if real else (5, 7, 53, 96, 67)
    label, x, h = _label(real, dtype), _normal(T, D, dtype=dtype), _normal(P, F if real else 64, dtype=dtype)
    w1, w3, w2 = _packed(E, F, D), _packed(E, F, D), _packed(E, D, h.shape[-1])
    token, weight = mx.arange(P) % T, mx.abs(_normal(P))
    expert = mx.sort(mx.random.randint(0, E, (P,), mx.int32, key=mx.random.key(P)))

    def gate_up() -> mx.array:
        with expert_prefill("metal"):
            return expert_gate_up(x, w1, w3, token, expert, weight, 10.0, True)

    def down() -> mx.array:
        with expert_prefill("metal"):
            return expert_down(h, w2, expert, True)

    yield Case("expert_gate_up_prefill", label, gate_up, real=real, large=real)
    yield Case("expert_down_prefill", label, down, real=real, large=real)


def _packed(E: int, rows: int, columns: int) -> ExpertWeights:
    scales = mx.random.randint(117, 121, (E, rows, columns // 32), mx.int32, key=mx.random.key(rows)).astype(mx.uint8)
    return ExpertWeights(_words(E, rows, columns // 8), scales, "mxfp4")


def _packed_shared(rows: int, columns: int) -> ExpertWeights:
    weight, scales, *_ = mx.quantize(_normal(rows, columns), mode="mxfp8")
    return ExpertWeights(weight, scales, "mxfp8")


def _affine(E: int, rows: int, columns: int, bits: int) -> ExpertWeights:
    """Numbers from 0 on; scales and biases that make them weights of about 1 in size, around 0."""
    scales = mx.abs(_normal(E, rows, columns // 32)) / (1 << bits)
    biases = -scales * (1 << (bits - 1))
    narrow = scales.astype(mx.bfloat16), biases.astype(mx.bfloat16)
    return ExpertWeights(_words(E, rows, columns * bits // 32), narrow[0], "affine", narrow[1], bits, 32)


def _words(*shape: int) -> mx.array:
    return mx.random.randint(0, 2**31 - 1, shape, mx.int32, key=mx.random.key(sum(shape))).view(mx.uint32)
