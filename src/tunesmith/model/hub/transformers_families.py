"""Families that transformers has and no table of tunesmith names: decoders of softmax attention.
Their layers are checked in text_class.py, their numbers by preflight."""

from __future__ import annotations

import functools
import importlib
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tunesmith.model.hub.families import EQUAL_TYPES, Family, find_family, make_multimodal

CAUSAL = "ForCausalLM"
DECODER = "TextModel"
# text parts of compared types that transformers has without a head
HEADLESS_TYPES = {"cosmos3_edge_text", "glm4v_text", "muse_glimmer_text", "step3p5"}
# Of other multimodal types the text part may compute something else than the class of its type.
# fmt: off
COMPARED_TYPES = {
    "aria", "aya_vision", "cosmos3_edge", "cosmos3_omni", "deepseek_vl", "deepseek_vl_hybrid",
    "exaone4_5", "fast_vlm", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "glm46v", "glm4v",
    "glmga", "got_ocr2", "hyperclovax_vision_v2", "idefics2", "idefics3", "internvl", "janus",
    "kimi_k25", "lfm2_vl", "lfm3_vl", "lighton_ocr", "llava", "llava_next", "llava_next_video",
    "llava_onevision", "llava_onevision1_5", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7",
    "mistral3", "moss_transcribe_diarize", "muse_glimmer", "ovis2", "ovis2_5", "pp_chart2table",
    "qianfan_ocr", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe",
    "shieldgemma2", "smolvlm", "step3p7", "video_llama_3", "video_llava", "vipllava",
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


def find_multimodal_class(model_type: str) -> str:
    """Return the name of transformers' class of a multimodal model, empty for other types."""
    return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type, "")


def find_causal_class(kind: type[PreTrainedConfig]) -> type[PreTrainedModel] | None:
    """Return transformers' causal class of a kind of config, its decoder with a head if there is
    only that, None without either."""
    module_name = kind.__module__.replace(".configuration_", ".modeling_")
    try:
        module = importlib.import_module(module_name)
    except ImportError:  # there is none, or it needs a library that is not installed
        return None
    for name, value in vars(module).items():
        if name.endswith(CAUSAL) and getattr(value, "config_class", None) is kind:
            return value
    if kind.model_type not in HEADLESS_TYPES:
        return None
    for name, value in vars(module).items():
        if name.endswith(DECODER) and getattr(value, "config_class", None) is kind:
            return add_head(value)
    return None


@functools.cache
def add_head(decoder: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a causal class of a decoder that transformers has in a multimodal class only."""
    base: Any = decoder.__base__

    class HeadedDecoder(base):
        config_class = decoder.config_class
        base_model_prefix = "model"
        _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = decoder(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(
            self, input_ids: Tensor, logits_to_keep: int | Tensor = 0, **settings: Any
        ) -> CausalLMOutputWithPast:
            out = self.model(input_ids=input_ids, **settings)
            is_count = isinstance(logits_to_keep, int)
            positions = slice(-logits_to_keep, None) if is_count else logits_to_keep
            factor = getattr(self.config, "output_multiplier", 1.0)
            logits = self.lm_head(out.last_hidden_state[:, positions]) * factor
            if cap := getattr(self.config, "final_logit_softcapping", None):
                logits = cap * torch.tanh(logits / cap)
            return CausalLMOutputWithPast(logits=logits, cache=out.cache)

    HeadedDecoder.__name__ = f"{decoder.__name__.removesuffix('Model')}{CAUSAL}"
    return HeadedDecoder


def find_renamings(*classes_and_types: str) -> list[tuple[str, str]]:
    """Return pattern and replacement of names in published files that transformers renames."""
    renamings: list[tuple[str, str]] = []
    for name in dict.fromkeys(classes_and_types):
        for step in get_checkpoint_conversion_mapping(name) or ():
            if type(step) is WeightRenaming:
                renamings += zip(step.source_patterns, step.target_patterns, strict=True)
    return renamings
