"""config.json of the released checkpoints, written out from their documentation, and a very small one."""

from __future__ import annotations

from typing import Any

FLASH: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 43,
    "num_hash_layers": 3,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 65536,
    },
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": 129280,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}

DSPARK = FLASH | {
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0, 0, 0],
    "dspark_block_size": 5,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [40, 41, 42],
    "dspark_markov_rank": 256,
}

BASE = FLASH | {"expert_dtype": "fp8"}

PRO = FLASH | {
    "hidden_size": 7168,
    "index_topk": 1024,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "o_groups": 16,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
}

# Its proportions to Flash, with each kind of layer where Pro has it.
SMALL_PRO = PRO | {
    "compress_ratios": [128, 128, 4, 128, 4],
    "head_dim": 128,
    "hidden_size": 224,
    "index_n_heads": 16,
    "index_topk": 48,
    "max_position_embeddings": 65536,
    "moe_intermediate_size": 96,
    "n_routed_experts": 12,
    "num_attention_heads": 8,
    "num_hidden_layers": 5,
    "num_nextn_predict_layers": 0,
    "o_groups": 4,
    "o_lora_rank": 64,
    "q_lora_rank": 96,
    "rope_scaling": FLASH["rope_scaling"] | {"original_max_position_embeddings": 4096},
    "vocab_size": 272,
}

V41: dict[str, Any] = {
    "architectures": ["DeepseekV41ForConditionalGeneration"],
    "model_type": "deepseek_v41",
    "text_config": {"model_type": "deepseek_v41_text", "hidden_size": 5120, "num_hidden_layers": 40},
}

# 0.2 MB with one layer of each kind. Sizes differ where they can, so that a mistaken dimension shows.
MICRO = FLASH | {
    "compress_ratios": [0, 4, 128],
    "head_dim": 96,
    "hidden_size": 64,
    "index_head_dim": 64,
    "index_n_heads": 6,
    "index_topk": 5,
    "max_position_embeddings": 1048576,
    "moe_intermediate_size": 160,
    "n_routed_experts": 3,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 0,
    "o_groups": 2,
    "o_lora_rank": 80,
    "q_lora_rank": 32,
    "swiglu_limit": 1.0,
    "vocab_size": 270,
}
