"""Values of config.json that transformers takes, and that no model can be computed with.

    check_config_values(config, where)     InputError names the key and what to do
    check_rotation(text, ..., where)       the same for the rotation

transformers divides by a cap of 0, lets a window of 0 tokens see everything, and builds no layers
for counts below 0. Left out: sizes that a model must have (spec.py), and what only a forward shows
(`forward_errors` in causal_lm.py)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.model.hub.families import get_text_config

# keys of sizes and counts, whatever the family calls them
SIZE_KEY = re.compile(
    r"(num|n)_\w+|\w+_(size|dim|rank|heads|layers|groups|state|conv|kernel|head|input|ssm)"
    r"|(moe|top)_(k|topk|k_experts)|first_k_dense_replace|topk_group|mamba_expand"
)
CAP_KEYS = ("final_logit_softcapping", "attn_logit_softcapping")
# types whose rotations rotary.py cannot choose for each document: one of complex numbers, and
# several modules, one for each base
FIXED_ROTATION_TYPES = ("deepseek_v2", "granite_swa", "granitemoe_swa")
ROTATION_KEYS = ("rope_parameters", "rope_scaling")
# transformers' names, and an older one that it reads for one type of model
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")
OLDER_ROPE_TYPES = {"phi3": ("su",)}
CONFIG_FIX = "download config.json again"
WINDOW_FIX = "set a window, or write full_attention into layer_types"


def check_config_values(config: Mapping[str, Any], where: str) -> None:
    """Raise InputError for a value that no model can have."""
    text = get_text_config(config)
    for key, value in text.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and value < 0 and SIZE_KEY.fullmatch(key):
            message = f"{key} is {value}, less than 0"
            raise InputError(message, where=where, fix=f"correct {key}, or {CONFIG_FIX}")
    for key in CAP_KEYS:
        if text.get(key) == 0:
            message = f"{key} is {text[key]}: nothing is left of what it caps"
            raise InputError(message, where=where, fix="null means no cap")
    _check_window(text, where)


def _check_window(text: Mapping[str, Any], where: str) -> None:
    """Raise InputError for a window of no tokens, and for layers of sliding_attention without one.
    transformers fails on most, and others then attend to all tokens alike, later ones too."""
    window = text.get("sliding_window", 1)
    is_off = text.get("use_sliding_window") is False
    if type(window) is int and window < 1 and not is_off:
        message = f"sliding_window is {window}: no token would see another"
        raise InputError(message, where=where, fix="null means no window")
    words = text.get("layer_types")
    if isinstance(words, list) and "sliding_attention" in words and (window is None or is_off):
        reason = "use_sliding_window is off" if is_off else "sliding_window is null"
        message = f"layer_types has sliding_attention, but {reason}"
        raise InputError(message, where=where, fix=WINDOW_FIX)


def check_rotation(text: Mapping[str, Any], text_type: str, where: str) -> None:
    """Raise InputError for a rotation that transformers does not know, and for one that cannot be
    chosen for each document."""
    rotations = [text[key] for key in ROTATION_KEYS if isinstance(text.get(key), Mapping)]
    for rotation in list(rotations):  # a part for each kind of layers
        rotations += [part for part in rotation.values() if isinstance(part, Mapping)]
    valid_types = (*ROPE_TYPES, *OLDER_ROPE_TYPES.get(text_type, ()))
    for rotation in rotations:
        rope_type = str(rotation.get("rope_type") or rotation.get("type") or "default")
        if rope_type not in valid_types:
            message = f"rope_type {rope_type!r:.60} is unknown"
            fix = f"correct it (known: {', '.join(valid_types)}), or {CONFIG_FIX}"
            raise InputError(message, where=where, fix=fix)
        if text_type in FIXED_ROTATION_TYPES and rope_type in ("dynamic", "longrope"):
            message = f"{text_type} with a rotation that depends on the length is not supported"
            fix = "set another rope_type, or use another model"
            raise InputError(message, where=where, fix=fix)
