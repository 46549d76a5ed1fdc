"""Absolute gates of a recipe: parsed, refused early, judged by value, and obeyed by the verbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tiny_runs import (
    build_sum_rows,
    make_tiny_recipe,
    plan_recipe,
    save_model_folder,
    write_rows,
)
from tunesmith.cli.app import main
from tunesmith.core.errors import InputError
from tunesmith.core.events import Score
from tunesmith.evaluate.regression_gate import build_limit_gates
from tunesmith.recipe.metric_limits import (
    list_reversed_limits,
    parse_limits,
    refuse_useless_limits,
)
from tunesmith.recipe.schema import Recipe


def score(value: float, low: float, high: float, n: int = 50, task: str = "test") -> Score:
    return Score(task, "exact_match", value, low, high, n, 3)


@pytest.mark.parametrize(
    ("text", "value", "is_held"),
    [
        (">= 0.8", 0.8, True),
        (">=0.8", 0.79, False),
        ("> 0.8", 0.8, False),
        ("> .8", 0.81, True),
        ("<= 8e-1", 0.8, True),
        ("< 0.8", 0.8, False),
        ("  < -0.5 ", -0.6, True),
    ],
)
def test_a_limit_is_a_comparison_of_the_value(text: str, value: float, is_held: bool) -> None:
    (limit,) = parse_limits({"exact_match": text})
    (gate,) = build_limit_gates([score(value, value - 0.01, value + 0.01)], [limit])
    assert gate.passed == is_held


@pytest.mark.parametrize(
    "text", ["0.8", "= 0.8", "== 0.8", ">= high", ">= nan", ">= inf", ">= 1e999", "", ">= 0.8%"]
)
def test_what_is_no_comparison_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match=r"not a comparison.*write exact_match"):
        Recipe.model_validate({"model": "m", "data": "d.jsonl", "gates": {"exact_match": text}})


@pytest.mark.parametrize("gates", [{"exact_match": 0.8}, {"exact_match": None}, ["a"], ">= 1"])
def test_what_is_no_text_is_refused(gates: Any) -> None:
    with pytest.raises(ValidationError):
        Recipe.model_validate({"model": "m", "data": "d.jsonl", "gates": gates})


def test_an_interval_beyond_the_limit_is_named_and_passes() -> None:
    limits = parse_limits({"exact_match": ">= 0.8"})
    (clear,) = build_limit_gates([score(0.9, 0.82, 0.95)], limits)
    (unclear,) = build_limit_gates([score(0.85, 0.7, 0.93)], limits)
    (missed,) = build_limit_gates([score(0.75, 0.6, 0.9)], limits)
    assert (clear.passed, unclear.passed, missed.passed) == (True, True, False)
    assert clear.message.endswith(": held")
    assert unclear.message.endswith("the interval reaches beyond the limit")
    assert missed.message.endswith(": not held")
    assert (unclear.bound, unclear.margin) == (0.7, 0.8)
    (upper,) = build_limit_gates([score(0.1, 0.0, 0.3)], parse_limits({"exact_match": "< 0.2"}))
    assert (upper.passed, upper.bound) == (True, 0.3)


def test_too_few_items_and_what_is_not_measured_fail() -> None:
    limits = parse_limits({"exact_match": ">= 0.8"})
    (few,) = build_limit_gates([score(1.0, 0.5, 1.0, n=4)], limits)
    assert not few.passed
    assert few.message.endswith("too few items to tell")
    (absent,) = build_limit_gates([], limits)
    assert not absent.passed
    assert absent.message == "not measured"


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("exact_match", ["test", "test: french", "sft test"]),
        ("test/exact_match", ["test", "sft test"]),
        ("test exact_match", ["test", "sft test"]),
        ("test: french/exact_match", ["test: french"]),
        ("french/exact_match", ["test: french"]),
        ("chrf", []),
    ],
)
def test_a_name_selects_tasks(name: str, tasks: list[str]) -> None:
    (limit,) = parse_limits({name: ">= 0.8"})
    all_tasks = ["test", "test: french", "sft test"]
    assert [task for task in all_tasks if limit.is_limit_of(task, "exact_match")] == tasks


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("exact_mach", r"did you mean exact_match\?"),
        ("test/exact_mach", r"did you mean exact_match\?"),
        ("chrf", "use exact_match, m.py:score, "),
        ("xexact_match", r"did you mean exact_match\?"),
        ("says ai", "did you mean breaks ai|use "),
        ("preference_accuracy", "use "),
    ],
)
def test_metrics_that_are_not_measured_are_refused(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=rf"not measured by this run[\s\S]*{hint}"):
        refuse_useless_limits(
            {name: "> 0"}, stage="sft", metrics=["exact_match", "a/m.py:score"], constraints=[]
        )


def test_metrics_that_are_measured_are_accepted() -> None:
    names = ["exact_match", "test/exact_match", "loss", "general text/bits_per_byte"]
    names += ["m.py:score", "breaks ai", "eliciting prompts/breaks ai"]
    metrics = ["exact_match", "a/m.py:score"]
    limits = dict.fromkeys(names, "> 0")
    refuse_useless_limits(limits, stage="sft", metrics=metrics, constraints=["ai"])
    with pytest.raises(InputError, match="'breaks ai' is not measured"):
        refuse_useless_limits(limits, stage="sft", metrics=metrics, constraints=[])


@pytest.mark.parametrize(
    ("name", "text", "meant"),
    [
        ("exact_match", "<= 0.8", ">= 0.8"),
        ("test/exact_match", "< 0.8", "> 0.8"),
        ("says ai", "<= 0.5", ">= 0.5"),
        ("chosen_logp", "<= -2", ">= -2"),
        ("loss", ">= 0.8", "<= 0.8"),
        ("general text/bits_per_byte", "> 1.2", "< 1.2"),
        ("breaks ai", ">= 0.05", "<= 0.05"),
        ("breaks ai margin", ">= 0.05", "<= 0.05"),
        ("rejected_logp", ">= -2", "<= -2"),
    ],
)
def test_a_limit_that_passes_worse_models_is_warned_about(name: str, text: str, meant: str) -> None:
    (warning,) = list_reversed_limits({name: text})
    assert "passes worse models" in warning
    assert warning.endswith(f'did you mean "{meant}"?')
    assert list_reversed_limits({name: meant, "m.py:loss": ">= 1", "a/m.py:score": "<= 1"}) == []


def test_the_plan_warns_about_a_reversed_limit(tmp_path: Path) -> None:
    model = save_model_folder(tmp_path / "model")
    recipe = make_tiny_recipe(model, tmp_path, gates={"loss": ">= 0.8"})
    assert [w for w in plan_recipe(recipe).warnings if w.startswith("gates: loss >= 0.8 passes")]


@pytest.mark.parametrize("name", ["exact_match", "test/chrf", "preference_accuracy", "breaks ai"])
def test_a_grade_lies_from_0_to_1(name: str) -> None:
    def refuse(name: str, text: str) -> None:
        metrics = ("exact_match", "chrf", "m.py:score")
        refuse_useless_limits(
            {name: text}, stage="preference", metrics=metrics, constraints=["ai", "ai margin"]
        )

    for text in (">= 1", "<= 0", "> 0.8"):
        refuse(name, text)
    for text in (">= 80", "< -0.1"):
        with pytest.raises(InputError, match="lies from 0 to 1"):
            refuse(name, text)
    with pytest.raises(InputError, match="lies from 0 to 1"):
        refuse("breaks ai margin", ">= 80")
    for metric in ("loss", "margin", "bits_per_byte", "rejected_logp", "bad_logp", "m.py:score"):
        refuse(metric, ">= 80")
        refuse(metric, "< -2")


def test_two_names_of_a_metric_cannot_both_have_a_limit() -> None:
    gates = {"normalised_match": ">= 0.8", "normalized_match": ">= 0.1"}
    with pytest.raises(ValidationError, match="two limits are for normalized_match"):
        Recipe.model_validate({"model": "m", "data": "d.jsonl", "gates": gates})


def test_the_plan_refuses_a_limit_in_percent(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = make_tiny_recipe(
        tiny_folder, tmp_path, metrics=["exact_match"], gates={"exact_match": ">= 80"}
    )
    with pytest.raises(InputError, match="gates: exact_match lies from 0 to 1") as refused:
        plan_recipe(recipe)
    assert refused.value.fix == 'write exact_match: ">= 0.8"'


def test_the_plan_refuses_what_is_not_measured(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = make_tiny_recipe(tiny_folder, tmp_path, gates={"chrf": "> 0"})
    with pytest.raises(InputError, match="gates: 'chrf' is not measured"):
        plan_recipe(recipe)


@pytest.mark.promise
def test_train_and_eval_exit_with_4_if_a_limit_is_not_held(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = write_rows(tmp_path / "test.jsonl", build_sum_rows(200, 6))
    recipe = {
        "model": str(tiny_folder),
        "data": str(write_rows(tmp_path / "train.jsonl", build_sum_rows(0, 10))),
        "test_data": str(test),
        "max_steps": 1,
    }

    def run_verb(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out + captured.err

    for name, limit, code in (("held", "<= 0.9", 0), ("missed", ">= 0.8", 4)):
        settings = recipe | {"gates": {"exact_match": limit}, "output_dir": str(tmp_path / name)}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(settings))
        exit_code, printed = run_verb("train", str(tmp_path / f"{name}.yaml"))
        assert exit_code == code, printed
        assert (tmp_path / name / "record.json").exists(), "the run is finished"
        assert (tmp_path / name / "report.html").exists()
    exit_code, printed = run_verb("eval", str(tmp_path / "missed"), "--gate")
    assert exit_code == 4
    assert "test exact_match limit" in " ".join(printed.split())
    assert run_verb("eval", str(tmp_path / "missed"))[0] == 0
