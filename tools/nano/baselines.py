"""What else compresses text: gzip, xz, and counts of byte sequences."""

from __future__ import annotations

import gzip
import lzma
import math
from collections import Counter


def compressed_bits(text: bytes, before: bytes) -> dict[str, float]:
    """Bits per byte of `text` when the compressor has seen `before`; gzip looks back 32 KiB only."""
    out = {}
    for name, compress in (("gzip", lambda b: gzip.compress(b, 9)), ("xz", lambda b: lzma.compress(b, preset=9))):
        out[name] = 8 * (len(compress(before + text)) - len(compress(before))) / len(text)
    return out


class ByteCounts:
    """Sequences of up to `order` bytes, each longer one interpolated with the shorter (Witten and Bell)."""

    def __init__(self, text: bytes, order: int) -> None:
        self.order = order
        self.seen = [Counter(text[i : i + n + 1] for i in range(len(text) - n)) for n in range(order)]
        self.total = [Counter[bytes]() for _ in range(order)]
        self.kinds = [Counter[bytes]() for _ in range(order)]
        for n, seen in enumerate(self.seen):
            for sequence, count in seen.items():
                self.total[n][sequence[:-1]] += count
                self.kinds[n][sequence[:-1]] += 1

    def bits_per_byte(self, text: bytes) -> float:
        return sum(-math.log2(self._probability(text, i)) for i in range(len(text))) / len(text)

    def _probability(self, text: bytes, i: int) -> float:
        p = 1 / 256
        for n in range(min(self.order, i + 1)):
            before = text[i - n : i]
            total = self.total[n][before]
            if total:
                kinds = self.kinds[n][before]
                p = (self.seen[n][text[i - n : i + 1]] + kinds * p) / (total + kinds)
        return p
