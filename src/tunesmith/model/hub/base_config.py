"""The keys of config.json that decide what a model computes, and how two of them differ.

    list_config_changes(stored, current) -> ["rope_theta: 10000.0 -> 500000.0", ...]
    encode_special_floats(config) -> Json    the config without NaN and infinities

A config can be written in several ways: with or without defaults, and with the keys of older
versions of transformers. Two configs are therefore compared as transformers reads them, unless they
are equal as they are.
"""

from __future__ import annotations

import json
import math
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from tunesmith.core.errors import InputError
from tunesmith.core.json_io import iter_leaves
from tunesmith.core.types import Json

# Names, output options, training, and tokens that the renderer's fingerprint covers.
IGNORED_KEYS = {
    *("_name_or_path", "architectures", "auto_map", "transformers_version", "dtype", "torch_dtype"),
    *("use_cache", "return_dict", "output_hidden_states", "output_attentions", "problem_type"),
    *("id2label", "label2id", "initializer_range", "_attn_implementation"),
    *("gradient_checkpointing", "bos_token_id", "eos_token_id", "pad_token_id"),
}
DROPOUT_PARTS = ("dropout", "pdrop")  # of attention_dropout, resid_pdrop: off outside of training
ABSENT = "none"
FLOAT_TAG = "__float__"


def select_forward_keys(config: Json) -> Json:
    """Return a config, and the configs in it, without the keys that do not change the forward."""
    selected: Json = {}
    for key, value in config.items():
        if key in IGNORED_KEYS or any(part in key for part in DROPOUT_PARTS):
            continue
        is_nested = isinstance(value, dict)
        selected[key] = (
            select_forward_keys(cast("Json", value)) if is_nested else encode_special_floats(value)
        )
    return selected


def encode_special_floats(value: Any) -> Any:
    """Return a value of a config with NaN and infinities as objects, the form in which transformers
    writes and reads them: JSON has no such numbers, but `time_step_limit` of Mamba ends at one."""
    if isinstance(value, float) and not math.isfinite(value):
        return {FLOAT_TAG: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        items = cast("Json", value).items()
        return {key: encode_special_floats(inner) for key, inner in items}
    if isinstance(value, list):
        return [encode_special_floats(inner) for inner in cast("list[Any]", value)]
    return value


def list_config_changes(stored: Json, current: Json) -> list[str]:
    """Return each key with another value, as `key: stored -> current`."""
    if stored == current:
        return []
    configs = [stored, current]
    with suppress(InputError):  # transformers cannot read both: they are compared as written
        configs = [_fill_defaults(config) for config in configs]
    leaves = [dict(iter_leaves(select_forward_keys(config))) for config in configs]
    stored_leaves = leaves[0]
    current_leaves = leaves[1]
    changes: list[str] = []
    for key in stored_leaves | current_leaves:
        before = stored_leaves.get(key)
        after = current_leaves.get(key)
        if before != after:
            changes.append(f"{key}: {_format_value(before)} -> {_format_value(after)}")
    return changes


def _fill_defaults(config: Json) -> Json:
    """Return a config as transformers reads it. Raises InputError if it cannot."""
    from tunesmith.model.reference_load import load_config_dict

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return load_config_dict(Path(folder))


def _format_value(value: Any) -> str:
    return ABSENT if value is None else f"{value!s:.60}"
