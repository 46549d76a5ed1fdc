"""What `metrics: auto` means for answers of strangers."""

import json
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import make_tiny_recipe, plan_recipe, write_rows
from tunesmith.core.types import PlanValue

OBJECT = '{"name": "find", "year": %d}'


def plan_metrics(model: Path, folder: Path, answers: list[str], **changed: Any) -> PlanValue:
    """Plan a run whose last six rows are held out."""
    rows = [{"prompt": f"What is {i}?", "completion": text} for i, text in enumerate(answers)]
    changed["data"] = write_rows(folder / "data.jsonl", rows[:-6])
    changed["test_data"] = write_rows(folder / "test.jsonl", rows[-6:])
    recipe = make_tiny_recipe(model, folder, metrics="auto", **changed)
    return plan_recipe(recipe).settings["metrics"]


@pytest.mark.parametrize(
    ("answers", "metrics"),
    [
        (["yes", "no"] * 20, ("accuracy", "macro_f1", "multiple_choice")),
        ([OBJECT % i for i in range(40)], ("field_f1", "json_valid")),
        ([json.dumps([i, i + 1]) for i in range(40)], ("field_f1", "json_valid")),
        (["none"] * 3 + [OBJECT % i for i in range(37)], ("field_f1", "json_valid")),
        ([OBJECT % i for i in range(39)] + ["none"], ("chrf",)),  # a test row that is no JSON
        ([f"list the {i} files of a folder" for i in range(40)], ("chrf",)),
        ([f"\u6587\u4ef6\u5939\u4e2d\u7684\u6587\u4ef6{i}" for i in range(40)], ("chrf",)),
        ([f"the {i} files" for i in range(40)], ("exact_match",)),
        ([f"{i} * 3 = {i * 3}" for i in range(40)], ("exact_match",)),
        (["NaN"] * 3 + [f'{{"n": NaN, "i": {i}}}' for i in range(37)], ("chrf",)),
    ],
)
def test_auto_metrics_follow_the_answers(
    answers: list[str], metrics: tuple[str, ...], tiny_folder: Path, tmp_path: Path
) -> None:
    assert plan_metrics(tiny_folder, tmp_path, answers).value == metrics


def test_the_reason_names_what_was_seen(tiny_folder: Path, tmp_path: Path) -> None:
    texts = [f"list the {i} files of a folder" for i in range(40)]
    assert "7 words or more" in plan_metrics(tiny_folder, tmp_path, texts).reason


def test_a_schema_makes_the_fields_decide(tiny_folder: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    answers = [OBJECT % i for i in range(40)]
    setting = plan_metrics(tiny_folder, tmp_path, answers, response_schema=schema)
    assert setting.value == ("field_f1", "schema_valid", "json_valid")


def test_a_gate_on_exact_match_has_it_measured(tiny_folder: Path, tmp_path: Path) -> None:
    gates = {"test/exact_match": ">= 0.8"}
    setting = plan_metrics(tiny_folder, tmp_path, [OBJECT % i for i in range(40)], gates=gates)
    assert setting.value == ("field_f1", "json_valid", "exact_match")
