"""What data sets of other tools become: sources of a recipe, with the format of their rows.

Axolotl lists its data sets with the type of their rows; LLaMA-Factory describes them in
dataset_info.json; TRL names one, or a mixture. Left out: all other keys (key_map.py)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from tunesmith.core.errors import InputError
from tunesmith.core.hub_names import FILE_SUFFIXES, is_hub_id
from tunesmith.core.json_io import read_json
from tunesmith.core.types import Json
from tunesmith.recipe.fields import wrap_list
from tunesmith.recipe.importers.draft import TABLE, ConfigKeys, RecipeDraft

NAME_KEYS = ("dataset_name", "dataset_id_or_path", "dataset_path")  # the latter of scripts
HUB_REASON = "not a local file: save its rows in the file that the recipe names"
NAMES_REASON = "a message must have role and content, or from and value"
WORDING_REASON = "the model's chat template formats the prompt, not Axolotl's sentences"
ROLE_NAMES = ("assistant", "gpt", "human", "system", "tool", "user")
TYPE_COLUMNS = ("instruction", "input", "output", "system")
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag")
SHAREGPT_TAGS = dict(zip(TAGS, ("from", "value", "human", "gpt"), strict=True))
OPENAI_TAGS = dict(zip(TAGS, ("role", "content", "user", "assistant"), strict=True))
ENTRY_KEYS: Json = TABLE["data_set_keys"]


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
    """Translate the data set, or the list of them in `datasets`, in `dataset_mixture` (a mapping
    with such a list) or in `dataset_mixer` (name -> share)."""
    test_split = draft.pop_text("dataset_test_split")
    keys = [key for key in NAME_KEYS if draft.remaining.get(key)]
    if name := draft.pop_text(keys[0] if keys else "dataset_name"):
        entry = {"path": name, "name": draft.pop_text("dataset_config")}
        entry["split"] = draft.pop_text("dataset_train_split")
        source = _make_trl_source(draft, keys[0], entry)
        draft.set_value("data", [source], keys[0])
        if test_split and source["path"].startswith("hf:"):
            draft.set_value("eval_data", [{**source, "split": test_split}], "dataset_name")
    mixture = draft.remaining.get("dataset_mixture")
    if isinstance(mixture, dict):
        draft.remaining["dataset_mixture"] = mixture.get("datasets")
        draft.remaining |= {k: mixture[k] for k in ("test_split_size",) if k in mixture}
        if mixture.get("seed") is not None:
            draft.skip_unneeded("dataset_mixture.seed", mixture["seed"], "one seed draws all")
    for key in ("datasets", "dataset_mixture", "dataset_mixer"):
        entries = draft.pop_value(key) or []
        if isinstance(entries, dict):
            entries = [{"path": name, "weight": share} for name, share in entries.items()]
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise draft.make_error(key, f"{key}: expected a list of mappings, each with a path")
        if entries:
            draft.set_value("data", [_make_trl_source(draft, key, e) for e in entries], key)


def _make_trl_source(draft: RecipeDraft, key: str, entry: Json) -> Json:
    """Return the source of a data set of TRL, or of the Alignment Handbook, whose keys differ."""
    keys = ConfigKeys(dict(entry), partial("{}: {}".format, draft.document.format_location((key,))))
    name = keys.pop_text("path") or keys.pop_text("id") or ""
    config = keys.pop_text("name") or keys.pop_text("config")
    split = keys.pop_text("split")
    files = keys.pop_texts("data_files")
    keys.pop_value("columns")  # the others are not read here, either
    if keys.remaining.get("weight") in (1, None):
        keys.pop_value("weight")
    for other, value in keys.remaining.items():
        draft.skip_key(f"{key}.{other} of {name}", value, "set max_examples, a number of rows")
    if path := draft.find_path(name):
        return {"path": path}
    if source := _make_hub_source(name, config=config, split=split, data_files=files):
        return source
    draft.skip_key(key, name, HUB_REASON)
    return {"path": f"{Path(name).name}.jsonl"}


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
        where = draft.document.format_location((key, index))
        keys = ConfigKeys(dict(entry), partial("{}: {}.{}".format, where, name))
        sources += _build_entry_sources(draft, name, keys)
    draft.set_value(to, sources, key)


def _build_entry_sources(draft: RecipeDraft, name: str, entry: ConfigKeys) -> list[Json]:
    """Build a source for each file of one entry."""
    path = entry.pop_text("path") or ""
    files = entry.pop_texts("data_files")
    hub_source = None if draft.find_path(path) else _make_axolotl_hub_source(path, files, entry)
    has_pairs = draft.document.values.get("rl") not in (None, False, "", "kto")
    parse = _parse_pairs if has_pairs else _parse_format
    row_format = parse(draft, name, entry)
    _report_unsupported(draft, name, entry.remaining)
    if hub_source is not None:
        return [{**hub_source, **row_format}]
    paths = [_resolve_file(draft, name, file, Path(path)) for file in files or [path]]
    return [{"path": file, **row_format} for file in paths]


def _make_axolotl_hub_source(path: str, files: list[str], entry: ConfigKeys) -> Json | None:
    """Return the source of a data set of the hub; a slice of a split stays to be reported."""
    source = _make_hub_source(path, data_files=files)
    if source is None:
        return None
    keys = {"revision": "revision"}
    if not files:
        keys |= {"config": "name"}
        if "[" not in str(entry.remaining.get("split")):
            keys |= {"split": "split"}
    values = {ours: entry.pop_text(theirs) for ours, theirs in keys.items()}
    return source | {key: value for key, value in values.items() if value}


def _resolve_file(draft: RecipeDraft, name: str, file: str, folder: Path) -> str:
    path = draft.find_path(file, folder) if file else None
    if path:
        return path
    draft.skip_key(f"{name}.path", file, HUB_REASON)
    if Path(file).suffix in (".jsonl", ".json", ".csv", ".parquet", ".txt"):
        return file
    return f"{Path(file).name or name.partition('[')[0]}.jsonl"


def _report_unsupported(draft: RecipeDraft, name: str, remaining: Json) -> None:
    roles = remaining.get("roles")
    names = list(chain(*map(wrap_list, roles.values()))) if isinstance(roles, dict) else []
    if names and all(role in ROLE_NAMES for role in names):
        del remaining["roles"]
    for key, value in remaining.items():
        default = ENTRY_KEYS["defaults"].get(key, "")
        if value not in (None, False) and default not in (None, value):
            reason = ENTRY_KEYS["reasons"].get(key, "a source has no such key")
            draft.skip_key(f"{name}.{key}", value, reason)


def _parse_format(draft: RecipeDraft, name: str, entry: ConfigKeys) -> Json:
    """Return our format of the rows, and the columns whose names differ."""
    kind = entry.remaining.get("type")
    if isinstance(kind, dict):
        del entry.remaining["type"]
        return _parse_custom_type(draft, name, ConfigKeys(dict(kind), entry.locate))
    kind = entry.pop_text("type")
    base = (kind or "").replace(":", ".").partition(".")[0]
    if base == "pretrain" or name.startswith("pretraining_dataset"):
        return _describe_format("text", {"text": entry.pop_text("text_column")})
    if base in ("chat_template", "sharegpt"):
        return _parse_messages(draft, name, entry, is_sharegpt=base == "sharegpt")
    if base == "alpaca":
        draft.skip_key(f"{name}.type", kind, WORDING_REASON)
        return _describe_format("alpaca", {})
    if base == "completion":
        return _describe_format("text", {"text": entry.pop_text("field")})
    if kind:
        draft.skip_key(f"{name}.type", kind, "unknown: the format is detected from the rows")
    return {}


def _parse_pairs(draft: RecipeDraft, name: str, entry: ConfigKeys) -> Json:
    """Return the columns of pairs; Axolotl's types only set the wording of the prompt."""
    kind = entry.remaining.pop("type", None)
    entry.pop_text_mapping("message_property_mappings")
    columns = {"prompt": entry.pop_text("field_messages") or entry.pop_text("field_prompt")}
    columns |= {side: entry.pop_text(f"field_{side}") for side in ("chosen", "rejected")}
    if str(kind or "").partition(".")[0] != "chat_template":
        draft.skip_key(f"{name}.type", kind, WORDING_REASON)
    return _describe_format("preference", columns) if any(columns.values()) else {}


def _parse_messages(draft: RecipeDraft, name: str, entry: ConfigKeys, *, is_sharegpt: bool) -> Json:
    """Return the format of messages: OpenAI's role and content, or ShareGPT's from and value."""
    names = entry.pop_text_mapping("message_property_mappings")
    role, content = ("from", "value") if is_sharegpt else ("role", "content")
    role = entry.pop_text("message_field_role") or names.get("role") or role
    content = entry.pop_text("message_field_content") or names.get("content") or content
    field = entry.pop_text("field_messages")
    field = field or ("conversations" if is_sharegpt else "messages")
    if (role, content) == ("from", "value"):
        return _describe_format("sharegpt", {"conversations": field})
    if (role, content) != ("role", "content"):
        draft.skip_key(f"{name}: names in a message", f"{role}, {content}", NAMES_REASON)
    return _describe_format("messages", {"messages": field})


def _parse_custom_type(draft: RecipeDraft, name: str, kind: ConfigKeys) -> Json:
    """Return the columns of a custom type; sentences around them are not supported."""
    columns = {column: kind.pop_text(f"field_{column}") for column in TYPE_COLUMNS}
    for key, value in kind.remaining.items():
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
        counts = [max_samples]
    else:
        counts = [max_samples, info.pop_number("num_samples")]
        source = _locate_rows(draft, name, info, info_file.parent, folder)
        source |= _parse_info(draft, name, info)
    limit = min((int(count) for count in counts if count), default=0)
    return source | ({"max_examples": limit} if limit else {})


def _find_info_file(draft: RecipeDraft, folder: str) -> Path | None:
    for parent in (folder, ".", "data"):
        for base in (Path.cwd(), draft.config_path.absolute().parent):
            path = base / parent / "dataset_info.json"
            if os.path.isfile(path):
                return path
    return None


def _read_entry(file: Path | None, name: str) -> ConfigKeys | None:
    content = read_json(file) if file else {}
    entry = content.get(name) if isinstance(content, dict) else None
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise InputError(f"{name}: expected a mapping", where=str(file))
    return ConfigKeys(entry, partial("{}: {}: {}".format, file, name))


def _locate_rows(
    draft: RecipeDraft, name: str, info: ConfigKeys, parent: Path, folder: str
) -> Json:
    """Return the file of a data set, or its name on the hub."""
    if file := info.pop_text("file_name"):
        return {"path": draft.find_path(file, parent) or f"{folder}/{file}"}
    hub_name = info.pop_text("hf_hub_url")
    parts = {"config": info.pop_text("subset"), "split": info.pop_text("split")}
    source = _make_hub_source(hub_name or "", **parts)
    if source is not None:
        return source
    urls = (info.remaining.get(key) for key in ("ms_hub_url", "om_hub_url", "script_url"))
    draft.skip_key(f"dataset {name}", hub_name or next(filter(None, urls), name), HUB_REASON)
    return {"path": f"{name}.jsonl"}


def _parse_info(draft: RecipeDraft, name: str, info: ConfigKeys) -> Json:
    columns = info.pop_text_mapping("columns")
    tags = info.pop_text_mapping("tags")
    is_alpaca = (info.pop_text("formatting") or "alpaca") == "alpaca"
    if (draft.document.values.get("stage") or "sft") == "pt":
        return _describe_format("text", {"text": columns.get("prompt", "instruction")})
    if info.remaining.get("ranking"):
        return _parse_ranking(draft, name, tags, columns, is_alpaca=is_alpaca)
    for kind in ("images", "videos", "audios"):
        if kind in columns:
            draft.skip_key(f"dataset {name}: {kind}", columns[kind], "only text is trained")
    if is_alpaca:
        alpaca = {ours: columns.get(theirs) for theirs, ours in ENTRY_KEYS["alpaca"].items()}
        return _describe_format("alpaca", alpaca)
    messages = columns.get("messages", "conversations")
    system = columns.get("system")
    row_columns = {"tools": columns.get("tools"), "label": columns.get("kto_tag")}
    all_tags = SHAREGPT_TAGS | tags
    if SHAREGPT_TAGS.items() <= all_tags.items():
        sharegpt = {"conversations": messages, "system": system, **row_columns}
        return _describe_format("sharegpt", sharegpt)
    if not OPENAI_TAGS.items() <= all_tags.items():
        draft.skip_key(f"dataset {name}: tags", tags, NAMES_REASON)
    if system:
        reason = "the system prompt must be the first message"
        draft.skip_key(f"dataset {name}: system", system, reason)
    return _describe_format("messages", {"messages": messages, **row_columns})


def _parse_ranking(
    draft: RecipeDraft, name: str, tags: Json, columns: Json, *, is_alpaca: bool
) -> Json:
    sides = {side: columns.get(side, side) for side in ("chosen", "rejected")}
    prompt = columns.get("prompt", "instruction")
    if not is_alpaca:
        prompt = columns.get("messages", "conversations")
        reason = "check the rows with `tunesmith data show`"
        draft.skip_key(f"dataset {name}: tags", tags or None, reason)
    elif columns.get("query"):
        reason = "a pair has a single prompt: merge both into one column"
        draft.skip_key(f"dataset {name}: query", columns["query"], reason)
    return _describe_format("preference", {"prompt": prompt, **sides})


# ---------------------------------------------------------------- ms-swift


def translate_swift_data(draft: RecipeDraft, key: str, to: str) -> None:
    """Translate data sets `name:subset#rows`, of ModelScope unless use_hf is set."""
    is_hf = draft.remaining.get("use_hf") is True
    sources: list[Json] = []
    for text in draft.pop_texts(key):
        name, _, limit = text.partition("#")
        name, _, config = name.removeprefix("HF::").partition(":")
        source = {"path": path} if (path := draft.find_path(name)) else None
        source = source or _make_hub_source(name, config=config)
        if source is None:
            draft.skip_key(key, name, HUB_REASON)
            source = {"path": name if Path(name).suffix else f"{Path(name).name}.jsonl"}
        elif source["path"].startswith("hf:") and not (is_hf or text.startswith("HF::")):
            draft.skip_key(key, name, "a data set of ModelScope: check that the hub has the same")
        sources.append(source | ({"max_examples": int(limit)} if limit.isdigit() else {}))
    if sources:
        draft.set_value(to, sources, key)
