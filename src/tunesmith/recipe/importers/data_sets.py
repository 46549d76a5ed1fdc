"""What data sets of other tools become: sources of a recipe, with the format of their rows.

Axolotl lists its data sets with the type of their rows; LLaMA-Factory describes them in
dataset_info.json; TRL has a single one. Left out: all other keys (key_map.py)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.hub_names import FILE_SUFFIXES, is_hub_id
from tunesmith.core.json_io import read_json
from tunesmith.core.types import Json
from tunesmith.recipe.fields import wrap_list
from tunesmith.recipe.importers.draft import (
    RecipeDraft,
    is_number,
    is_text,
    is_text_mapping,
    is_texts,
)

HUB_REASON = "not a local file: save its rows in the file that the recipe names"
NAMES_REASON = "a message must have role and content, or from and value"
WORDING_REASON = "the model's chat template formats the prompt, not Axolotl's sentences"
ROLE_NAMES = {"human": "user", "gpt": "assistant"}
ROLE_NAMES |= {role: role for role in ("system", "user", "assistant", "tool")}
TYPE_COLUMNS = ("instruction", "input", "output", "system")
# keys of an entry, by the kind of their values
ENTRY_KINDS = {
    "a text": "path split revision name text_column field field_messages field_prompt field_chosen "
    "field_rejected message_field_role message_field_content",
    "a text or a list of texts": "data_files roles_to_train",
    "a text or a mapping": "type",
    "a mapping": "roles",
    "a mapping to texts": "message_property_mappings",
}
TYPE_KINDS = {"a text": " ".join(f"field_{column}" for column in TYPE_COLUMNS)}
INFO_KINDS = {
    "a text": "file_name hf_hub_url subset split formatting",
    "true or false": "ranking",
    "a number": "num_samples",
    "a mapping to texts": "columns tags",
}
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
# their columns of an alpaca row -> ours
ALPACA_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
ALPACA_COLUMNS |= {"system": "system", "history": "history", "kto_tag": "label"}
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag")
SHAREGPT_TAGS = dict(zip(TAGS, ("from", "value", "human", "gpt"), strict=True))
OPENAI_TAGS = dict(zip(TAGS, ("role", "content", "user", "assistant"), strict=True))


def _check_kinds(mapping: Json, kinds: dict[str, str], where: str) -> None:
    """Raise InputError for a value of another kind than its key has."""
    for kind, keys in kinds.items():
        for key in keys.split():
            value = mapping.get(key)
            if value is not None and not _is_kind(value, kind):
                message = f"{key}: expected {kind}, found {value!r:.60}"
                raise InputError(message, where=where)


def _is_kind(value: Any, kind: str) -> bool:
    if isinstance(value, dict):
        is_plain = kind == "a mapping to texts" and is_text_mapping(value.values())
        return is_plain or kind in ("a mapping", "a text or a mapping")
    if kind == "true or false":
        return isinstance(value, bool)
    if kind == "a number":
        return is_number(value)
    is_list = kind == "a text or a list of texts" and is_texts(value)
    return is_list or (kind.startswith("a text") and is_text(value))


def _describe_format(row_format: str, columns: Mapping[str, Any]) -> Json:
    """Describe a row format, with the columns (ours -> theirs) whose names differ."""
    renamed = {ours: str(theirs) for ours, theirs in columns.items() if theirs and theirs != ours}
    return {"format": row_format} | ({"columns": renamed} if renamed else {})


def _make_hub_source(name: str, **keys: Any) -> Json | None:
    """Return the source of a data set of the hub, None for a name that is none.

    `keys` are revision, config, split and data_files; those that are not set are left out."""
    if not is_hub_id(name) or name.endswith(FILE_SUFFIXES):
        return None
    return {"path": f"hf://{name}"} | {key: value for key, value in keys.items() if value}


# ---------------------------------------------------------------- TRL


def translate_trl_data(draft: RecipeDraft) -> None:
    name = draft.pop_text("dataset_name")
    if name is None:
        return
    config = draft.pop_text("dataset_config")
    splits = {"data": draft.pop_text("dataset_train_split")}
    splits["eval_data"] = draft.pop_text("dataset_test_split")
    path = draft.find_path(name)
    if path is not None:
        draft.set_value("data", [{"path": path}], "dataset_name")
        return
    for key, split in splits.items():
        source = _make_hub_source(name, config=config, split=split)
        if source is not None and (split or key == "data"):
            draft.set_value(key, [source], "dataset_name")
    if "data" not in draft.values:
        draft.skip_key("dataset_name", name, HUB_REASON)
        draft.set_value("data", [{"path": f"{Path(name).name}.jsonl"}], "dataset_name")


# ---------------------------------------------------------------- Axolotl


def translate_axolotl_data(draft: RecipeDraft, key: str, to: str) -> None:
    entries = draft.pop_value(key)
    if not entries:
        return
    entries = [entries] if isinstance(entries, dict) else entries
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise draft.make_error(key, f"{key}: expected a list of mappings, each with a path")
    sources: list[Json] = []
    for index, entry in enumerate(entries):
        name = f"{key}[{index}]"
        where = f"{draft.document.format_location((key, index))}: {name}"
        _check_kinds(entry, ENTRY_KINDS, where)
        if isinstance(entry.get("type"), dict):
            _check_kinds(entry["type"], TYPE_KINDS, f"{where}.type")
        sources += _build_entry_sources(draft, name, dict(entry))
    draft.set_value(to, sources, key)


def _build_entry_sources(draft: RecipeDraft, name: str, entry: Json) -> list[Json]:
    """Build a source for each file of one entry."""
    path = str(entry.pop("path", None) or "")
    files = entry.pop("data_files", None)
    hub_source = None if draft.find_path(path) else _make_axolotl_hub_source(path, files, entry)
    has_pairs = draft.document.values.get("rl") not in (None, False, "", "kto")
    parse = _parse_pairs if has_pairs else _parse_format
    row_format = parse(draft, name, entry)
    _report_unsupported(draft, name, entry)
    if hub_source is not None:
        return [{**hub_source, **row_format}]
    files = [str(file) for file in files] if isinstance(files, list) else [str(files or path)]
    return [{"path": _resolve_file(draft, name, file, Path(path)), **row_format} for file in files]


def _make_axolotl_hub_source(path: str, files: Any, entry: Json) -> Json | None:
    """Return the source of a data set of the hub; a slice of a split stays to be reported."""
    split = entry.get("split")
    source = _make_hub_source(
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
    draft.skip_key(f"{name}.path", file, HUB_REASON)
    if Path(file).suffix in (".jsonl", ".json", ".csv", ".parquet", ".txt"):
        return file
    return f"{Path(file).name or name.partition('[')[0]}.jsonl"


def _report_unsupported(draft: RecipeDraft, name: str, entry: Json) -> None:
    roles: Json = entry.pop("roles", None) or {}
    role_names = {str(role) for names in roles.values() for role in wrap_list(names or ())}
    if not role_names <= ROLE_NAMES.keys():
        reason = f"supported roles: {', '.join(sorted(ROLE_NAMES))}"
        draft.skip_key(f"{name}.roles", roles, reason)
    _translate_roles(draft, f"{name}.roles_to_train", entry.pop("roles_to_train", None))
    for key, value in entry.items():
        if value not in (None, False) and DEFAULT_VALUES.get(key, "") not in (None, value):
            is_split = key == "split"
            reason = (
                "set max_examples, a number of rows" if is_split else "a source has no such key"
            )
            draft.skip_key(f"{name}.{key}", value, reason)


def _translate_roles(draft: RecipeDraft, key: str, roles: Any) -> None:
    """Translate the trained roles of an entry; a recipe has the same for all of them."""
    if roles is None or roles == ["assistant"]:
        return
    names = sorted({ROLE_NAMES.get(str(role), str(role)) for role in wrap_list(roles)})
    if not names or not set(names) <= set(ROLE_NAMES.values()):
        reason = f"supported roles: {', '.join(sorted(set(ROLE_NAMES.values())))}"
        draft.skip_key(key, roles, reason)
    elif draft.values.get("train_on", names) != names:
        draft.skip_key(key, roles, "a recipe trains the same roles of all data: set train_on")
    else:
        draft.set_value("train_on", names, key)


def _parse_format(draft: RecipeDraft, name: str, entry: Json) -> Json:
    """Return our format of the rows, and the columns whose names differ."""
    kind = entry.pop("type", None)
    if isinstance(kind, dict):
        return _parse_custom_type(draft, name, kind)
    base = str(kind or "").replace(":", ".").partition(".")[0]
    if base == "pretrain" or name.startswith("pretraining_dataset"):
        return _describe_format("text", {"text": entry.pop("text_column", None)})
    if base in ("chat_template", "sharegpt"):
        return _parse_messages(draft, name, base, entry)
    if base == "alpaca":
        draft.skip_key(f"{name}.type", kind, WORDING_REASON)
        return _describe_format("alpaca", {})
    if base == "completion":
        return _describe_format("text", {"text": entry.pop("field", None)})
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
    return _describe_format("preference", columns) if any(columns.values()) else {}


def _parse_messages(draft: RecipeDraft, name: str, base: str, entry: Json) -> Json:
    """Return the format of messages: OpenAI's role and content, or ShareGPT's from and value."""
    names: Json = entry.pop("message_property_mappings", None) or {}
    is_sharegpt = base == "sharegpt"
    default_fields = ("from", "value") if is_sharegpt else ("role", "content")
    role = entry.pop("message_field_role", None) or names.get("role") or default_fields[0]
    content = entry.pop("message_field_content", None) or names.get("content") or default_fields[1]
    default_field = "conversations" if is_sharegpt else "messages"
    field = entry.pop("field_messages", None) or default_field
    if (role, content) == ("from", "value"):
        return _describe_format("sharegpt", {"conversations": field})
    if (role, content) != ("role", "content"):
        draft.skip_key(f"{name}: names in a message", f"{role}, {content}", NAMES_REASON)
    return _describe_format("messages", {"messages": field})


def _parse_custom_type(draft: RecipeDraft, name: str, kind: Json) -> Json:
    """Return the columns of a custom type; sentences around them are not supported."""
    columns = {column: kind.pop(f"field_{column}", None) for column in TYPE_COLUMNS}
    for key, value in kind.items():
        if value and value not in ("{instruction}", "{instruction} {input}", "{system}"):
            draft.skip_key(f"{name}.type.{key}", value, WORDING_REASON)
    return _describe_format("alpaca", columns)


# ---------------------------------------------------------------- LLaMA-Factory


def translate_llamafactory_data(draft: RecipeDraft) -> None:
    folder = draft.pop_text("dataset_dir") or "data"
    max_samples = draft.pop_number("max_samples")
    for key, recipe_key in (("dataset", "data"), ("eval_dataset", "eval_data")):
        if names := draft.pop_texts(key):
            sources = [_build_source(draft, name, folder, max_samples) for name in names]
            note = f"{key}, max_samples" if max_samples else key
            draft.set_value(recipe_key, sources, note)


def _build_source(draft: RecipeDraft, name: str, folder: str, max_samples: float | None) -> Json:
    """Build the source of a data set from its entry in dataset_info.json."""
    info_file = _find_info_file(draft, folder)
    info = _read_entry(info_file, name)
    if info_file is None or info is None:
        reason = "not in dataset_info.json: set the path of its file"
        if info_file is None:
            reason = f"no dataset_info.json in {folder}/: set the path of its file"
        draft.skip_key(f"dataset {name}", name, reason)
        source: Json = {"path": name if Path(name).suffix else f"{name}.jsonl"}
        info = {}
    else:
        source = _locate_rows(draft, name, info, info_file.parent, folder)
        source |= _parse_info(draft, name, info)
    counts = [int(count) for count in (max_samples, info.get("num_samples")) if count]
    return source | ({"max_examples": min(counts)} if counts else {})


def _find_info_file(draft: RecipeDraft, folder: str) -> Path | None:
    for parent in (folder, ".", "data"):
        for base in (Path.cwd(), draft.config_path.absolute().parent):
            path = base / parent / "dataset_info.json"
            if os.path.isfile(path):
                return path
    return None


def _read_entry(file: Path | None, name: str) -> Json | None:
    content = read_json(file) if file else {}
    entry = content.get(name) if isinstance(content, dict) else None
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise InputError(f"{name}: expected a mapping", where=str(file))
    _check_kinds(entry, INFO_KINDS, f"{file}: {name}")
    return entry


def _locate_rows(draft: RecipeDraft, name: str, info: Json, parent: Path, folder: str) -> Json:
    """Return the file of a data set, or its name on the hub."""
    if "file_name" in info:
        file = str(info["file_name"])
        return {"path": draft.find_path(file, parent) or f"{folder}/{file}"}
    hub_name = str(info.get("hf_hub_url", ""))
    source = _make_hub_source(hub_name, config=info.get("subset"), split=info.get("split"))
    if source is not None:
        return source
    urls = (info.get(key) for key in ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url"))
    draft.skip_key(f"dataset {name}", next(filter(None, urls), info), HUB_REASON)
    return {"path": f"{name}.jsonl"}


def _parse_info(draft: RecipeDraft, name: str, info: Json) -> Json:
    columns: Json = info.get("columns") or {}
    stage = draft.document.values.get("stage") or "sft"
    _refuse_wrong_stage(draft, name, info, stage)
    if stage == "pt":
        return _describe_format("text", {"text": columns.get("prompt", "instruction")})
    if info.get("ranking"):
        return _parse_ranking(draft, name, info, columns)
    for kind in ("images", "videos", "audios"):
        if kind in columns:
            draft.skip_key(f"dataset {name}: {kind}", columns[kind], "only text is trained")
    if info.get("formatting", "alpaca") == "alpaca":
        alpaca = {ours: columns.get(theirs) for theirs, ours in ALPACA_COLUMNS.items()}
        return _describe_format("alpaca", alpaca)
    tags = SHAREGPT_TAGS | (info.get("tags") or {})
    messages = columns.get("messages", "conversations")
    system = columns.get("system")
    row_columns = {"tools": columns.get("tools"), "label": columns.get("kto_tag")}
    if SHAREGPT_TAGS.items() <= tags.items():
        sharegpt = {"conversations": messages, "system": system, **row_columns}
        return _describe_format("sharegpt", sharegpt)
    if not OPENAI_TAGS.items() <= tags.items():
        draft.skip_key(f"dataset {name}: tags", info.get("tags"), NAMES_REASON)
    if system:
        reason = "the system prompt must be the first message"
        draft.skip_key(f"dataset {name}: system", system, reason)
    return _describe_format("messages", {"messages": messages, **row_columns})


def _refuse_wrong_stage(draft: RecipeDraft, name: str, info: Json, stage: str) -> None:
    is_paired = bool(info.get("ranking"))
    if is_paired and stage not in ("dpo", "kto"):
        message = f"{name} has preference pairs, which need stage: dpo, not {stage}"
        raise draft.make_error("dataset", message)
    is_kto = "kto_tag" in (info.get("columns") or {})
    if stage == "kto" and not (is_kto or is_paired):
        raise draft.make_error("dataset", f"{name} has no labels (columns: kto_tag)")
    if (is_kto and stage != "kto") or (stage == "dpo" and not is_paired):
        raise draft.make_error("dataset", f"{name} has no preference pairs (ranking: true)")


def _parse_ranking(draft: RecipeDraft, name: str, info: Json, columns: Json) -> Json:
    sides = {side: columns.get(side, side) for side in ("chosen", "rejected")}
    prompt = columns.get("prompt", "instruction")
    if info.get("formatting", "alpaca") != "alpaca":
        prompt = columns.get("messages", "conversations")
        reason = "check the rows with `tunesmith data show`"
        draft.skip_key(f"dataset {name}: tags", info.get("tags"), reason)
    elif columns.get("query"):
        reason = "a pair has a single prompt: merge both into one column"
        draft.skip_key(f"dataset {name}: query", columns["query"], reason)
    return _describe_format("preference", {"prompt": prompt, **sides})
