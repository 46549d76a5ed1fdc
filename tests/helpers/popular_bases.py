"""The config.json of popular bases with recurrent layers or experts, and all lines of the ranking.

PUBLISHED[number of the line] -> models, those of popular_configs.py among them."""

from popular_configs import (
    DENSE,
    GEMMA,
    HEAD_128,
    QWEN,
    TIED,
    PublishedModel,
    make_config,
)

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
            make_config(
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
            make_config(
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
            make_config(
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
            make_config(
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
            make_config(
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
            make_config("olmo3", "Olmo3ForCausalLM", 4096, 32, 32, 32, 11_008, 100_278),
            billions=7.3,
            layers=(32, 0),
        ),
        PublishedModel(
            "OLMo Hybrid 7B",
            make_config(
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
            make_config(
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
            make_config(
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
            make_config(
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
            make_config(
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
            make_config(
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
            make_config(
                *("deepseek_v32", "DeepseekV32ForCausalLM", 7168, 61, 128, 128, 18_432, 129_280)
            ),
            layers=(61, 0),
        ),
        PublishedModel(
            "GLM-5",
            make_config(
                *("glm_moe_dsa", "GlmMoeDsaForCausalLM", 6144, 78, 64, 64, 12_288, 154_880)
            ),
            layers=(78, 0),
        ),
    ),
}
PUBLISHED: dict[int, tuple[PublishedModel, ...]] = dict(
    sorted({**QWEN, **GEMMA, **DENSE, **HYBRID, **EXPERTS}.items())
)
