"""Axolotl: one YAML with a list of data sets, each with the type of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.core.types import Json
from tunesmith.recipe.importers import common
from tunesmith.recipe.importers.draft import RecipeDraft, describe_format

# fmt: off
SIGNATURE_KEYS = frozenset((
    "base_model", "datasets", "test_datasets", "sequence_len", "adapter", "micro_batch_size", "num_epochs",
    "lr_scheduler", "val_set_size", "sample_packing", "lora_target_linear", "lora_model_dir",
    "dataset_prepared_path", "evals_per_epoch", "load_in_4bit",
))
# fmt: on
SAME_KEYS = common.SAME_KEYS | {
    "sequence_len": "max_length",
    "num_epochs": "num_train_epochs",
    "peft_use_rslora": "use_rslora",
    "peft_use_dora": "use_dora",
}
UNSUPPORTED_STAGES = ("reward_model", "process_reward_model")
OVERLONG_VALUES = {"drop": "drop", "truncate": "truncate", "raise": "refuse"}

WORDING_REASON = "the model's chat template words the prompt here, not Axolotl's own sentences"
SUPPORTED_ROLES = {"system", "user", "human", "assistant", "gpt", "tool"}
# Keys of a data set that say nothing new: the split of a local file, and what is always so here.
DEFAULT_VALUES = {
    "ds_type": None,
    "split": "train",
    "roles_to_train": ["assistant"],
    "train_on_eos": "turn",
    "field_tools": "tools",
    "chat_template": "tokenizer_default",
    "trust_remote_code": False,
    "revision": None,
}


def translate(draft: RecipeDraft) -> None:
    for key in UNSUPPORTED_STAGES:
        if draft.remaining.get(key):
            value = draft.remaining[key]
            message = f"{key}: {value if isinstance(value, str) else '...'}: "
            raise draft.make_error(key, message + "there is no counterpart here")
    if draft.remaining.get("val_set_size") and draft.remaining.get("test_datasets"):
        raise draft.make_error(
            "val_set_size", "val_set_size and test_datasets contradict each other: keep one"
        )
    common.translate_model(draft, "base_model")
    draft.rename_keys(SAME_KEYS)
    _translate_method(draft)
    _translate_overlong(draft)
    common.translate_new_tokens(draft, "tokens", module_keys=("lora_modules_to_save",))
    preference, pretraining = draft.pop_scalar("rl"), draft.remaining.get("pretraining_dataset")
    for key, recipe_key in (
        ("pretraining_dataset", "data"),
        ("datasets", "data"),
        ("test_datasets", "eval_data"),
    ):
        if entries := draft.pop_value(key):
            draft.set_value(
                recipe_key, _build_sources(draft, key, entries, pairs=bool(preference)), key
            )
    common.translate_eval_split(draft, "val_set_size")
    _translate_template(draft)
    common.translate_batch_size(draft, "micro_batch_size", micro_default=1)
    common.translate_steps(draft)
    common.translate_schedule(draft, "lr_scheduler")
    common.translate_optimizer(draft, "optimizer")
    common.translate_precision(draft)
    common.translate_saving(draft)
    common.translate_output_dir(draft)
    if preference:
        beta = "orpo_alpha" if preference == "orpo" else "rl_beta"
        common.translate_preference(
            draft, preference, "rl", beta=beta, gamma="simpo_gamma", nll_coefficient="rpo_alpha"
        )
    elif pretraining:
        common.translate_pretraining(draft, "pretraining_dataset")
    tokens = draft.remaining.get("special_tokens")
    if isinstance(tokens, dict) and tokens.keys() == {"pad_token"}:
        draft.skip_key(
            "special_tokens",
            draft.pop_value("special_tokens"),
            "nothing is padded",
            is_important=False,
        )


def _translate_method(draft: RecipeDraft) -> None:
    """Without an adapter Axolotl trains all weights."""
    adapter = draft.pop_scalar("adapter")
    if adapter in (None, ""):
        draft.set_value("method", "full", "no adapter")
        return
    if adapter not in ("lora", "qlora"):
        draft.skip_key("adapter", adapter, "lora, qlora and full are the methods here")
        return
    common.translate_lora(draft, "adapter", is_4bit=adapter == "qlora")
    common.translate_adapter(draft, "lora_model_dir")
    common.translate_target_modules(draft, "lora_target_modules", all_linear_names=("all-linear",))
    if draft.pop_value("lora_target_linear") and "lora_target_modules" not in draft.values:
        draft.set_value("lora_target_modules", "all-linear", "lora_target_linear")


def _translate_overlong(draft: RecipeDraft) -> None:
    strategy = draft.pop_scalar("excess_length_strategy")
    if strategy in OVERLONG_VALUES:
        draft.set_value("overlong", OVERLONG_VALUES[strategy], "excess_length_strategy")
    elif strategy is not None:
        draft.skip_key(
            "excess_length_strategy", strategy, "drop, truncate or refuse here: set overlong"
        )


def _translate_template(draft: RecipeDraft) -> None:
    file = draft.pop_scalar("chat_template_jinja")
    if file is not None:
        draft.pop_value("chat_template")
        draft.remaining["chat_template"] = str(file)
    common.translate_chat_template(draft, "chat_template", default_names=("tokenizer_default",))


# ---------------------------------------------------------------- data sets


def _build_sources(draft: RecipeDraft, key: str, entries: Any, *, pairs: bool) -> list[Json]:
    if isinstance(entries, dict):
        entries = [entries]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise draft.make_error(key, f"{key}: expected a list of mappings, each with a path")
    source_lists = [
        _build_entry_sources(draft, f"{key}[{index}]", dict(entry), pairs)
        for index, entry in enumerate(entries)
    ]
    return [source for sources in source_lists for source in sources]


def _build_entry_sources(draft: RecipeDraft, name: str, entry: Json, pairs: bool) -> list[Json]:
    """A source for each file of one entry."""
    path, files = str(entry.pop("path", None) or ""), entry.pop("data_files", None)
    files = [str(file) for file in files] if isinstance(files, list) else [str(files or path)]
    row_format = _parse_pairs(draft, name, entry) if pairs else _parse_format(draft, name, entry)
    _report_unsupported(draft, name, entry)
    return [{"path": _resolve_file(draft, name, file, Path(path)), **row_format} for file in files]


def _resolve_file(draft: RecipeDraft, name: str, file: str, folder: Path) -> str:
    path = draft.find_path(file, folder) if file else None
    if path:
        return path
    draft.skip_key(f"{name}.path", file, common.HUB_DATASET_REASON)
    if Path(file).suffix in (".jsonl", ".json", ".csv", ".parquet", ".txt"):
        return file
    return f"{Path(file).name or name.partition('[')[0]}.jsonl"


def _report_unsupported(draft: RecipeDraft, name: str, entry: Json) -> None:
    roles = entry.pop("roles", None)
    if (
        isinstance(roles, dict)
        and not {str(role) for names in roles.values() for role in names or ()} <= SUPPORTED_ROLES
    ):
        draft.skip_key(
            f"{name}.roles", roles, f"the roles here are {', '.join(sorted(SUPPORTED_ROLES))}"
        )
    for key, value in entry.items():
        if value not in (None, False) and DEFAULT_VALUES.get(key, "") not in (None, value):
            reason = (
                "set max_examples, a number of rows"
                if key == "split"
                else "a source has nothing like it"
            )
            draft.skip_key(f"{name}.{key}", value, reason)


def _parse_format(draft: RecipeDraft, name: str, entry: Json) -> Json:
    """Our format of the rows, and the columns that have another name in the file."""
    kind = entry.pop("type", None)
    if isinstance(kind, dict):
        return _parse_custom_type(draft, name, kind)
    base = str(kind or "").replace(":", ".").partition(".")[0]
    if base == "pretrain" or name.startswith("pretraining_dataset"):
        return describe_format("text", {"text": entry.pop("text_column", None)})
    if base in ("chat_template", "sharegpt"):
        return _parse_messages(draft, name, base, entry)
    if base == "alpaca":
        draft.skip_key(f"{name}.type", kind, WORDING_REASON)
        return describe_format("alpaca", {})
    if base == "completion":
        return describe_format("text", {"text": entry.pop("field", None)})
    if kind:
        draft.skip_key(f"{name}.type", kind, "not known here: the format is detected from the rows")
    return {}


def _parse_pairs(draft: RecipeDraft, name: str, entry: Json) -> Json:
    """Prompt, chosen and rejected; their types say how the prompt is worded, which the model's
    template does here."""
    kind = entry.pop("type", None)
    entry.pop("message_property_mappings", None)
    columns = {"prompt": entry.pop("field_messages", None) or entry.pop("field_prompt", None)}
    columns |= {side: entry.pop(f"field_{side}", None) for side in ("chosen", "rejected")}
    if str(kind or "").partition(".")[0] != "chat_template":
        draft.skip_key(f"{name}.type", kind, WORDING_REASON)
    return describe_format("preference", columns) if any(columns.values()) else {}


def _parse_messages(draft: RecipeDraft, name: str, base: str, entry: Json) -> Json:
    """Role and content make OpenAI messages, from and value ShareGPT; other names have no
    counterpart."""
    names = entry.pop("message_property_mappings", None)
    names = names if isinstance(names, dict) else {}
    default_fields = ("from", "value") if base == "sharegpt" else ("role", "content")
    role = entry.pop("message_field_role", None) or names.get("role") or default_fields[0]
    content = entry.pop("message_field_content", None) or names.get("content") or default_fields[1]
    field = entry.pop("field_messages", None) or (
        "conversations" if base == "sharegpt" else "messages"
    )
    if (role, content) == ("from", "value"):
        return describe_format("sharegpt", {"conversations": field})
    if (role, content) != ("role", "content"):
        reason = "a message has role and content, or from and value, here"
        draft.skip_key(f"{name}: names in a message", f"{role}, {content}", reason)
    return describe_format("messages", {"messages": field})


def _parse_custom_type(draft: RecipeDraft, name: str, kind: Json) -> Json:
    """A type of the user's own: names of columns, and perhaps sentences around them."""
    columns = {
        column: kind.pop(f"field_{column}", None)
        for column in ("instruction", "input", "output", "system")
    }
    for key, value in kind.items():
        if value and value not in ("{instruction}", "{instruction} {input}", "{system}"):
            draft.skip_key(f"{name}.type.{key}", value, WORDING_REASON)
    return describe_format("alpaca", columns)
