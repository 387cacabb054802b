"""DeepSeek-V4-Flash in MLX."""

from .config import ModelConfig
from .errors import V4FlashError
from .loading import load, load_model
from .model import Model

__version__ = "0.1.0"

__all__ = ["Model", "ModelConfig", "V4FlashError", "load", "load_model"]
