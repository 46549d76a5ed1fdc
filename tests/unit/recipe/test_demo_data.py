"""The embedded example: its files keep the promises of its documentation."""

from __future__ import annotations

import json
import re
from email.utils import parsedate_to_datetime

import jsonschema
import pytest
import yaml

from tunesmith.core.types import Json
from tunesmith.recipe.demo import DEMO_RECIPE
from tunesmith.recipe.schema import Recipe

FOLDER = DEMO_RECIPE.parent
SPLITS = ("train", "eval", "test")
FIELDS = ["package", "upstream", "revision", "date", "new_upstream", "upload", "closes"]


def lines_of(name: str) -> list[Json]:
    return [json.loads(line) for line in (FOLDER / name).read_text("utf-8").splitlines()]


def rows_of(split: str) -> list[tuple[str, Json]]:
    """(entry, answer) of each row."""
    rows = [row["messages"] for row in lines_of(f"{split}.jsonl")]
    return [(messages[1]["content"], json.loads(messages[2]["content"])) for messages in rows]


def family(package: str) -> str:
    return re.sub(r"[\d.]+.*$", "", re.sub(r"^(lib|python-)", "", package)).split("-")[0]


def triples(entry: str) -> set[str]:
    words = re.findall(
        r"[a-z]+|0", re.sub(r"\d+", "0", "\n".join(entry.splitlines()[1:-1]).lower())
    )
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def test_the_files_are_at_most_a_megabyte() -> None:
    assert (
        sum(
            path.stat().st_size
            for path in FOLDER.iterdir()
            if path.is_file() and path.suffix != ".py"
        )
        < 1_000_000
    )


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_a_system_a_user_and_an_assistant_message_with_one_system_prompt_for_all(
    split: str,
) -> None:
    rows = [row["messages"] for row in lines_of(f"{split}.jsonl")]
    assert {tuple(message["role"] for message in row) for row in rows} == {
        ("system", "user", "assistant")
    }
    assert {row[0]["content"] for row in rows} == {
        lines_of("train.jsonl")[0]["messages"][0]["content"]
    }
    assert all(field in rows[0][0]["content"] for field in FIELDS)


@pytest.mark.parametrize("split", SPLITS)
def test_answers_follow_the_schema_and_are_compact_json_in_one_order(split: str) -> None:
    validator = jsonschema.Draft202012Validator(
        json.loads((FOLDER / "schema.json").read_text("utf-8"))
    )
    for row in lines_of(f"{split}.jsonl"):
        text = row["messages"][2]["content"]
        answer = json.loads(text)
        assert list(answer) == FIELDS
        assert validator.is_valid(answer), text
        assert text == json.dumps(answer, separators=(",", ":"), ensure_ascii=False)


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_what_the_entry_says(split: str) -> None:
    for entry, answer in rows_of(split):
        head, *_, last = entry.splitlines()
        revision = "" if answer["revision"] is None else f"-{answer['revision']}"
        version = re.match(r"(\S+) \((?:\d+:)?(.*?)\) ", head)
        assert version is not None
        assert version.groups() == (answer["package"], answer["upstream"] + revision)
        assert parsedate_to_datetime(last.partition("  ")[2]).strftime("%Y-%m-%d") == answer["date"]
        phrases = [
            word
            for word in ("team upload", "non-maintainer upload", "nmu")
            if f"* {word}" in entry.lower()
        ]
        assert answer["upload"] == (
            {"team upload": "team"}.get(phrases[0], "nmu") if phrases else "maintainer"
        )
        assert answer["closes"] == sorted(answer["closes"])
        assert all(re.search(rf"\b{number}\b", entry) for number in answer["closes"])
        assert bool(answer["closes"]) == ("closes:" in entry.lower())


def test_no_source_family_is_in_two_splits() -> None:
    families = {
        split: {family(answer["package"]) for _, answer in rows_of(split)} for split in SPLITS
    }
    for first, second in (("train", "eval"), ("train", "test"), ("eval", "test")):
        assert not families[first] & families[second]


def test_no_two_entries_are_near_duplicates() -> None:
    everything = [triples(entry) for split in SPLITS for entry, _ in rows_of(split)]
    for position, words in enumerate(everything):
        assert all(
            len(words & second) < 0.6 * len(words | second) for second in everything[:position]
        )


def test_no_constant_answer_gets_a_field_right_on_most_rows() -> None:
    for field in FIELDS:
        values = [json.dumps(answer[field]) for _, answer in rows_of("test")]
        assert max(values.count(value) for value in set(values)) < 0.75 * len(values), field


def test_no_mail_address_remains() -> None:
    for path in FOLDER.glob("*.jsonl"):
        assert not re.search(r"[\w.+-]+@[\w-]+\.\w{2,}", path.read_text("utf-8")), path.name


def test_general_text_has_four_domains_and_no_row_of_the_task() -> None:
    rows = lines_of("general.jsonl")
    assert {row["domain"] for row in rows} == {"fiction", "dictionary", "reference", "code"}
    assert all(600 <= len(row["text"]) <= 1200 for row in rows)
    assert len({row["text"] for row in rows}) == len(rows) == 80
    assert not any("urgency=" in row["text"] for row in rows)


def test_origin_states_the_counts_of_rows_and_of_changelogs() -> None:
    origin = (FOLDER / "ORIGIN.md").read_text("utf-8")
    for split in SPLITS:
        assert f"| `{split}.jsonl` | {len(rows_of(split))} |" in origin
    assert f"| `general.jsonl` | {len(lines_of('general.jsonl'))} |" in origin


def test_notices_name_the_licence_of_every_changelog_and_hold_its_text() -> None:
    notices = (FOLDER / "NOTICES.txt").read_text("utf-8")
    named = dict(re.findall(r"^(\S+) \S+ \(package \S+\): (.+)$", notices, re.MULTILINE))
    packages = ", ".join(re.findall(r"^  entries of (.+)$", notices, re.MULTILINE)).split(", ")
    assert {answer["package"] for split in SPLITS for _, answer in rows_of(split)} == set(packages)
    texts = re.findall(r"^-{100}\n.*?: (.+)\n\n(\S.*)", notices, re.MULTILINE)
    assert sorted(name for names, _ in texts for name in names.split(", ")) == sorted(named)
    assert not any(re.search(r"GPL(?!-2\+$)", licence) for licence in named.values())


def test_the_recipe_is_valid_and_its_files_are_here() -> None:
    values = yaml.safe_load((FOLDER / "recipe.yaml").read_text("utf-8"))
    recipe = Recipe.model_validate(values)
    assert recipe.model == "smollm2-135m-instruct"
    for key in ("data", "eval_data", "test_data", "retention_data", "response_schema"):
        assert (FOLDER / values[key]).is_file(), key
