"""Tiny configs of the families whose layers carry a state from token to token."""

from typing import Any

from transformers import (
    FalconH1Config,
    GraniteMoeHybridConfig,
    Lfm2Config,
    Lfm2MoeConfig,
    NemotronHConfig,
    OlmoHybridConfig,
    PreTrainedConfig,
    Qwen3NextConfig,
)
from transformers.models.lfm3.configuration_lfm3 import Lfm3Config
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

LINEAR = ["linear_attention", "full_attention", "linear_attention"]
CONV = ["conv", "full_attention", "conv"]
DELTA: dict[str, Any] = {
    "num_hidden_layers": 3,
    "layer_types": LINEAR,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
# Largest relative difference from the stock gradients, whose recurrence computes in fp32.
DELTA_TOLERANCE = 1e-4
MAMBA2_TOLERANCE = 1e-5
HYBRID_TOLERANCES = {
    "qwen3_5": DELTA_TOLERANCE,
    "qwen3_next": DELTA_TOLERANCE,
    "olmo_hybrid": DELTA_TOLERANCE,
    "granitemoehybrid": MAMBA2_TOLERANCE,
    "falcon_h1": MAMBA2_TOLERANCE,
    "nemotron_h": MAMBA2_TOLERANCE,
}
CONV_FAMILIES = ("lfm2", "lfm3", "lfm2_moe")


def make_hybrid_configs(sizes: dict[str, Any], wide: dict[str, Any]) -> dict[str, PreTrainedConfig]:
    """Return family -> config. Those with experts have dense layers here."""
    sizes = {key: value for key, value in sizes.items() if key != "num_hidden_layers"}
    wide = {key: value for key, value in wide.items() if key != "num_hidden_layers"}
    return {
        "qwen3_5": Qwen3_5TextConfig(**wide, **DELTA),
        "qwen3_next": Qwen3NextConfig(
            **wide,
            **DELTA,
            **EXPERTS,
            shared_expert_intermediate_size=24,
            mlp_only_layers=[0, 1, 2],
        ),
        "olmo_hybrid": OlmoHybridConfig(
            **sizes, **DELTA | {"linear_num_key_heads": 4}, linear_allow_neg_eigval=True
        ),
        "lfm2": Lfm2Config(**sizes, num_hidden_layers=3, layer_types=CONV),
        "lfm3": Lfm3Config(**sizes, num_hidden_layers=3, layer_types=CONV),
        "lfm2_moe": Lfm2MoeConfig(
            **sizes, **EXPERTS, num_hidden_layers=3, layer_types=CONV, num_dense_layers=3
        ),
        "granitemoehybrid": GraniteMoeHybridConfig(
            **sizes,
            num_hidden_layers=3,
            layer_types=["mamba", "attention", "mamba"],
            num_local_experts=0,
            num_experts_per_tok=0,
            shared_intermediate_size=80,
            mamba_n_heads=6,
            mamba_d_head=16,
            mamba_d_state=8,
            mamba_n_groups=2,
            mamba_expand=2,
            embedding_multiplier=3.0,
            logits_scaling=2.5,
            residual_multiplier=0.4,
        ),
        "falcon_h1": FalconH1Config(
            **wide,
            num_hidden_layers=2,
            mamba_d_ssm=64,
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_d_state=8,
            mamba_n_groups=1,
            embedding_multiplier=3.0,
            lm_head_multiplier=0.4,
            key_multiplier=0.5,
            ssm_in_multiplier=1.5,
            ssm_multipliers=[0.5, 1.5, 0.7, 1.2, 0.9],
        ),
        "nemotron_h": NemotronHConfig(
            **wide,
            layers_block_type=["mamba", "attention", "mlp"],
            mamba_num_heads=4,
            mamba_head_dim=16,
            ssm_state_size=8,
            n_groups=2,
        ),
    }
