"""The commented recipe names every key, and every line of it is valid when switched on."""

from __future__ import annotations

import re
from pathlib import Path

import jsonschema
import yaml

from tunesmith.core.json_io import read_json
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.schema import KEYS, Recipe
from tunesmith.recipe.template import build_commented_recipe, write_recipe


def test_it_has_every_key_with_its_default() -> None:
    text = build_commented_recipe(model="tiny", data="a.jsonl")
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    assert re.findall(r"^(?:# )?([a-z_]+): ", text, flags=re.MULTILINE) == list(KEYS)
    assert all(len(line) < 150 for line in text.splitlines())


def test_switching_every_line_on_changes_nothing(tmp_path: Path) -> None:
    text = build_commented_recipe(model="tiny", data="a.jsonl")
    (tmp_path / "r.yaml").write_text(re.sub(r"^# (?=[a-z_]+: )", "", text, flags=re.MULTILINE))
    loaded_recipe = load_recipe(tmp_path / "r.yaml")
    assert loaded_recipe == Recipe.model_validate({"model": "tiny", "data": tmp_path / "a.jsonl"})


def test_the_written_schema_accepts_it(tmp_path: Path) -> None:
    written = write_recipe(tmp_path / "recipe.yaml", model="tiny: [odd] #name", data="a b.jsonl")
    values = yaml.safe_load(written.recipe.read_text())
    assert values == {"model": "tiny: [odd] #name", "data": "a b.jsonl"}
    jsonschema.validate(values, read_json(written.schema))
