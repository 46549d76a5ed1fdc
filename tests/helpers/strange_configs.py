"""Odd but plausible configs of listed families, as strangers publish them: one kind of layers only,
other head counts, biases, tied and untied heads, odd vocabularies, no windows, other taps."""

import copy
from typing import Any

from transformers import (
    AutoConfig,
    Gemma4TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from text_part_configs import GEMMA4
from tiny_models import CONFIGS, SIZES, WIDE

COMPUTED_KEYS = ("architectures", "transformers_version", "dtype", "_name_or_path", "model_type")
TIED: dict[str, Any] = {"tie_word_embeddings": True}
HALF_ROTATED: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    }
}
ONE_HEAD_COUNT = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
# of other families' heads: Llama ignores them
OTHER_HEADS: dict[str, Any] = {
    "logit_scale": 0.3,
    "logits_scaling": 3.0,
    "lm_head_multiplier": 0.4,
    "final_logit_softcapping": 2.0,
}
WINDOW_PATTERN = ["sliding_attention", "sliding_attention", "full_attention"] * 2


def vary(family: str, **changes: Any) -> PreTrainedConfig:
    """Return the tiny config of a family with other values."""
    config = copy.deepcopy(CONFIGS[family])
    values = {key: value for key, value in config.to_dict().items() if key not in COMPUTED_KEYS}
    return AutoConfig.for_model(config.model_type, **values | changes)


ATTENTION_CONFIGS: dict[str, PreTrainedConfig] = {
    "llama, one layer, all heads": LlamaConfig(
        **SIZES | {"num_key_value_heads": 4, "num_hidden_layers": 1}
    ),
    "llama, one key head, 101 tokens": LlamaConfig(
        **SIZES | TIED | {"num_key_value_heads": 1, "vocab_size": 101}
    ),
    "llama, biased MLP with gelu": LlamaConfig(
        **WIDE, mlp_bias=True, hidden_act="gelu_pytorch_tanh"
    ),
    "llama, relu2": LlamaConfig(**SIZES, hidden_act="relu2"),
    "llama, keys of other heads": LlamaConfig(**SIZES, **OTHER_HEADS),
    "granite, keys of other heads": vary("granite", **OTHER_HEADS),
    "qwen2, no window": Qwen2Config(**SIZES, **TIED, use_sliding_window=False),
    "qwen3, biased": Qwen3Config(**WIDE, attention_bias=True),
    "mistral, no window": MistralConfig(**SIZES, **TIED, sliding_window=None),
    "gemma3, windows only": vary("gemma3", layer_types=["sliding_attention"] * 2),
    "gemma3, untied, no windows": vary(
        "gemma3", tie_word_embeddings=False, layer_types=["full_attention"] * 2
    ),
    "phi3, half rotated": Phi3Config(**SIZES, **HALF_ROTATED, sliding_window=None),
    "cohere, normed heads": vary("cohere", use_qk_norm=True, tie_word_embeddings=False),
    "olmo2, tied": Olmo2Config(**SIZES | TIED | {"num_key_value_heads": 4}),
    "smollm3, nothing rotated": SmolLM3Config(**SIZES, no_rope_layers=[0, 0]),
    "gpt_neox, tied, no biases": GPTNeoXConfig(**ONE_HEAD_COUNT, **TIED, attention_bias=False),
    "starcoder2, untied, no biases": vary(
        "starcoder2", tie_word_embeddings=False, use_bias=False, sliding_window=None
    ),
    "phi, two key heads": vary("phi", num_key_value_heads=2, qk_layernorm=False),
    "gemma4, nothing shared": Gemma4TextConfig(**GEMMA4 | {"num_kv_shared_layers": 0}),
    "gemma4, half of 6 layers shared": Gemma4TextConfig(
        **GEMMA4
        | {"num_hidden_layers": 6, "layer_types": WINDOW_PATTERN, "num_kv_shared_layers": 3}
    ),
}
STATE_CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3_5, recurrent only": vary("qwen3_5", layer_types=["linear_attention"] * 3),
    "qwen3_5, attention only": vary("qwen3_5", layer_types=["full_attention"] * 3),
    "qwen3_5, tied, equal heads": vary(
        "qwen3_5", **TIED, linear_num_key_heads=4, linear_num_value_heads=4
    ),
    "qwen3_5, two taps": vary("qwen3_5", linear_conv_kernel_dim=2),
    "olmo_hybrid, all key heads": vary(
        "olmo_hybrid", linear_allow_neg_eigval=False, num_key_value_heads=4
    ),
    "lfm2, convolutions only": vary("lfm2", layer_types=["conv"] * 3),
    "lfm2, biased convolutions": vary("lfm2", conv_bias=True),
    "lfm2, five taps, untied": vary("lfm2", conv_L_cache=5, tie_word_embeddings=False),
    "granite4, one group": vary("granitemoehybrid", mamba_n_groups=1, mamba_conv_bias=False),
    "granite4, biased": vary("granitemoehybrid", mamba_proj_bias=True),
    "falcon_h1, norm": vary("falcon_h1", mamba_rms_norm=True, mamba_norm_before_gate=False),
    "falcon_h1, tied, two groups": vary("falcon_h1", **TIED, mamba_n_groups=2),
    "nemotron_h, biased": vary("nemotron_h", use_bias=True, mlp_bias=True, attention_bias=True),
}
EXPERT_CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3_next, one dense layer": vary("qwen3_next", mlp_only_layers=[1]),
    "qwen3_5_moe, one of five": vary("qwen3_5_moe", num_experts=5, num_experts_per_tok=1),
    "gpt_oss, no windows": vary("gpt_oss", layer_types=["full_attention"] * 2),
    "gpt_oss, windows only": vary("gpt_oss", **TIED, layer_types=["sliding_attention"] * 2),
    "mixtral, tied, window": vary("mixtral", **TIED, sliding_window=8),
    "qwen3_moe, every second layer": vary("qwen3_moe", norm_topk_prob=False, decoder_sparse_step=2),
    "glm4_moe, two shared": vary(
        "glm4_moe", n_shared_experts=2, use_qk_norm=False, attention_bias=False
    ),
    "deepseek_v3, wide queries": vary("deepseek_v3", q_lora_rank=None, first_k_dense_replace=0),
    "olmoe, tied": vary("olmoe", **TIED, norm_topk_prob=True, clip_qkv=None),
}
STRANGE_CONFIGS = ATTENTION_CONFIGS | STATE_CONFIGS | EXPERT_CONFIGS
