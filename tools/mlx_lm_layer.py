"""A decode step of one layer of mlx-lm's deepseek_v41, to count beside ours.

That model is DeepSeek-V4.1, of which mlx-lm has an implementation: the same streams, window, compressed rows, indexer,
router and experts, in other numbers. It has no HCA layers (all rows of a layer without an indexer) and no router by
token id. Its layers that read another layer's compressed rows are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models import deepseek_v41

Step = Callable[[mx.array], list[mx.array]]


def decode_step(config: dict[str, Any], ratio: int, position: int) -> Step:
    """One token at `position` through a layer that compresses by `ratio`, or not if it is 0, with 4-bit weights."""
    layer, args = _layer(config, ratio)
    cache, shared = deepseek_v41.LayerCache(args.sliding_window), {}
    mix, streams = mx.ones((1, 1, args.hc_mult)), mx.zeros((1, position, args.hc_mult, args.hidden_size), mx.bfloat16)
    rows = deepseek_v41._window_indices(previous=0, length=position, window=args.sliding_window)
    many = mx.broadcast_to(mix, (1, position, args.hc_mult))
    y = layer(streams, many, start_pos=0, window_idx=rows[None], cache=cache, shared=shared)
    mx.eval(y, [a for a in cache.state if a is not None])
    previous = cache.window.shape[1]
    rows = deepseek_v41._window_indices(previous=previous, length=1, window=args.sliding_window)[None]
    # Computed once for all layers, so no part of this one.
    mx.eval(rows, mix)

    def step(x: mx.array) -> list[mx.array]:
        new = layer(x, mix, start_pos=position, window_idx=rows, cache=cache, shared=dict(shared))
        kept = (cache.window, cache.compress_kv, cache.index_k, cache.pending_kv, cache.pending_gate)
        return [*new, *(a for a in kept if a is not None)]

    return step


def _layer(config: dict[str, Any], ratio: int) -> tuple[nn.Module, deepseek_v41.ModelArgs]:
    """Random weights: linear layers affine with 4 bits and groups of 64, norms bfloat16, the rest float32."""
    fields = deepseek_v41.ModelArgs.__dataclass_fields__
    sizes = {name: value for name, value in config.items() if name in fields}
    compressed = (0,) if ratio else ()
    args = deepseek_v41.ModelArgs(**{
        **sizes, "model_type": "deepseek_v41", "num_hidden_layers": 1, "compress_ratios": (ratio,),
        "kv_source_layer_ids": compressed, "index_source_layer_ids": compressed,
    })  # fmt: skip
    layer = deepseek_v41.DecoderLayer(args, 0)
    wide = deepseek_v41.Model(args).cast_predicate if hasattr(deepseek_v41.Model, "cast_predicate") else None
    layer.update(tree_map_with_path(
        lambda path, a: a.astype(mx.bfloat16) if wide is None or wide(f"model.layers.0.{path}") else a,
        layer.parameters(),
    ))  # fmt: skip
    nn.quantize(layer, group_size=64, bits=4)
    mx.eval(tree_flatten(layer.parameters()))
    return layer, args


@contextmanager
def fused_as_on_metal(make: Callable[..., Any]) -> Iterator[None]:
    """Norm, rotation, attention, Sinkhorn and swiglu as one launch each, which MLX's CPU graph would take apart.

    Args:
        make: makes a kernel, as mx.fast.metal_kernel does.
    """

    def one(name: str, x: mx.array, *others: mx.array | None, dtype: mx.Dtype | None = None) -> mx.array:
        inputs = [a for a in (x, *others) if a is not None]
        names = [f"a{i}" for i in range(len(inputs))]
        kernel = make(name=name, input_names=names, output_names=["y"], source=" ")
        (y,) = kernel(
            inputs=inputs,
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[x.shape],
            output_dtypes=[dtype or x.dtype],
        )
        return y

    fused: list[tuple[Any, str, Callable[..., mx.array]]] = [
        (mx.fast, "rms_norm", lambda x, weight, eps: one("rms_norm", x, weight)),
        (mx.fast, "rope", lambda x, *_, freqs=None, **__: one("rope", x, freqs)),
        (mx.fast, "scaled_dot_product_attention",
         lambda q, k, v, *, scale, mask, sinks: one("attention", q, k, v, mask, sinks)),
        # One launch there too, but MLX cannot record them.
        (mx, "to_fp8", lambda x: one("to_fp8", x, dtype=mx.uint8)),
        (mx, "from_fp8", lambda x, dtype: one("from_fp8", x, dtype=dtype)),
        (deepseek_v41, "_sinkhorn", lambda comb, *, iters, eps: one("sinkhorn", comb, eps)),
        (deepseek_v41, "swiglu", lambda gate, x: one("swiglu", gate, x)),
    ]  # fmt: skip
    before = [getattr(owner, name) for owner, name, _ in fused]
    for owner, name, stand_in in fused:
        setattr(owner, name, stand_in)
    try:
        yield
    finally:
        for (owner, name, _), original in zip(fused, before, strict=True):
            setattr(owner, name, original)
