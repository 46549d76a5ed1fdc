"""Tiny configs of families whose attention or MLP differs: sinks, and decoders without a gate."""

from typing import Any

from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteSWAConfig,
    HyperCLOVAXConfig,
    IQuestCoderConfig,
    Jais2Config,
    MiniCPM3Config,
    PersimmonConfig,
    PhiConfig,
    PreTrainedConfig,
    Starcoder2Config,
)


def make_gpt2_config(sizes: dict[str, Any], **settings: Any) -> GPT2Config:
    """Return a config of the size of the others, with dropout, and a head that is not tied."""
    values: dict[str, Any] = {
        "vocab_size": sizes["vocab_size"],
        "n_embd": sizes["hidden_size"],
        "n_inner": sizes["intermediate_size"],
        "n_layer": sizes["num_hidden_layers"],
        "n_head": sizes["num_attention_heads"],
        "n_positions": sizes["max_position_embeddings"],
        "pad_token_id": sizes["pad_token_id"],
        "bos_token_id": sizes["bos_token_id"],
        "eos_token_id": sizes["eos_token_id"],
        "tie_word_embeddings": False,
    }
    return GPT2Config(**values | settings)


def make_attention_configs(
    sizes: dict[str, Any], wide: dict[str, Any], window: int
) -> dict[str, PreTrainedConfig]:
    """Return the configs. `sizes` and `wide` are those of the other tiny models, `window` is their
    sliding window."""
    one_head_count = {key: value for key, value in sizes.items() if key != "num_key_value_heads"}
    partial = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return {
        "gpt_oss": GptOssConfig(
            **wide, sliding_window=window, num_local_experts=6, num_experts_per_tok=2
        ),
        # the base's own dropout is switched off
        "phi": PhiConfig(
            **(sizes | {"num_key_value_heads": 4}),
            rope_parameters=partial,
            qk_layernorm=True,
            resid_pdrop=0.1,
            embd_pdrop=0.1,
        ),
        "starcoder2": Starcoder2Config(
            **sizes, sliding_window=window, residual_dropout=0.1, embedding_dropout=0.1
        ),
        "gpt2": make_gpt2_config(sizes, tie_word_embeddings=True, n_inner=None),
        "gpt2-scaled": make_gpt2_config(
            sizes,
            activation_function="gelu",
            scale_attn_by_inverse_layer_idx=True,
            reorder_and_upcast_attn=True,
        ),
        "gpt_neox": GPTNeoXConfig(
            **one_head_count, rope_parameters=partial, hidden_dropout=0.1, attention_dropout=0.1
        ),
        "gpt_neox-sequential": GPTNeoXConfig(
            **one_head_count, rope_parameters=partial, use_parallel_residual=False
        ),
        **_make_scaled_configs(sizes, wide, window),
        "jais2": Jais2Config(**wide),
        "persimmon": PersimmonConfig(**one_head_count, hidden_dropout=0.1, attention_dropout=0.1),
    }


def _make_scaled_configs(
    sizes: dict[str, Any], wide: dict[str, Any], window: int
) -> dict[str, PreTrainedConfig]:
    """Return those whose embeddings, scores, residuals or logits have factors."""
    factors = {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.5,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
    }
    return {
        # a layer of windows that is rotated otherwise, and one that is not
        "granite_swa": GraniteSWAConfig(
            **sizes,
            **factors,
            sliding_window=window,
            layer_types=["sliding_attention", "full_attention"],
            layer_rope_theta=[100.0, 0],
        ),
        "hyperclovax": HyperCLOVAXConfig(**wide, **factors),
        "hyperclovax-pre": HyperCLOVAXConfig(**sizes, use_post_norm=False, attention_bias=True),
        "iquestcoder": IQuestCoderConfig(**wide, attention_bias=True),
        "minicpm3": MiniCPM3Config(
            **(sizes | {"num_key_value_heads": 4}),
            q_lora_rank=24,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=12,
            dim_model_base=16,
        ),
    }
