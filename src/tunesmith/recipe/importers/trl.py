"""TRL: the YAML of `trl sft --config`; most of its names are Hugging Face's, which are ours."""

from __future__ import annotations

from pathlib import Path

from tunesmith.recipe.importers import common
from tunesmith.recipe.importers.draft import Draft

# fmt: off
SIGNS = frozenset((
    "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "use_peft", "dtype",
    "torch_dtype", "max_length", "assistant_only_loss", "completion_only_loss", "packing", "chat_template_path",
    "dataset_text_field", "load_in_4bit",
))
# fmt: on
SAME = common.SAME | {"max_length": "max_length", "max_seq_length": "max_length"}


def translate(draft: Draft) -> None:
    common.model(draft, "model_name_or_path")
    draft.rename(SAME)
    if "max_length" in draft.values:
        draft.put("overlong", "truncate", "what TRL does with rows over max_length")
    adapter = draft.take("use_peft")
    if adapter:
        common.low_rank(draft, "use_peft")
    else:
        draft.put("method", "full", "no use_peft")
    common.target_modules(draft, "lora_target_modules", everything=("all-linear",))
    _data(draft)
    common.chat_template(draft, "chat_template_path", own=())
    common.batch_size(draft, "per_device_train_batch_size", micro_default=8)
    common.steps(draft)
    common.schedule(draft, "lr_scheduler_type")
    common.optimizer(draft, "optim")
    common.precision(draft, "dtype", "torch_dtype")
    common.saving(draft)
    common.folder(draft)


def _data(draft: Draft) -> None:
    name = draft.word("dataset_name")
    if name is None:
        return
    found = draft.locate(str(name))
    if found is None:
        draft.leave("dataset_name", name, common.FROM_HUB)
    draft.put("data", [{"path": found or f"{Path(str(name)).name}.jsonl"}], "dataset_name")
