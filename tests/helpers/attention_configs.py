"""Tiny configs of families whose attention or MLP differs: sinks, and decoders without a gate."""

from typing import Any

from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
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
    }
