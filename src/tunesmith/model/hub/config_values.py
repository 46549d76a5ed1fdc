"""Values of config.json that no model can be computed with, or only as no maker meant it.

    check_config_values(config, where)     InputError names the key and what to do
    check_rotation(text, ..., where)       the same of the size of heads, once it is known

transformers takes most of them: it builds layers of no values, divides by a cap of 0, lets a window
of 0 tokens see everything, and rotates heads of one value into heads of two. Left out: sizes that a
model must have (spec.py), and what only a forward shows (`forward_errors` in causal_lm.py)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.model.hub.families import find_text_type, get_text_config

# types with windows in the layers that layer_types calls sliding_attention, with one in all layers,
# and with one only if use_sliding_window is set
LAYER_WINDOW_TYPES = (
    *("afmoe", "cohere2", "cohere2_moe", "cwm", "dots1", "exaone4", "gemma2", "gemma3_text"),
    *("gemma4_text", "gemma4_unified_text", "gpt_oss", "granite_swa", "granitemoe_swa", "lfm3"),
    *("mellum", "ministral", "mistral", "olmo3", "vaultgemma"),
)
GLOBAL_WINDOW_TYPES = ("ministral3", "mixtral", "phi3", "starcoder2")
SWITCHED_WINDOW_TYPES = ("qwen2", "qwen2_moe", "qwen3", "smollm3")
UNMASKED_WINDOW_TYPE = "olmoe"  # its masks have no window, its flash attention has
# types that cap logits, and scores of attention
CAPPED_HEAD_TYPES = (
    *("gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text", "nanochat", "vaultgemma"),
)
CAPS = {
    "final_logit_softcapping": CAPPED_HEAD_TYPES,
    "attn_logit_softcapping": ("gemma2", "vaultgemma"),
}
# keys of sizes and counts, whatever the family calls them
SIZE_KEY = re.compile(
    r"(num|n)_\w+|\w+_(size|dim|rank|heads|layers|groups|state|conv|kernel|head|input|ssm)"
    r"|(moe|top)_(k|topk|k_experts)|first_k_dense_replace|topk_group|mamba_expand"
)
UNROTATED_TYPES = ("gpt2", "nemotron_h")
# types whose rotations rotary.py cannot choose for each document: one of complex numbers, and
# several modules, one for each base
FIXED_ROTATION_TYPES = ("deepseek_v2", "granite_swa", "granitemoe_swa")
# types whose kinds of layers may have a rotation each; the others rotate all layers alike, two of
# them with a base for each layer
NESTED_ROTATION_TYPES = (
    *("gemma3_text", "gemma4_text", "gemma4_unified_text", "lfm3", "mellum", "olmo3"),
)
LAYER_BASE_TYPES = ("granite_swa", "granitemoe_swa")
ROTATION_KEYS = ("rope_parameters", "rope_scaling")
# transformers' names, and an older one that it reads for one type of model
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
OLDER_ROPE_TYPES = {"phi3": ("su",)}
CONFIG_FIX = "download config.json again"


def check_config_values(config: Mapping[str, Any], where: str) -> None:
    """Raise InputError for a value that no model of this type can have."""
    _check_counts(config, where)
    _check_window(config, where)
    _check_caps(config, where)
    _check_nested_rotation(config, where)


def _check_counts(config: Mapping[str, Any], where: str) -> None:
    """Raise InputError for less than nothing of what a model has."""
    for key, value in get_text_config(config).items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and value < 0 and SIZE_KEY.fullmatch(key):
            message = f"{key} is {value}, less than 0"
            raise InputError(message, where=where, fix=f"correct {key}, or {CONFIG_FIX}")


def _check_window(config: Mapping[str, Any], where: str) -> None:
    """Raise InputError for a window of no tokens in a type that applies windows: transformers then
    attends to all tokens alike, later ones too."""
    _check_window_layers(config, where)
    text = get_text_config(config)
    text_type = find_text_type(config)
    window = text.get("sliding_window")
    if text_type == UNMASKED_WINDOW_TYPE and window is not None:
        message = (
            f"{text_type} has a sliding_window of {window!r:.80}, which transformers applies with "
            "flash attention only"
        )
        raise InputError(message, where=where, fix="set sliding_window to null")
    words = text.get("layer_types")
    has_window_layers = not isinstance(words, list) or "sliding_attention" in words
    is_used = text_type in GLOBAL_WINDOW_TYPES or text.get("use_sliding_window") is True
    is_used |= text_type in LAYER_WINDOW_TYPES and has_window_layers
    if is_used and type(window) is int and window < 1:
        message = f"sliding_window is {window}: no token would see another"
        can_be_null = text_type in GLOBAL_WINDOW_TYPES
        fix = "null means no window" if can_be_null else f"correct it, or {CONFIG_FIX}"
        raise InputError(message, where=where, fix=fix)


def _check_window_layers(config: Mapping[str, Any], where: str) -> None:
    """Raise InputError for layers of sliding_attention without a window. transformers fails on
    most, gives some a window of no tokens, and others one that depends on the kind of attention."""
    text = get_text_config(config)
    text_type = find_text_type(config)
    words = text.get("layer_types")
    if not isinstance(words, list) or "sliding_attention" not in words:
        return
    is_switched = text_type in SWITCHED_WINDOW_TYPES
    is_null = text.get("sliding_window", 1) is None
    if is_switched and text.get("use_sliding_window") is not True:
        reason = "use_sliding_window is off"
        fix = "set use_sliding_window to true"
    elif is_null and (is_switched or text_type in LAYER_WINDOW_TYPES):
        reason = "sliding_window is null"
        fix = "set sliding_window"
    else:
        return
    message = f"layer_types has sliding_attention, but {reason}"
    raise InputError(message, where=where, fix=f"{fix}, or write full_attention into layer_types")


def _check_caps(config: Mapping[str, Any], where: str) -> None:
    """Raise InputError for a cap of 0, by which transformers divides."""
    text = get_text_config(config)
    for key, types in CAPS.items():
        if find_text_type(config) in types and text.get(key) == 0:
            message = f"{key} is {text[key]}: nothing is left of what it caps"
            raise InputError(message, where=where, fix="null means no cap")


def _check_nested_rotation(config: Mapping[str, Any], where: str) -> None:
    """Raise InputError for a rotation of each kind of layers in a type that has one for all, or one
    for each base: transformers takes the parts for parameters."""
    text_type = find_text_type(config)
    if text_type in NESTED_ROTATION_TYPES:
        return
    for key in ROTATION_KEYS:
        rotation = get_text_config(config).get(key)
        if not isinstance(rotation, Mapping):
            continue
        names = sorted(name for name, part in rotation.items() if isinstance(part, Mapping))
        if names:
            parts = ", ".join(names)[:200]
            message = f"{text_type} rotates all layers alike, but {key} has parts for {parts}"
            fix = f"write the parameters of one rotation into {key}"
            if text_type in LAYER_BASE_TYPES:
                fix += ", and the base of each layer into layer_rope_theta"
            raise InputError(message, where=where, fix=fix)


def check_rotation(text: Mapping[str, Any], text_type: str, head_dim: int, where: str) -> None:
    """Raise InputError for a rotation that transformers does not know, and for heads whose values
    do not come in pairs, which is what a rotation turns.

    transformers takes a head of one value for one of two."""
    rope_types = _list_rope_types(text)
    valid_types = (*ROPE_TYPES, *OLDER_ROPE_TYPES.get(text_type, ()))
    for rope_type in rope_types:
        if rope_type not in valid_types:
            message = f"rope_type {rope_type!r:.60} is unknown"
            fix = f"correct it (known: {', '.join(valid_types)}), or {CONFIG_FIX}"
            raise InputError(message, where=where, fix=fix)
    is_unrotated = text_type in UNROTATED_TYPES or text.get("position_embedding_type") == "nope"
    depends_on_length = not {"dynamic", "longrope"}.isdisjoint(rope_types)
    if text_type in FIXED_ROTATION_TYPES and depends_on_length:
        message = f"{text_type} with a rotation that depends on the length is not supported"
        raise InputError(message, where=where, fix="set another rope_type, or use another model")
    if is_unrotated or _is_partly_rotated(text):
        return
    # of multi-head latent attention a part of each head is rotated
    has_latent_keys = isinstance(text.get("qk_nope_head_dim"), int)
    key = "qk_rope_head_dim" if has_latent_keys else "head_dim"
    size = text.get(key) if has_latent_keys else head_dim
    if isinstance(size, int) and size % 2:
        message = f"{key} is {size}, but a rotation turns pairs of values"
        raise InputError(message, where=where, fix=f"correct {key}, or {CONFIG_FIX}")


def _is_partly_rotated(text: Mapping[str, Any]) -> bool:
    """Return whether only some values of a head are rotated."""
    factors = [part.get("partial_rotary_factor") for part in (text, *_list_rotations(text))]
    return any(isinstance(factor, float) and factor < 1 for factor in factors)


def _list_rope_types(text: Mapping[str, Any]) -> list[str]:
    rotations = _list_rotations(text)
    return [str(part.get("rope_type") or part.get("type") or "default") for part in rotations]


def _list_rotations(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the parameters of the rotation, and those of each type of layers inside them."""
    rotations: list[Mapping[str, Any]] = []
    for rotation in (text.get(key) for key in ROTATION_KEYS):
        if isinstance(rotation, Mapping):
            rotations.append(rotation)
            rotations += [part for part in rotation.values() if isinstance(part, Mapping)]
    return rotations
