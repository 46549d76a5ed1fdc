"""The foreign tasks of benchmarks/tasks: files divided by group, the same bytes each time."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks.tasks.build import build
from benchmarks.tasks.make import SECTIONS, TASKS, extract_fields, label_by_hash
from benchmarks.tasks.page import write_page
from benchmarks.tasks.run import spoil
from benchmarks.tasks.sources import INDEX, strip_roff


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """An index of 60 packages of 30 sources, and a page of man with two prototypes."""
    records = [
        f"Package: lib{i}\nSource: source{i // 2}\nSection: {SECTIONS[i % 8]}\n"
        f"Description: a program with the number {i} of this index"
        for i in range(60)
    ]
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / INDEX).write_text("\n\n".join(records), encoding="utf-8")
    pages = folder / "manpages-dev/usr/share/man/man3"
    pages.mkdir(parents=True)
    (pages / "strtok.3.gz").write_text(MAN_PAGE, encoding="utf-8")
    return folder


MAN_PAGE = r""".SH NAME
strtok, strtok_r \- extract tokens from strings
.SH SYNOPSIS
.nf
.B #include <string.h>
.P
.BI "char *strtok(char *_Nullable restrict " str ", const char *restrict " delim );
.fi
"""


def read_rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_a_task_has_no_group_in_two_files_and_the_same_bytes_again(packages: Path, tmp_path: Path):
    task = replace(TASKS["sections"], train=16, test=6, per_group=2, per_label=3)

    folder = build("sections", task, packages, tmp_path / "one")
    again = build("sections", task, packages, tmp_path / "two")

    groups: list[set[str]] = []
    for name, count in (("train.jsonl", 16), ("test.jsonl", 6)):
        rows = read_rows(folder / name)
        assert len(rows) == count
        assert (folder / name).read_bytes() == (again / name).read_bytes()
        groups.append({row["id"].partition("/")[0] for row in rows})
    assert not groups[0] & groups[1]
    assert max(Counter(row["completion"] for row in rows).values()) == 1  # 3 of 16, 1 of 6
    recipe = (folder / "recipe.yaml").read_text("utf-8")
    assert recipe == "model: smollm2-135m-instruct\ndata: train.jsonl\ntest_data: test.jsonl\n"


def test_too_few_rows_are_refused(packages: Path, tmp_path: Path):
    task = replace(TASKS["sections"], train=100)

    with pytest.raises(ValueError, match="rows for test, 100 are needed"):
        build("sections", task, packages, tmp_path)


def test_a_prototype_becomes_its_parts(packages: Path):
    ((group, row),) = extract_fields(packages)

    messages = row["messages"]
    assert isinstance(messages, list)
    question, answer = messages
    assert group == "strtok.3"
    assert question["content"].endswith("delim);")
    assert json.loads(answer["content"]) == {
        "function": "strtok",
        "returns": "char *",
        "header": "string.h",
        "parameters": ["str", "delim"],
        "pointers": 2,
        "variadic": False,
    }


def test_a_label_by_hash_does_not_depend_on_the_word(tmp_path: Path):
    data = tmp_path / "wordnet-base/usr/share/wordnet/data.noun"
    data.parent.mkdir(parents=True)
    gloss = "a plant or animal that is atypically small"
    lines = [f"0000 03 n 01 {word} 0 | {gloss}; more" for word in ("dwarf", "midget")]
    data.write_text("\n".join(["  1 a license", *lines]), encoding="utf-8")

    labels = [row["completion"] for _, row in label_by_hash(tmp_path)]

    assert len(labels) == 2
    assert labels[0] == labels[1]


def test_roff_becomes_text():
    assert strip_roff('.\\" a comment\nThe\n.BR strtok ()\nfunction \\fIbreaks\\fP.\n.P\nNext') == (
        "The strtok() function breaks.\n\nNext"
    )


def test_the_page_counts_harm_and_forecasts_that_held(tmp_path: Path):
    change = {"metric": "test exact_match", "difference": -0.2, "low": -0.3, "high": -0.1}
    score = {"metric": "test exact_match", "before": 0.0, "after": 0.9, "n": 100}
    default = {"arm": "default", "exit": 0, "minutes": 5.0, "scores": [score], "verdict": "ready"}
    default["date"] = "2026-12-03"
    step = {**default, "arm": "step 1", "reason": "train longer", "command": "tunesmith train r"}
    step |= {"metric": "test exact_match", "low": -0.05, "high": 0.1}
    step["against"] = [{**change, "verdict": "seed noise unknown"}]
    step["measured"] = {"held": False, "worse": ["test exact_match"]}
    step["measured"] |= {"steps": [20, 20], "seconds": [60.0, 66.0]}
    page = tmp_path / "tasks.md"

    write_page(page, "| tasks |\n", [{"task": "tools", "arms": [default, step], "guard": []}])

    text = page.read_text("utf-8")
    assert "1 steps that train: 1 made a graded metric significantly worse" in text
    assert "0 of 1 forecasts held the change" in text
    assert "forecast: 20 steps, 60 s; it took 20, 66 s" in text
    assert "| -0.050 to +0.100 | -0.200 [-0.300, -0.100], seed noise unknown |" in text


def test_spoiled_rows_have_the_answers_of_other_rows(tmp_path: Path):
    rows = [{"id": f"a/{i}", "prompt": f"p{i}", "completion": f"c{i}"} for i in range(9)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    spoil(tmp_path, "shuffled answers")
    shuffled = read_rows(tmp_path / "spoiled.jsonl")
    spoil(tmp_path, "one row")
    repeated = read_rows(tmp_path / "spoiled.jsonl")

    assert [row["prompt"] for row in shuffled] == [row["prompt"] for row in rows]
    assert sorted(row["completion"] for row in shuffled) == [f"c{i}" for i in range(9)]
    assert shuffled != rows
    assert {row["prompt"] for row in repeated} == {"p0"}
