"""Which files of a data set repository are the rows of a split.

    choose_files(files, readme, HubChoice(split="train")) -> ("data/train-00000-of-00001.parquet",)

In: the names of its files and its README. Out: files that this package reads, in order. What
counts, first to last: `data_files` of the recipe, `configs` in the README, the words train,
validation and test in names of files or folders; files without any are the split train. These are
the rules of the `datasets` package (its documentation, "Structure your repository"). Refused by
name: loading scripts, which are code of a stranger, and files of other types. Left out: reaching
the hub (session/hub_data.py)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import PurePosixPath
from typing import Any, cast

import yaml

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.recipe.yaml_lines import load_yaml

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
METADATA_NAMES = ("dataset_infos.json", "dataset_dict.json", "dataset_info.json", "state.json")
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
DEFAULT_SPLIT = "train"
MAX_PATTERN_PARTS = 20
MAX_ANY_DEPTH = 3  # of ** in a pattern: each multiplies the comparisons
MAX_LISTED = 8
_SHARD = re.compile(r"(?:^|/)([\w.]+?)-\d{5}-of-\d{5}\.")
_WORD = re.compile(r"[a-z]+")
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class HubChoice:
    """The keys of a recipe that choose files. An empty one is not set."""

    config: str = ""
    split: str = ""
    data_files: tuple[str, ...] = ()


def choose_files(
    files: Sequence[str],
    readme: str,
    choice: HubChoice,
    *,
    where: str,
    default_split: str = DEFAULT_SPLIT,
) -> tuple[str, ...]:
    """Return the files to read.

    A split that the recipe does not name is `default_split`, or the only one. Raises InputError for
    what cannot be read, and lists what there is."""
    if choice.data_files:
        chosen = _match_files(files, choice.data_files, where)
    else:
        splits = _find_splits(files, readme, choice.config, where)
        chosen = splits[_choose_split(splits, choice.split, default_split, where)]
    _refuse_unreadable(chosen, where)
    return tuple(chosen)


def _choose_split(
    splits: Mapping[str, Sequence[str]], split: str, default_split: str, where: str
) -> str:
    if split in splits:
        return split
    if not split:
        if default_split in splits:
            return default_split
        if len(splits) == 1:
            return next(iter(splits))
    fix = f"set split: to one of {_list_names(splits)}, or name files in data_files"
    if "[" in split:
        message = f"slices of a split such as {split!r:.60} are not supported"
        raise InputError(message, where=where, fix="name the split, and set max_examples")
    message = f"the data set has no split {split!r:.60}" if split else "which split is not set"
    raise InputError(message, where=where, fix=fix)


# ---------------------------------------------------------------- splits


def _find_splits(
    files: Sequence[str], readme: str, config: str, where: str
) -> dict[str, list[str]]:
    """Return the files of each split."""
    configs = _read_configs(readme, where)
    if configs:
        return _read_config_splits(files, _choose_config(configs, config, where), where)
    if config:
        fix = "leave config out, or name files in data_files"
        raise InputError("the README of the data set lists no configs", where=where, fix=fix)
    data = [file for file in files if _is_data_file(file)]
    scripts = [file for file in files if file.endswith(".py") and "/" not in file]
    if scripts:
        message = f"a loading script makes its rows ({scripts[0]}); code from the hub is never run"
        fix = "name its data files in data_files, or use a copy of the data set without a script"
        raise InputError(message, where=where, fix=fix)
    if not data:
        message = f"no file that can be read: it has {_list_suffixes(files)}"
        fix = f"use a data set with {', '.join(DATA_SUFFIXES)} files"
        raise InputError(message, where=where, fix=fix)
    return _group_by_name(data)


def _group_by_name(files: Sequence[str]) -> dict[str, list[str]]:
    """Group files by the split in their name, else in their folders, else all as train."""
    shards = {file: match[1] for file in files if (match := _SHARD.search(file))}
    if shards:
        return _group(shards)
    for get_parts in (_get_stem, _get_folders):
        by_word: dict[str, str] = {}
        for file in files:
            words = _WORD.findall(get_parts(file).lower())
            split = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), "")
            if split:
                by_word[file] = split
        if by_word:
            return _group(by_word)
    return {DEFAULT_SPLIT: sorted(files)}


def _group(split_by_file: Mapping[str, str]) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for file, split in sorted(split_by_file.items()):
        splits.setdefault(split, []).append(file)
    return splits


def _get_stem(file: str) -> str:
    return PurePosixPath(file).name.partition(".")[0]


def _get_folders(file: str) -> str:
    return PurePosixPath(file).parent.as_posix()


# ---------------------------------------------------------------- configs of the README


def _read_configs(readme: str, where: str) -> list[Json]:
    """Return the `configs` of a README that name data files."""
    match = _FRONT_MATTER.match(readme.replace("\r\n", "\n"))
    if match is None:
        return []
    try:
        metadata = load_yaml(match[1])
    except (yaml.YAMLError, ValueError, RecursionError):
        fix = "name files in data_files"
        message = "the metadata at the top of its README.md are not valid YAML"
        raise InputError(message, where=where, fix=fix) from None
    configs: Any = metadata.get("configs") if isinstance(metadata, dict) else None
    if not isinstance(configs, list):
        return []
    items = cast("list[Any]", configs)
    return [item for item in items if isinstance(item, dict) and "data_files" in item]


def _choose_config(configs: Sequence[Json], config: str, where: str) -> Json:
    by_name = {str(each.get("config_name", "default")): each for each in configs}
    if config:
        if config in by_name:
            return by_name[config]
        message = f"the data set has no config {config!r:.60}"
        fix = f"set config: to one of {_list_names(by_name)}"
        raise InputError(message, where=where, fix=fix)
    defaults = [each for name, each in by_name.items() if each.get("default") is True]
    if len(by_name) == 1 or defaults:
        return defaults[0] if defaults else configs[0]
    if "default" in by_name:
        return by_name["default"]
    fix = f"set config: to one of {_list_names(by_name)}"
    raise InputError("the data set has several configs", where=where, fix=fix)


def _read_config_splits(files: Sequence[str], config: Json, where: str) -> dict[str, list[str]]:
    folder = str(config.get("data_dir") or "").strip("/")
    splits: dict[str, list[str]] = {}
    for split, patterns in _list_patterns(config["data_files"], where):
        full_patterns = [f"{folder}/{pattern}" if folder else pattern for pattern in patterns]
        splits[split] = _match_files(files, full_patterns, where)
    return splits


def _list_patterns(value: Any, where: str) -> list[tuple[str, list[str]]]:
    """Return (split, patterns) of `data_files`: a pattern, a list, or a list of {split, path}."""
    items: list[Any] = value if isinstance(value, list) else [value]
    if items and all(isinstance(item, str) for item in items):
        return [(DEFAULT_SPLIT, items)]
    patterns: list[tuple[str, list[str]]] = []
    for item in items:
        path = item.get("path") if isinstance(item, dict) else None
        paths: list[Any] = path if isinstance(path, list) else [path]
        if not all(isinstance(each, str) for each in paths):
            fix = "name files in data_files"
            message = "data_files in the metadata of its README.md are not patterns"
            raise InputError(message, where=where, fix=fix)
        patterns.append((str(item.get("split", DEFAULT_SPLIT)), paths))
    return patterns


# ---------------------------------------------------------------- patterns and file types


def _match_files(files: Sequence[str], patterns: Sequence[str], where: str) -> list[str]:
    """Return the files that match, in the order of the patterns; each pattern has one."""
    chosen: dict[str, None] = {}
    for pattern in patterns:
        parts = PurePosixPath(pattern.removeprefix("./")).parts
        if len(parts) > MAX_PATTERN_PARTS or parts.count("**") > MAX_ANY_DEPTH:
            message = f"the pattern {pattern!r:.80} is too long"
            raise InputError(message, where=where, fix="name the files in data_files")
        matches = [pattern] if pattern in files else []
        matches = matches or [file for file in sorted(files) if _match(file.split("/"), parts)]
        if not matches:
            readable = [file for file in files if _is_data_file(file)]
            fix = f"its data files are {_list_names(readable)}" if readable else "check data_files"
            raise InputError(f"no file matches {pattern!r:.80}", where=where, fix=fix)
        chosen.update(dict.fromkeys(matches))
    return list(chosen)


def _match(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """Match a path part by part: * stays in one, ** stands for any number of folders."""
    if not patterns:
        return not parts
    head, *rest = patterns
    if head == "**":
        return any(_match(parts[index:], rest) for index in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], head) and _match(parts[1:], rest)


def _get_suffix(file: str) -> str:
    return PurePosixPath(file.lower().removesuffix(".gz")).suffix


def _is_data_file(file: str) -> bool:
    is_hidden = any(part.startswith((".", "__")) for part in file.split("/"))
    is_metadata = PurePosixPath(file).name in METADATA_NAMES
    return not is_hidden and not is_metadata and _get_suffix(file) in DATA_SUFFIXES


def _refuse_unreadable(files: Sequence[str], where: str) -> None:
    """Raise InputError for files of other types, and of several: they may hold the same rows."""
    suffixes = sorted({_get_suffix(file) for file in files})
    unknown = [file for file in files if _get_suffix(file) not in DATA_SUFFIXES]
    if unknown:
        message = f"{unknown[0]} cannot be read"
        fix = f"use {', '.join(DATA_SUFFIXES)} files: name them in data_files"
        raise InputError(message, where=where, fix=fix)
    if len(suffixes) > 1:
        message = f"the split has files of several types, {' and '.join(suffixes)}"
        fix = f"name those of one type: data_files: '*{suffixes[0]}'"
        raise InputError(message, where=where, fix=fix)
    if suffixes == [".parquet"] and find_spec("pyarrow") is None:
        fix = "pip install '.[parquet]' in tunesmith's folder, or use a data set of .jsonl files"
        raise InputError("reading Parquet files needs pyarrow", where=where, fix=fix)


def _list_suffixes(files: Sequence[str]) -> str:
    suffixes = sorted({_get_suffix(file) or file for file in files if not file.startswith(".")})
    return _list_names([f"{suffix} files" if suffix[:1] == "." else suffix for suffix in suffixes])


def _list_names(names: Sequence[str] | Mapping[str, Any]) -> str:
    listed = ", ".join(list(names)[:MAX_LISTED]) or "no files"
    return listed + (", ..." if len(names) > MAX_LISTED else "")
