"""Tiny models whose rotary frequencies depend on the length of the sequence."""

from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    Olmo3Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
)
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

from hybrid_configs import DELTA
from tiny_models import MIXED, SIZES

LIMIT = 32
HALF = SIZES["hidden_size"] // SIZES["num_attention_heads"] // 2
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0 + 0.1 * i for i in range(HALF)],
    "long_factor": [2.0 + 1.5 * i for i in range(HALF)],
    "original_max_position_embeddings": LIMIT,
}
PARTIAL = LONGROPE | {
    "short_factor": LONGROPE["short_factor"][: HALF // 2],
    "long_factor": LONGROPE["long_factor"][: HALF // 2],
    "partial_rotary_factor": 0.5,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 100.0}
SHORT_CONTEXT = SIZES | {"max_position_embeddings": LIMIT}
CONFIGS: dict[str, PreTrainedConfig] = {
    "phi3-128k": Phi3Config(
        **SIZES, rope_parameters=LONGROPE, original_max_position_embeddings=LIMIT
    ),
    "phi3.5": Phi3Config(
        **SIZES,
        rope_parameters=LONGROPE,
        original_max_position_embeddings=LIMIT,
        sliding_window=20,
    ),
    "phi4-mini": Phi3Config(
        **SIZES,
        rope_parameters=PARTIAL,
        original_max_position_embeddings=LIMIT,
        partial_rotary_factor=0.5,
        tie_word_embeddings=True,
    ),
    "llama-longrope": LlamaConfig(**SIZES, rope_parameters=LONGROPE),
    "llama-dynamic": LlamaConfig(**SHORT_CONTEXT, rope_parameters=DYNAMIC),
    "qwen2-dynamic": Qwen2Config(**SHORT_CONTEXT, rope_parameters=DYNAMIC),
    "gemma3-longrope": Gemma3TextConfig(
        **SIZES,
        **MIXED,
        head_dim=2 * HALF,
        rope_parameters={"sliding_attention": PLAIN, "full_attention": LONGROPE},
    ),
    "olmo3-dynamic": Olmo3Config(
        **SHORT_CONTEXT,
        **MIXED,
        rope_parameters={"sliding_attention": PLAIN, "full_attention": DYNAMIC},
    ),
    # positions of three axes
    "qwen3_5-dynamic": Qwen3_5TextConfig(
        **SHORT_CONTEXT | DELTA,
        head_dim=2 * HALF,
        rope_parameters=DYNAMIC | {"mrope_section": [2, 2, 2], "partial_rotary_factor": 1.0},
    ),
}
