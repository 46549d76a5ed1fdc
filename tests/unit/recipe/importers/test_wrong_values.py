"""Values of another kind than a key has are translated or refused with their place, at every key
that an importer reads, nested ones too."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from trainer_configs import AXOLOTL, LLAMAFACTORY, TRL, write_config, write_datasets
from tunesmith.core.errors import InputError
from tunesmith.recipe.importers import convert, data_sets, key_map
from tunesmith.recipe.importers.convert import TOOLS, Translation, translate

WRONG_VALUES = (
    *(5, 1.5, True, "many", "", "x" * 5000, "\0", [], {}),
    *(["a"], [5, None], [["a"]], {"a": 5}, {"a": ["b"]}, [{"a": "b"}]),
)
ENTRY: dict[str, Any] = {"path": "a.jsonl", "type": "chat_template"}
INFO: dict[str, Any] = {"file_name": "a.json", "columns": {"prompt": "q"}}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def translated(text: str) -> Translation:
    return translate(write_config(Path.cwd(), text), Path.cwd() / "recipe.yaml")


def list_words(*modules: ModuleType) -> list[str]:
    """Return every word in the source that may be a key: the strings of words alone."""
    words: set[str] = set()
    for module in modules:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = node.value.split()
                if all(re.fullmatch("[a-z][a-z0-9_]*", word) for word in found):
                    words.update(found)
    return sorted(words)


def list_row_words(value: Any) -> set[str]:
    """Return every word in the rows of a tool that may be a key."""
    if isinstance(value, dict):
        return set().union(*map(list_row_words, [*value, *value.values()]))
    if isinstance(value, list):
        return set().union(*map(list_row_words, value))
    return set(value.split()) if isinstance(value, str) else set()


def place_in_entry(key: str, value: Any) -> Iterator[dict[str, Any]]:
    entries = [
        ENTRY | {key: value},
        ENTRY | {"type": {key: value}},
        ENTRY | {"message_property_mappings": {key: value}},
        ENTRY | {"roles": {key: value}},
    ]
    for entry in entries:
        yield {"datasets": [entry]}
    yield {"datasets": [ENTRY | {key: value}], "rl": "dpo"}


def place_in_info(key: str, value: Any) -> Iterator[dict[str, Any]]:
    for kind in ("alpaca", "sharegpt"):
        entry = INFO | {"formatting": kind}
        yield entry | {key: value}
        yield entry | {"ranking": True, key: value}
        yield entry | {"columns": {key: value}}
        yield entry | {"tags": {key: value}}


def is_refused(config: dict[str, Any]) -> bool:
    """Return whether a config is refused, with its place, not translated."""
    try:
        assert translated(yaml.safe_dump(config)).values["data"]
    except InputError as error:
        assert error.where  # noqa: PT017 - which of the two it is, is open
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "tool"), [(AXOLOTL, "Axolotl"), (LLAMAFACTORY, "LLaMA-Factory"), (TRL, "TRL")]
)
def test_wrong_values_of_every_key_are_translated_or_refused(text: str, tool: str) -> None:
    write_datasets(Path.cwd())
    config = yaml.safe_load(text)
    rows = TOOLS[tool]["rows"]
    keys = {*list_words(data_sets, key_map, convert), *list_row_words(rows)}
    (renamed,) = [row for row in rows if row["do"] == "rename"]
    assert {"tokens", "new_special_tokens", "lora_r", "datasets", "dataset"} & keys
    for key in sorted(keys):
        refused = [is_refused(config | {key: value}) for value in WRONG_VALUES]
        is_renamed = key in renamed["names"] or key in renamed["same"].split()
        assert any(refused) or not is_renamed, key


@pytest.mark.slow
def test_wrong_values_in_data_sets_of_axolotl() -> None:
    config = yaml.safe_load(AXOLOTL)
    num_refused = 0
    for key in list_words(data_sets):
        for value in WRONG_VALUES:
            for changes in place_in_entry(key, value):
                num_refused += is_refused(config | changes)
    assert num_refused > 100


@pytest.mark.slow
def test_wrong_values_in_dataset_info() -> None:
    config = yaml.safe_load(LLAMAFACTORY) | {"dataset": "odd"}
    file = Path.cwd() / "sets" / "dataset_info.json"
    file.parent.mkdir()
    num_refused = 0
    for key in list_words(data_sets):
        for value in WRONG_VALUES:
            for entry in place_in_info(key, value):
                file.write_text(json.dumps({"odd": entry}))
                num_refused += is_refused(config)
    assert num_refused > 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (AXOLOTL + "tokens: 5\n", "expected a list of texts, found 5"),
        (AXOLOTL + "lora_target_modules: 5\n", "expected a list of texts, found 5"),
        (AXOLOTL + "lora_modules_to_save: {a: 1}\n", "expected a list of texts, found {'a': 1}"),
        (LLAMAFACTORY + "new_special_tokens: true\n", "expected a list of texts, found True"),
        (
            "base_model: a\ndatasets: [{path: x, type: sharegpt, field_messages: [a]}]\n",
            "expected a text, found ['a']",
        ),
        ("base_model: a\npretraining_dataset: {path: c}\nsequence_len: [5]\n", "found [5]"),
    ],
)
def test_values_of_another_kind_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        translated(text)
    assert re.match(r"config\.yml:\d+", Path(raised.value.where).name)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"num_samples": "many"}, "expected a number, found 'many'"),
        ({"columns": ["a"]}, "expected a mapping to texts, found ['a']"),
        ({"columns": {"prompt": ["a"]}}, "expected a mapping to texts"),
        ({"tags": "x"}, "expected a mapping to texts, found 'x'"),
    ],
)
def test_entries_of_another_kind_are_refused(entry: dict[str, Any], message: str) -> None:
    file = Path.cwd() / "sets" / "dataset_info.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"tickets": INFO | entry}))
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        translated(LLAMAFACTORY)
    assert raised.value.where.endswith(f"dataset_info.json: tickets: {next(iter(entry))}")


def test_names_of_digits_stay_texts() -> None:
    config = yaml.safe_load(TRL) | {"dataset_name": "org/rows", "dataset_config": "20231101"}
    assert translated(yaml.safe_dump(config)).values["data"][0]["config"] == "20231101"
