"""Tiny configs of families whose attention or MLP differs: sinks, and decoders without a gate."""

from typing import Any

from transformers import (
    GPTNeoXConfig,
    GptOssConfig,
    PhiConfig,
    PreTrainedConfig,
    Starcoder2Config,
)


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
        "gpt_neox": GPTNeoXConfig(
            **one_head_count, rope_parameters=partial, hidden_dropout=0.1, attention_dropout=0.1
        ),
        "gpt_neox-sequential": GPTNeoXConfig(
            **one_head_count, rope_parameters=partial, use_parallel_residual=False
        ),
    }
