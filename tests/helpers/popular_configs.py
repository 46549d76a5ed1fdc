"""The config.json of the bases that are fine-tuned most, in the keys that their files have.

PUBLISHED[number of the line in the ranking] -> models. Sizes are those that the makers publish, and
`billions` their own count of the parameters of the text part, rounded as they round it. Keys that
change no shape are mostly left out. `refused` is what the message says of a line that is not
taken."""

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


def _make_config(model_type: str, architecture: str, *sizes: int, **others: Any) -> Config:
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


def _make_multimodal(model_type: str, architecture: str, text: Config, **others: Any) -> Config:
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
    text = _make_config(
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
    return _make_multimodal(model_type, f"{text_class}ForConditionalGeneration", text)


QWEN3_5_EXPERTS = {
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
QWEN3_MOE = _make_config(
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
QWEN3_VL_TEXT = _make_config(
    "qwen3_vl_text", "", 2048, 28, 16, 8, 6144, 151_936, **TIED, **HEAD_128
)
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
            _make_config(
                *("qwen3", "Qwen3ForCausalLM", 1024, 28, 16, 8, 3072, 151_936), **HEAD_128, **TIED
            ),
            billions=0.6,
            layers=(28, 0),
        ),
        PublishedModel(
            "Qwen3-32B",
            _make_config(
                *("qwen3", "Qwen3ForCausalLM", 5120, 64, 64, 8, 25_600, 151_936), **HEAD_128
            ),
            billions=32.8,
            layers=(64, 0),
        ),
    ),
    8: (
        PublishedModel(
            "Qwen2.5-7B",
            _make_config("qwen2", "Qwen2ForCausalLM", 3584, 28, 28, 4, 18_944, 152_064),
            billions=7.61,
            layers=(28, 0),
        ),
    ),
    10: (
        PublishedModel(
            "Qwen3-VL-2B",
            _make_multimodal("qwen3_vl", "Qwen3VLForConditionalGeneration", QWEN3_VL_TEXT),
            billions=1.7,
            layers=(28, 0),
        ),
        PublishedModel(
            "Qwen3-VL-30B-A3B",
            _make_multimodal(
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
    text = _make_config(
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
    return _make_multimodal(model_type, f"{name}ForConditionalGeneration", text)


def _make_gemma3(*sizes: int, head_dim: int) -> Config:
    text = _make_config("gemma3_text", "", *sizes, head_dim=head_dim, sliding_window=1024, **TIED)
    return _make_multimodal("gemma3", "Gemma3ForConditionalGeneration", text)


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
            _make_config(
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
            _make_config(
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
    text = _make_config(text_type, "", *sizes, **HEAD_128, **tied)
    return _make_multimodal("mistral3", "Mistral3ForConditionalGeneration", text, **others)


FP8_PER_TENSOR = {
    "activation_scheme": "static",
    "dequantize": False,
    "modules_to_not_convert": ["model.vision_tower", "lm_head"],
    "quant_method": "fp8",
    "weight_block_size": None,
}
LLAMA_8B = _make_config("llama", "LlamaForCausalLM", 4096, 32, 32, 8, 14_336, 128_256)
DENSE = {
    6: (
        PublishedModel(
            "Llama 3.2 1B",
            _make_config(
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
            _make_config("mistral", "MistralForCausalLM", 4096, 32, 32, 8, 14_336, 32_768),
            billions=7.25,
            layers=(32, 0),
        ),
        PublishedModel(
            "Mistral Nemo",
            _make_config(
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
            _make_config("phi3", "Phi3ForCausalLM", 5120, 40, 40, 10, 17_920, 100_352),
            billions=14.7,
            layers=(40, 0),
        ),
    ),
    18: (
        PublishedModel(
            "SmolLM2-135M",
            _make_config("llama", "LlamaForCausalLM", 576, 30, 9, 3, 1536, 49_152, **TIED),
            billions=0.135,
            layers=(30, 0),
        ),
        PublishedModel(
            "SmolLM3-3B",
            _make_config("smollm3", "SmolLM3ForCausalLM", 2048, 36, 16, 4, 11_008, 128_256, **TIED),
            billions=3.08,
            layers=(36, 0),
        ),
    ),
    20: (
        PublishedModel(
            "DeepSeek-R1-Distill-Qwen-7B",
            _make_config("qwen2", "Qwen2ForCausalLM", 3584, 28, 28, 4, 18_944, 152_064),
            billions=7.62,
            layers=(28, 0),
        ),
        PublishedModel("DeepSeek-R1-Distill-Llama-8B", LLAMA_8B, billions=8.03, layers=(32, 0)),
    ),
}

# ---------------------------------------------------------------- hybrids

GRANITE_4 = ("granitemoehybrid", "GraniteMoeHybridForCausalLM")
GRANITE_MAMBA = {
    "mamba_d_conv": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "layer_types": ([*["mamba"] * 5, "attention", *["mamba"] * 4]) * 4,
}
FALCON = {
    "head_dim": 64,
    "mamba_d_conv": 4,
    "mamba_d_head": 64,
    "mamba_d_ssm": 1536,
    "mamba_d_state": 128,
    "mamba_n_groups": 1,
    "mamba_n_heads": 24,
}
HYBRID = {
    17: (
        PublishedModel(
            "LFM2-1.2B",
            _make_config(
                *("lfm2", "Lfm2ForCausalLM", 2048, 16, 32, 8, 12_288, 65_536),
                block_auto_adjust_ff_dim=True,
                block_ff_dim=12_288,
                block_ffn_dim_multiplier=1.0,
                block_multiple_of=256,
                conv_L_cache=3,
                full_attn_idxs=[2, 5, 8, 10, 12, 14],
                **TIED,
            ),
            billions=1.17,
            layers=(6, 10),
        ),
    ),
    19: (
        PublishedModel(
            "Granite 4.0 micro",
            _make_config(
                *(*GRANITE_4, 2560, 40, 40, 8, 8192, 100_352),
                layer_types=["attention"] * 40,
                num_local_experts=0,
                num_experts_per_tok=0,
                shared_intermediate_size=8192,
                **TIED,
            ),
            billions=3.4,
            layers=(40, 0),
        ),
        PublishedModel(
            "Granite 4.0 h-micro",
            _make_config(
                *(*GRANITE_4, 2048, 40, 32, 8, 8192, 100_352),
                **GRANITE_MAMBA,
                mamba_n_heads=64,
                num_local_experts=0,
                num_experts_per_tok=0,
                shared_intermediate_size=8192,
                **TIED,
            ),
            billions=3.19,
            layers=(4, 36),
        ),
        PublishedModel(
            "Granite 4.0 h-tiny",
            _make_config(
                *(*GRANITE_4, 1536, 40, 12, 4, 512, 100_352),
                **GRANITE_MAMBA,
                mamba_n_heads=48,
                num_local_experts=64,
                num_experts_per_tok=6,
                shared_intermediate_size=1024,
                **TIED,
            ),
            billions=6.94,
            layers=(4, 36),
        ),
    ),
    22: (
        PublishedModel(
            "Nemotron 3 Nano 30B-A3B",
            _make_config(
                *("nemotron_h", "NemotronHForCausalLM", 2688, 52, 32, 2, 1856, 131_072),
                **HEAD_128,
                hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
                mamba_num_heads=64,
                mamba_head_dim=64,
                ssm_state_size=128,
                n_groups=8,
                conv_kernel=4,
                n_routed_experts=128,
                n_shared_experts=1,
                num_experts_per_tok=6,
                moe_intermediate_size=1856,
                moe_shared_expert_intermediate_size=3712,
            ),
            billions=31.6,
            layers=(6, 23),
        ),
    ),
    23: (
        PublishedModel(
            "OLMo 3 7B",
            _make_config("olmo3", "Olmo3ForCausalLM", 4096, 32, 32, 32, 11_008, 100_278),
            billions=7.3,
            layers=(32, 0),
        ),
        PublishedModel(
            "OLMo Hybrid 7B",
            _make_config(
                *("olmo_hybrid", "OlmoHybridForCausalLM", 3840, 32, 30, 30, 11_008, 100_352),
                layer_types=[*["linear_attention"] * 3, "full_attention"] * 8,
                linear_num_key_heads=30,
                linear_num_value_heads=30,
                linear_key_head_dim=96,
                linear_value_head_dim=192,
                linear_conv_kernel_dim=4,
            ),
            billions=7.4,
            layers=(8, 24),
        ),
    ),
    24: (
        PublishedModel(
            "Falcon-H1-0.5B",
            _make_config(
                *("falcon_h1", "FalconH1ForCausalLM", 1024, 36, 8, 2, 2048, 32_784), **FALCON
            ),
            billions=0.52,
            layers=(36, 36),
        ),
    ),
}

# ---------------------------------------------------------------- experts

MXFP4 = {
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    "quant_method": "mxfp4",
}
EXPERTS = {
    7: (
        PublishedModel(
            "gpt-oss-20b",
            _make_config(
                *("gpt_oss", "GptOssForCausalLM", 2880, 24, 64, 8, 2880, 201_088),
                head_dim=64,
                layer_types=["sliding_attention", "full_attention"] * 12,
                sliding_window=128,
                attention_bias=True,
                num_local_experts=32,
                num_experts_per_tok=4,
                quantization_config=MXFP4,
            ),
            billions=20.9,
            layers=(24, 0),
        ),
    ),
    21: (
        PublishedModel(
            "GLM-4.7-Flash",
            _make_config(
                *("glm4_moe_lite", "Glm4MoeLiteForCausalLM", 2048, 47, 20, 20, 10_240, 154_880),
                first_k_dense_replace=1,
                kv_lora_rank=512,
                q_lora_rank=768,
                qk_nope_head_dim=192,
                qk_rope_head_dim=64,
                v_head_dim=256,
                n_routed_experts=64,
                n_shared_experts=1,
                num_experts_per_tok=4,
                moe_intermediate_size=1536,
                n_group=1,
                topk_group=1,
                num_nextn_predict_layers=1,
            ),
            billions=30,
            layers=(47, 0),
        ),
        PublishedModel(
            "GLM-4.5-Air",
            _make_config(
                *("glm4_moe", "Glm4MoeForCausalLM", 4096, 46, 96, 8, 10_944, 151_552),
                **HEAD_128,
                attention_bias=True,
                first_k_dense_replace=1,
                n_routed_experts=128,
                n_shared_experts=1,
                num_experts_per_tok=8,
                moe_intermediate_size=1408,
                n_group=1,
                topk_group=1,
                num_nextn_predict_layers=1,
            ),
            billions=106,
            layers=(46, 0),
        ),
    ),
    25: (
        PublishedModel(
            "DeepSeek V3.1",
            _make_config(
                *("deepseek_v3", "DeepseekV3ForCausalLM", 7168, 61, 128, 128, 18_432, 129_280),
                first_k_dense_replace=3,
                kv_lora_rank=512,
                q_lora_rank=1536,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
                n_routed_experts=256,
                n_shared_experts=1,
                num_experts_per_tok=8,
                moe_intermediate_size=2048,
                n_group=8,
                topk_group=4,
                num_nextn_predict_layers=1,
                quantization_config={
                    "activation_scheme": "dynamic",
                    "fmt": "e4m3",
                    "quant_method": "fp8",
                    "weight_block_size": [128, 128],
                },
            ),
            billions=671,
            layers=(61, 0),
        ),
        PublishedModel(
            "DeepSeek V3.2",
            _make_config(
                *("deepseek_v32", "DeepseekV32ForCausalLM", 7168, 61, 128, 128, 18_432, 129_280)
            ),
            refused="indexer",
        ),
        PublishedModel(
            "GLM-5",
            _make_config(
                *("glm_moe_dsa", "GlmMoeDsaForCausalLM", 6144, 78, 64, 64, 12_288, 154_880)
            ),
            refused="indexer",
        ),
    ),
}
PUBLISHED: dict[int, tuple[PublishedModel, ...]] = dict(
    sorted({**QWEN, **GEMMA, **DENSE, **HYBRID, **EXPERTS}.items())
)
