"""Tiny random networks of several families."""

import copy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 97
WINDOW = 6  # shorter than most of the prompts, so that windows matter
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,  # logits far apart, so that rounding cannot decide
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma2": Gemma2Config(**SIZES, sliding_window=WINDOW, attn_logit_softcapping=5.0, final_logit_softcapping=9.0),
    "gemma3": Gemma3TextConfig(
        **SIZES, sliding_window=WINDOW, layer_types=["sliding_attention"] * 2 + ["full_attention"]
    ),
    "granite": GraniteConfig(**SIZES, attention_multiplier=0.2, logits_scaling=3.0, residual_multiplier=0.7),
    "olmo2": Olmo2Config(**SIZES),  # its attention stays the stock one
}


def tiny_network(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return (
        AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]), dtype=torch.float32)
        .eval()
        .requires_grad_(False)
    )
