"""Random values for a checkpoint's tensors: every feature is used, and activations stay of order one."""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Iterator
from statistics import NormalDist
from typing import Any

import numpy as np

from .config import ModelConfig
from .inventory import TensorSpec
from .safetensors_header import DTYPES

Array = np.ndarray[Any, np.dtype[Any]]

# Elements drawn at once. The largest temporary is eight bytes for each.
PIECE = 1 << 21

# V4-Flash-Base repeats these two in its draft block.
COPIES = {"mtp.0.emb.tok_emb.weight": "embed.weight", "mtp.0.head.weight": "head.weight"}

_F32 = re.compile(r"(hc_\w+|attn_sink|ape|gate\.bias)$")


def stored_dtype(name: str, spec: TensorSpec, base: bool) -> str:
    """The one of the possible types that DeepSeek's files have; `base` as in V4-Flash-Base."""
    if "F8_E8M0" in spec.dtypes:
        return "F32" if base else "F8_E8M0"
    if set(spec.dtypes) == {"BF16", "F32"}:
        return "F32" if _F32.search(name) else "BF16"
    return spec.dtypes[0]


def random_pieces(
    name: str, specs: dict[str, TensorSpec], dtype: str, config: ModelConfig, seed: int
) -> Iterator[Array]:
    """Values of one tensor in pieces, flat; the same for a name and seed, whatever else is written."""
    name = COPIES.get(name, name)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    source = np.random.SFC64(int.from_bytes(digest, "little"))
    shape = specs[name].shape
    if name.endswith("tid2eid"):
        yield from _distinct_experts(source, shape, config.n_routed_experts)
        return
    table = None if dtype == "I8" else _table(name, specs, dtype, config)
    index = np.dtype(np.uint8 if table is None or len(table) == 256 else np.uint16)
    count = math.prod(shape)
    for start in range(0, count, PIECE):
        size = min(PIECE, count - start)
        draws = source.random_raw(-(-size * index.itemsize // 8)).view(index)[:size]
        yield draws if table is None else table.take(draws)


def _distinct_experts(source: np.random.SFC64, shape: tuple[int, ...], experts: int) -> Iterator[Array]:
    tokens, chosen = shape
    rows = max(4, PIECE // experts // 4 * 4)  # so that a piece uses whole draws of eight bytes
    for start in range(0, tokens, rows):
        size = min(rows, tokens - start)
        keys = source.random_raw(-(-size * experts // 4)).view(np.uint16)[: size * experts].reshape(size, experts)
        # Stable, because the order of equal keys would otherwise depend on the processor.
        yield np.argsort(keys, axis=1, kind="stable")[:, :chosen].astype(np.int64).ravel()


def _table(name: str, specs: dict[str, TensorSpec], dtype: str, config: ModelConfig) -> Array:
    """What a random byte, or for floats a random uint16, stands for."""
    if dtype == "F8_E4M3":
        return _fp8_table()[0]
    if not name.endswith(".scale"):
        mean, spread = _spread(name, specs[name].shape[-1], config)
        return _float_table(dtype, mean, spread)
    weight = specs[name.removesuffix("scale") + "weight"]
    packed = weight.dtypes[0] == "I8"
    _, spread = _spread(name.removesuffix("scale") + "weight", weight.shape[-1] * (2 if packed else 1), config)
    return _scale_table(dtype, spread / (_FP4_RMS if packed else _fp8_table()[1]))


def _spread(name: str, columns: int, config: ModelConfig) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values."""
    norm, out, inner = 1 / math.sqrt(columns), _output_gain(config), _inner_gain(config)
    rules = {
        r"norm\.weight$": (1.0, 0.2),
        r"^embed\.weight$": (0.0, 1.0),
        r"^head\.weight$": (0.0, 2 * norm),  # logits of standard deviation 2
        r"hc_\w+_base$": (0.0, 1.0),
        r"hc_\w+_scale$": (1.0, 0.2),
        r"attn_sink$": (0.0, 1.0),
        r"ape$": (0.0, 0.5),
        r"gate\.bias$": (0.0, 0.1),
        r"gate\.weight$": (0.0, 2 * norm),
        r"attn\.wo_b\.weight$": (0.0, 2 * out * norm),  # heads average rows, which makes them small
        r"\.w[13]\.weight$": (0.0, inner * norm),
        r"\.w2\.weight$": (0.0, out * norm / _swiglu_rms(inner, config.swiglu_limit)),
    }
    return next((value for rule, value in rules.items() if re.search(rule, name)), (0.0, norm))


def _output_gain(config: ModelConfig) -> float:
    """Size of what a sublayer adds, such that the streams do not grow with the number of layers."""
    return min(1.0, math.sqrt(2 / config.num_hidden_layers))


def _inner_gain(config: ModelConfig) -> float:
    """Size of the inputs of SwiGLU: large enough for its limit to act on some, small enough for it to matter little."""
    return min(max(0.35 * config.swiglu_limit, 1.0), 4.0)


@functools.cache
def _swiglu_rms(gain: float, limit: float) -> float:
    x = gain * _quantiles(4096)
    gate, up = np.minimum(x, limit), np.clip(x, -limit, limit)
    return round(float(np.sqrt(np.mean((gate / (1 + np.exp(-gate))) ** 2) * np.mean(up**2))), 9)


@functools.cache
def _quantiles(count: int) -> Array:
    """Values of a normal distribution that cut it into equal parts, with a variance of one."""
    normal = NormalDist()
    # Rounded, because the last digits of a logarithm depend on the machine.
    values: Array = np.array([round(normal.inv_cdf((i + 0.5) / count), 12) for i in range(count)])
    return values / math.sqrt(math.fsum(values**2) / count)


@functools.lru_cache(maxsize=64)
def _float_table(dtype: str, mean: float, spread: float) -> Array:
    values = (mean + spread * _quantiles(1 << 16)).astype(np.float32)
    if dtype == "F32":
        return values
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(DTYPES["BF16"])


def _fp8_values() -> Array:
    """What the codes 0 ... 126 of E4M3 stand for; 127 is not a number."""
    codes = np.arange(127)
    exponent, mantissa = codes >> 3, codes & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))


@functools.cache
def _fp8_table() -> tuple[Array, float]:
    """Codes of a normal distribution, some of them subnormal, and the root mean square of their values."""
    wanted, values = _quantiles(256), _fp8_values()
    codes = np.abs(np.abs(wanted)[:, None] - values).argmin(axis=1)
    rms = float(np.sqrt(np.mean(values[codes] ** 2)))
    return (codes | np.where(wanted < 0, 0x80, 0)).astype(np.uint8), rms


# Of all sixteen FP4 codes alike: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
_FP4_RMS = math.sqrt(sum(v * v for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)) / 8)


@functools.lru_cache(maxsize=64)
def _scale_table(dtype: str, rms: float) -> Array:
    """Powers of two of this root mean square, over a range of eight or sixteen."""
    middle = math.log2(rms) - 0.5 * math.log2((0.25 + 1 + 4) / 3)
    lower = math.floor(middle)
    # A share of the exponents is one higher, so that the mean square is not rounded to a power of two.
    share = (4 ** (middle - lower) - 1) / 3
    i = np.arange(256)
    exponents = lower + i % 3 - 1 + ((i // 3 + 0.5) / (256 / 3) < share)
    return (exponents + 127).astype(np.uint8) if dtype == "F8_E8M0" else (2.0**exponents).astype(np.float32)
