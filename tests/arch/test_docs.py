"""The pages say what the program says: the table of keys is made from the schema, every verb has a
page."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from tunesmith.cli import app
from tunesmith.core.types import Json
from tunesmith.recipe.explain import describe_schema
from tunesmith.recipe.fields import (
    Constraint,
    DataSource,
    GuardConfig,
    MixtureConfig,
    PairLoss,
    PromptForm,
    RehearsalConfig,
)
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.schema import ALIASES, KEYS, build_recipe_schema

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# the guide of a verb, where it has not the verb's name
PAGES = {
    "tune lr": "guides/tune",
    "eval": "guides/evaluate",
    "compare": "guides/evaluate",
    "resume": "guides/train",
    "demo": "guides/train",
    "data check": "guides/data",
    "data show": "guides/data",
    "data curate": "guides/data",
    "data review": "guides/data",
    "data reviewed": "guides/data",
    "data export-reviews": "guides/data",
    "data import-reviews": "guides/data",
    "data lock": "guides/data",
    "data split": "guides/data",
    "schema": "reference/recipe",
}


def test_the_table_of_keys_is_the_schema() -> None:
    """After a change of a key: put the lines that this compares with into the page."""
    page = (DOCS / "reference" / "recipe.md").read_text()
    assert tables(page)[0] == key_table()
    assert tables(page)[1] == inner_table(DataSource)
    assert tables(page)[2] == inner_table(RehearsalConfig)
    assert tables(page)[3] == inner_table(Constraint)
    assert tables(page)[4] == inner_table(MixtureConfig)
    assert tables(page)[5] == inner_table(PromptForm)
    assert tables(page)[6] == inner_table(PairLoss)
    assert tables(page)[7] == inner_table(GuardConfig)


def key_table() -> list[str]:
    properties = build_recipe_schema()["properties"]
    aliases = {key: [alias for alias, of in ALIASES.items() if of == key] for key in KEYS}
    lines = ["| key | takes | if left out | what it is | also called |", "|---|---|---|---|---|"]
    return lines + [row(key, properties[key], names(aliases[key])) for key in KEYS]


def inner_table(model: type[BaseModel]) -> list[str]:
    properties = model.model_json_schema()["properties"]
    return ["| key | takes | if left out | what it is |", "|---|---|---|---|"] + [
        row(k, v) for k, v in properties.items()
    ]


def row(key: str, schema: Json, *more: str) -> str:
    default = schema.get(
        "default", "needed" if key in ("model", "data", "path", "match", "prompt") else None
    )
    cells = [f"`{key}`", takes(schema), shown(default), schema["description"].rstrip("."), *more]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def takes(schema: Json) -> str:
    if schema.get("type") == "object":
        return "a mapping"
    return re.sub(r"'([a-z0-9_-]+)'", r"`\1`", describe_schema(schema)).removesuffix(" or null")


def shown(default: object) -> str:
    if default in (None, [], {}):
        return "-"
    return str(default).lower() if isinstance(default, bool) else str(default)


def names(aliases: list[str]) -> str:
    return ", ".join(f"`{alias}`" for alias in aliases)


def tables(page: str) -> list[list[str]]:
    return [
        block.strip().splitlines()
        for block in re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE)
    ]


@pytest.mark.parametrize("page", ["README.md", "docs/reference/recipe.md"])
def test_the_recipes_of_the_pages_load(page: str, tmp_path: Path) -> None:
    blocks = re.findall(
        r"^```yaml\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL
    )
    assert blocks
    for block in blocks:
        (tmp_path / "recipe.yaml").write_text(block)
        assert load_recipe(tmp_path / "recipe.yaml")


# ---------------------------------------------------------------- pages


def test_every_verb_has_a_page_with_its_options() -> None:
    for name, verb in app.VERBS.items():
        page = (DOCS / f"{PAGES.get(name, f'guides/{name}')}.md").read_text()
        assert f"tunesmith {name}" in page, name
        positional = {"args", "folder", "path", "as_json", "from_config", "target", "a", "b"}
        options = set(inspect.signature(verb).parameters) - positional
        assert {
            option for option in options if f"--{option.replace('_', '-')}" not in page
        } == set(), name


def test_every_page_is_in_the_index_and_every_link_leads_somewhere() -> None:
    index = (DOCS / "index.md").read_text()
    for page in DOCS.rglob("*.md"):
        name = str(page.relative_to(DOCS))
        assert name == "index.md" or f"({name})" in index, name
    for page in [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("page", ["design/faults.md", "security.md", "guides/export.md"])
def test_every_test_that_a_page_names_exists(page: str) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (DOCS / page).read_text())
    assert named
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), flags=re.MULTILINE), (
            f"{page}: {file}::{test}"
        )


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_every_output_is_there(page: Path) -> None:
    """A line of capitals alone stands for output that is still to be put in."""
    assert not re.findall(r"^[A-Z]+(?:_[A-Z]+)+$", page.read_text(), flags=re.MULTILINE)
