"""A tiny config of each decoder and multimodal model that transformers has, from its defaults."""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

MAX_LAYERS = 4
WINDOW = 8
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sliding_window": WINDOW,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 20,
    # latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    # sparse attention, longer than the documents
    "index_topk": 512,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "attention_chunk_size": 512,
}
# what the defaults of a type do not let become tiny
GEMMA3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.5, 0.0] * 2,
}
TOWER: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "embed_dim"), 16),
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads"), 2),
    "patch_size": 4,
    "image_size": 16,
    "num_position_embeddings": 16,
    "out_hidden_size": 48,
    "deepstack_visual_indexes": [0],
}
SIGLIP = "siglip_vision_model"  # in place of a tower that needs another library
SPECIAL_TOKENS = (
    *("image_token_id", "image_token_index", "video_token_id"),
    *("audio_token_id", "vision_start_token_id", "vision_end_token_id"),
)
SPARSE = {"layer_types": ["full_attention", "indexed_attention", "indexed_attention"]}
CHANGES: dict[str, dict[str, Any]] = {
    "gemma3n_text": GEMMA3N,
    "llama4_text": {
        "num_hidden_layers": 4,
        "intermediate_size_mlp": 80,
        "interleave_moe_layer_step": 2,
        "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
        "no_rope_layers": [1, 1, 1, 0],
    },
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "index_n_heads": 2,
        "index_block_size": 16,
        "index_topk_blocks": 16,
        "dense_intermediate_size": 80,
        "shared_intermediate_size": 20,
    },
}


def list_whole_types() -> Iterator[str]:
    """Yield the model types of decoders and of models that answer with text to text and images."""
    yield from dict.fromkeys(
        (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    )


def make_config(model_type: str) -> PreTrainedConfig:
    """Return a config with the sizes of a tiny model, also of the text part if it has one."""
    kind: Any = CONFIG_MAPPING[model_type]
    default = kind()
    if "text_config" in kind.sub_configs:
        return kind(text_config=make_values(default.get_text_config()))
    return kind(**make_values(default))


def make_whole_config(model_type: str) -> PreTrainedConfig:
    """Return the config of a multimodal model whose towers are tiny, too."""
    kind: Any = CONFIG_MAPPING[model_type]
    default = kind()
    values: dict[str, Any] = {name: 90 for name in SPECIAL_TOKENS if hasattr(default, name)}
    for name in kind.sub_configs:
        if name == "text_config":
            values[name] = make_values(default.get_text_config())
        elif part := getattr(default, name, None):
            if part.model_type == "timm_wrapper":
                part = CONFIG_MAPPING[SIGLIP]()
            described = part.to_dict()
            sizes = {key: size for key, size in TOWER.items() if key in described}
            values[name] = sizes | {"model_type": part.model_type}
    return kind(**values)


def make_values(default: PreTrainedConfig) -> dict[str, Any]:
    """Return the values that make a config tiny, where it has such keys."""
    described = default.to_dict()
    values = {key: size for key, size in SIZES.items() if key in described}
    if words := described.get("layer_types"):
        kinds = list(dict.fromkeys(words))
        values["layer_types"] = (kinds * MAX_LAYERS)[: max(3, len(kinds))]
        values["num_hidden_layers"] = len(values["layer_types"])
    rotation = described.get("rope_parameters") or {}
    if "mrope_section" in rotation or "glm4v" in default.model_type:
        share = rotation.get("partial_rotary_factor", 1.0)
        half = int(values.get("head_dim", 12) * share) // 2
        sections = [half - 2 * (half // 3), half // 3, half // 3]
        values["rope_parameters"] = rotation | {"mrope_section": sections}
    if "qk_rope_head_dim" in values:
        values.pop("head_dim", None)
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
    if default.model_type in ("deepseek_v32", "glm_moe_dsa"):
        values |= SPARSE
    return values | {"model_type": default.model_type} | CHANGES.get(default.model_type, {})
