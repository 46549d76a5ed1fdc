"""Importer for TRL: the YAML of `trl sft --config`, whose names are mostly ours."""

from __future__ import annotations

from pathlib import Path

from tunesmith.recipe.importers import key_map
from tunesmith.recipe.importers.draft import RecipeDraft

SIGNATURE_KEYS = frozenset(
    [
        "dataset_name",
        "dataset_config",
        "dataset_train_split",
        "dataset_test_split",
        "use_peft",
        "dtype",
        "torch_dtype",
        "max_length",
        "assistant_only_loss",
        "completion_only_loss",
        "packing",
        "chat_template_path",
        "dataset_text_field",
        "load_in_4bit",
    ]
)
SAME_KEYS = key_map.SAME_KEYS | {"max_length": "max_length", "max_seq_length": "max_length"}


def translate(draft: RecipeDraft) -> None:
    key_map.translate_model(draft, "model_name_or_path")
    draft.rename_keys(SAME_KEYS)
    if draft.document.values.get("max_length", True) is not None:
        draft.set_value("on_overlong", "truncate", "TRL truncates rows over max_length")
    adapter = draft.pop_value("use_peft")
    if adapter:
        key_map.translate_lora(draft, "use_peft")
    else:
        draft.set_value("method", "full", "no use_peft")
    key_map.translate_target_modules(draft, "lora_target_modules", all_linear_names=("all-linear",))
    if adapter:
        key_map.translate_modules_to_save(draft, "lora_modules_to_save")
    _translate_data(draft)
    key_map.translate_chat_template(draft, "chat_template_path", default_names=())
    key_map.translate_batch_size(draft, "per_device_train_batch_size", micro_default=8)
    key_map.translate_steps(draft)
    key_map.translate_schedule(draft, "lr_scheduler_type")
    key_map.translate_optimizer(draft, "optim")
    key_map.translate_precision(draft, "dtype", "torch_dtype")
    key_map.translate_saving(draft)
    key_map.translate_output_dir(draft)
    _translate_trained_text(draft)
    key_map.translate_objective(draft)


def _translate_trained_text(draft: RecipeDraft) -> None:
    """Translate the two switches of the mask; with assistant_only_loss, completion_only_loss has
    nothing left to decide."""
    switches = {
        key: draft.pop_value(key) for key in ("assistant_only_loss", "completion_only_loss")
    }
    if switches["assistant_only_loss"]:
        draft.set_value("train_on", "answers", "assistant_only_loss")
        return
    for key, value in switches.items():
        if value is False and "train_on" not in draft.values:
            draft.set_value("train_on", "all", key)
    if switches["completion_only_loss"] and "train_on" not in draft.values:
        draft.set_value("train_on", "answers", "completion_only_loss")


def _translate_data(draft: RecipeDraft) -> None:
    name = draft.pop_text("dataset_name")
    if name is None:
        return
    config = draft.pop_text("dataset_config")
    splits = {"data": draft.pop_text("dataset_train_split")}
    splits["eval_data"] = draft.pop_text("dataset_test_split")
    path = draft.find_path(name)
    for key, split in splits.items():
        source = key_map.make_hub_source(name, config=config, split=split)
        if path is None and source is not None and (split or key == "data"):
            draft.set_value(key, [source], "dataset_name")
    if path is None and "data" not in draft.values:
        draft.skip_key("dataset_name", name, key_map.HUB_DATASET_REASON)
        path = f"{Path(name).name}.jsonl"
    if path is not None:
        draft.set_value("data", [{"path": path}], "dataset_name")
