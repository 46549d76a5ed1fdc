"""Importer for Axolotl: one YAML with a list of data sets, each with the type of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.core.types import Json
from tunesmith.recipe.fields import wrap_list
from tunesmith.recipe.importers import key_map
from tunesmith.recipe.importers.draft import RecipeDraft, check_kinds, describe_format

SIGNATURE_KEYS = frozenset(
    [
        "base_model",
        "datasets",
        "test_datasets",
        "sequence_len",
        "adapter",
        "micro_batch_size",
        "num_epochs",
        "lr_scheduler",
        "val_set_size",
        "sample_packing",
        "lora_target_linear",
        "lora_model_dir",
        "dataset_prepared_path",
        "evals_per_epoch",
        "load_in_4bit",
    ]
)
SAME_KEYS = key_map.SAME_KEYS | {
    "sequence_len": "max_length",
    "num_epochs": "num_train_epochs",
    "peft_use_rslora": "use_rslora",
    "peft_use_dora": "use_dora",
}
DATA_KEYS = {"pretraining_dataset": "data", "datasets": "data", "test_datasets": "eval_data"}
# by loss: the fields of our `loss`, and their keys
LOSS_KEYS: dict[str, dict[str, str]] = {
    "dpo": {"nll_coefficient": "rpo_alpha"},
    "orpo": {},
    "simpo": {"gamma": "simpo_gamma", "nll_coefficient": "cpo_alpha"},
    "kto": {
        "desirable_weight": "kto_desirable_weight",
        "undesirable_weight": "kto_undesirable_weight",
    },
}
BETA_KEYS = ("rl_beta", "orpo_alpha")  # of any loss; the first that is set
NLL_DEFAULTS = {"dpo": 0.0, "simpo": 1.0}  # SimPO runs in TRL's CPOTrainer, with its cpo_alpha
ORPO_REASON = "the NLL term of ORPO covers the answer; in Axolotl it covers the prompt, too"
UNSUPPORTED_STAGES = ("reward_model", "process_reward_model")
OVERLONG_VALUES = {"drop": "drop", "truncate": "truncate", "raise": "refuse"}

WORDING_REASON = "the model's chat template formats the prompt, not Axolotl's sentences"
ROLE_NAMES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}
_TEXT_KEYS = (
    "path split revision name text_column field field_messages field_prompt field_chosen "
    "field_rejected message_field_role message_field_content"
)
ENTRY_KINDS = dict.fromkeys(_TEXT_KEYS.split(), ("a text",)) | {
    "data_files": ("a text", "a list of texts"),
    "type": ("a text", "a mapping"),
    "roles": ("a mapping",),
    "roles_to_train": ("a text", "a list of texts"),
    "message_property_mappings": ("a mapping to texts",),
}
TYPE_COLUMNS = ("instruction", "input", "output", "system")
TYPE_KINDS = {f"field_{column}": ("a text",) for column in TYPE_COLUMNS}
SUPPORTED_ROLES = {"system", "user", "human", "assistant", "gpt", "tool"}
# Keys of a data set that change nothing with these values; None: with any value.
DEFAULT_VALUES = {
    "ds_type": None,
    "split": "train",
    "train_on_eos": "turn",
    "field_tools": "tools",
    "chat_template": "tokenizer_default",
    "trust_remote_code": False,
    "revision": None,
}


def translate(draft: RecipeDraft) -> None:
    for key in UNSUPPORTED_STAGES:
        if draft.remaining.get(key):
            raise draft.make_error(key, f"{key} is not supported")
    if draft.remaining.get("val_set_size") and draft.remaining.get("test_datasets"):
        raise draft.make_error(
            "val_set_size", "val_set_size and test_datasets contradict each other: keep one"
        )
    key_map.translate_model(draft, "base_model")
    draft.rename_keys(SAME_KEYS)
    _translate_method(draft)
    _translate_overlong(draft)
    key_map.translate_new_tokens(draft, "tokens", module_keys=("lora_modules_to_save",))
    if draft.values.get("method") != "full":
        key_map.translate_modules_to_save(draft, "lora_modules_to_save")
    preference = draft.pop_scalar("rl")
    pretraining = draft.remaining.get("pretraining_dataset")
    for key, recipe_key in DATA_KEYS.items():
        if entries := draft.pop_value(key):
            has_pairs = bool(preference) and preference != "kto"
            sources = _build_sources(draft, key, entries, pairs=has_pairs)
            draft.set_value(recipe_key, sources, key)
    key_map.translate_eval_split(draft, "val_set_size")
    _translate_template(draft)
    key_map.translate_batch_size(draft, "micro_batch_size", micro_default=1)
    key_map.translate_steps(draft)
    key_map.translate_schedule(draft, "lr_scheduler")
    key_map.translate_optimizer(draft, "optimizer")
    key_map.translate_precision(draft)
    key_map.translate_saving(draft)
    key_map.translate_output_dir(draft)
    if preference:
        _translate_preference(draft, preference)
    elif pretraining:
        key_map.translate_pretraining(draft, "pretraining_dataset")
    key_map.translate_trained_text(draft, "train_on_inputs")
    key_map.translate_objective(draft)
    tokens = draft.remaining.get("special_tokens")
    if isinstance(tokens, dict) and tokens.keys() == {"pad_token"}:
        value = draft.pop_value("special_tokens")
        draft.skip_key("special_tokens", value, "there is no padding", is_important=False)


def _translate_method(draft: RecipeDraft) -> None:
    """Translate the method; without an adapter Axolotl trains all weights."""
    adapter = draft.pop_scalar("adapter")
    if adapter in (None, ""):
        draft.set_value("method", "full", "no adapter")
        return
    if adapter not in ("lora", "qlora"):
        draft.skip_key("adapter", adapter, "supported methods: lora, qlora, full")
        return
    key_map.translate_lora(draft, "adapter", is_4bit=adapter == "qlora")
    key_map.translate_adapter(draft, "lora_model_dir")
    key_map.translate_target_modules(draft, "lora_target_modules", all_linear_names=("all-linear",))
    if draft.pop_value("lora_target_linear") and "lora_target_modules" not in draft.values:
        draft.set_value("lora_target_modules", "all-linear", "lora_target_linear")


def _translate_preference(draft: RecipeDraft, loss: Any) -> None:
    set_keys = [key for key in BETA_KEYS if draft.remaining.get(key) is not None]
    beta = set_keys[0] if set_keys else BETA_KEYS[0]
    for key in set_keys[1:]:
        draft.skip_key(key, draft.pop_value(key), f"{beta} is used", is_important=False)
    loss_keys = {name: {"beta": beta, **keys} for name, keys in LOSS_KEYS.items()}
    key_map.translate_preference(draft, loss, "rl", loss_keys, NLL_DEFAULTS)
    if loss == "orpo":
        draft.skip_key("rl orpo", None, ORPO_REASON)


def _translate_overlong(draft: RecipeDraft) -> None:
    strategy = draft.pop_scalar("excess_length_strategy")
    if strategy in OVERLONG_VALUES:
        draft.set_value("on_overlong", OVERLONG_VALUES[strategy], "excess_length_strategy")
    elif strategy is not None:
        reason = "set on_overlong: drop, truncate or refuse"
        draft.skip_key("excess_length_strategy", strategy, reason)


def _translate_template(draft: RecipeDraft) -> None:
    file = draft.pop_text("chat_template_jinja")
    if file is not None:
        draft.pop_value("chat_template")
        draft.remaining["chat_template"] = file
    key_map.translate_chat_template(draft, "chat_template", default_names=("tokenizer_default",))


# ---------------------------------------------------------------- data sets


def _build_sources(draft: RecipeDraft, key: str, entries: Any, *, pairs: bool) -> list[Json]:
    if isinstance(entries, dict):
        entries = [entries]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise draft.make_error(key, f"{key}: expected a list of mappings, each with a path")
    sources: list[Json] = []
    for index, entry in enumerate(entries):
        name = f"{key}[{index}]"
        where = f"{draft.document.format_location((key, index))}: {name}"
        check_kinds(entry, ENTRY_KINDS, where)
        if isinstance(entry.get("type"), dict):
            check_kinds(entry["type"], TYPE_KINDS, f"{where}.type")
        sources += _build_entry_sources(draft, name, dict(entry), pairs)
    return sources


def _build_entry_sources(draft: RecipeDraft, name: str, entry: Json, pairs: bool) -> list[Json]:
    """Build a source for each file of one entry."""
    path = str(entry.pop("path", None) or "")
    files = entry.pop("data_files", None)
    hub_source = None if draft.find_path(path) else _make_hub_source(path, files, entry)
    row_format = _parse_pairs(draft, name, entry) if pairs else _parse_format(draft, name, entry)
    _report_unsupported(draft, name, entry)
    if hub_source is not None:
        return [{**hub_source, **row_format}]
    files = [str(file) for file in files] if isinstance(files, list) else [str(files or path)]
    return [{"path": _resolve_file(draft, name, file, Path(path)), **row_format} for file in files]


def _make_hub_source(path: str, files: Any, entry: Json) -> Json | None:
    """Return the source of a data set of the hub; a slice of a split stays to be reported."""
    split = entry.get("split")
    source = key_map.make_hub_source(
        path,
        revision=entry.get("revision"),
        config=None if files else entry.get("name"),
        split=None if files or "[" in str(split) else split,
        data_files=files,
    )
    if source is not None:
        for key in ("revision", "name", *(["split"] if "split" in source else [])):
            entry.pop(key, None)
    return source


def _resolve_file(draft: RecipeDraft, name: str, file: str, folder: Path) -> str:
    path = draft.find_path(file, folder) if file else None
    if path:
        return path
    draft.skip_key(f"{name}.path", file, key_map.HUB_DATASET_REASON)
    if Path(file).suffix in (".jsonl", ".json", ".csv", ".parquet", ".txt"):
        return file
    return f"{Path(file).name or name.partition('[')[0]}.jsonl"


def _report_unsupported(draft: RecipeDraft, name: str, entry: Json) -> None:
    roles = entry.pop("roles", None)
    if isinstance(roles, dict):
        role_names: set[str] = set()
        for names in roles.values():
            role_names.update(map(str, wrap_list(names or ())))
        if not role_names <= SUPPORTED_ROLES:
            reason = f"supported roles: {', '.join(sorted(SUPPORTED_ROLES))}"
            draft.skip_key(f"{name}.roles", roles, reason)
    _translate_roles(draft, f"{name}.roles_to_train", entry.pop("roles_to_train", None))
    for key, value in entry.items():
        if value not in (None, False) and DEFAULT_VALUES.get(key, "") not in (None, value):
            reason = "a source has no such key"
            if key == "split":
                reason = "set max_examples, a number of rows"
            draft.skip_key(f"{name}.{key}", value, reason)


def _translate_roles(draft: RecipeDraft, key: str, roles: Any) -> None:
    """Translate the trained roles of an entry; a recipe has the same for all of them."""
    if roles is None or roles == ["assistant"]:
        return
    names = {ROLE_NAMES.get(str(role), str(role)) for role in wrap_list(roles)}
    if not names or not names <= set(ROLE_NAMES.values()):
        draft.skip_key(key, roles, f"supported roles: {', '.join(sorted(ROLE_NAMES.values()))}")
    elif draft.values.get("train_on", sorted(names)) != sorted(names):
        draft.skip_key(key, roles, "a recipe trains the same roles of all data: set train_on")
    else:
        draft.set_value("train_on", sorted(names), key)


def _parse_format(draft: RecipeDraft, name: str, entry: Json) -> Json:
    """Return our format of the rows, and the columns whose names differ."""
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
        draft.skip_key(f"{name}.type", kind, "unknown: the format is detected from the rows")
    return {}


def _parse_pairs(draft: RecipeDraft, name: str, entry: Json) -> Json:
    """Return the columns of pairs; Axolotl's types only set the wording of the prompt."""
    kind = entry.pop("type", None)
    entry.pop("message_property_mappings", None)
    columns = {"prompt": entry.pop("field_messages", None) or entry.pop("field_prompt", None)}
    columns |= {side: entry.pop(f"field_{side}", None) for side in ("chosen", "rejected")}
    if str(kind or "").partition(".")[0] != "chat_template":
        draft.skip_key(f"{name}.type", kind, WORDING_REASON)
    return describe_format("preference", columns) if any(columns.values()) else {}


def _parse_messages(draft: RecipeDraft, name: str, base: str, entry: Json) -> Json:
    """Return the format of messages: OpenAI's role and content, or ShareGPT's from and value."""
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
        reason = "a message must have role and content, or from and value"
        draft.skip_key(f"{name}: names in a message", f"{role}, {content}", reason)
    return describe_format("messages", {"messages": field})


def _parse_custom_type(draft: RecipeDraft, name: str, kind: Json) -> Json:
    """Return the columns of a custom type; sentences around them are not supported."""
    columns = {column: kind.pop(f"field_{column}", None) for column in TYPE_COLUMNS}
    for key, value in kind.items():
        if value and value not in ("{instruction}", "{instruction} {input}", "{system}"):
            draft.skip_key(f"{name}.type.{key}", value, WORDING_REASON)
    return describe_format("alpaca", columns)
