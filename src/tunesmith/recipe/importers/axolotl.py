"""Axolotl: one YAML with a list of data sets, each with the type of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.core.types import Json
from tunesmith.recipe.importers import common
from tunesmith.recipe.importers.draft import Draft, described

# fmt: off
SIGNS = frozenset((
    "base_model", "datasets", "test_datasets", "sequence_len", "adapter", "micro_batch_size", "num_epochs",
    "lr_scheduler", "val_set_size", "sample_packing", "lora_target_linear", "lora_model_dir",
    "dataset_prepared_path", "evals_per_epoch", "load_in_4bit",
))
# fmt: on
SAME = common.SAME | {
    "sequence_len": "max_length",
    "num_epochs": "num_train_epochs",
    "peft_use_rslora": "use_rslora",
    "peft_use_dora": "use_dora",
}
OTHER_STAGES = ("reward_model", "process_reward_model")
LONG_ROWS = {"drop": "drop", "truncate": "truncate", "raise": "refuse"}

OWN_WORDS = "the model's chat template words the prompt here, not Axolotl's own sentences"
KNOWN_ROLES = {"system", "user", "human", "assistant", "gpt", "tool"}
# Keys of a data set that say nothing new: the split of a local file, and what is always so here.
PLAIN = {
    "ds_type": None,
    "split": "train",
    "roles_to_train": ["assistant"],
    "train_on_eos": "turn",
    "field_tools": "tools",
    "chat_template": "tokenizer_default",
    "trust_remote_code": False,
    "revision": None,
}


def translate(draft: Draft) -> None:
    for key in OTHER_STAGES:
        if draft.given.get(key):
            value = draft.given[key]
            what = f"{key}: {value if isinstance(value, str) else '...'}: "
            raise draft.refusal(key, what + "there is no counterpart here")
    if draft.given.get("val_set_size") and draft.given.get("test_datasets"):
        raise draft.refusal("val_set_size", "val_set_size and test_datasets contradict each other: keep one")
    common.model(draft, "base_model")
    draft.rename(SAME)
    _method(draft)
    _long_rows(draft)
    common.new_tokens(draft, "tokens", whole=("lora_modules_to_save",))
    preference, texts = draft.word("rl"), draft.given.get("pretraining_dataset")
    for key, ours in (("pretraining_dataset", "data"), ("datasets", "data"), ("test_datasets", "eval_data")):
        if entries := draft.take(key):
            draft.put(ours, _sources(draft, key, entries, pairs=bool(preference)), key)
    common.held_out(draft, "val_set_size")
    _template(draft)
    common.batch_size(draft, "micro_batch_size", micro_default=1)
    common.steps(draft)
    common.schedule(draft, "lr_scheduler")
    common.optimizer(draft, "optimizer")
    common.precision(draft)
    common.saving(draft)
    common.folder(draft)
    if preference:
        beta = "orpo_alpha" if preference == "orpo" else "rl_beta"
        common.pairs(draft, preference, "rl", beta=beta, gamma="simpo_gamma", nll_coefficient="rpo_alpha")
    elif texts:
        common.texts(draft, "pretraining_dataset")
    tokens = draft.given.get("special_tokens")
    if isinstance(tokens, dict) and tokens.keys() == {"pad_token"}:
        draft.leave("special_tokens", draft.take("special_tokens"), "nothing is padded", matters=False)


def _method(draft: Draft) -> None:
    """Without an adapter Axolotl trains all weights."""
    adapter = draft.word("adapter")
    if adapter in (None, ""):
        draft.put("method", "full", "no adapter")
        return
    if adapter not in ("lora", "qlora"):
        draft.leave("adapter", adapter, "lora, qlora and full are the methods here")
        return
    common.low_rank(draft, "adapter", four_bits=adapter == "qlora")
    common.adapter(draft, "lora_model_dir")
    common.target_modules(draft, "lora_target_modules", everything=("all-linear",))
    if draft.take("lora_target_linear") and "lora_target_modules" not in draft.values:
        draft.put("lora_target_modules", "all-linear", "lora_target_linear")


def _long_rows(draft: Draft) -> None:
    strategy = draft.word("excess_length_strategy")
    if strategy in LONG_ROWS:
        draft.put("overlong", LONG_ROWS[strategy], "excess_length_strategy")
    elif strategy is not None:
        draft.leave("excess_length_strategy", strategy, "drop, truncate or refuse here: set overlong")


def _template(draft: Draft) -> None:
    file = draft.word("chat_template_jinja")
    if file is not None:
        draft.take("chat_template")
        draft.given["chat_template"] = str(file)
    common.chat_template(draft, "chat_template", own=("tokenizer_default",))


# ---------------------------------------------------------------- data sets


def _sources(draft: Draft, key: str, entries: Any, *, pairs: bool) -> list[Json]:
    if isinstance(entries, dict):
        entries = [entries]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise draft.refusal(key, f"{key}: expected a list of mappings, each with a path")
    found = [_of_entry(draft, f"{key}[{place}]", dict(entry), pairs) for place, entry in enumerate(entries)]
    return [source for sources in found for source in sources]


def _of_entry(draft: Draft, name: str, entry: Json, pairs: bool) -> list[Json]:
    """A source for each file of one entry."""
    path, files = str(entry.pop("path", None) or ""), entry.pop("data_files", None)
    files = [str(file) for file in files] if isinstance(files, list) else [str(files or path)]
    format = _pairs(draft, name, entry) if pairs else _format(draft, name, entry)
    _say_what_else(draft, name, entry)
    return [{"path": _file(draft, name, file, Path(path)), **format} for file in files]


def _file(draft: Draft, name: str, file: str, folder: Path) -> str:
    found = draft.locate(file, folder) if file else None
    if found:
        return found
    draft.leave(f"{name}.path", file, common.FROM_HUB)
    if Path(file).suffix in (".jsonl", ".json", ".csv", ".parquet", ".txt"):
        return file
    return f"{Path(file).name or name.partition('[')[0]}.jsonl"


def _say_what_else(draft: Draft, name: str, entry: Json) -> None:
    roles = entry.pop("roles", None)
    if isinstance(roles, dict) and not {str(one) for names in roles.values() for one in names or ()} <= KNOWN_ROLES:
        draft.leave(f"{name}.roles", roles, f"the roles here are {', '.join(sorted(KNOWN_ROLES))}")
    for key, value in entry.items():
        if value not in (None, False) and PLAIN.get(key, "") not in (None, value):
            reason = "set max_examples, a number of rows" if key == "split" else "a source has nothing like it"
            draft.leave(f"{name}.{key}", value, reason)


def _format(draft: Draft, name: str, entry: Json) -> Json:
    """Our format of the rows, and the columns that have another name in the file."""
    kind = entry.pop("type", None)
    if isinstance(kind, dict):
        return _own_type(draft, name, kind)
    base = str(kind or "").replace(":", ".").partition(".")[0]
    if base == "pretrain" or name.startswith("pretraining_dataset"):
        return described("text", {"text": entry.pop("text_column", None)})
    if base in ("chat_template", "sharegpt"):
        return _messages(draft, name, base, entry)
    if base == "alpaca":
        draft.leave(f"{name}.type", kind, OWN_WORDS)
        return described("alpaca", {})
    if base == "completion":
        return described("text", {"text": entry.pop("field", None)})
    if kind:
        draft.leave(f"{name}.type", kind, "not known here: the format is detected from the rows")
    return {}


def _pairs(draft: Draft, name: str, entry: Json) -> Json:
    """Prompt, chosen and rejected; their types say how the prompt is worded, which the model's template does here."""
    kind = entry.pop("type", None)
    entry.pop("message_property_mappings", None)
    columns = {"prompt": entry.pop("field_messages", None) or entry.pop("field_prompt", None)}
    columns |= {side: entry.pop(f"field_{side}", None) for side in ("chosen", "rejected")}
    if str(kind or "").partition(".")[0] != "chat_template":
        draft.leave(f"{name}.type", kind, OWN_WORDS)
    return described("preference", columns) if any(columns.values()) else {}


def _messages(draft: Draft, name: str, base: str, entry: Json) -> Json:
    """Role and content make OpenAI messages, from and value ShareGPT; other names have no counterpart."""
    names = entry.pop("message_property_mappings", None)
    names = names if isinstance(names, dict) else {}
    usual = ("from", "value") if base == "sharegpt" else ("role", "content")
    role = entry.pop("message_field_role", None) or names.get("role") or usual[0]
    content = entry.pop("message_field_content", None) or names.get("content") or usual[1]
    field = entry.pop("field_messages", None) or ("conversations" if base == "sharegpt" else "messages")
    if (role, content) == ("from", "value"):
        return described("sharegpt", {"conversations": field})
    if (role, content) != ("role", "content"):
        reason = "a message has role and content, or from and value, here"
        draft.leave(f"{name}: names in a message", f"{role}, {content}", reason)
    return described("messages", {"messages": field})


def _own_type(draft: Draft, name: str, kind: Json) -> Json:
    """A type of the user's own: names of columns, and perhaps sentences around them."""
    columns = {ours: kind.pop(f"field_{ours}", None) for ours in ("instruction", "input", "output", "system")}
    for key, value in kind.items():
        if value and value not in ("{instruction}", "{instruction} {input}", "{system}"):
            draft.leave(f"{name}.type.{key}", value, OWN_WORDS)
    return described("alpaca", columns)
