"""The model types that tunesmith takes, and what their layers are made of.

    find_family(model_type) -> Family | None
    find_layer_mixers(config, family) -> ("delta", "delta", "delta", "attention", ...)

The table has what must be known of a type before transformers is loaded, or that its classes do not
say; others are derived from its classes (transformers_families.py). A layer whose token mixer is
not in `READY` is refused: packed documents would leak through one that carries state and does not
start anew at every document. Left out: sizes, which come from config.json and the headers of the
weights (spec.py)."""

from __future__ import annotations

import functools
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
# Attention to chosen keys, which is attention to all of them up to the product of these keys.
SPARSE_WORDS = {
    "indexed_attention": ("index_topk",),
    "minimax_m3_sparse": ("index_topk_blocks", "index_block_size"),
}
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
    "falcon_h1": Family("FalconH1", MAMBA2),
    "gpt2": Family("GPT2", class_suffix="LMHeadModel"),
    "granitemoehybrid": Family("GraniteMoeHybrid", MAMBA2, has_experts=True),
    "internlm3": Family("Llama", written_class="InternLM3ForCausalLM"),
    "iquestcoder": Family("Llama", written_class="IQuestCoderForCausalLM"),
    "lfm2": Family("Lfm2", CONV),
    "lfm2_moe": Family("Lfm2Moe", CONV, has_experts=True),
    "lfm3": Family("Lfm3", CONV),
    "nemotron_h": Family("NemotronH", MAMBA2, has_experts=True),
    "olmo_hybrid": Family("OlmoHybrid", DELTA),
    "qwen3_5_moe_text": Family("Qwen3_5Moe", DELTA, has_experts=True),
    "qwen3_5_text": Family("Qwen3_5", DELTA),
    "qwen3_next": Family("Qwen3Next", DELTA, has_experts=True),
    "sarvam_mla": Family("DeepseekV3", has_experts=True, written_class="SarvamMLAForCausalLM"),
    "deepseek_v32": Family("DeepseekV3", has_experts=True, written_class="DeepseekV32ForCausalLM"),
    "glm_moe_dsa": Family("DeepseekV3", has_experts=True, written_class="GlmMoeDsaForCausalLM"),
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
    **dict.fromkeys(("deepseek_v4", "qwen4_exp", "qwen4_exp_text"), INDEXER_REASON),
    **dict.fromkeys(("nllb_moe", "switch_transformers"), CAPACITY_REASON),
    **dict.fromkeys(("mllama", "mllama_text_model"), "has layers that only images pass through"),
    **dict.fromkeys(("llama4", "llama4_text"), "attends within chunks, which is not supported"),
    "glm4v_moe": "has experts whose adapters PEFT cannot load into the whole model",
    "nemotron": "does not pass on to its attention which documents a pack has",
    "phimoe": "chooses experts by SparseMixer, whose gradient is not computed exactly",
    "jetmoe": "chooses experts inside its attention, which is not supported",
}
# Types -> the type that computes the same: on text, whose three positions are equal, so that the
# rotation is the plain one; with sparse attention, up to the length to which it sees all keys.
EQUAL_TYPES = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text"), "qwen2"),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), "deepseek_v3"),
    **{"qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe"},  # noqa: PIE800
}
IDEFICS_TYPES = ("idefics2", "idefics3", "smolvlm")  # whose text part has another name


@functools.cache
def find_family(model_type: str) -> Family | None:
    """Return the family of a model type, None if transformers has no decoder that could be it."""
    if model_type in TEXT_FAMILIES:
        return TEXT_FAMILIES[model_type]
    if model_type in REFUSED_TYPES:
        return None
    from tunesmith.model.hub.transformers_families import derive_family

    return derive_family(model_type)


def make_multimodal(model_type: str, text_type: str) -> Family:
    """Return the family of a checkpoint with this text part."""
    family = find_family(text_type)
    assert family is not None, text_type
    prefix = "model.text_model." if model_type in IDEFICS_TYPES else TEXT_PREFIX
    return replace(family, is_uniform=False, tensor_prefix=prefix, text_type=text_type)


FAMILY_FIX = "choose another model: docs/reference/models.md says which are supported"


def find_text_type(config: Mapping[str, Any]) -> str:
    """Return the model type of what is trained: that of the config, or of its text part."""
    model_type = str(config.get("model_type"))
    family = find_family(model_type)
    if family is None or not family.tensor_prefix:
        return EQUAL_TYPES.get(model_type, model_type)
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
    family = find_family(str(config.get("model_type")))
    return family.tensor_prefix if family else ""


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
