"""Switches in the configs of other tools, written as a text: `train_on_inputs: "false"`.

Each tool reads them in its own way. Axolotl's pydantic and TRL's argparse turn a text into true or
false; LLaMA-Factory turns none, so that any text, "false" too, is true there: it is refused, since
whoever wrote it did not mean that. In: the config as YAML has it. Out: the same with true and false
in place of texts, 1 and 0. Left out: switches that nothing here follows from (unsupported.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.recipe.yaml_lines import YamlMapping

_SHARED_KEYS = (
    "use_rslora use_dora full_determinism load_in_4bit load_in_8bit bf16 fp16 bfloat16 float16 "
    "pure_bf16 float32 double_quantization use_bnb_nested_quant bnb_4bit_use_double_quant"
)
_TOOL_KEYS = {
    "LLaMA-Factory": "train_on_prompt",
    "Axolotl": (
        "train_on_inputs lora_target_linear peft_use_rslora peft_use_dora reward_model "
        "process_reward_model"
    ),
    "TRL": "use_peft assistant_only_loss completion_only_loss",
}
SWITCHES = {tool: f"{_SHARED_KEYS} {keys}".split() for tool, keys in _TOOL_KEYS.items()}
# What `bf16` may be besides: Axolotl's `full` trains as true does, and also evaluates in bf16.
PRECISIONS: dict[str, dict[str, Any]] = {"Axolotl": {"auto": "auto", "full": True}}
_ARGPARSE_TEXTS: dict[str, bool] = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}
TEXTS: dict[str, dict[str, bool]] = {
    "LLaMA-Factory": {},
    "Axolotl": {**_ARGPARSE_TEXTS, "on": True, "off": False},
    "TRL": _ARGPARSE_TEXTS,
}


def read_switches(document: YamlMapping, tool: str) -> YamlMapping:
    """Return a config with its switches as true and false. Raises InputError for a value that the
    tool does not read as a switch."""
    values = dict(document.values)
    for key in SWITCHES[tool]:
        value = values.get(key)
        names = PRECISIONS.get(tool, {}) if key == "bf16" else {}
        if isinstance(value, str) and value in names:
            values[key] = names[value]
        elif value not in (None, ""):
            values[key] = _parse_switch(document, key, value, tool)
    return replace(document, values=values)


def _parse_switch(document: YamlMapping, key: str, value: Any, tool: str) -> bool:
    is_text = isinstance(value, str)
    if is_text and value.lower() in TEXTS[tool]:
        return TEXTS[tool][value.lower()]
    if isinstance(value, (bool, int)) and value in (False, True):
        return bool(value)
    fix = "write true or false"
    if is_text and not TEXTS[tool]:
        fix += f", without quotes: to {tool}, any text is true"
    message = f"{key}: expected true or false, found {value!r:.60}"
    raise InputError(message, where=document.format_location((key,)), fix=fix)
