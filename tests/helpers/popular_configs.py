"""The config.json of the bases that are fine-tuned most, in the keys that their files have.

QWEN[number of the line in the ranking] -> models, and so GEMMA and DENSE; popular_bases.py has the
others. Sizes are those that the makers publish, and `billions` their own count of the parameters of
the text part, rounded as they round it. Keys that change no shape are mostly left out. `refused` is
what the message says of a line that is not taken."""

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class PublishedModel:
    """`billions` are None where no count of the text part alone is published, or none is known to
    us. `layers` are the attention and the recurrent ones."""

    name: str
    config: Config
    billions: float | None = None
    layers: tuple[int, int] = (0, 0)
    refused: str = ""


def make_config(model_type: str, architecture: str, *sizes: int, **others: Any) -> Config:
    """`sizes`: hidden, layers, heads, key and value heads, MLP, vocabulary."""
    names = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("intermediate_size", "vocab_size"),
    )
    return {
        "architectures": [architecture],
        "model_type": model_type,
        **dict(zip(names, sizes, strict=True)),
        "max_position_embeddings": 40_960,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        **others,
    }


def make_multimodal(model_type: str, architecture: str, text: Config, **others: Any) -> Config:
    """Put a text part beside a vision tower."""
    part = {key: value for key, value in text.items() if key != "architectures"}
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "text_config": part,
        "vision_config": {"hidden_size": 1152},
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": text["tie_word_embeddings"],
        **others,
    }


TIED = {"tie_word_embeddings": True}
HEAD_128 = {"head_dim": 128}


# ---------------------------------------------------------------- Qwen


def _make_qwen3_5(model_type: str, *sizes: int, value_heads: int, **others: Any) -> Config:
    has_experts = "moe" in model_type
    text_class = "Qwen3_5Moe" if has_experts else "Qwen3_5"
    text = make_config(
        f"{model_type}_text",
        "",
        *sizes,
        head_dim=256,
        full_attention_interval=4,
        layer_types=[*["linear_attention"] * 3, "full_attention"] * (sizes[1] // 4),
        linear_conv_kernel_dim=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=16,
        linear_num_value_heads=value_heads,
        mtp_num_hidden_layers=1,
        **others,
    )
    return make_multimodal(model_type, f"{text_class}ForConditionalGeneration", text)


QWEN3_5_EXPERTS = {
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
QWEN3_MOE = make_config(
    *("qwen3_moe", "Qwen3MoeForCausalLM"),
    *(2048, 48, 32, 4, 6144, 151_936),
    **HEAD_128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    norm_topk_prob=True,
)
QWEN3_VL_TEXT = make_config("qwen3_vl_text", "", 2048, 28, 16, 8, 6144, 151_936, **TIED, **HEAD_128)
QWEN = {
    1: (
        PublishedModel(
            "Qwen3.5-0.8B",
            _make_qwen3_5("qwen3_5", 1024, 24, 8, 2, 3584, 248_320, value_heads=16, **TIED),
            layers=(6, 18),
        ),
        PublishedModel(
            "Qwen3.5-9B",
            _make_qwen3_5("qwen3_5", 4096, 32, 16, 4, 12_288, 248_320, value_heads=32),
            billions=9,
            layers=(8, 24),
        ),
        PublishedModel(
            "Qwen3.6-27B",
            _make_qwen3_5("qwen3_5", 5120, 64, 24, 4, 17_408, 248_320, value_heads=48),
            billions=27,
            layers=(16, 48),
        ),
    ),
    2: (
        PublishedModel(
            "Qwen3.6-35B-A3B",
            _make_qwen3_5(
                *("qwen3_5_moe", 2048, 40, 16, 2, 5120, 248_320),
                value_heads=32,
                **QWEN3_5_EXPERTS,
            ),
            billions=35,
            layers=(10, 30),
        ),
    ),
    3: (
        PublishedModel(
            "Qwen3-0.6B",
            make_config(
                *("qwen3", "Qwen3ForCausalLM", 1024, 28, 16, 8, 3072, 151_936), **HEAD_128, **TIED
            ),
            billions=0.6,
            layers=(28, 0),
        ),
        PublishedModel(
            "Qwen3-32B",
            make_config(
                *("qwen3", "Qwen3ForCausalLM", 5120, 64, 64, 8, 25_600, 151_936), **HEAD_128
            ),
            billions=32.8,
            layers=(64, 0),
        ),
    ),
    8: (
        PublishedModel(
            "Qwen2.5-7B",
            make_config("qwen2", "Qwen2ForCausalLM", 3584, 28, 28, 4, 18_944, 152_064),
            billions=7.61,
            layers=(28, 0),
        ),
    ),
    10: (
        PublishedModel(
            "Qwen3-VL-2B",
            make_multimodal("qwen3_vl", "Qwen3VLForConditionalGeneration", QWEN3_VL_TEXT),
            billions=1.7,
            layers=(28, 0),
        ),
        PublishedModel(
            "Qwen3-VL-30B-A3B",
            make_multimodal(
                *("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration"),
                QWEN3_MOE | {"model_type": "qwen3_vl_moe_text"},
            ),
            billions=30.5,
            layers=(48, 0),
        ),
    ),
    11: (PublishedModel("Qwen3-30B-A3B", QWEN3_MOE, billions=30.5, layers=(48, 0)),),
}

# ---------------------------------------------------------------- Gemma


def _make_gemma4(model_type: str, *sizes: int, period: int, **others: Any) -> Config:
    layers = sizes[1]
    text = make_config(
        f"{model_type}_text",
        "",
        *sizes,
        **TIED,
        head_dim=256,
        global_head_dim=512,
        layer_types=[*["sliding_attention"] * (period - 1), "full_attention"] * (layers // period),
        sliding_window=512,
        pad_token_id=0,
        vocab_size_per_layer_input=sizes[-1],
        **others,
    )
    name = "Gemma4" if model_type == "gemma4" else "Gemma4Unified"
    return make_multimodal(model_type, f"{name}ForConditionalGeneration", text)


def _make_gemma3(*sizes: int, head_dim: int) -> Config:
    text = make_config("gemma3_text", "", *sizes, head_dim=head_dim, sliding_window=1024, **TIED)
    return make_multimodal("gemma3", "Gemma3ForConditionalGeneration", text)


GLOBAL_KEYS_ARE_VALUES = {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0}
GEMMA4_EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
}
GEMMA_VOCABULARY = 262_144
GEMMA = {
    4: (
        PublishedModel(
            "Gemma 4 E2B",
            _make_gemma4(
                *("gemma4", 1536, 35, 8, 1, 6144, GEMMA_VOCABULARY),
                period=5,
                num_kv_shared_layers=20,
                use_double_wide_mlp=True,
                hidden_size_per_layer_input=256,
            ),
            billions=None,  # 5.1 with its towers
            layers=(35, 0),
        ),
    ),
    5: (
        PublishedModel(
            "Gemma 4 26B-A4B",
            _make_gemma4(
                *("gemma4", 2816, 30, 16, 8, 2112, GEMMA_VOCABULARY),
                period=6,
                num_global_key_value_heads=2,
                **GLOBAL_KEYS_ARE_VALUES,
                **GEMMA4_EXPERTS,
            ),
            billions=25.2,
            layers=(30, 0),
        ),
        PublishedModel(
            "Gemma 4 31B",
            _make_gemma4(
                *("gemma4", 5376, 60, 32, 16, 21_504, GEMMA_VOCABULARY),
                period=6,
                num_global_key_value_heads=4,
                **GLOBAL_KEYS_ARE_VALUES,
            ),
            billions=30.7,
            layers=(60, 0),
        ),
    ),
    9: (
        PublishedModel(
            "Gemma 4 12B",
            _make_gemma4(
                *("gemma4_unified", 3840, 48, 16, 8, 15_360, GEMMA_VOCABULARY),
                period=6,
                num_global_key_value_heads=1,
                attention_k_eq_v=True,
            ),
            billions=12,
            layers=(48, 0),
        ),
    ),
    12: (
        PublishedModel(
            "Gemma 3 270M",
            make_config(
                *("gemma3_text", "Gemma3ForCausalLM", 640, 18, 4, 1, 2048, GEMMA_VOCABULARY),
                head_dim=256,
                sliding_window=512,
                **TIED,
            ),
            billions=0.268,
            layers=(18, 0),
        ),
        PublishedModel(
            "Gemma 3 1B",
            make_config(
                *("gemma3_text", "Gemma3ForCausalLM", 1152, 26, 4, 1, 6912, GEMMA_VOCABULARY),
                head_dim=256,
                sliding_window=512,
                **TIED,
            ),
            billions=1.0,
            layers=(26, 0),
        ),
    ),
    13: (
        PublishedModel(
            "Gemma 3 4B",
            _make_gemma3(2560, 34, 8, 4, 10_240, 262_208, head_dim=256),
            billions=3.88,
            layers=(34, 0),
        ),
        PublishedModel(
            "Gemma 3 27B",
            _make_gemma3(5376, 62, 32, 16, 21_504, 262_208, head_dim=128),
            billions=27,
            layers=(62, 0),
        ),
    ),
}

# ---------------------------------------------------------------- Llama, Mistral, Phi, SmolLM, OLMo


def _make_mistral3(text_type: str, *sizes: int, **others: Any) -> Config:
    tied = {"tie_word_embeddings": others.pop("tie_word_embeddings", False)}
    text = make_config(text_type, "", *sizes, **HEAD_128, **tied)
    return make_multimodal("mistral3", "Mistral3ForConditionalGeneration", text, **others)


FP8_PER_TENSOR = {
    "activation_scheme": "static",
    "dequantize": False,
    "modules_to_not_convert": ["model.vision_tower", "lm_head"],
    "quant_method": "fp8",
    "weight_block_size": None,
}
LLAMA_8B = make_config("llama", "LlamaForCausalLM", 4096, 32, 32, 8, 14_336, 128_256)
DENSE = {
    6: (
        PublishedModel(
            "Llama 3.2 1B",
            make_config(
                *("llama", "LlamaForCausalLM", 2048, 16, 32, 8, 8192, 128_256), head_dim=64, **TIED
            ),
            billions=1.24,
            layers=(16, 0),
        ),
        PublishedModel("Llama 3.1 8B", LLAMA_8B, billions=8.03, layers=(32, 0)),
    ),
    14: (
        PublishedModel(
            "Mistral 7B v0.3",
            make_config("mistral", "MistralForCausalLM", 4096, 32, 32, 8, 14_336, 32_768),
            billions=7.25,
            layers=(32, 0),
        ),
        PublishedModel(
            "Mistral Nemo",
            make_config(
                *("mistral", "MistralForCausalLM", 5120, 40, 32, 8, 14_336, 131_072), **HEAD_128
            ),
            billions=12.2,
            layers=(40, 0),
        ),
    ),
    15: (
        PublishedModel(
            "Ministral 3 3B, base",
            _make_mistral3("ministral3", 3072, 26, 32, 8, 9216, 131_072, **TIED),
            billions=3.4,
            layers=(26, 0),
        ),
        PublishedModel(
            "Ministral 3 8B, instruct in FP8",
            _make_mistral3(
                *("ministral3", 4096, 34, 32, 8, 14_336, 131_072),
                quantization_config=FP8_PER_TENSOR,
            ),
            billions=8.4,
            layers=(34, 0),
        ),
        PublishedModel(
            "Mistral Small 3.1",
            _make_mistral3("mistral", 5120, 40, 32, 8, 32_768, 131_072),
            billions=23.6,
            layers=(40, 0),
        ),
    ),
    16: (
        PublishedModel(
            "Phi-4",
            make_config("phi3", "Phi3ForCausalLM", 5120, 40, 40, 10, 17_920, 100_352),
            billions=14.7,
            layers=(40, 0),
        ),
    ),
    18: (
        PublishedModel(
            "SmolLM2-135M",
            make_config("llama", "LlamaForCausalLM", 576, 30, 9, 3, 1536, 49_152, **TIED),
            billions=0.135,
            layers=(30, 0),
        ),
        PublishedModel(
            "SmolLM3-3B",
            make_config("smollm3", "SmolLM3ForCausalLM", 2048, 36, 16, 4, 11_008, 128_256, **TIED),
            billions=3.08,
            layers=(36, 0),
        ),
    ),
    20: (
        PublishedModel(
            "DeepSeek-R1-Distill-Qwen-7B",
            make_config("qwen2", "Qwen2ForCausalLM", 3584, 28, 28, 4, 18_944, 152_064),
            billions=7.62,
            layers=(28, 0),
        ),
        PublishedModel("DeepSeek-R1-Distill-Llama-8B", LLAMA_8B, billions=8.03, layers=(32, 0)),
    ),
}
