import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.core.errors import InputError
from tunesmith.model.hub.spec import read_spec

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
TYPES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "olmo2",
    "phi3",
    "smollm3",
    "arcee",
    "bitnet",
    "cwm",
    "vaultgemma",
]


@pytest.mark.parametrize("model_type", TYPES)
def test_the_spec_says_what_the_model_is(tmp_path: Path, model_type: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES))
    model.save_pretrained(tmp_path)
    spec, config = read_spec(tmp_path, name="tiny"), model.config
    assert (spec.name, spec.path, spec.model_type) == ("tiny", tmp_path, model_type)
    assert spec.architecture == type(model).__name__
    assert spec.head_dim == model.model.layers[0].self_attn.head_dim
    assert spec.tie_word_embeddings == bool(config.tie_word_embeddings)
    assert spec.parameters == model.num_parameters()
    in_blocks = [
        module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)
    ]
    assert spec.block_parameters == sum(module.weight.numel() for module in in_blocks)
    assert spec.head_parameters == model.lm_head.weight.numel()
    assert (spec.context_length, spec.num_layers, spec.dtype) == (128, 2, "float32")


def test_dtype_and_origin(model_folder: Path) -> None:
    weights = {
        name: value.bfloat16()
        for name, value in load_file(model_folder / "model.safetensors").items()
    }
    save_file(
        weights | {"model.norm.weight": weights["model.norm.weight"].float()},
        model_folder / "model.safetensors",
    )
    (model_folder / "manifest.json").write_text(json.dumps({"origin": "made here"}))
    spec = read_spec(model_folder)
    assert (spec.name, spec.dtype, spec.origin) == ("model", "bfloat16", "made here")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "mamba"}, "mamba has layers that carry state"),
        ({"model_type": "lfm2"}, "LlamaForCausalLM, but a model of type lfm2 is a Lfm2ForCausalLM"),
        (
            {"layer_types": ["full_attention", "linear_attention"]},
            "layers of type linear_attention",
        ),
        ({"layer_types": ["conv", "full_attention"]}, "layers of type conv"),
        ({"layer_types": "mamba"}, "layers of type mamba"),
        (
            {"model_type": "llava", "vision_config": {"a": 1}},
            "has no text part",
        ),
        ({"vision_config": {"a": 1}}, r"of llama has inputs other than text \(vision_config\)"),
        (
            {"per_layer_config": {"0": {"head_dim": 8}}},
            r"llama has layers of different sizes \(per_layer_config\)",
        ),
        (
            {"layer_types": ["full_attention"]},
            "2 layers, but 1 layer_types",
        ),
        (
            {"model_type": "qwen2_audio", "audio_config": {"a": 1}},
            r"inputs other than text \(audio_config\)",
        ),
        ({"model_type": "t5"}, "is an encoder-decoder"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "is an encoder-decoder"),
        ({"num_local_experts": 8}, r"llama has no experts, but config\.json has 8"),
        ({"model_type": "nllb_moe"}, "nllb_moe gives its experts a limited capacity"),
        ({"expert_capacity": 64}, "llama gives its experts a limited capacity"),
        ({"model_type": "jetmoe"}, "jetmoe chooses experts inside its attention"),
        ({"model_type": "dbrx_moe", "num_experts": 8}, "type 'dbrx_moe' is not supported"),
        ({"model_type": "martian"}, "the model type 'martian' is not supported"),
        ({"model_type": None}, "no model_type"),
        ({"model_type": ["llama"]}, "no model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is not a causal language model"),
        ({"architectures": None}, "architectures is None"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized .*gptq"),
        ({"num_hidden_layers": None}, "no num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
        ({"num_hidden_layers": 3}, "says 3 attention layers, the weights have 2"),
        ({"num_hidden_layers": 1}, r"1 layers but the weights have model\.layers\.1\."),
        ({"hidden_size": "576"}, "hidden_size is 576, not an integer"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"vocab_size": 100}, r"has shape \[266, 64\], config.json says \[100, 64\]"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({"tie_word_embeddings": False}, r"no lm_head\.weight"),
    ],
)
def test_refused_by_name(change_config, changed: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_spec(change_config(**changed))
    assert caught.value.where
    assert caught.value.fix


def test_quantized_tensors_are_refused(model_folder: Path) -> None:
    weights = load_file(model_folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].to(
        torch.uint8
    )
    save_file(weights, model_folder / "model.safetensors")
    with pytest.raises(InputError, match=r"mlp\.up_proj\.weight is U8"):
        read_spec(model_folder)


def test_a_stored_head_is_not_tied(change_config) -> None:
    folder = change_config(tie_word_embeddings=None)
    weights = load_file(folder / "model.safetensors")
    assert read_spec(folder).tie_word_embeddings
    save_file(
        weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()},
        folder / "model.safetensors",
    )
    assert not read_spec(folder).tie_word_embeddings


@pytest.mark.parametrize(
    ("changed", "message", "fix"),
    [
        (
            {"architectures": ["Gemma3ForConditionalGeneration"]},
            "says Gemma3ForConditionalGeneration, a multimodal class, but llama is the type",
            r"whole model's config\.json; for weights of the text alone, write LlamaForCausalLM",
        ),
        (
            {"architectures": ["InternVLChatModel"], "model_type": "internvl"},
            "says InternVLChatModel, but transformers' internvl is InternVLForConditionalGenera",
            r"whose architectures says InternVLForConditionalGeneration; .* Qwen2ForCausalLM",
        ),
        (
            {
                "architectures": ["Cohere2VisionForConditionalGeneration"],
                "model_type": "cohere2_vision",
                "text_config": {"model_type": "cohere2"},
                "vision_config": {"a": 1},
            },
            "^[^ ]*: Cohere2VisionForConditionalGeneration of cohere2_vision has inputs other than",
            "use a text model of type cohere2, which is its text part, or choose another",
        ),
    ],
)
def test_a_multimodal_class_is_refused_with_what_to_use_instead(
    change_config, changed: dict, message: str, fix: str
) -> None:
    folder = change_config(**changed)
    if changed.get("model_type") == "internvl":
        config = json.loads((folder / "config.json").read_text())
        text = config | {"model_type": "qwen2"}
        outer = changed | {"text_config": text}
        (folder / "config.json").write_text(json.dumps(outer))
        weights = load_file(folder / "model.safetensors")
        biases = {
            name.replace("weight", "bias"): tensor[:, 0].clone()
            for name, tensor in weights.items()
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        }
        prefix = "model.language_model."
        named = {f"{prefix}{n.removeprefix('model.')}": t for n, t in (weights | biases).items()}
        save_file(named, folder / "model.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        read_spec(folder)
    assert re.search(fix, caught.value.fix)
