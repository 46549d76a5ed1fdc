"""No key of another tool is passed over: set to another value than its default, it changes the
recipe, or a line names it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith.core.errors import InputError
from tunesmith.recipe.importers.convert import TABLE, TOOLS, Translation, translate

Config = dict[str, Any]
TRL: Config = {
    "model_name_or_path": "org/base",
    "dataset_name": "rows.jsonl",
    "use_peft": True,
    "learning_rate": 1e-4,
}
AXOLOTL: Config = {
    "base_model": "org/base",
    "datasets": [{"path": "rows.jsonl", "type": "chat_template"}],
    "adapter": "lora",
    "micro_batch_size": 2,
}
LLAMAFACTORY: Config = {
    "model_name_or_path": "org/base",
    "dataset": "rows.jsonl",
    "finetuning_type": "lora",
    "cutoff_len": 512,
}
# Axolotl and LLaMA-Factory are not installed with the tests: keys that matter, with a value that is
# not their default.
AXOLOTL_KEYS: Config = {
    "train_on_inputs": True,
    "sequence_len": 777,
    "sample_packing": True,
    "num_epochs": 7,
    "gradient_accumulation_steps": 5,
    "lr_scheduler": "inverse_sqrt",
    "optimizer": "adafactor",
    "warmup_ratio": 0.2,
    "warmup_steps": 20,
    "weight_decay": 0.3,
    "max_grad_norm": 0.5,
    "neftune_noise_alpha": 5,
    "noisy_embedding_alpha": 5,
    "label_smoothing_factor": 0.1,
    "lora_dropout": 0.2,
    "lora_r": 77,
    "lora_alpha": 7,
    "lora_target_linear": True,
    "peft_use_dora": True,
    "peft_use_rslora": True,
    "lora_modules_to_save": ["lm_head"],
    "loraplus_lr_ratio": 16,
    "relora_steps": 5,
    "seed": 7,
    "bf16": False,
    "fp16": True,
    "load_in_8bit": True,
    "load_in_4bit": True,
    "early_stopping_patience": 3,
    "loss_watchdog_threshold": 5.0,
    "save_strategy": "no",
    "eval_strategy": "steps",
    "saves_per_epoch": 2,
    "cosine_min_lr_ratio": 0.1,
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "adam_beta2": 0.95,
    "shuffle_merged_datasets": False,
    "dataset_exact_deduplication": True,
    "excess_length_strategy": "truncate",
    "special_tokens": {"bos_token": "<x>"},
    "chat_template": "chatml",
    "report_to": "wandb",
    "group_by_length": True,
    "gradient_checkpointing": True,
    "rl": "dpo",
    "deepspeed": "zero2.json",
}
LLAMAFACTORY_KEYS: Config = {
    "train_on_prompt": True,
    "mask_history": True,
    "max_samples": 500,
    "cutoff_len": 777,
    "packing": True,
    "neat_packing": True,
    "num_train_epochs": 7,
    "per_device_train_batch_size": 3,
    "lr_scheduler_type": "warmup_stable_decay",
    "warmup_ratio": 0.2,
    "warmup_steps": 20,
    "learning_rate": 3e-4,
    "max_grad_norm": 0.5,
    "optim": "adamw_torch",
    "neftune_noise_alpha": 5,
    "label_smoothing_factor": 0.1,
    "lora_rank": 77,
    "lora_alpha": 7,
    "lora_dropout": 0.2,
    "lora_target": "q_proj",
    "use_dora": True,
    "use_rslora": True,
    "loraplus_lr_ratio": 16,
    "pissa_init": True,
    "additional_target": "lm_head",
    "quantization_bit": 4,
    "double_quantization": False,
    "template": "qwen",
    "seed": 7,
    "bf16": True,
    "fp16": True,
    "pure_bf16": True,
    "save_strategy": "no",
    "eval_strategy": "steps",
    "val_size": 0.2,
    "report_to": "wandb",
    "early_stopping_steps": 3,
    "use_cache": False,
    "low_cpu_mem_usage": False,
    "stage": "kto",
    "pref_beta": 0.3,
    "kto_chosen_weight": 2.0,
    "dpo_label_smoothing": 0.1,
    "flash_attn": "fa2",
    "rope_scaling": "linear",
    "freeze_trainable_layers": 3,
}
LOSS_KEYS: Config = {
    "rl_beta": 0.7,
    "orpo_alpha": 0.7,
    "rpo_alpha": 0.7,
    "cpo_alpha": 0.7,
    "simpo_gamma": 0.7,
    "pref_beta": 0.7,
    "pref_ftx": 0.7,
    "kto_desirable_weight": 2.0,
    "kto_undesirable_weight": 2.0,
    "kto_chosen_weight": 2.0,
    "kto_rejected_weight": 2.0,
    "dpo_label_smoothing": 0.1,
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")


def translate_config(config: Config) -> Translation:
    file = Path.cwd() / "config.yml"
    file.write_text(yaml.safe_dump(config))
    return translate(file, Path.cwd() / "recipe.yaml")


def is_silent(config: Config, key: str, value: Any) -> bool:
    """Return whether a changed key changes no value of the recipe and is in no line."""
    base = translate_config({name: old for name, old in config.items() if name != key} | config)
    try:
        changed = translate_config(config | {key: value})
    except InputError:
        return False
    is_named = any(key in entry.key for entry in changed.untranslated)
    return changed.values == base.values and not is_named


def change_value(default: Any) -> Any:
    """Return another value than a default of TRL."""
    if isinstance(default, bool):
        return not default
    if isinstance(default, (int, float)) and default:
        return 0 if default > 0 else 9
    return {None: 9, 0: 9}.get(default, "other") if not isinstance(default, list) else ["other"]


def list_trl_fields() -> dict[str, Any]:
    from trl import ModelConfig, ScriptArguments, SFTConfig

    defaults: dict[str, Any] = {}
    for config_class in (ScriptArguments, SFTConfig, ModelConfig):
        for field in dataclasses.fields(config_class):
            defaults[field.name] = field.default
            if field.default_factory is not dataclasses.MISSING:
                defaults[field.name] = field.default_factory()
    return defaults


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_key_of_trl_is_silent() -> None:
    fields = list_trl_fields()
    silent = []
    for key, default in (fields | {"use_peft": True}).items():
        # an empty value turns off what is on by default
        values = [change_value(default), None] if default else [change_value(default)]
        silent += [(key, default, value) for value in values if is_silent(TRL, key, value)]
    assert silent == []
    on = {key for key, default in fields.items() if default and key not in TRL}
    assert on - {"learning_rate"} <= set(
        f"{TABLE['on_by_default']} {TOOLS['TRL']['on_by_default']}".split()
    )


@pytest.mark.parametrize(
    ("config", "keys"), [(AXOLOTL, AXOLOTL_KEYS), (LLAMAFACTORY, LLAMAFACTORY_KEYS)]
)
def test_no_key_is_silent(config: Config, keys: Config) -> None:
    assert [key for key, value in keys.items() if is_silent(config, key, value)] == []


@pytest.mark.parametrize("loss", ["dpo", "orpo", "simpo", "kto"])
def test_no_key_of_a_preference_loss_is_silent(loss: str) -> None:
    stage = {"stage": "kto"} if loss == "kto" else {"stage": "dpo", "pref_loss": loss}
    for config in (AXOLOTL | {"rl": loss}, LLAMAFACTORY | stage):
        assert [key for key, value in LOSS_KEYS.items() if is_silent(config, key, value)] == []


@pytest.mark.parametrize(
    ("config", "tool"), [(TRL, "TRL"), (AXOLOTL, "Axolotl"), (LLAMAFACTORY, "LLaMA-Factory")]
)
def test_defaults_that_a_config_leaves_out_are_said(config: Config, tool: str) -> None:
    translation = translate_config(config)
    lines = {entry.key for entry in translation.untranslated}
    for key, text in TOOLS[tool]["defaults"].items():
        assert (text in lines) == (key not in translation.values), key


# ---------------------------------------------------------------- what is trained


@pytest.mark.parametrize(
    ("config", "keys", "expected"),
    [
        (TRL, {"completion_only_loss": False}, "all"),
        (TRL, {"assistant_only_loss": False}, "all"),
        (TRL, {"assistant_only_loss": True}, "answers"),
        (TRL, {"assistant_only_loss": True, "completion_only_loss": False}, "answers"),
        (TRL, {"completion_only_loss": True}, "answers"),
        (AXOLOTL, {"train_on_inputs": True}, "all"),
        (LLAMAFACTORY, {"train_on_prompt": True}, "all"),
    ],
)
def test_trained_text(config: Config, keys: Config, expected: str) -> None:
    assert translate_config(config | keys).values["train_on"] == expected


def test_roles_of_axolotl() -> None:
    datasets = [{"path": "rows.jsonl", "type": "chat_template", "roles_to_train": ["gpt", "human"]}]
    translation = translate_config(AXOLOTL | {"datasets": datasets})
    (entry,) = [entry for entry in translation.untranslated if "roles_to_train" in entry.key]
    assert "set train_on" in entry.reason


@pytest.mark.parametrize(
    ("keys", "loss"),
    [
        ({"rl": "dpo", "rl_beta": 0.05}, {"beta": 0.05, "nll_coefficient": 0.0}),
        ({"rl": "dpo", "rpo_alpha": 0.5, "cpo_alpha": 0.3}, {"nll_coefficient": 0.5}),
        ({"rl": "dpo", "orpo_alpha": 0.3}, {"beta": 0.3, "nll_coefficient": 0.0}),
        ({"rl": "simpo"}, {"nll_coefficient": 1.0}),
        ({"rl": "simpo", "cpo_alpha": 0.5, "rpo_alpha": 0.3}, {"nll_coefficient": 0.5}),
        ({"rl": "simpo", "cpo_alpha": 0}, {"nll_coefficient": 0}),
        ({"rl": "orpo", "rl_beta": 0.3, "orpo_alpha": 0.2, "rpo_alpha": 0.5}, {"beta": 0.3}),
    ],
)
def test_coefficients_of_axolotl(keys: Config, loss: Config) -> None:
    assert translate_config(AXOLOTL | keys).values["loss"] == {"name": keys["rl"], **loss}


@pytest.mark.parametrize(
    ("keys", "loss"),
    [
        ({}, {"name": "dpo", "nll_coefficient": 0.0}),
        ({"pref_loss": "simpo", "pref_ftx": 0.5}, {"name": "simpo", "nll_coefficient": 0.5}),
        ({"pref_loss": "orpo"}, "orpo"),
        ({"pref_loss": "orpo", "pref_ftx": 0.5}, {"name": "orpo", "nll_coefficient": 1.5}),
        ({"stage": "kto", "pref_ftx": 0.5}, "kto"),
    ],
)
def test_coefficients_of_llamafactory(keys: Config, loss: object) -> None:
    assert translate_config(LLAMAFACTORY | {"stage": "dpo"} | keys).values["loss"] == loss


def test_what_a_coefficient_covers_is_said() -> None:
    translation = translate_config(AXOLOTL | {"rl": "orpo"})
    assert any("covers the prompt, too" in entry.reason for entry in translation.untranslated)
    keys = {"stage": "dpo", "pref_loss": "orpo"}
    translation = translate_config(LLAMAFACTORY | keys)
    assert any("a mean over answers" in entry.reason for entry in translation.untranslated)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_coefficient_that_axolotl_leaves_out_is_that_of_trl() -> None:
    from trl.experimental.cpo import CPOConfig

    (row,) = [row for row in TOOLS["Axolotl"]["rows"] if row["do"] == "axolotl_stage"]
    assert row["nll_defaults"]["simpo"] == CPOConfig.cpo_alpha


@pytest.mark.parametrize("length", [{}, {"max_length": 77}, {"cutoff_len": 77}])
def test_longer_rows_are_truncated_as_there(length: Config) -> None:
    config = LLAMAFACTORY if "cutoff_len" in length else TRL
    assert translate_config(config | length).values["on_overlong"] == "truncate"
    without = {key: value for key, value in LLAMAFACTORY.items() if key != "cutoff_len"}
    assert translate_config(without).values["on_overlong"] == "truncate"
    assert "on_overlong" not in translate_config(TRL | {"max_length": None}).values


def test_kto() -> None:
    keys = {"rl": "kto", "rl_beta": 0.2, "kto_desirable_weight": 2.0}
    loss = translate_config(AXOLOTL | keys).values["loss"]
    assert loss == {"name": "kto", "beta": 0.2, "desirable_weight": 2.0}
    keys = {"stage": "kto", "kto_rejected_weight": 3.0}
    loss = translate_config(LLAMAFACTORY | keys).values["loss"]
    assert loss == {"name": "kto", "undesirable_weight": 3.0}


def test_a_limit_of_rows_survives_a_missing_dataset_info() -> None:
    data = translate_config(LLAMAFACTORY | {"max_samples": 500}).values["data"]
    assert data[0]["max_examples"] == 500


def test_a_constant_rate_has_no_warm_up() -> None:
    keys = {"lr_scheduler": "constant", "warmup_ratio": 0.1}
    translation = translate_config(AXOLOTL | keys)
    assert translation.values["lr_scheduler_type"] == "constant"
    assert "warmup_ratio" not in translation.values
    assert any(entry.key == "warmup_ratio" for entry in translation.untranslated)


@pytest.mark.parametrize("config", [TRL, AXOLOTL, LLAMAFACTORY])
def test_determinism(config: Config) -> None:
    assert translate_config(config | {"full_determinism": True}).values["deterministic"] is True
    assert translate_config(config | {"full_determinism": False}).values["deterministic"] is False
    assert "deterministic" not in translate_config(config).values


def test_label_smoothing_of_pairs() -> None:
    values = translate_config(AXOLOTL | {"rl": "dpo", "dpo_label_smoothing": 0.1}).values
    assert values["label_smoothing"] == 0.1
    values = translate_config(AXOLOTL | {"rl": "simpo", "dpo_label_smoothing": 0.1}).values
    assert "label_smoothing" not in values


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({"torch_dtype": "bfloat16", "bf16": True}, "bf16"),
        ({"torch_dtype": "float16", "fp16": True}, "fp16"),
        ({"torch_dtype": "float32", "bf16": True}, "bf16"),
    ],
)
def test_mixed_precision_of_trl(keys: Config, dtype: str) -> None:
    translation = translate_config(TRL | keys)
    assert translation.values["dtype"] == dtype
    lines = {entry.key for entry in translation.untranslated if entry.is_important}
    assert ("torch_dtype" in lines) == (keys["torch_dtype"] == "float32")


def test_keys_of_dpo_in_a_config_of_trl() -> None:
    translation = translate_config(TRL | {"beta": 0.05, "max_prompt_length": 512})
    assert translation.values["loss"] == {"name": "dpo", "beta": 0.05, "nll_coefficient": 0.0}
    assert "train_on" not in translation.values
    lines = {entry.key for entry in translation.untranslated if entry.is_important}
    assert {"max_prompt_length", "beta of trl dpo"} <= lines
