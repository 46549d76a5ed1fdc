"""Facts from flags, files, recipes and answers; invalid ones are refused with their location."""

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
from tiny_runs import build_sum_rows, write_rows
from tunesmith.advise.rules.facts import Requirements
from tunesmith.advise.rules.requirements import read_requirements
from tunesmith.cli import app
from tunesmith.cli.views.advice import render_advice
from tunesmith.core.errors import InputError


def read_facts(**facts: Any) -> Requirements:
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
        ({"need": "tools"}, "need", ("tool-calling",)),
        ({"need": "on-device", "params": "1.5B"}, "params", 1_500_000_000),
        ({"need": "on-device", "device_memory": "8GB"}, "device_memory", 8_000_000_000),
        ({"need": "tone", "--private": "true"}, "private", True),
        ({"need": "tone", "private": None}, "private", None),
        ({"need": "facts", "facts_change": "Daily"}, "facts_change", "daily"),
    ],
)
def test_values_are_parsed(facts: dict[str, Any], name: str, value: Any) -> None:
    assert getattr(read_facts(**facts), name) == value


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({}, r"advise: 'need' is missing"),
        ({"need": "tome"}, r"argument need: unknown need 'tome'; did you mean 'tone'"),
        ({"need": "xyzzy"}, r"choose from facts, format, tone, latency, domain, skill, safety"),
        ({"need": ","}, r"no need is named"),
        ({"need": "tone", "exampels": 3}, r"unknown fact 'exampels'; did you mean 'examples'"),
        ({"need": "tone", "--examples": "-5"}, r"^--examples: -5 is negative"),
        ({"need": "tone", "examples": True}, r"'True' is not a whole number"),
        ({"need": "tone", "examples": 2.5}, r"'2.5' is not a whole number"),
        ({"need": "tone", "examples": "9" * 16}, r"is too large"),
        ({"need": "tone", "prompt": "god"}, r"did you mean 'good'"),
        (
            {"need": "domain", "raw_text": "many"},
            r"'many' is not a whole number; write a size as 300KB",
        ),
        ({"need": "on-device", "params": 7}, r"'7' is not a model size; write 135M or 7B"),
        ({"need": "tone", "private": "maybe"}, r"'maybe' is neither yes nor no"),
        ({"need": "tone", "raw_text": 1, "raw-text": 2}, r"duplicate fact 'raw_text'"),
        (
            {"need": "tone", "facts_change": "daily"},
            r"facts_change is daily, but 'facts' is not needed",
        ),
        ({"need": "tone", "paraphrases": 3}, r"'facts' is not needed"),
        ({"need": "latency", "requests_month": 0}, r"requests_month is 0"),
    ],
)
def test_invalid_facts_are_refused(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_facts(**facts)


# ---------------------------------------------------------------- files


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_arguments_win_over_a_file(tmp_path: Path) -> None:
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
        ("need: tone\nexamples: -3\n", r"facts\.yaml:2: -3 is negative"),
        ("need: tone\nneed: facts\n", r"facts\.yaml:2: duplicate key 'need'"),
        ("- need\n", r"facts\.yaml:1: expected a mapping"),
        ("need: [tone\n", r"facts\.yaml:\d+:\d+: not YAML"),
        ("examples: 3\n", r"facts\.yaml: 'need' is missing"),
    ],
)
def test_an_invalid_file_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        read_requirements(write(tmp_path / "facts.yaml", text), {})


def test_the_rows_of_a_recipe_are_counted(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", build_sum_rows(1, 60))
    recipe = write(tmp_path / "r.yaml", "model: none-that-exists\ndata: train.jsonl\n")
    assert read_requirements(recipe, {"need": "tone"}).examples == 60
    assert read_requirements(recipe, {"need": "tone", "examples": 60}).examples == 60
    with pytest.raises(InputError, match=r"examples is 7, but the data of .*r\.yaml has 60"):
        read_requirements(recipe, {"need": "tone", "examples": 7})
    with pytest.raises(InputError, match="'need' is missing"):
        read_requirements(recipe, {})
    write(tmp_path / "r.yaml", "model: none-that-exists\ndata: train.jsonl\nmax_examples: 55\n")
    assert read_requirements(recipe, {"need": "tone"}).examples == 55


def test_bytes_are_counted_for_continued_pretraining(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / "a.txt", "a" * 700)
    write(tmp_path / "texts" / "b.md", "b" * 300)
    recipe = write(tmp_path / "r.yaml", "model: m\nstage: cpt\ndata: texts\n")
    requirements = read_requirements(recipe, {"need": "domain"})
    assert (requirements.raw_text, requirements.examples) == (1000, None)


def test_pairs_are_counted_for_preference_training(tmp_path: Path) -> None:
    write_rows(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)
    recipe = write(tmp_path / "r.yaml", "model: m\nstage: preference\ndata: pairs.jsonl\n")
    assert read_requirements(recipe, {"need": "tone"}).pairs == 3


def test_several_stages_are_summed(tmp_path: Path) -> None:
    write(tmp_path / "text.txt", "a" * 700)
    write_rows(tmp_path / "train.jsonl", build_sum_rows(1, 60))
    stages = "stage: [{cpt: {data: text.txt}}, {sft: {data: train.jsonl}}]"
    recipe = write(tmp_path / "r.yaml", f"model: m\n{stages}\n")
    requirements = read_requirements(recipe, {"need": "domain"})
    assert (requirements.raw_text, requirements.examples) == (700, 60)


# ---------------------------------------------------------------- the command line


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        app.main(["advise", *arguments])
    return int(exit_info.value.code or 0)


@pytest.fixture(autouse=True)
def restore_excepthook() -> Iterator[None]:
    original = sys.excepthook  # main replaces it
    yield
    sys.excepthook = original


def test_without_facts_the_missing_one_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert "'need' is missing" in capsys.readouterr().err


def test_the_command_line_agrees_with_python(
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


def test_the_view_shows_reasons_objections_and_counterfactuals() -> None:
    text = io.StringIO()
    advice = tunesmith.advise(
        need=["facts", "tone"], facts_change="daily", examples=300, private=True
    )
    Console(file=text, width=400).print(render_advice(advice))
    output = text.getvalue()
    assert output.startswith("Fine-tune: prompt, retrieval, SFT\n")
    assert "(Ovadia 2023 (2312.05934); published)" in output
    assert "training of any kind, for facts" in output
    assert "prompt: good -> don't fine-tune: prompt" in output
    assert "assumed" in output
    assert output.count("keep the trained model as confidential as its training text") == 1
