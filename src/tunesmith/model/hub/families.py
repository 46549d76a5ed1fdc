"""The model types that tunesmith takes, and what their layers are made of.

    FAMILIES[model_type] -> Family
    find_layer_mixers(config, family) -> ("delta", "delta", "delta", "attention", ...)

A type that is not in the table is refused by name, and so is a layer whose token mixer is not in
`READY`: packed documents would leak through a layer that carries state and does not start anew at
every document. The table names classes of transformers and loads none of them. Left out: sizes,
which come from config.json and the headers of the weights (spec.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.core.errors import InputError

ATTENTION = "attention"
PARALLEL = "attention+mamba2"  # both in one layer, on the same input
EXPERTS = "experts"
NO_MIXER = ""  # of a layer that is only an MLP or only experts
# what the code of this version trains: token mixers, and EXPERTS
READY = frozenset({ATTENTION, "delta", "mamba2", "conv", EXPERTS})

# Words of `layer_types`. Which mixer the recurrent ones mean depends on the family.
ATTENTION_WORDS = {"full_attention", "sliding_attention", "attention"}
RECURRENT_WORDS = {"linear_attention", "mamba"}
NO_MIXER_WORDS = {"mlp", "moe"}
EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN_KEYS = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk")

# of the names of the text part's tensors on the full model, as transformers builds it
TEXT_PREFIX = "model.language_model."


@dataclass(frozen=True)
class Family:
    """A kind of model.

    `text_class` is the prefix of transformers' class names. `mixers` are the token mixers that its
    layers may have. `is_uniform`: all layers are alike, and the sizes in config.json say all of
    their shapes, so that nothing of transformers is needed to read them. A multimodal checkpoint
    has its text part below `tensor_prefix`; `text_type` is the model type of this part.
    `class_suffix` ends the name of the class with a head; `written_class` is what config.json may
    call it instead, where transformers builds the class of another type."""

    text_class: str
    mixers: frozenset[str] = frozenset({ATTENTION})
    has_experts: bool = False  # can have; its config says how many
    is_uniform: bool = False
    tensor_prefix: str = ""
    text_type: str = ""
    class_suffix: str = "ForCausalLM"
    written_class: str = ""

    @property
    def causal_class(self) -> str:
        return f"{self.text_class}{self.class_suffix}"


# fmt: off
# Dense text decoders with softmax attention.
UNIFORM_CLASSES = {
    "apertus": "Apertus", "arcee": "Arcee", "bitnet": "BitNet", "cohere": "Cohere",
    "cohere2": "Cohere2", "cwm": "Cwm", "ernie4_5": "Ernie4_5", "exaone4": "Exaone4",
    "gemma": "Gemma", "gemma2": "Gemma2", "gemma3_text": "Gemma3", "glm": "Glm", "glm4": "Glm4",
    "granite": "Granite", "helium": "Helium", "hunyuan_v1_dense": "HunYuanDenseV1",
    "llama": "Llama", "ministral": "Ministral", "ministral3": "Ministral3", "mistral": "Mistral",
    "olmo": "Olmo", "olmo2": "Olmo2", "olmo3": "Olmo3", "phi3": "Phi3", "qwen2": "Qwen2",
    "qwen3": "Qwen3", "seed_oss": "SeedOss", "smollm3": "SmolLM3", "vaultgemma": "VaultGemma",
}
# fmt: on
DELTA = frozenset({ATTENTION, "delta"})
MAMBA2 = frozenset({ATTENTION, "mamba2"})
CONV = frozenset({ATTENTION, "conv"})
TEXT_FAMILIES = {
    **{name: Family(text_class, is_uniform=True) for name, text_class in UNIFORM_CLASSES.items()},
    "afmoe": Family("Afmoe", has_experts=True),
    "cohere2_moe": Family("Cohere2Moe", has_experts=True),
    "deepseek_v2": Family("DeepseekV2", has_experts=True),
    "deepseek_v3": Family("DeepseekV3", has_experts=True),
    "dots1": Family("Dots1", has_experts=True),
    "ernie4_5_moe": Family("Ernie4_5_Moe", has_experts=True),
    "falcon_h1": Family("FalconH1", MAMBA2),
    "flex_olmo": Family("FlexOlmo", has_experts=True),
    "gemma4_text": Family("Gemma4", has_experts=True),
    "gemma4_unified_text": Family("Gemma4Unified"),
    "glm4_moe": Family("Glm4Moe", has_experts=True),
    "glm4_moe_lite": Family("Glm4MoeLite", has_experts=True),
    "gpt2": Family("GPT2", class_suffix="LMHeadModel"),
    "gpt_neox": Family("GPTNeoX"),
    "gpt_oss": Family("GptOss", has_experts=True),
    "granite_swa": Family("GraniteSWA"),
    "granitemoe": Family("GraniteMoe", has_experts=True),
    "granitemoe_swa": Family("GraniteMoeSWA", has_experts=True),
    "granitemoehybrid": Family("GraniteMoeHybrid", MAMBA2, has_experts=True),
    "granitemoeshared": Family("GraniteMoeShared", has_experts=True),
    "hunyuan_v1_moe": Family("HunYuanMoEV1", has_experts=True),
    "hyperclovax": Family("HyperCLOVAX"),
    "internlm3": Family("Llama", written_class="InternLM3ForCausalLM"),
    "iquestcoder": Family("Llama", written_class="IQuestCoderForCausalLM"),
    "jais2": Family("Jais2"),
    "lfm2": Family("Lfm2", CONV),
    "lfm2_moe": Family("Lfm2Moe", CONV, has_experts=True),
    "lfm3": Family("Lfm3", CONV),
    "mellum": Family("Mellum", has_experts=True),
    "minicpm3": Family("MiniCPM3"),
    "minimax_m2": Family("MiniMaxM2", has_experts=True),
    "mixtral": Family("Mixtral", has_experts=True),
    "nanochat": Family("NanoChat"),
    "nemotron_h": Family("NemotronH", MAMBA2, has_experts=True),
    "olmo_hybrid": Family("OlmoHybrid", DELTA),
    "olmoe": Family("Olmoe", has_experts=True),
    "persimmon": Family("Persimmon"),
    "phi": Family("Phi"),
    "qwen2_moe": Family("Qwen2Moe", has_experts=True),
    "qwen3_5_moe_text": Family("Qwen3_5Moe", DELTA, has_experts=True),
    "qwen3_5_text": Family("Qwen3_5", DELTA),
    "qwen3_moe": Family("Qwen3Moe", has_experts=True),
    "qwen3_next": Family("Qwen3Next", DELTA, has_experts=True),
    "sarvam_mla": Family("DeepseekV3", has_experts=True, written_class="SarvamMLAForCausalLM"),
    "solar_open": Family("SolarOpen", has_experts=True),
    "starcoder2": Family("Starcoder2"),
}
# Types that are refused for a reason of their own, which follows their name in the message.
STATE_REASON = (
    "has layers that carry state from token to token: packed documents would leak through them"
)
STATEFUL_TYPES = (
    *("bailing_hybrid", "bamba", "falcon_mamba", "jamba", "kimi_linear", "mamba", "mamba2"),
    *("minimax", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2", "zaya"),
)
INDEXER_REASON = "chooses the keys of its attention by an indexer, which is not computed exactly"
CAPACITY_REASON = (
    "gives its experts a limited capacity: what a token computes would depend on the other "
    "documents of its pack"
)
# of config.json, in any model type
CAPACITY_KEYS = ("expert_capacity", "moe_expert_capacity", "capacity_factor", "expert_choice")
REFUSED_TYPES = {
    **dict.fromkeys(STATEFUL_TYPES, STATE_REASON),
    "deepseek_v32": INDEXER_REASON,
    "deepseek_v4": INDEXER_REASON,
    "glm_moe_dsa": INDEXER_REASON,
    "qwen4_exp": INDEXER_REASON,
    **dict.fromkeys(("nllb_moe", "switch_transformers"), CAPACITY_REASON),
    "jetmoe": "chooses experts inside its attention, which is not supported",
    "llama4": "attends within chunks of the sequence, which is not supported",
    "llama4_text": "attends within chunks of the sequence, which is not supported",
}
# Multimodal checkpoints -> the model type of their text part where text_config does not say it.
TEXT_TYPES = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "mistral3": "mistral",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_vl_moe": "qwen3_vl_moe_text",
}
# Text parts that transformers has no causal class for -> the type that computes the same on text:
# the three positions of a text token are equal, so its rotation is the plain one.
EQUAL_TYPES = {"qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe"}


def _make_multimodal(text_type: str) -> Family:
    text_type = EQUAL_TYPES.get(text_type, text_type)
    family = TEXT_FAMILIES[text_type]
    return replace(family, is_uniform=False, tensor_prefix=TEXT_PREFIX, text_type=text_type)


FAMILIES: dict[str, Family] = {
    **TEXT_FAMILIES,
    **{name: _make_multimodal(text_type) for name, text_type in TEXT_TYPES.items()},
}
FAMILY_FIX = f"choose a model of a supported type: {', '.join(FAMILIES)}"


def find_text_type(config: Mapping[str, Any]) -> str:
    """Return the model type of what is trained: that of the config, or of its text part."""
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(model_type)
    if family is None or not family.tensor_prefix:
        return model_type
    text = config.get("text_config")
    named = text.get("model_type") if isinstance(text, dict) else None
    text_type = str(named or family.text_type)
    return EQUAL_TYPES.get(text_type, text_type)


def get_text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the values of the text part, none if they are no mapping."""
    text = config.get("text_config") if get_tensor_prefix(config) else config
    return text if isinstance(text, Mapping) else {}


def get_tensor_prefix(config: Mapping[str, Any]) -> str:
    """Return what stands before the text part's names on the whole model, empty for a text
    model."""
    model_type = config.get("model_type")
    return FAMILIES[model_type].tensor_prefix if model_type in FAMILIES else ""


def find_layer_mixers(config: Mapping[str, Any], family: Family, where: str) -> tuple[str, ...]:
    """Return the token mixer of each layer: attention, delta, mamba2, conv, `PARALLEL` or
    `NO_MIXER`. Raise InputError for layers that no mixer of this family knows, or that `READY`
    lacks."""
    layers = config.get("layer_types") or [ATTENTION] * config["num_hidden_layers"]
    words = list(map(str, layers)) if isinstance(layers, list) else [str(layers)]
    meanings = _list_layer_words(family)
    if unknown := sorted(set(words) - meanings.keys()):
        message = (
            f"{config['model_type']} has layers of type {', '.join(unknown)[:200]}: "
            "packed documents would leak through them"
        )
        raise InputError(message, where=where, fix=FAMILY_FIX)
    if len(words) != config["num_hidden_layers"]:
        message = f"{config['num_hidden_layers']} layers, but {len(words)} layer_types"
        raise InputError(message, where=where, fix="download config.json again")
    return tuple(meanings[word] for word in words)


def _list_layer_words(family: Family) -> dict[str, str]:
    """Return word of `layer_types` -> mixer, of those that a family can have."""
    meanings = dict.fromkeys(ATTENTION_WORDS, ATTENTION)
    meanings |= dict.fromkeys(NO_MIXER_WORDS, NO_MIXER)
    for mixer in family.mixers & READY - {ATTENTION}:
        words = {mixer} if mixer == "conv" else RECURRENT_WORDS
        meanings |= dict.fromkeys(words, mixer)
    if "mamba2" in family.mixers & READY:
        meanings["hybrid"] = PARALLEL
    return meanings


def count_experts(config: Mapping[str, Any]) -> int:
    """Return how many routed experts a layer has, 0 for a dense model."""
    if config.get("enable_moe_block") is False:
        return 0
    counts = [config[key] for key in EXPERT_KEYS if isinstance(config.get(key), int)]
    return max(counts[0], 0) if counts else 0


def count_experts_per_token(config: Mapping[str, Any]) -> int:
    """Return how many of the routed experts compute a token, the most of any layer."""
    for key in EXPERTS_PER_TOKEN_KEYS:
        value: Any = config.get(key)
        if isinstance(value, list):  # one for each layer
            value = max((count for count in value if isinstance(count, int)), default=None)
        if isinstance(value, int):
            return value
    return 0
