"""Switches that a config writes as a text mean what the other tool reads, or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer_configs import write_config
from tunesmith.core.errors import InputError
from tunesmith.recipe.importers.convert import Translation, list_switches, translate

CONFIGS: dict[str, dict[str, Any]] = {
    "Axolotl": {
        "base_model": "org/base",
        "adapter": "lora",
        "datasets": [{"path": "rows.jsonl", "type": "chat_template"}],
    },
    "TRL": {"model_name_or_path": "org/base", "dataset_name": "rows.jsonl", "use_peft": True},
    "LLaMA-Factory": {"model_name_or_path": "org/base", "dataset": "rows", "cutoff_len": 64},
}
TEXTS = {
    True: ("true", "True", "yes", "1"),
    False: ("false", "FALSE", "no", "off", "0"),
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def translate_config(tool: str, key: str, value: object) -> Translation:
    text = yaml.safe_dump(CONFIGS[tool] | {key: value})
    translation = translate(write_config(Path.cwd(), text), Path.cwd() / "recipe.yaml")
    assert translation.tool == tool
    return translation


def describe(tool: str, key: str, value: object) -> tuple[Any, ...] | str:
    try:
        translation = translate_config(tool, key, value)
    except InputError as error:
        return error.message
    return translation.values, translation.untranslated


@pytest.mark.parametrize("is_on", [True, False])
@pytest.mark.parametrize("tool", ["Axolotl", "TRL"])
def test_a_quoted_switch_is_what_the_tool_reads(tool: str, is_on: bool) -> None:
    for index, key in enumerate(list_switches(tool)):
        plain = describe(tool, key, is_on)
        texts = [text for text in TEXTS[is_on] if (tool, text) != ("TRL", "off")]
        for value in (texts[index % len(texts)], int(is_on)):
            assert describe(tool, key, value) == plain, (key, value)


def test_prompts_are_not_trained_for_the_text_false() -> None:
    assert "train_on" not in translate_config("Axolotl", "train_on_inputs", "false").values
    assert translate_config("Axolotl", "train_on_inputs", "true").values["train_on"] == "all"
    assert translate_config("TRL", "use_peft", "false").values["method"] == "full"
    assert translate_config("TRL", "completion_only_loss", "false").values["train_on"] == "all"


@pytest.mark.parametrize(
    ("tool", "key", "value"),
    [
        *(("LLaMA-Factory", key, "false") for key in list_switches("LLaMA-Factory")),
        ("LLaMA-Factory", "train_on_prompt", "true"),
        ("TRL", "use_peft", "off"),
        ("TRL", "use_peft", "auto"),
        ("TRL", "bf16", "auto"),
        ("LLaMA-Factory", "bf16", "auto"),
        ("Axolotl", "fp16", "full"),
        ("Axolotl", "train_on_inputs", "perhaps"),
        ("Axolotl", "train_on_inputs", 2),
        ("Axolotl", "train_on_inputs", [True]),
    ],
)
def test_what_the_tool_reads_as_no_switch_is_refused(tool: str, key: str, value: object) -> None:
    with pytest.raises(InputError, match=f"{key}: expected true or false, found") as caught:
        translate_config(tool, key, value)
    assert "config.yml:" in caught.value.where
    assert "write true or false" in caught.value.fix
    has_quotes = "without quotes: to LLaMA-Factory, any text is true" in caught.value.fix
    assert has_quotes == (tool == "LLaMA-Factory")


def test_bf16_of_axolotl_may_be_auto_or_full() -> None:
    assert "dtype" not in translate_config("Axolotl", "bf16", "auto").values
    assert describe("Axolotl", "bf16", "full") == describe("Axolotl", "bf16", True)
