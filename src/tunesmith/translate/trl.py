"""TRL: the YAML of `trl sft --config`; most of its names are Hugging Face's, which are ours."""

from __future__ import annotations

from pathlib import Path

from tunesmith.translate import topics
from tunesmith.translate.draft import Draft

# fmt: off
SIGNS = frozenset((
    "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "use_peft", "dtype",
    "torch_dtype", "max_length", "assistant_only_loss", "completion_only_loss", "packing", "chat_template_path",
    "dataset_text_field", "load_in_4bit",
))
# fmt: on
SAME = topics.SAME | {"max_length": "max_length", "max_seq_length": "max_length"}


def translate(draft: Draft) -> None:
    topics.model(draft, "model_name_or_path")
    draft.rename(SAME)
    if "max_length" in draft.values:
        draft.put("overlong", "truncate", "what TRL does with rows over max_length")
    adapter = draft.take("use_peft")
    if adapter:
        topics.low_rank(draft, "use_peft")
    else:
        draft.put("method", "full", "no use_peft")
    topics.target_modules(draft, "lora_target_modules", everything=("all-linear",))
    _data(draft)
    topics.chat_template(draft, "chat_template_path", own=())
    topics.batch_size(draft, "per_device_train_batch_size", micro_default=8)
    topics.steps(draft)
    topics.schedule(draft, "lr_scheduler_type")
    topics.optimizer(draft, "optim")
    topics.precision(draft, "dtype", "torch_dtype")
    topics.saving(draft)
    topics.folder(draft)


def _data(draft: Draft) -> None:
    name = draft.word("dataset_name")
    if name is None:
        return
    found = draft.locate(str(name))
    if found is None:
        draft.leave("dataset_name", name, topics.FROM_HUB)
    draft.put("data", [{"path": found or f"{Path(str(name)).name}.jsonl"}], "dataset_name")
