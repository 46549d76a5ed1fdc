"""Tiny configs of multimodal models, and of the families that are their text parts."""

from typing import Any

from transformers import (
    Gemma3Config,
    GraniteMoeHybridConfig,
    Ministral3Config,
    Mistral3Config,
    PreTrainedConfig,
    Qwen3VLConfig,
)
from transformers.models.gemma4.configuration_gemma4 import Gemma4Config, Gemma4TextConfig
from transformers.models.gemma4_unified.configuration_gemma4_unified import (
    Gemma4UnifiedConfig,
    Gemma4UnifiedTextConfig,
)
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeConfig
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeConfig

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA: dict[str, Any] = SIZES | {"sliding_window": 8, "query_pre_attn_scalar": 11}
# Embeddings per layer, and two layers that use the keys and values of earlier ones.
GEMMA4: dict[str, Any] = SIZES | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "sliding_window": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 24,
    "final_logit_softcapping": 9.0,
}
# One key and value head in the global layers, whose values are their keys.
GEMMA4_UNIFIED: dict[str, Any] = SIZES | {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "global_head_dim": 24,
    "num_global_key_value_heads": 1,
}
QWEN3_VL: dict[str, Any] = SIZES | {
    "num_hidden_layers": 2,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5000.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}
QWEN3_5: dict[str, Any] = SIZES | {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5000.0,
        "mrope_section": [1, 1, 0],
        "partial_rotary_factor": 0.25,
    },
}
# 2 * 24 is the hidden size: a stack of gates is square, and its shape does not say how it is stored
SQUARE_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}
EXPERTS = SQUARE_EXPERTS | {"moe_intermediate_size": 20}
MINISTRAL3: dict[str, Any] = SIZES | {"num_hidden_layers": 2, "model_type": "ministral3"}
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 4,
}
GEMMA4_TOWER = TOWER | {"num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 64}
TOWER_QWEN: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 48,
    "patch_size": 4,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}
PLAIN_TOWER_QWEN = {
    key: value for key, value in TOWER_QWEN.items() if key != "deepstack_visual_indexes"
}
QWEN_IMAGE_TOKENS: dict[str, Any] = {
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}


def make_text_part_configs() -> dict[str, PreTrainedConfig]:
    """Return family -> config of text classes whose layers differ from each other."""
    return {
        "gemma4": Gemma4TextConfig(**GEMMA4),
        "gemma4_unified": Gemma4UnifiedTextConfig(**GEMMA4_UNIFIED),
        "ministral3": Ministral3Config(
            **{k: v for k, v in MINISTRAL3.items() if k != "model_type"}
        ),
        "granite4": GraniteMoeHybridConfig(
            **{key: value for key, value in SIZES.items() if key != "head_dim"},
            num_hidden_layers=2,
            layer_types=["attention", "attention"],
            num_local_experts=0,
            num_experts_per_tok=0,
            shared_intermediate_size=80,
            mamba_n_heads=6,
            position_embedding_type="rope",
            embedding_multiplier=3.0,
            logits_scaling=2.5,
            residual_multiplier=0.4,
            attention_multiplier=0.2,
        ),
    }


def make_multimodal_configs() -> dict[str, PreTrainedConfig]:
    """Return model type -> config of the whole model, with a vision tower."""
    return {
        "gemma3": Gemma3Config(
            text_config=GEMMA | {"num_hidden_layers": 2},
            vision_config=TOWER | {"image_size": 16},
            mm_tokens_per_image=4,
            image_token_index=90,
        ),
        "gemma4": Gemma4Config(
            text_config=GEMMA4, vision_config=GEMMA4_TOWER, audio_config=None, image_token_id=90
        ),
        "gemma4_unified": Gemma4UnifiedConfig(
            text_config=GEMMA4_UNIFIED,
            vision_config={
                "patch_size": 4,
                "mm_embed_dim": 16,
                "mm_posemb_size": 8,
                "output_proj_dims": 16,
            },
            audio_config=None,
            image_token_id=90,
        ),
        "qwen3_vl": Qwen3VLConfig(
            text_config=QWEN3_VL,
            vision_config=TOWER_QWEN,
            **QWEN_IMAGE_TOKENS,
        ),
        "qwen3_5": Qwen3_5Config(
            text_config=QWEN3_5,
            vision_config=PLAIN_TOWER_QWEN,
            **QWEN_IMAGE_TOKENS,
            tie_word_embeddings=True,
        ),
        "mistral3": Mistral3Config(
            text_config=MINISTRAL3,
            vision_config=TOWER | {"model_type": "pixtral", "image_size": 16, "head_dim": 8},
            image_token_index=90,
            tie_word_embeddings=False,
        ),
    }


def make_multimodal_expert_configs() -> dict[str, PreTrainedConfig]:
    """Return those whose text part has experts. Files of Qwen3-VL hold their stacks transposed."""
    gemma4_experts = {
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 20,
    }
    return {
        "qwen3_vl_moe": Qwen3VLMoeConfig(
            text_config=QWEN3_VL | EXPERTS, vision_config=TOWER_QWEN, **QWEN_IMAGE_TOKENS
        ),
        "qwen3_vl_moe-square": Qwen3VLMoeConfig(
            text_config=QWEN3_VL | SQUARE_EXPERTS, vision_config=TOWER_QWEN, **QWEN_IMAGE_TOKENS
        ),
        "qwen3_5_moe": Qwen3_5MoeConfig(
            text_config=QWEN3_5 | EXPERTS | {"shared_expert_intermediate_size": 24},
            vision_config=PLAIN_TOWER_QWEN,
            **QWEN_IMAGE_TOKENS,
        ),
        "gemma4-experts": Gemma4Config(
            text_config=GEMMA4 | gemma4_experts,
            vision_config=GEMMA4_TOWER,
            audio_config=None,
            image_token_id=90,
        ),
    }
