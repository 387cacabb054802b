"""DeepSeek-V4-Flash in MLX."""

from .chat import Chat
from .config import ModelConfig
from .engine import generate, stream_generate
from .errors import V4FlashError
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
    "register",
    "stream_generate",
]
