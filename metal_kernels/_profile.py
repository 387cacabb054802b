"""What was found out about the kernels on this machine, kept between runs."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class Verdict:
    """Whether an op's kernel is used on this machine.

    Attributes:
        right: it gave what its reference gives.
        approved: it is right, and not slower than stock MLX.
        reason: why, in words.
        error: largest relative root-mean-square difference from the reference.
        kernel_s, stock_s: median seconds over the cases at real sizes; None if not timed.
    """

    op: str
    right: bool
    approved: bool
    reason: str
    error: float | None = None
    kernel_s: float | None = None
    stock_s: float | None = None


def machine() -> dict[str, str]:
    """What a verdict depends on: device, system, MLX, and the kernels' own text."""
    info = mx.device_info() if mx.metal.is_available() else {}
    text = hashlib.sha256()
    for part in sorted(resources.files(__package__).iterdir(), key=lambda p: p.name):
        if part.name.endswith((".metal", ".py")):
            text.update(part.read_bytes())
    return {
        "device": str(info.get("device_name", platform.machine())),
        "system": platform.platform(),
        "mlx": version("mlx"),
        "kernels": text.hexdigest()[:16],
    }


def path() -> Path:
    """File of this machine's profile; another one for every system, MLX version and text of the kernels."""
    base = os.environ.get("MLX_V4FLASH_CACHE")
    if base is None and sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches" / "mlx-v4flash")
    elif base is None:
        base = str(Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mlx-v4flash")
    key = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()[:16]
    return Path(base) / f"kernels-{key}.json"


def read() -> list[Verdict] | None:
    """The verdicts of this machine, or None if it has none that can be read."""
    try:
        stored: dict[str, Any] = json.loads(path().read_text(encoding="utf-8"))
        return [Verdict(**verdict) for verdict in stored["verdicts"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write(verdicts: list[Verdict]) -> Path:
    """Keep the verdicts; a reader sees the old file or the new one, never a part."""
    target = path()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}.part")
    content = {"machine": machine(), "verdicts": [asdict(v) for v in verdicts]}
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return part.replace(target)
