"""What other tools do where a config is silent, and what a config says that changes nothing here.

In: a translated draft. Out: `UntranslatedKey` entries, so that no key and no default of the other
tool is passed over in silence. The values are those of TRL 1.16, Axolotl 0.13 and LLaMA-Factory
0.9."""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any

from tunesmith.core.types import Json
from tunesmith.recipe.importers.draft import RecipeDraft

# Keys that are on, or not empty, unless a config turns them off.
_TRAINER_KEYS = (
    "per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type optim "
    "optimizer adam_beta1 adam_beta2 adam_epsilon gradient_accumulation_steps max_grad_norm seed "
    "average_tokens_across_devices logging_strategy logging_steps log_on_each_node "
    "logging_nan_inf_filter log_level log_level_replica report_to project eval_strategy "
    "include_num_input_tokens_seen per_device_eval_batch_size eval_do_concat_batches "
    "save_strategy save_steps save_safetensors hub_strategy dataloader_pin_memory "
    "dataloader_in_order remove_unused_columns train_sampling_strategy length_column_name "
    "ddp_timeout skip_memory_metrics local_rank"
)
_TOOL_KEYS = {
    "TRL": (
        "gradient_checkpointing bf16 dataset_train_split dataset_test_split dataset_text_field "
        "max_length truncation_mode packing_strategy pad_to_multiple_of loss_type model_revision "
        "dtype lora_r lora_alpha lora_dropout lora_task_type bnb_4bit_quant_type "
        "assistant_only_loss completion_only_loss shuffle_dataset"
    ),
    "Axolotl": (
        "micro_batch_size num_epochs sequence_len lr_scheduler bf16 "
        "shuffle_merged_datasets dataloader_prefetch_factor train_on_eos include_tokens_per_second "
        "excess_length_strategy val_set_size rl_beta"
    ),
    "LLaMA-Factory": (
        "template cutoff_len finetuning_type lora_rank lora_target pref_beta pref_loss "
        "kto_chosen_weight kto_rejected_weight simpo_gamma quantization_method quantization_type "
        "double_quantization use_fast_tokenizer low_cpu_mem_usage "
        "flash_attn dataset_dir ignore_pad_token_for_loss use_cache infer_dtype model_revision "
        "train_from_scratch_default"
    ),
}
ON_BY_DEFAULT = {
    tool: frozenset(f"{_TRAINER_KEYS} {keys}".split()) for tool, keys in _TOOL_KEYS.items()
}

# tool -> our key -> its key and value where a config leaves it out
SILENT_DEFAULTS: dict[str, dict[str, str]] = {
    "TRL": {
        "learning_rate": "learning_rate 2e-05",
        "num_train_epochs": "num_train_epochs 3",
        "batch_size": "per_device_train_batch_size 8",
        "max_length": "max_length 1024",
        "warmup_ratio": "warmup_steps 0",
        "lora_r": "lora_r 16",
        "lora_dropout": "lora_dropout 0.05",
        "lora_target_modules": "lora_target_modules of PEFT",
        "train_on": "assistant_only_loss false (prompts of conversations are trained)",
        "seed": "seed 42",
    },
    "Axolotl": {
        "num_train_epochs": "num_epochs 1",
        "batch_size": "micro_batch_size 1",
        "max_length": "sequence_len 512",
        "lr_scheduler_type": "lr_scheduler cosine",
        "seed": "seed 42",
    },
    "LLaMA-Factory": {
        "learning_rate": "learning_rate 5e-05",
        "num_train_epochs": "num_train_epochs 3",
        "batch_size": "per_device_train_batch_size 8",
        "max_length": "cutoff_len 2048",
        "warmup_ratio": "warmup_ratio 0",
        "lora_r": "lora_rank 8",
        "lora_alpha": "lora_alpha 2 * lora_rank",
        "seed": "seed 42",
    },
}
# tool -> the same for the fields of our `loss`
SILENT_LOSS_DEFAULTS: dict[str, dict[str, str]] = {
    "TRL": {},
    "Axolotl": {"beta": "rl_beta 0.1"},
    "LLaMA-Factory": {"beta": "pref_beta 0.1", "gamma": "simpo_gamma 0.5"},
}
SECRET_KEY = re.compile("token$|api_key|secret|password")
NO_EFFECT = "nothing in the recipe follows from it"


def report_unused_keys(draft: RecipeDraft, tool: str, overridden: Container[str]) -> None:
    """Record every key that neither a note nor another entry names: its value is the same here, or
    a rule decides. Keys that are off, as they are by default, and `overridden` ones ask for
    nothing."""
    texts = [*draft.notes.values(), *(entry.key for entry in draft.untranslated)]
    named = {word for text in texts for word in re.findall(r"\w+", text)}
    for key, value in draft.document.values.items():
        if key in named or key in overridden or is_off_by_default(tool, key, value):
            continue
        if not SECRET_KEY.search(key):
            draft.skip_key(key, value, NO_EFFECT, is_important=False)


def is_off_by_default(tool: str, key: str, value: Any) -> bool:
    """Return whether an empty or false value of a key is what the tool does without it."""
    is_off = value in (None, False, "", 0, [], {})
    return is_off and key not in ON_BY_DEFAULT[tool]


def report_silent_defaults(draft: RecipeDraft, tool: str) -> None:
    """Record the tool's defaults for what the config leaves out and a rule decides otherwise."""
    reason = f"defaults of {tool} that the config leaves out; here a rule decides"
    for key, text in SILENT_DEFAULTS[tool].items():
        is_adapter_key = key.startswith("lora_") and draft.values.get("method") == "full"
        is_unused = key == "train_on" and draft.values.get("stage", "sft") != "sft"
        if key not in draft.values and not is_adapter_key and not is_unused:
            draft.skip_key(text, None, reason, is_important=False)
    loss = draft.values.get("loss")
    if loss is None:
        return
    loss_config: Json = loss if isinstance(loss, dict) else {"name": loss}
    for key, text in SILENT_LOSS_DEFAULTS[tool].items():
        is_unused = key == "gamma" and loss_config["name"] != "simpo"
        if key not in loss_config and not is_unused:
            draft.skip_key(text, None, reason, is_important=False)
