"""Tiny configs of families with experts. Their routers choose 2 of 6 to 8 experts."""

from typing import Any

from transformers import (
    AfmoeConfig,
    Cohere2MoeConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Dots1Config,
    Ernie4_5_MoeConfig,
    FlexOlmoConfig,
    Gemma4TextConfig,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    GraniteMoeSharedConfig,
    GraniteMoeSWAConfig,
    HunYuanMoEV1Config,
    Lfm2MoeConfig,
    MellumConfig,
    MiniMaxM2Config,
    MixtralConfig,
    NemotronHConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SarvamMLAConfig,
    SolarOpenConfig,
)
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig

CHOICES: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2}
WINDOWS: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
}
SHARED: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "routed_scaling_factor": 1.5,
}
# queries and keys of 20 values, values of 16
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
}
# Largest relative difference from the stock gradients of families whose recurrence or router
# computes in fp32; the others: those of their norms.
EXPERT_TOLERANCES = {
    "qwen3_5_moe": 1e-4,
    "nemotron_h-experts": 1e-5,
    "granitemoehybrid-experts": 1e-5,
}
# those that also have layers with a state
RECURRENT_EXPERTS = (
    "qwen3_5_moe",
    "lfm2_moe-experts",
    "nemotron_h-experts",
    "granitemoehybrid-experts",
)


def make_expert_configs(sizes: dict[str, Any], wide: dict[str, Any]) -> dict[str, PreTrainedConfig]:
    """Return family -> config."""
    return {
        **_make_attention_configs(sizes, wide),
        **_make_further_configs(sizes, wide),
        **_make_windowed_configs(sizes, wide),
        **_make_cohere_configs(wide),
        **_make_latent_configs(sizes),
        **_make_hybrid_configs(sizes, wide),
    }


def _make_attention_configs(
    sizes: dict[str, Any], wide: dict[str, Any]
) -> dict[str, PreTrainedConfig]:
    narrow = sizes | {"intermediate_size": 24}
    return {
        "qwen3_moe": Qwen3MoeConfig(
            **wide, **CHOICES, moe_intermediate_size=24, norm_topk_prob=True
        ),
        "olmoe": OlmoeConfig(**narrow, **CHOICES, clip_qkv=0.5),
        "mixtral": MixtralConfig(
            **narrow, num_local_experts=6, num_experts_per_tok=2, router_jitter_noise=0.1
        ),
        "glm4_moe": Glm4MoeConfig(
            **wide, **SHARED, n_group=1, topk_group=1, use_qk_norm=True, attention_bias=True
        ),
        "gemma4-experts": Gemma4TextConfig(
            **wide,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=8,
            global_head_dim=32,
            hidden_size_per_layer_input=0,
            attention_k_eq_v=True,
            num_global_key_value_heads=1,
            enable_moe_block=True,
            num_experts=6,
            top_k_experts=2,
            moe_intermediate_size=16,
        ),
    }


def _make_further_configs(
    sizes: dict[str, Any], wide: dict[str, Any]
) -> dict[str, PreTrainedConfig]:
    """Return those with shared experts that are gated, biases of routers, and multipliers."""
    narrow = sizes | {"intermediate_size": 24}
    granite: dict[str, Any] = narrow | {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
    }
    partial = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return {
        "qwen2_moe": Qwen2MoeConfig(
            **sizes, **CHOICES, moe_intermediate_size=24, shared_expert_intermediate_size=32
        ),
        "granitemoe": GraniteMoeConfig(**granite),
        "granitemoeshared": GraniteMoeSharedConfig(**granite, shared_intermediate_size=32),
        "ernie4_5_moe": Ernie4_5_MoeConfig(
            **sizes,
            moe_num_experts=8,
            moe_k=2,
            moe_intermediate_size=24,
            moe_num_shared_experts=2,
            use_bias=True,
        ),
        "hunyuan_v1_moe": HunYuanMoEV1Config(
            **(wide | {"intermediate_size": 24}), num_experts=6, moe_topk=2
        ),
        "flex_olmo": FlexOlmoConfig(**narrow, **CHOICES),
        "dots1": Dots1Config(
            **wide, **SHARED, norm_topk_prob=True, sliding_window=8, max_window_layers=1
        ),
        "minimax_m2": MiniMaxM2Config(
            **(wide | {"intermediate_size": 24}),
            num_local_experts=8,
            num_experts_per_tok=2,
            rope_parameters=partial,
            router_jitter_noise=0.1,
        ),
    }


def _make_windowed_configs(
    sizes: dict[str, Any], wide: dict[str, Any]
) -> dict[str, PreTrainedConfig]:
    """Return those with layers of windows, whose rotation may be another one or none, and Solar
    Open, which has none."""
    return {
        "afmoe": AfmoeConfig(
            **wide,
            **WINDOWS,
            **CHOICES,
            moe_intermediate_size=24,
            num_dense_layers=1,
            num_shared_experts=2,
            route_scale=1.5,
            mup_enabled=True,
        ),
        "granitemoe_swa": GraniteMoeSWAConfig(
            **(sizes | {"intermediate_size": 24}),
            **WINDOWS,
            num_local_experts=6,
            num_experts_per_tok=2,
            shared_intermediate_size=32,
            layer_rope_theta=[100.0, 0],
            logits_scaling=0.5,
            attention_multiplier=0.2,
        ),
        "mellum": MellumConfig(
            **wide,
            **WINDOWS,
            **CHOICES,
            moe_intermediate_size=24,
            mlp_layer_types=["dense", "sparse"],
        ),
        "solar_open": SolarOpenConfig(
            **{key: value for key, value in wide.items() if key != "intermediate_size"},
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            routed_scaling_factor=1.5,
            n_group=2,
        ),
    }


def _make_cohere_configs(wide: dict[str, Any]) -> dict[str, PreTrainedConfig]:
    """Return Cohere's, whose experts are chosen by a softmax or by a sigmoid."""
    narrow = wide | {"intermediate_size": 24}
    return {
        "cohere2_moe": Cohere2MoeConfig(
            **narrow,
            **CHOICES,
            sliding_window=8,
            first_k_dense_replace=1,
            prefix_dense_intermediate_size=40,
            num_shared_experts=1,
            logit_scale=1.5,
        ),
        "cohere2_moe-sigmoid": Cohere2MoeConfig(
            **narrow,
            **WINDOWS,
            **CHOICES,
            expert_selection_fn="sigmoid",
            num_shared_experts=2,
            shared_expert_combination_strategy="sum",
            rms_norm_eps=1e-5,
            logit_scale=1.5,
        ),
    }


def _make_latent_configs(sizes: dict[str, Any]) -> dict[str, PreTrainedConfig]:
    """Return those with multi-head latent attention."""
    latent = sizes | SHARED | LATENT
    return {
        "glm4_moe_lite": Glm4MoeLiteConfig(**latent, n_group=1, topk_group=1),
        "deepseek_v2": DeepseekV2Config(
            **(latent | {"q_lora_rank": None}),
            n_group=2,
            topk_group=1,
            topk_method="group_limited_greedy",
        ),
        "deepseek_v3": DeepseekV3Config(**latent, n_group=2, topk_group=1),
        "sarvam_mla": SarvamMLAConfig(**(latent | {"q_lora_rank": None})),
    }


def _make_hybrid_configs(
    sizes: dict[str, Any], wide: dict[str, Any]
) -> dict[str, PreTrainedConfig]:
    """Return those with layers that carry state."""
    others = {key: value for key, value in wide.items() if key != "num_hidden_layers"}
    no_mlp = {key: value for key, value in others.items() if key != "intermediate_size"}
    narrow = {key: value for key, value in others.items() if key != "head_dim"}
    return {
        "qwen3_5_moe": Qwen3_5MoeTextConfig(
            **no_mlp,
            **CHOICES,
            num_hidden_layers=2,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=12,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
        ),
        "lfm2_moe-experts": Lfm2MoeConfig(
            **narrow,
            **CHOICES,
            num_hidden_layers=3,
            layer_types=["conv", "full_attention", "conv"],
            moe_intermediate_size=24,
            num_dense_layers=1,
            use_expert_bias=True,
        ),
        "nemotron_h-experts": NemotronHConfig(
            **others,
            layers_block_type=["mamba", "attention", "moe"],
            mamba_num_heads=4,
            mamba_head_dim=16,
            ssm_state_size=8,
            n_groups=2,
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            moe_shared_expert_intermediate_size=24,
            n_group=1,
            topk_group=1,
        ),
        "granitemoehybrid-experts": GraniteMoeHybridConfig(
            **(sizes | {"num_hidden_layers": 2, "intermediate_size": 24}),
            layer_types=["mamba", "attention"],
            num_local_experts=6,
            num_experts_per_tok=2,
            shared_intermediate_size=24,
            mamba_n_heads=6,
            mamba_d_head=16,
            mamba_d_state=8,
            mamba_n_groups=2,
            residual_multiplier=0.4,
        ),
    }
