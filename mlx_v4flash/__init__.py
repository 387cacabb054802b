"""DeepSeek-V4-Flash in MLX."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat import Chat
    from .config import ModelConfig
    from .engine import generate, stream_generate
    from .errors import V4FlashError
    from .hub import nano_folder
    from .loading import load, load_model
    from .mlx_lm_bridge import register
    from .model import Model
    from .sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "Chat",
    "Model",
    "ModelConfig",
    "SamplingParams",
    "V4FlashError",
    "generate",
    "load",
    "load_model",
    "nano_folder",
    "register",
    "stream_generate",
]

# Where each name is defined. It is imported when it is first asked for: with mlx-lm come seconds of other imports, for
# which `mlx-v4flash --help` need not wait.
_HOMES = {
    "Chat": "chat",
    "Model": "model",
    "ModelConfig": "config",
    "SamplingParams": "sampling",
    "V4FlashError": "errors",
    "generate": "engine",
    "load": "loading",
    "load_model": "loading",
    "nano_folder": "hub",
    "register": "mlx_lm_bridge",
    "stream_generate": "engine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
