"""Facts from flags, files, recipes and answers; what cannot be is refused with its place."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tunesmith
from tiny_runs import sums, write_rows
from tunesmith.advise.rules.questionnaire import Requirements, ask_questions, read_requirements
from tunesmith.cli import app
from tunesmith.cli.views.advice import render_advice
from tunesmith.core.errors import InputError


def told(**facts: Any) -> Requirements:
    return read_requirements(None, facts)


@pytest.mark.parametrize(
    ("facts", "name", "value"),
    [
        ({"need": "format, tone"}, "need", ("format", "tone")),
        ({"need": ["TONE", "facts"]}, "need", ("facts", "tone")),
        ({"need": ["persona", "json", "cost"]}, "need", ("format", "tone", "latency")),
        ({"need": "tone", "examples": "1,000"}, "examples", 1000),
        ({"need": "tone", "examples": 1_000}, "examples", 1000),
        ({"need": "domain", "raw_text": "1.5MB"}, "raw_text", 1_500_000),
        ({"need": "domain", "raw-text": 7}, "raw_text", 7),
        ({"need": "tone", "private": "yes"}, "private", True),
        ({"need": "tone", "--private": "true"}, "private", True),
        ({"need": "tone", "private": None}, "private", None),
        ({"need": "facts", "facts_change": "Daily"}, "facts_change", "daily"),
    ],
)
def test_values_are_understood(facts: dict[str, Any], name: str, value: Any) -> None:
    assert getattr(told(**facts), name) == value


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({}, r"advise: what is needed is not said"),
        ({"need": "tome"}, r"argument need: unknown need 'tome'; did you mean 'tone'"),
        ({"need": "xyzzy"}, r"there are facts, format, tone, latency, domain, skill"),
        ({"need": ","}, r"nothing is named"),
        ({"need": "tone", "exampels": 3}, r"unknown fact 'exampels'; did you mean 'examples'"),
        ({"need": "tone", "--examples": "-5"}, r"^--examples: -5 is less than nothing"),
        ({"need": "tone", "examples": True}, r"'True' is no whole number"),
        ({"need": "tone", "examples": 2.5}, r"'2.5' is no whole number"),
        ({"need": "tone", "examples": "9" * 16}, r"more than there can be"),
        ({"need": "tone", "prompt": "god"}, r"did you mean 'good'"),
        (
            {"need": "domain", "raw_text": "many"},
            r"'many' is no whole number; a size is written as 300KB",
        ),
        ({"need": "tone", "private": "maybe"}, r"'maybe' is neither yes nor no"),
        ({"need": "tone", "raw_text": 1, "raw-text": 2}, r"raw_text is given twice"),
        (
            {"need": "tone", "facts_change": "daily"},
            r"the facts change daily, but no facts are needed",
        ),
        ({"need": "tone", "paraphrases": 3}, r"no facts are needed"),
        ({"need": "latency", "requests_month": 0}, r"there are none"),
    ],
)
def test_what_cannot_be_is_refused(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        told(**facts)


# ---------------------------------------------------------------- files


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_file_tells_facts_and_arguments_win(tmp_path: Path) -> None:
    path = write(
        tmp_path / "facts.yaml",
        "need: [format, tone]\nexamples: 300\nprompt: close\nraw-text: 20MB\n",
    )
    assert read_requirements(path, {}) == Requirements(
        ("format", "tone"), examples=300, prompt="close", raw_text=20_000_000
    )
    assert read_requirements(path, {"examples": 5, "need": "skill"}).examples == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("need: tone\nexampels: 3\n", r"facts\.yaml:2: unknown fact 'exampels'"),
        ("need: tone\nexamples: -3\n", r"facts\.yaml:2: -3 is less than nothing"),
        ("need: tone\nneed: facts\n", r"facts\.yaml:2: 'need' stands here a second time"),
        ("- need\n", r"facts\.yaml:1: expected a mapping"),
        ("need: [tone\n", r"facts\.yaml:\d+:\d+: not YAML"),
        ("examples: 3\n", r"facts\.yaml: what is needed is not said"),
    ],
)
def test_a_file_that_is_none_is_refused_with_its_line(
    text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        read_requirements(write(tmp_path / "facts.yaml", text), {})


def test_the_rows_of_a_recipe_are_counted(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", sums(1, 60))
    recipe = write(tmp_path / "r.yaml", "model: none-that-exists\ndata: train.jsonl\n")
    assert read_requirements(recipe, {"need": "tone"}).examples == 60
    assert read_requirements(recipe, {"need": "tone", "examples": 60}).examples == 60
    with pytest.raises(InputError, match=r"examples is 7, and the data of .*r\.yaml has 60"):
        read_requirements(recipe, {"need": "tone", "examples": 7})
    with pytest.raises(InputError, match="what is needed is not said"):
        read_requirements(recipe, {})
    write(tmp_path / "r.yaml", "model: none-that-exists\ndata: train.jsonl\nmax_examples: 55\n")
    assert read_requirements(recipe, {"need": "tone"}).examples == 55


def test_of_a_recipe_for_continued_pretraining_the_text_is_counted(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / "a.txt", "a" * 700)
    write(tmp_path / "texts" / "b.md", "b" * 300)
    recipe = write(tmp_path / "r.yaml", "model: m\nstage: cpt\ndata: texts\n")
    found = read_requirements(recipe, {"need": "domain"})
    assert (found.raw_text, found.examples) == (1000, None)


def test_of_a_recipe_for_preferences_the_pairs_are_counted(tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)
    recipe = write(tmp_path / "r.yaml", "model: m\nstage: preference\ndata: pairs.jsonl\n")
    assert read_requirements(recipe, {"need": "tone"}).pairs == 3


def test_of_several_stages_all_is_counted(tmp_path: Path) -> None:
    write(tmp_path / "text.txt", "a" * 700)
    write_rows(tmp_path / "train.jsonl", sums(1, 60))
    stages = "stage: [{cpt: {data: text.txt}}, {sft: {data: train.jsonl}}]"
    recipe = write(tmp_path / "r.yaml", f"model: m\n{stages}\n")
    found = read_requirements(recipe, {"need": "domain"})
    assert (found.raw_text, found.examples) == (700, 60)


# ---------------------------------------------------------------- questions


def test_only_what_matters_is_asked_and_a_wrong_answer_is_asked_again() -> None:
    lines = iter(["", "tome", "tone", "300", "-1", "", "close", "no"])
    asked: list[str] = []
    complaints: list[str] = []
    facts = ask_questions(lambda question: asked.append(question) or next(lines), complaints.append)
    assert facts == {"need": ("tone",), "examples": 300, "prompt": "close", "private": False}
    assert read_requirements(None, facts) == Requirements(
        ("tone",), examples=300, prompt="close", private=False
    )
    assert [complaint.partition(";")[0] for complaint in complaints] == [
        "nothing is named: there are facts, format, tone, latency, domain, skill",
        "unknown need 'tome'",
        "-1 is less than nothing",
    ]
    assert len(asked) == 8
    assert not any("change" in question or "month" in question for question in asked)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        app.main(["advise", *words])
    return int(ended.value.code or 0)


@pytest.fixture(autouse=True)
def hook() -> Iterator[None]:
    kept = sys.excepthook  # main sets it: put it back
    yield
    sys.excepthook = kept


def test_the_command_line_asks_when_somebody_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("facts\nweekly\n2MB\n\n\n\nno\n"))
    assert run("--json") == 0
    out, err = capsys.readouterr()
    assert [step["approach"] for step in json.loads(out)["recommendations"]] == ["retrieval"]
    assert "How often do the facts change?" in err
    monkeypatch.setattr(sys, "stdin", Terminal("facts\n"))
    assert run() == 130
    monkeypatch.setattr(sys, "stdin", io.StringIO("facts\n"))
    assert run() == 2


def test_the_command_line_says_what_python_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write(tmp_path / "facts.yaml", "need: latency\nprompt: good\nexamples: 900\n")
    assert run(str(path), "--requests-month", "200", "--private", "--json") == 0
    out = json.loads(capsys.readouterr().out)
    advice = tunesmith.advise(path, requests_month=200, private=True)
    assert (out["verdict"], advice.verdict) == ("don't fine-tune", "don't fine-tune")
    assert out["requirements"]["requests_month"] == advice.requirements.requests_month == 200
    assert out["requirements"]["private"] is True
    assert run("--need", "tone", "--examples", "-1") == 2


def test_the_view_shows_reasons_what_was_ruled_out_and_what_would_change_it() -> None:
    text = io.StringIO()
    advice = tunesmith.advise(
        need=["facts", "tone"], facts_change="daily", examples=300, private=True
    )
    Console(file=text, width=400).print(render_advice(advice))
    shown = text.getvalue()
    assert shown.startswith("Fine-tune: prompt, retrieval, SFT\n")
    assert "(Ovadia 2023; published)" in shown
    assert "training of any kind, for facts" in shown
    assert "prompt: good -> don't fine-tune: prompt" in shown
    assert "not said" in shown
    assert shown.count("keep the trained model as secret as its text") == 1
