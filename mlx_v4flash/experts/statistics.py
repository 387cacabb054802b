"""What streaming experts took, counted."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class LayerCounts:
    """Of one layer: experts that calls used, of these how many were in memory, and how many were given up."""

    used: int = 0
    hits: int = 0
    evictions: int = 0

    @property
    def hit_rate(self) -> float | None:
        return self.hits / self.used if self.used else None


@dataclass
class Statistics:
    """Counts since the model was loaded; what was read while loading is not among them.

    Args:
        tokens: that went through the model.
        records, bytes_read: from disk; records are counted when their reading begins.
        disk_s: time in which reads were under way; wait_s: the part of it in which nothing else was done.
        syncs: how often the host waited for the device to learn which experts are needed.
        prefetched: experts loaded on a guess; prefetched_used: those that the next call needed.
    """

    layers: list[LayerCounts] = field(default_factory=list)
    tokens: int = 0
    records: int = 0
    bytes_read: int = 0
    disk_s: float = 0.0
    wait_s: float = 0.0
    syncs: int = 0
    prefetched: int = 0
    prefetched_used: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add_read(self, nbytes: int) -> None:
        """So much was read; any thread may say so."""
        with self._lock:
            self.bytes_read += nbytes

    def report(self) -> dict[str, Any]:
        """For --stats: rates, seconds and bytes; for each layer what `LayerCounts` has."""
        used, hits = sum(layer.used for layer in self.layers), sum(layer.hits for layer in self.layers)
        return {
            "expert_hit_rate": round(hits / used, 4) if used else None,
            "expert_bytes_per_token": self.bytes_read // max(self.tokens, 1),
            "expert_records_read": self.records,
            "expert_disk_hidden_s": round(max(self.disk_s - self.wait_s, 0.0), 3),
            "expert_disk_exposed_s": round(self.wait_s, 3),
            "expert_evictions": sum(layer.evictions for layer in self.layers),
            "expert_syncs": self.syncs,
            "expert_prefetch_useful": self.prefetched_used,
            "expert_prefetch_wasted": self.prefetched - self.prefetched_used,
            "expert_layers": [asdict(layer) | {"hit_rate": layer.hit_rate} for layer in self.layers],
        }
