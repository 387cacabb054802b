"""Ops of DeepSeek-V4 that are worth a Metal kernel, each beside its reference in plain MLX."""

import os

# MLX multiplies float32 matrices at about ten bits on recent GPUs (M5, CUDA) unless told otherwise, and reads the
# variable at its first product. The router, the mixing weights and attention's logits are float32 for a reason.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

from ._dispatch import KernelError, active, kernels
from .compress import Quant, compress
from .experts import ExpertWeights, add_shared, expert_down, expert_down_sum, expert_gate_up, swiglu
from .index_query import index_query
from .index_scores import index_scores
from .index_topk import index_topk
from .latents import latents
from .project_f32 import project_f32
from .quantized_product import AFFINE_BITS, AFFINE_GROUPS, FORMATS, quantized_product
from .query_rope import query_rope
from .rms_norm import rms_norm
from .rope import rope
from .round_trip import fp4_round_trip, fp8_round_trip
from .route import route, route_hash
from .sparse_attention import sparse_attention
from .stream_collapse import stream_collapse
from .stream_enter import stream_enter, stream_head
from .stream_expand import stream_expand
from .stream_mix import stream_head_mix, stream_mix

__all__ = [
    "AFFINE_BITS",
    "AFFINE_GROUPS",
    "FORMATS",
    "ExpertWeights",
    "KernelError",
    "Quant",
    "active",
    "add_shared",
    "compress",
    "expert_down",
    "expert_down_sum",
    "expert_gate_up",
    "fp4_round_trip",
    "fp8_round_trip",
    "index_query",
    "index_scores",
    "index_topk",
    "kernels",
    "latents",
    "project_f32",
    "quantized_product",
    "query_rope",
    "rms_norm",
    "rope",
    "route",
    "route_hash",
    "sparse_attention",
    "stream_collapse",
    "stream_enter",
    "stream_expand",
    "stream_head",
    "stream_head_mix",
    "stream_mix",
    "swiglu",
]
