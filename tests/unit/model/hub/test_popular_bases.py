"""The bases that are fine-tuned most are taken: their configs alone, with transformers' defaults
for what a line does not name."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from tunesmith.core.errors import InputError
from tunesmith.model.hub.families import FAMILIES
from tunesmith.model.hub.spec import read_spec

EXPERTS: dict[str, Any] = {
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
}
ATTENTION_ONLY: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": ["attention"] * 4,
    "num_local_experts": 0,
}
# line of the ranking -> model type, values of its (text) config
ACCEPTED: dict[str, tuple[str, dict[str, Any]]] = {
    "1 Qwen3.5 dense": ("qwen3_5", {}),
    "2 Qwen3.5-35B-A3B": ("qwen3_5_moe", {}),
    "3 Qwen3": ("qwen3", {}),
    "4 Gemma 4 E2B": ("gemma4", {"num_kv_shared_layers": 10}),
    "5 Gemma 4 26B-A4B": ("gemma4", EXPERTS | {"hidden_size_per_layer_input": 0}),
    "6 Llama 3": ("llama", {}),
    "7 gpt-oss": ("gpt_oss", {}),
    "8 Qwen2.5": ("qwen2", {}),
    "9 Gemma 4 12B": ("gemma4_unified", {}),
    "10 Qwen3-VL": ("qwen3_vl", {}),
    "11 Qwen3-30B-A3B": ("qwen3_moe", {}),
    "12 Gemma 3 1B": ("gemma3_text", {}),
    "13 Gemma 3 4B": ("gemma3", {}),
    "14 Mistral": ("mistral", {}),
    "15 Ministral 3": ("mistral3", {"model_type": "ministral3"}),
    "16 Phi-4": ("phi3", {}),
    "17 LFM2": ("lfm2", {"full_attn_idxs": [2, 5]}),
    "18 SmolLM3": ("smollm3", {}),
    "19 Granite 4": ("granitemoehybrid", ATTENTION_ONLY),
    "19 Granite 4-h": ("granitemoehybrid", {"num_local_experts": 0}),
    "21 GLM-4.7-Flash": ("glm4_moe_lite", {}),
    "21 GLM-4.5-Air": ("glm4_moe", {}),
    "22 Nemotron 3 Nano": ("nemotron_h", {"layers_block_type": ["mamba", "moe", "attention"]}),
    "23 OLMo 3": ("olmo3", {}),
    "23 OLMo Hybrid": ("olmo_hybrid", {}),
    "24 Falcon-H1": ("falcon_h1", {}),
}
REFUSED = {"25 DeepSeek V3.2": ("deepseek_v32", "indexer")}


def write_config(folder: Path, model_type: str, values: dict[str, Any]) -> Path:
    family = FAMILIES.get(model_type)
    is_multimodal = family is not None and bool(family.tensor_prefix)
    config = AutoConfig.for_model(
        model_type, **({"text_config": values} if is_multimodal else values)
    )
    name = family.causal_class if family else "DeepseekV32ForCausalLM"
    if is_multimodal:
        name = name.replace("CausalLM", "ConditionalGeneration")
    content = json.loads(config.to_json_string(use_diff=False)) | {"architectures": [name]}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("line", ACCEPTED)
def test_a_popular_base_is_taken(line: str, tmp_path: Path) -> None:
    spec = read_spec(write_config(tmp_path, *ACCEPTED[line]))
    assert len(spec.layer_mixers) == spec.num_layers
    assert 0 < spec.active_parameters <= spec.block_parameters < spec.parameters


@pytest.mark.parametrize("line", REFUSED)
def test_the_others_are_refused_by_name(line: str, tmp_path: Path) -> None:
    model_type, reason = REFUSED[line]
    with pytest.raises(InputError, match=rf"{model_type}.*{reason}"):
        read_spec(write_config(tmp_path, model_type, {}))


def test_published_sizes_are_found(tmp_path: Path) -> None:
    """The defaults of these types are the sizes of DeepSeek-V3 and of Qwen3.5-35B-A3B."""
    sizes: dict[str, tuple[int, int]] = {}
    for model_type in ("deepseek_v3", "qwen3_5_moe"):
        spec = read_spec(write_config(tmp_path, model_type, {}))
        sizes[model_type] = (round(spec.parameters / 1e9), round(spec.active_parameters / 1e9))
    assert sizes == {"deepseek_v3": (671, 36), "qwen3_5_moe": (35, 2)}
