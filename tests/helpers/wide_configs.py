"""Configs of every text family, wide enough that what a forward keeps is mostly hidden states.

Four layers, of each kind that the family has. WIDE_CONFIGS[name]: the model type is in the config.
"""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from tunesmith.model.hub.families import UNIFORM_CLASSES

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FULL = "full_attention"
WINDOWS: dict[str, Any] = {"layer_types": ["sliding_attention", FULL] * 2, "sliding_window": 32}
DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", FULL] * 2,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
MAMBA2: dict[str, Any] = {
    "layer_types": ["mamba", "attention"] * 2,
    "shared_intermediate_size": 512,
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_d_state": 64,
    "mamba_n_groups": 1,
}
CONV: dict[str, Any] = {
    "layer_types": ["conv", FULL] * 2,
    "block_auto_adjust_ff_dim": False,
    "head_dim": None,
}
CHOICE: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2}
EXPERTS: dict[str, Any] = CHOICE | {"moe_intermediate_size": 128}
LOCAL_EXPERTS: dict[str, Any] = {"num_local_experts": 8, "num_experts_per_tok": 2}
NO_EXPERTS: dict[str, Any] = {"num_local_experts": 0, "num_experts_per_tok": 0}
SHARED: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 128,
    "n_group": 1,
    "topk_group": 1,
}
# keys of 96, values of 64
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "head_dim": None,
}
HALF_ROTARY: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
    "head_dim": None,
}
NEMOTRON: dict[str, Any] = {
    "num_hidden_layers": None,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "ssm_state_size": 64,
    "n_groups": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "moe_shared_expert_intermediate_size": 128,
    "n_group": 1,
    "topk_group": 1,
}
UNIFORM_SETTINGS = {"gemma2": WINDOWS, "gemma3_text": WINDOWS, "phi3": {"sliding_window": 256}}
# name -> settings; None leaves out a size, and `-` begins a variant, some with dense layers between
# those with experts, or after them
SETTINGS: dict[str, dict[str, Any]] = {
    **{name: UNIFORM_SETTINGS.get(name, {}) for name in UNIFORM_CLASSES},
    "phi3-96": {"head_dim": 96, "hidden_size": 384},
    "afmoe": WINDOWS | EXPERTS | {"num_dense_layers": 1, "num_shared_experts": 1},
    "afmoe-two-dense": WINDOWS | EXPERTS | {"num_dense_layers": 2, "num_shared_experts": 1},
    "cohere2_moe": WINDOWS
    | CHOICE
    | {"intermediate_size": 128, "num_shared_experts": 1, "expert_selection_fn": "sigmoid"},
    "deepseek_v2": SHARED | LATENT,
    "deepseek_v3": SHARED | LATENT,
    "deepseek_v3-three-dense": SHARED | LATENT | {"first_k_dense_replace": 3},
    "dots1": SHARED,
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 128,
        "moe_num_shared_experts": 2,
    },
    "ernie4_5_moe-between": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 128,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
    },
    "falcon_h1": {
        "mamba_d_ssm": 256,
        "mamba_n_heads": 4,
        "mamba_d_head": 64,
        "mamba_d_state": 64,
        "mamba_n_groups": 1,
    },
    "flex_olmo": CHOICE | {"intermediate_size": 128},
    "gemma4_text": WINDOWS
    | {
        "global_head_dim": 64,
        "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": 97,
        "num_kv_shared_layers": 2,
    },
    "gemma4_text-experts": WINDOWS
    | {
        "global_head_dim": 128,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "num_kv_shared_layers": 0,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 128,
    },
    "gemma4_unified_text": WINDOWS
    | {"global_head_dim": 64, "num_global_key_value_heads": 1, "num_kv_shared_layers": 0},
    "glm4_moe": SHARED | {"use_qk_norm": True},
    "glm4_moe_lite": SHARED | LATENT,
    "gpt2": {"num_key_value_heads": None, "head_dim": None, "n_inner": 704},
    "gpt_neox": HALF_ROTARY | {"num_key_value_heads": None},
    "gpt_oss": LOCAL_EXPERTS | {"sliding_window": 32},
    "granite_swa": {"sliding_window": 32},
    "granitemoe": LOCAL_EXPERTS | {"intermediate_size": 128},
    "granitemoe_swa": LOCAL_EXPERTS | {"intermediate_size": 128, "sliding_window": 32},
    "granitemoehybrid": MAMBA2 | NO_EXPERTS,
    "granitemoehybrid-attention": MAMBA2 | NO_EXPERTS | {"layer_types": ["attention"] * 4},
    "granitemoehybrid-experts": MAMBA2
    | LOCAL_EXPERTS
    | {"shared_intermediate_size": 128, "intermediate_size": 128},
    "granitemoeshared": LOCAL_EXPERTS | {"intermediate_size": 128, "shared_intermediate_size": 256},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "intermediate_size": 128},
    "hyperclovax": {},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "lfm2": CONV,
    "lfm2_moe": CONV | EXPERTS | {"num_dense_layers": 1, "use_expert_bias": True},
    "lfm3": CONV,
    "mellum": WINDOWS | EXPERTS | {"mlp_layer_types": ["dense", *["sparse"] * 3]},
    "mellum-alternating": WINDOWS | EXPERTS | {"mlp_layer_types": ["sparse", "dense"] * 2},
    "minicpm3": LATENT,
    "minimax_m2": LOCAL_EXPERTS | {"intermediate_size": 128},
    "mixtral": LOCAL_EXPERTS | {"intermediate_size": 128},
    "nanochat": {"head_dim": None},
    "nemotron_h": NEMOTRON | {"layers_block_type": ["mamba", "attention", "mlp", "mlp"]},
    "nemotron_h-experts": NEMOTRON | {"layers_block_type": ["mamba", "moe", "attention", "moe"]},
    "olmo_hybrid": DELTA | {"linear_allow_neg_eigval": True, "head_dim": None},
    "olmoe": CHOICE | {"intermediate_size": 128},
    "persimmon": {"num_key_value_heads": None, "head_dim": None},
    "phi": HALF_ROTARY | {"num_key_value_heads": 4, "qk_layernorm": True},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 256},
    "qwen2_moe-first": EXPERTS
    | {"shared_expert_intermediate_size": 256, "mlp_only_layers": [1, 2, 3]},
    "qwen3_5_moe_text": DELTA
    | EXPERTS
    | {"shared_expert_intermediate_size": 128, "intermediate_size": None},
    "qwen3_5_text": DELTA,
    "qwen3_moe": EXPERTS,
    "qwen3_moe-alternating": EXPERTS | {"decoder_sparse_step": 2},
    "qwen3_moe-between": EXPERTS | {"mlp_only_layers": [0, 3]},
    "qwen3_next": DELTA | EXPERTS | {"shared_expert_intermediate_size": 128},
    "qwen3_next-first": DELTA
    | EXPERTS
    | {"shared_expert_intermediate_size": 128, "mlp_only_layers": [1, 2, 3]},
    "sarvam_mla": SHARED | LATENT,
    "solar_open": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "intermediate_size": None,
    },
    "starcoder2": {"sliding_window": 32},
}


def make_wide_config(name: str) -> PreTrainedConfig:
    """Return the config of a family in SETTINGS."""
    sizes = SIZES | SETTINGS[name]
    present = {key: value for key, value in sizes.items() if value is not None}
    return AutoConfig.for_model(name.partition("-")[0], **present)
