"""Mistakes that are easy to make in this model: each would run without an error and give a wrong one.

They follow the list at the end of the specification (section 15), and go on with what its text and the golden cases
warn of. Each is one or more replacements in one file; `mutations.py` makes them one at a time and runs the tests.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """A wrong version of one file.

    Attributes:
        rule: entry of the list in the specification, or another short name.
        what: what is wrong.
        file: path from the root of the project.
        edits: text as it must be, exactly once in the file, and the wrong text, for each replacement.
        too_small: for the golden cases to notice; tests of the part alone do, and run first.
        tests: files that must notice, instead of those that compare logits with what is expected.
    """

    rule: str
    what: str
    file: str
    edits: tuple[tuple[str, str], ...]
    too_small: bool = False
    tests: tuple[str, ...] = ()


def wrong(
    rule: str, what: str, file: str, *texts: str, too_small: bool = False, tests: tuple[str, ...] = ()
) -> Mistake:
    assert texts and len(texts) % 2 == 0, what
    return Mistake(rule, what, file, tuple(zip(texts[::2], texts[1::2], strict=True)), too_small, tests)


OPS, MODEL = "metal_kernels", "mlx_v4flash"
MIX, EXPAND, COLLAPSE = f"{OPS}/stream_mix.py", f"{OPS}/stream_expand.py", f"{OPS}/stream_collapse.py"
ATTEND, ROPE, POOL, LATENTS = f"{OPS}/sparse_attention.py", f"{OPS}/rope.py", f"{OPS}/compress.py", f"{OPS}/latents.py"
QUERY, NORM, EXPERTS, ROUTE = f"{OPS}/query_rope.py", f"{OPS}/rms_norm.py", f"{OPS}/experts.py", f"{OPS}/route.py"
SCORES, TOPK, INDEX_QUERY = f"{OPS}/index_scores.py", f"{OPS}/index_topk.py", f"{OPS}/index_query.py"
ROUND, ATTENTION, TABLES = f"{OPS}/round_trip.py", f"{MODEL}/attention.py", f"{MODEL}/rope.py"
COMPRESSOR, CACHE, MOE, WEIGHTS = (f"{MODEL}/{n}.py" for n in ("compressor", "cache", "moe", "weights"))
CHECKPOINT, LINEAR, PRODUCTS = (f"{MODEL}/{n}.py" for n in ("checkpoint", "linear", "experts/products"))

COLUMNS, ROWS = "comb.sum(axis=-2, keepdims=True) + hc_eps)\n", "comb.sum(axis=-1, keepdims=True) + hc_eps)\n"
SINKHORN = f"        comb = comb / ({ROWS}        comb = comb / ({COLUMNS}"

STREAMS = [
    wrong("1", "comb not transposed", EXPAND, "comb.swapaxes(-1, -2) @", "comb @"),
    wrong("1", "softmax over the columns of comb", MIX, "mx.softmax(comb, axis=-1)", "mx.softmax(comb, axis=-2)"),
    wrong("1", "no softmax of comb, only exp", MIX, "mx.softmax(comb, axis=-1)", "mx.exp(comb)"),
    wrong("1", "Sinkhorn ends with rows", MIX, SINKHORN,
          f"        comb = comb / ({COLUMNS}        comb = comb / ({ROWS}"),
    wrong("1", "19 Sinkhorn iterations", MIX, "range(iterations - 1)", "range(iterations - 2)"),
    wrong("1", "21 Sinkhorn iterations", MIX, "range(iterations - 1)", "range(iterations)"),
    wrong("1", "one Sinkhorn iteration", MIX, "range(iterations - 1)", "range(0)"),
    wrong("1", "no epsilon on comb after its softmax", MIX, "axis=-1) + hc_eps\n", "axis=-1)\n"),
    wrong("1", "no epsilon on pre", MIX, "base[:N]) + hc_eps", "base[:N])", too_small=True),
    wrong("1", "no epsilon on the weights of the head", MIX, "scale + base) + hc_eps", "scale + base)", too_small=True),
    wrong("1", "post not doubled", MIX, "2 * mx.sigmoid", "mx.sigmoid"),
    wrong("1", "scales of pre and post swapped", MIX, "scale[0] + base[:N]", "scale[1] + base[:N]",
          "scale[1] + base[N :", "scale[0] + base[N :"),
    wrong("1", "streams flattened feature by feature", MIX, ".flatten(-2)", ".swapaxes(-1, -2).flatten(-2)"),
    wrong("1", "statistic of each stream apart", MIX, "    f = x.astype(mx.float32).flatten(-2)",
          "    f = (x * mx.rsqrt(x.square().mean(axis=-1, keepdims=True) + norm_eps)).astype(mx.float32).flatten(-2)"),
    wrong("1", "mixing weights not normalised", MIX,
          " * mx.rsqrt(f.square().mean(axis=-1, keepdims=True) + norm_eps)", ""),
    wrong("1", "pre normalised to one", COLLAPSE, "pre[..., None])", "(pre / pre.sum(-1, keepdims=True))[..., None])",
          too_small=True),
]  # fmt: skip

ROTATION = [
    wrong("2", "no output de-rotation", ATTEND, "return rope_reference(o, cos, -sin)", "return o"),
    wrong("2", "output rotated once more", ATTEND, "rope_reference(o, cos, -sin)", "rope_reference(o, cos, sin)"),
    wrong("2", "values without their rotated part", ATTEND, "return rope_reference(o, cos, -sin)",
          "return mx.concatenate([(s := mx.split(o, [K - 2 * cos.shape[-1]], -1))[0], mx.zeros_like(s[1])], -1)"),
    wrong("3", "theta 10000 everywhere", TABLES, "config.compress_rope_theta", "config.rope_theta"),
    wrong("3", "theta 160000 everywhere", TABLES, "(config.rope_theta", "(config.compress_rope_theta"),
    wrong("3", "YaRN also in window layers", TABLES, "rope_theta, width, None)",
          "rope_theta, width, config.rope_scaling)"),
    wrong("3", "no YaRN in compressed layers", TABLES, "compress_rope_theta, width, config.rope_scaling)",
          "compress_rope_theta, width, None)"),
    wrong("3", "YaRN factor halved", TABLES, "np.float32(yarn.factor)", "np.float32(yarn.factor / 2)"),
    wrong("3", "YaRN ramp not rounded to whole pairs", TABLES, "max(math.floor(pair(yarn.beta_fast)), 0)",
          "max(pair(yarn.beta_fast), 0)", "math.ceil(pair(yarn.beta_slow))", "pair(yarn.beta_slow)"),
    wrong("3", "YaRN ramp the other way round", TABLES, "* ramp + frequencies * (1 - ramp)",
          "* (1 - ramp) + frequencies * ramp"),
    wrong("3", "magnitude factor of YaRN", TABLES, "(mx.cos(angles), mx.sin(angles))",
          "(mx.cos(angles) * (m := 1.277 if compressed else 1), mx.sin(angles) * m)"),
    wrong("3", "plain table in all attention", ATTENTION, "compressed=self.ratio != 0", "compressed=False"),
    wrong("3", "plain table for window keys", ATTENTION, "self.kv_norm.weight, cos, sin,",
          "self.kv_norm.weight, *rotations.tokens(compressed=False),"),
    wrong("3", "plain table for compressed rows", TABLES, "self._rotation(True, first", "self._rotation(False, first"),
    wrong("3", "plain table for indexer queries", COMPRESSOR, "tokens(compressed=True)", "tokens(compressed=False)"),
    wrong("3", "positions in bfloat16", TABLES, "step).astype(mx.float32)",
          "step).astype(mx.bfloat16).astype(mx.float32)"),
    wrong("3", "positions start at zero in each call", TABLES, "self.position, self.T, 1", "0, self.T, 1"),
    wrong("4", "half-split pairs", ROPE, ".reshape(*turned.shape[:-1], -1, 2)", "",
          "a, b = pairs[..., 0], pairs[..., 1]", "a, b = mx.split(pairs, 2, axis=-1)",
          "mx.stack(", "mx.concatenate("),
    wrong("4", "the first dimensions rotated", ROPE,
          "still, turned = mx.split(x, [x.shape[-1] - 2 * cos.shape[-1]], axis=-1)",
          "turned, still = mx.split(x, [2 * cos.shape[-1]], axis=-1)",
          "[still, turned.astype(x.dtype)]", "[turned.astype(x.dtype), still]"),
    wrong("4", "pairs turned the other way", ROPE, "a * cos - b * sin, a * sin + b * cos",
          "a * cos + b * sin, b * cos - a * sin"),
]  # fmt: skip

COMPRESSION = [
    wrong("5", "no overlap between groups", POOL, "mx.concatenate([last_values, values[:, 1:, :, K:]], axis=2)",
          "values[:, 1:, :, K:]", "mx.concatenate([last_gates, gates[:, 1:, :, K:]], axis=2)", "gates[:, 1:, :, K:]"),
    wrong("5", "halves of the overlap swapped", POOL, "values[:, :-1, :, :K], gates[:, :-1, :, :K]",
          "values[:, :-1, :, K:], gates[:, :-1, :, K:]", "values[:, 1:, :, K:]]", "values[:, 1:, :, :K]]",
          "gates[:, 1:, :, K:]]", "gates[:, 1:, :, :K]]"),
    wrong("5", "first halves kept in their own group", POOL, "values[:, :-1, :, :K], gates[:, :-1, :, :K]",
          "values[:, 1:, :, :K], gates[:, 1:, :, :K]"),
    wrong("5", "last group forgotten between calls", CACHE, "before = start % R, n > R and start >= R",
          "before = start % R, False"),
    wrong("5", "absent group before the first takes part", POOL, "-mx.inf), last_gates[:, 1:]",
          "0.0), last_gates[:, 1:]"),
    wrong("5", "ring of tokens one group late", CACHE, "(start + 1 - R) % n", "(start + 1) % n"),
    wrong("5", "a softmax for each half of the candidates", POOL, "mx.softmax(gates, axis=2)",
          "(0.5 * mx.nan_to_num(mx.softmax(gates.reshape(*gates.shape[:2], 2, -1, gates.shape[3]), axis=3))"
          ").reshape(gates.shape)"),
    wrong("5", "row at the position of its last token", TABLES, "first * ratio, count",
          "(first + 1) * ratio - 1, count"),
    wrong("5", "row at its own number", TABLES, "first * ratio, count, ratio", "first, count, 1"),
    wrong("5", "ape ignored", POOL, ".reshape(split) + ape", ".reshape(split)"),
    wrong("5", "groups counted from the start of the call", CACHE, "open_tokens, before = start % R,",
          "open_tokens, before = 0,"),
    wrong("5", "one softmax for all channels", POOL, "mx.softmax(gates, axis=2)",
          "mx.softmax(gates.mean(axis=3, keepdims=True), axis=2)"),
    wrong("5", "rotated before the norm", POOL, "rope_reference(rms_norm(pooled, weight, eps), cos, sin)",
          "rms_norm(rope_reference(pooled, cos, sin), weight, eps)"),
    wrong("5", "no norm of compressed rows", POOL, "rms_norm(pooled, weight, eps)", "pooled"),
    wrong("5", "open group forgets its oldest token", CACHE, "kept = open_tokens + R * before",
          "kept = max(open_tokens - 1, 0) + R * before"),
]  # fmt: skip

VISIBILITY = [
    wrong("6", "HCA rows visible one token late", ATTEND, "((positions + 1) // ratio)", "(positions // ratio)"),
    wrong("6", "HCA rows visible one token early", ATTEND, "((positions + 1) // ratio)", "((positions + 2) // ratio)"),
    wrong("6", "CSA rows visible one token late", COMPRESSOR, "rotations.position + t + 1) //",
          "rotations.position + t) //"),
    wrong("6", "CSA rows visible one token early", COMPRESSOR, "rotations.position + t + 1) //",
          "rotations.position + t + 2) //"),
    wrong("6", "window of 127", ATTEND, "(age < window_size)", "(age < window_size - 1)"),
    wrong("6", "window of 129", ATTEND, "(age < window_size)", "(age <= window_size)",
          "start - window_size + 1)", "start - window_size)"),
    wrong("6", "window without the current token", ATTEND, "(age >= 0)", "(age > 0)"),
    wrong("6", "window with the next token", ATTEND, "(age >= 0)", "(age >= -1)"),
    wrong("6", "window loses its oldest row between chunks", CACHE, "min(start, W - 1)), rows]",
          "min(start, W - 2)), rows]"),
    wrong("6", "new row in the wrong place of the ring", CACHE, "rows, start % W)", "rows, (start + 1) % W)"),
    wrong("6", "ring of a chunk turned by one", CACHE, "_ring(seen, W, start + T)",
          "_ring(seen, W, start + T + 1)"),
    wrong("6", "softmax of window and rows apart", ATTEND, "mx.softmax(mx.concatenate(logits, axis=-1), axis=-1)",
          "mx.concatenate([mx.softmax(mx.concatenate(logits[:2], axis=-1), axis=-1)]"
          " + [mx.nan_to_num(mx.softmax(a, axis=-1)) for a in logits[2:]], axis=-1)"),
    wrong("6", "sink ignored", ATTEND, "[sink[None, None, :, None] +", "[-mx.inf +", "(B, T, 1, 1)", "(B, T, H, 1)"),
    wrong("6", "sink scaled like a logit", ATTEND, "[sink[None, None, :, None] +",
          "[sink[None, None, :, None] * K**-0.5 +"),
    wrong("6", "one sink for all heads", ATTEND, "[sink[None, None, :, None] +",
          "[sink.mean() + 0 * sink[None, None, :, None] +"),
    wrong("6", "logits scaled by the rotated width", ATTEND, "* K**-0.5", "* 64**-0.5"),
]  # fmt: skip

QUERIES = [
    wrong("7", "no norm per head", QUERY, "rms_norm(q, None, eps)", "q"),
    wrong("7", "one norm over all heads", QUERY, "rms_norm(q, None, eps)",
          "rms_norm(q.flatten(-2), None, eps).reshape(q.shape)"),
    wrong("7", "no norm of the latent", LATENTS, "return rms_norm(q, q_weight, eps), row", "return q, row"),
    wrong("7", "no norm of the key", LATENTS, "rms_norm(kv, kv_weight, eps)", "kv"),
    wrong("7", "norms times 1 + w", NORM, "weight.astype(mx.float32)\n", "1 + weight.astype(mx.float32)\n"),
]  # fmt: skip

CLAMP = [
    wrong("8", "gate clamped on both sides", EXPERTS, "mx.minimum(g.astype(mx.float32), limit)",
          "mx.clip(g.astype(mx.float32), -limit, limit)"),
    wrong("8", "gate not clamped", EXPERTS, "mx.minimum(g.astype(mx.float32), limit)", "g.astype(mx.float32)"),
    wrong("8", "up clamped from above only", EXPERTS, "mx.clip(u.astype(mx.float32), -limit, limit)",
          "mx.minimum(u.astype(mx.float32), limit)"),
    wrong("8", "up not clamped", EXPERTS, "mx.clip(u.astype(mx.float32), -limit, limit)", "u.astype(mx.float32)"),
    wrong("8", "clamped after silu", EXPERTS, "mx.minimum(g.astype(mx.float32), limit)", "g.astype(mx.float32)",
          "return g * mx.sigmoid(g)", "return mx.minimum(g * mx.sigmoid(g), limit)"),
    wrong("8", "no clamp in the shared expert", PRODUCTS, "self.w3(x), self._limit)", "self.w3(x), 1e9)"),
    wrong("8", "no clamp in the shared expert beside few pairs", EXPERTS, "swiglu(g, u, limit).astype(x.dtype)])",
          "swiglu(g, u, 1e9).astype(x.dtype)])"),
    wrong("8", "no clamp in the routed experts", PRODUCTS, "self.limit, True)", "1e9, True)"),
    wrong("8", "no clamp in the routed experts of few pairs", PRODUCTS, "self.limit, False, both)",
          "1e9, False, both)"),
    wrong("8", "w1 and w3 swapped in the shared expert", PRODUCTS, "swiglu(self.w1(x), self.w3(x)",
          "swiglu(self.w3(x), self.w1(x)"),
    wrong("8", "w1 and w3 swapped in the routed experts", PRODUCTS,
          "        h = expert_gate_up(x, self.w1, self.w3,", "        h = expert_gate_up(x, self.w3, self.w1,"),
    wrong("8", "w1 and w3 of the shared expert swapped beside few pairs", PRODUCTS,
          "(packed(shared.w1), packed(shared.w3))", "(packed(shared.w3), packed(shared.w1))"),
    wrong("8", "shared expert left out", EXPERTS, " + shared.astype(mx.float32)", ""),
]  # fmt: skip

ROUTING = [
    wrong("9", "bias in the weights", ROUTE, "_weights(scores, ids, scale)", "_weights(scores + bias, ids, scale)"),
    wrong("9", "bias ignored", ROUTE, "-(scores + bias)", "-scores"),
    wrong("9", "bias added to the logits", ROUTE, "-(scores + bias)", "-_scores(logits + bias)"),
    wrong("9", "hash layers routed by score", ROUTE, "experts = table[ids]",
          "experts = mx.argpartition(-logits, table.shape[-1] - 1, axis=-1)[..., : table.shape[-1]].astype(mx.int32)"),
    wrong("9", "hash layers with equal weights", ROUTE, "_weights(_scores(logits), experts, scale)",
          "mx.full(experts.shape, scale / experts.shape[-1])"),
    wrong("9", "weights scaled before they are normalised", ROUTE, "axis=-1)\n    return chosen /",
          "axis=-1) * scale\n    return chosen /", "keepdims=True) * scale", "keepdims=True)"),
    wrong("9", "weights not normalised", ROUTE, "chosen / chosen.sum(axis=-1, keepdims=True) * scale",
          "chosen * scale"),
    wrong("9", "sigmoid for the scores", ROUTE, "mx.sqrt(mx.logaddexp(logits, 0.0))", "mx.sigmoid(logits)"),
    wrong("9", "softplus without the square root", ROUTE, "mx.sqrt(mx.logaddexp(logits, 0.0))",
          "mx.logaddexp(logits, 0.0)"),
    wrong("9", "router in bfloat16", MOE, "logits = project_f32(x, self.weight)",
          "logits = project_f32(x, self.weight).astype(mx.bfloat16).astype(mx.float32)"),
    wrong("9", "one expert fewer", MOE, "self._k, self._scale)", "self._k - 1, self._scale)"),
]  # fmt: skip

FORMATS = [
    wrong("10", "nibbles swapped", WEIGHTS, "    array = _read(tensors, experts, dtype, readers)\n",
          "    array = _read(tensors, experts, dtype, readers)\n"
          "    array = (array >> 4 & 0x0F0F0F0F | (array & 0x0F0F0F0F) << 4) if tensors[0].dtype == 'I8' else array\n"),
    wrong("10", "E8M0 as 2^(v - 126)", CHECKPOINT, "codes, bad = values,", "codes, bad = values + 1,"),
    wrong("10", "E8M0 of the experts as 2^(v - 128)", WEIGHTS,
          "    list(readers.map(read_into, tensors, parts))\n",
          "    list(readers.map(read_into, tensors, parts))\n    host -= 1 if check_scales else 0\n"),
    wrong("10", "one FP8 scale for each matrix", WEIGHTS, "scale_bytes(stored, tensor.name)\n",
          "np.full_like(s := scale_bytes(stored, tensor.name), s[0, 0])\n"),
    wrong("10", "wo_a with its groups interleaved", LINEAR, "layer.weight.reshape(G, -1, layer.weight.shape[-1])",
          "mx.contiguous(layer.weight.reshape(-1, G, layer.weight.shape[-1]).swapaxes(0, 1))",
          "array.reshape(G, -1, array.shape[-1])",
          "mx.contiguous(array.reshape(-1, G, array.shape[-1]).swapaxes(0, 1))"),
    wrong("10", "heads dealt out to the groups", ATTENTION, "o.reshape(B, T, c.o_groups, -1)",
          "o.reshape(B, T, -1, c.o_groups, c.head_dim).swapaxes(2, 3).reshape(B, T, c.o_groups, -1)"),
    wrong("10", "outputs of wo_a interleaved", LINEAR, "y.swapaxes(0, 1).reshape(B, T, -1)",
          "y.transpose(1, 2, 0).reshape(B, T, -1)"),
    wrong("10", "top-k one smaller", COMPRESSOR, "config.index_topk, ratio", "config.index_topk - 1, ratio"),
    wrong("10", "top-k one larger", COMPRESSOR, "config.index_topk, ratio", "config.index_topk + 1, ratio"),
    wrong("10", "no top-k limit", COMPRESSOR, "keys.shape[1] <= self.top_k", "self.top_k"),
    wrong("10", "top-k before visibility", TOPK, "mx.where(rows < visible[:, None], -scores, mx.inf)", "-scores"),
]  # fmt: skip

INDEXER = [
    wrong("indexer", "no ReLU", SCORES, "mx.maximum(q @ part.swapaxes(1, 2), 0)", "(q @ part.swapaxes(1, 2))"),
    wrong("indexer", "ReLU after the head weights", SCORES, "(w[:, :, None] @ dots)[:, :, 0]",
          "mx.maximum(w[..., None] * dots, 0).sum(axis=2)"),
    wrong("indexer", "ReLU after the sum over heads", SCORES, "mx.maximum(q @ part.swapaxes(1, 2), 0)",
          "(q @ part.swapaxes(1, 2))", "(w[:, :, None] @ dots)[:, :, 0]",
          "mx.maximum((w[:, :, None] @ dots)[:, :, 0], 0)"),
    wrong("indexer", "head weights ignored", COMPRESSOR, "w, scale = projected[..., self._weights],",
          "w, scale = mx.ones_like(projected[..., self._weights]),"),
    wrong("indexer", "queries not rotated", INDEX_QUERY, "q = rope_reference(q, cos, sin)", "q = q"),
    wrong("indexer", "queries normalised per head", INDEX_QUERY, "q = rope_reference(q, cos, sin)",
          "q = rope_reference(mx.fast.rms_norm(q, None, 1e-6), cos, sin)"),
    wrong("indexer", "lowest scores chosen", TOPK, "-scores, mx.inf)", "scores, mx.inf)"),
]  # fmt: skip

ROUNDING = [
    wrong("FP8", "no round trip of rows", LATENTS, "[fp8_round_trip_reference(still, FP8_BLOCK), turned]",
          "[still, turned]"),
    wrong("FP8", "window rows only", COMPRESSOR, '("fp4" if index else "fp8")', '("fp4" if index else "none")'),
    wrong("FP8", "compressed rows only", LATENTS,
          "row = fp8_except_rotated(row, 2 * cos.shape[-1])", "pass"),
    wrong("FP8", "rotated dimensions rounded too", LATENTS,
          "mx.concatenate([fp8_round_trip_reference(still, FP8_BLOCK), turned], axis=-1)",
          "fp8_round_trip_reference(row, FP8_BLOCK)"),
    wrong("FP8", "blocks of 32", ROUND, "FP8_BLOCK = 64", "FP8_BLOCK = 32", too_small=True),
    wrong("FP8", "largest value 240", ROUND, "FP8_FLOOR = 448.0", "FP8_FLOOR = 240.0", too_small=True),
    wrong("FP8", "no floor", ROUND, "448.0, 1e-4", "448.0, 1e-30", too_small=True),
    wrong("FP8", "scales not rounded to powers of two", ROUND, "scale = (exponent << 23).view(mx.float32)",
          "scale = amax / largest"),
    wrong("FP8", "scales rounded down", ROUND, "(bits >> 23) + ((bits & 0x7FFFFF) != 0)", "(bits >> 23)"),
    wrong("FP8", "scales rounded up from powers of two", ROUND, "((bits & 0x7FFFFF) != 0)", "1", too_small=True),
    wrong("FP4", "no round trip in the indexer", ROUND, "(mx.round(blocks / step) * step * scale)", "(blocks * scale)"),
    wrong("FP4", "queries not rounded", INDEX_QUERY, "hadamard_fp4(q) if", "mx.hadamard_transform(q) if"),
    wrong("FP4", "keys not rounded", POOL, "return hadamard_fp4(row)", "return mx.hadamard_transform(row)"),
    wrong("FP4", "without Hadamard", ROUND, "mx.hadamard_transform(x.astype(mx.float32)).astype(x.dtype)", "x"),
    wrong("FP4", "Hadamard without its scale", ROUND, "mx.hadamard_transform(x.astype(mx.float32))",
          "mx.hadamard_transform(x.astype(mx.float32), 1.0)"),
    wrong("FP4", "ties away from zero", ROUND, "mx.round(blocks / step)",
          "mx.sign(blocks) * mx.floor(size / step + 0.5)", too_small=True),
    wrong("FP4", "blocks of 64", ROUND, "FP4_BLOCK = 32", "FP4_BLOCK = 64"),
    wrong("FP4", "no value 3", ROUND, "mx.where(size < 4, 1.0, 2.0)", "2.0"),
    wrong("inputs", "blocks of 64", LINEAR, "ACTIVATION_BLOCK = 128", "ACTIVATION_BLOCK = 64", too_small=True),
    wrong("inputs", "none rounded", LINEAR, "_fp8_input if self.quantize_activations else _unchanged", "_unchanged"),
    wrong("inputs", "wo_a's rounded", ATTENTION, "grouped_linear(self.wo_a, o.reshape(B, T, c.o_groups, -1))",
          "grouped_linear(self.wo_a, self._round_input(o.reshape(B, T, c.o_groups, -1)))"),
    wrong("inputs", "wo_b's not rounded", ATTENTION, "self.wo_b(self._round_input(z))", "self.wo_b(z)"),
    wrong("inputs", "the router's rounded", MOE, "self.gate(flat,", "self.gate(self._round_input(flat),"),
    wrong("inputs", "the compressors' rounded", ATTENTION, "self.wcompress(x)",
          "self.wcompress(self._round_input(x))"),
    wrong("inputs", "w2's of the shared expert not rounded", PRODUCTS, "self.w2(self._round_input(h))", "self.w2(h)"),
    wrong("inputs", "w2's of the routed experts not rounded", PRODUCTS, "expert_down(self.round_input(h),",
          "expert_down(h,"),
    wrong("inputs", "w2's of few pairs not rounded", PRODUCTS, "expert_down_sum(self.round_input(h),",
          "expert_down_sum(h,"),
    wrong("inputs", "the indexer queries' not rounded", ATTENTION,
          "= stacked_linear(self.wq_b, self._round_input(qr), self._queries)",
          "= [stacked_linear(self.wq_b, a, self._queries)[i] for i, a in enumerate([self._round_input(qr), qr]"
          "[: len(self._queries)])]", too_small=True),
]  # fmt: skip

STORE, STREAMED, PLAN = f"{MODEL}/experts/store.py", f"{MODEL}/experts/streamed.py", f"{MODEL}/plan.py"
SOURCE, READERS, POOL_OF, WORK = (f"{MODEL}/experts/{name}.py" for name in ("source", "readers", "pool", "work"))
RESIDENCY, EVICTION, ENGINE = f"{MODEL}/experts/residency.py", f"{MODEL}/experts/eviction.py", f"{MODEL}/engine.py"


def streaming(what: str, file: str, *texts: str) -> Mistake:
    tests = (
        "tests/test_residency.py", "tests/test_work.py", "tests/test_eviction.py", "tests/test_memory.py",
        "tests/test_plan.py", "tests/test_experts_streaming.py",
    )  # fmt: skip
    return wrong("stream", what, file, *texts, tests=tests)


STREAMING = [
    streaming("a free slot is given twice", RESIDENCY, "= self.loading[expert] = self._free.pop()",
              "= self.loading[expert] = self._free[-1]"),
    streaming("what is in use may go", RESIDENCY, "kept = set(keep)", "kept = set()"),
    streaming("a failed load goes on loading", RESIDENCY, "        self.loading.clear()\n", ""),
    streaming("a failed load counts as loaded", STORE, "            table.give_up_loading()",
              "            for expert in list(table.loading):\n                table.loaded(expert)"),
    streaming("what was lost stays lost", RESIDENCY,
              "        self.loading.clear()\n"
              "        self._free = sorted(set(range(self.slots)).difference(self.resident.values()), reverse=True)",
              "        self._free.extend(self.loading.values())\n        self.loading.clear()"),
    streaming("reads of an ended request begin", WORK, "if epoch != self._epoch:", "if False:"),
    streaming("the one used last goes", EVICTION, "for expert in self._order:", "for expert in reversed(self._order):"),
    streaming("uses never count less", EVICTION, "now = self._calls / self._half_life", "now = 0.0"),
    streaming("guesses are not counted as used", STORE,
              "self.statistics.prefetched_used += len(set(ahead.experts).intersection(distinct))", "pass"),
    streaming("slots are written while they are read", STORE, "        self.await_readers(layer)\n        own = self",
              "        own = self"),
    streaming("staging is written while it is read", STORE, "        self.await_readers(None)\n", ""),
    streaming("resident experts of a prefill are read again", STORE,
              "            if held is None:", "            if True:"),
    streaming("nobody waits for what a failed request still reads", WORK, "while busy := list(self._busy.values()):",
              "while busy := []:"),
    streaming("a shrinking pool gives up too little", STORE,
              "left = before - max(nbytes,", "left = before - min(nbytes,"),
    streaming("a shrinking pool keeps its old memory", STORE, "            user.release()", "            pass"),
    streaming("the other half of the staging range", STREAMED, "self._halves[half], x", "self._halves[1 - half], x"),
    streaming("copies of the wrong half stay", STREAMED, "half * self._half + slots[e]", "slots[e]"),
    streaming("the least used stay after a prefill", STREAMED, "np.argsort(-counts, kind", "np.argsort(counts, kind"),
    streaming("results in the order they came", STREAMED, "[order].reshape(*chosen.shape, -1), shared_result",
              ".reshape(*chosen.shape, -1), shared_result"),
    streaming("written to another layer's slots", POOL_OF,
              "arrays, {name: host[start:end] for name, host in hosts.items()}))\n    return ranges",
              "arrays, {name: host[: end - start] for name, host in hosts.items()}))\n    return ranges"),
    streaming("checksums are not compared", SOURCE, "if crc != packed.crc32[expert]:", "if False:"),
    streaming("scales are not checked", SOURCE, "                    scale_bytes(target, tensor.name)",
              "                    pass"),
    streaming("a short read is taken for all", READERS, "    while buffers:\n        count = os.preadv(fd,",
              "    if buffers:\n        count = os.preadv(fd,"),
    streaming("a file that was written to goes unseen", READERS, "return found.st_size, found.st_mtime_ns",
              "return found.st_size, 0"),
    streaming("direct reads begin at the block", READERS,
              "bounce[max(offset - start, 0) : max(min(count, end - start), 0)]",
              "bounce[0 : max(min(count, end - start) - max(offset - start, 0), 0)]"),
    streaming("a layer may get fewer slots than a token needs", POOL_OF, "min(max(each + more, least), most)",
              "min(each + more, most)"),
    streaming("caches are not planned", PLAN, '"caches": cache_bytes(c, context, packed),', '"caches": 0,'),
    streaming("the smallest budget forgets staging", PLAN, "A * sum(records) + sum(streaming.values())",
              "A * sum(records)"),
    streaming("the process does not count", ENGINE, "max(0, held_bytes() - plan.budget, arrays - plan.array_bytes)",
              "max(0, arrays - plan.array_bytes)"),
    streaming("slots go before freed memory", ENGINE, "    give_back()\n    excess = _excess(plan)\n    if excess and",
              "    excess = _excess(plan)\n    if excess and"),
    streaming("a conversation outgrows the plan", ENGINE, "    return min(room, planned)", "    return room"),
]  # fmt: skip

MISTAKES = [
    *STREAMS, *ROTATION, *COMPRESSION, *VISIBILITY, *QUERIES, *CLAMP, *ROUTING, *FORMATS, *INDEXER, *ROUNDING,
    *STREAMING,
]  # fmt: skip
