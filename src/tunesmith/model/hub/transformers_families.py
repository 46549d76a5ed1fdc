"""Families that transformers has and no table of tunesmith names: decoders of softmax attention.
Their layers are checked in text_class.py, their numbers by preflight."""

from __future__ import annotations

import importlib
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tunesmith.model.hub.families import EQUAL_TYPES, Family, find_family, make_multimodal

CAUSAL = "ForCausalLM"
# Of other multimodal types the text part may compute something else than the class of its type.
# fmt: off
COMPARED_TYPES = {
    "aria", "deepseek_vl", "deepseek_vl_hybrid", "exaone4_5", "gemma3", "gemma3n", "gemma4",
    "gemma4_unified", "got_ocr2", "idefics2", "idefics3", "internvl", "janus", "kimi_k25",
    "lfm2_vl", "lighton_ocr", "llava", "llava_next", "llava_next_video", "llava_onevision",
    "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "mistral3", "moss_transcribe_diarize", "ovis2",
    "qianfan_ocr", "qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe",
    "shieldgemma2", "smolvlm", "video_llama_3", "video_llava", "vipllava",
}
# fmt: on


def derive_family(model_type: str) -> Family | None:
    """Return the family of a decoder, or of a multimodal model with a decoder as its text part."""
    if model_type not in CONFIG_MAPPING:
        return None
    kind: Any = CONFIG_MAPPING[model_type]
    if "text_config" in kind.sub_configs:
        text_type = kind().get_text_config().model_type if model_type in COMPARED_TYPES else ""
        text_type = EQUAL_TYPES.get(text_type, text_type)
        return make_multimodal(model_type, text_type) if find_family(text_type) else None
    causal = find_causal_class(kind)
    if causal is None or kind.sub_configs:
        return None
    return Family(causal.__name__.removesuffix(CAUSAL), has_experts=True)


def find_causal_class(kind: type[PreTrainedConfig]) -> type[PreTrainedModel] | None:
    """Return transformers' causal class of a kind of config, None without one."""
    module_name = kind.__module__.replace(".configuration_", ".modeling_")
    try:
        module = importlib.import_module(module_name)
    except ImportError:  # there is none, or it needs a library that is not installed
        return None
    for name, value in vars(module).items():
        if name.endswith(CAUSAL) and getattr(value, "config_class", None) is kind:
            return value
    return None


def find_renamings(*classes_and_types: str) -> list[tuple[str, str]]:
    """Return pattern and replacement of names in published files that transformers renames."""
    renamings: list[tuple[str, str]] = []
    for name in dict.fromkeys(classes_and_types):
        for step in get_checkpoint_conversion_mapping(name) or ():
            if type(step) is WeightRenaming:
                renamings += zip(step.source_patterns, step.target_patterns, strict=True)
    return renamings
