"""TRL: the YAML of `trl sft --config`; most of its names are Hugging Face's, which are ours."""

from __future__ import annotations

from pathlib import Path

from tunesmith.recipe.importers import common
from tunesmith.recipe.importers.draft import RecipeDraft

# fmt: off
SIGNATURE_KEYS = frozenset((
    "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "use_peft", "dtype",
    "torch_dtype", "max_length", "assistant_only_loss", "completion_only_loss", "packing", "chat_template_path",
    "dataset_text_field", "load_in_4bit",
))
# fmt: on
SAME_KEYS = common.SAME_KEYS | {"max_length": "max_length", "max_seq_length": "max_length"}


def translate(draft: RecipeDraft) -> None:
    common.translate_model(draft, "model_name_or_path")
    draft.rename_keys(SAME_KEYS)
    if "max_length" in draft.values:
        draft.set_value("overlong", "truncate", "what TRL does with rows over max_length")
    adapter = draft.pop_value("use_peft")
    if adapter:
        common.translate_lora(draft, "use_peft")
    else:
        draft.set_value("method", "full", "no use_peft")
    common.translate_target_modules(draft, "lora_target_modules", all_linear_names=("all-linear",))
    _translate_data(draft)
    common.translate_chat_template(draft, "chat_template_path", default_names=())
    common.translate_batch_size(draft, "per_device_train_batch_size", micro_default=8)
    common.translate_steps(draft)
    common.translate_schedule(draft, "lr_scheduler_type")
    common.translate_optimizer(draft, "optim")
    common.translate_precision(draft, "dtype", "torch_dtype")
    common.translate_saving(draft)
    common.translate_output_dir(draft)


def _translate_data(draft: RecipeDraft) -> None:
    name = draft.pop_scalar("dataset_name")
    if name is None:
        return
    path = draft.find_path(str(name))
    if path is None:
        draft.skip_key("dataset_name", name, common.HUB_DATASET_REASON)
    draft.set_value("data", [{"path": path or f"{Path(str(name)).name}.jsonl"}], "dataset_name")
