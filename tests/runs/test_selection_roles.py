"""What each data role decides: test_data nothing, retention_data the limit of forgetting."""

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import build_sum_rows, make_tiny_recipe, read_adapter_bytes, train, write_rows
from tunesmith import api
from tunesmith.core.events import PROBE_TASK, Event, Score
from tunesmith.core.run_dir import read_run_record
from tunesmith.core.types import Json
from tunesmith.evaluate import measure
from tunesmith.evaluate.items import EvalItems
from tunesmith.recipe.schema import Recipe
from tunesmith.train.best_checkpoint import EvalPoint, select_best
from tunesmith.train.guard import guarded_loop

pytestmark = pytest.mark.promise


BOTH_ROLES = "the beginnings of a few of them limited which checkpoint could be chosen"


def make_selecting_recipe(model: Path, folder: Path, **changed: Any) -> Recipe:
    """A run that overfits its six rows, so that an early checkpoint is the best."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "eval_data": str(write_rows(folder / "eval.jsonl", build_sum_rows(700, 6))),
        "learning_rate": 0.05,
        "num_train_epochs": 8,
        "eval_steps": 2,
        "save_steps": 2,
        "metrics": ["exact_match"],
    }
    return make_tiny_recipe(model, folder, **(values | changed))


def write_test_rows(folder: Path, name: str, rows: list[Json]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    return str(write_rows(folder / f"{name}.jsonl", rows))


def select_decisions(events: list[Event]) -> list[Event]:
    """Return all that a choice is made from: every event between the first and the last step, but
    times and memory."""
    return [e for e in events if isinstance(e, Score) and e.task.startswith(("eval", PROBE_TASK))]


def test_no_choice_reads_test_data(tiny_folder: Path, tmp_path: Path) -> None:
    """The training rows themselves, or rows that training makes unlikely: the same checkpoint."""
    opposite: list[Json] = []
    for row in build_sum_rows(900, 6):
        opposite.append(
            {"messages": [row["messages"][0], {"role": "assistant", "content": "zzzz"}]}
        )
    recipes: list[Recipe] = []
    events: list[list[Event]] = []
    scores: list[float] = []
    for name, rows in (("easy", build_sum_rows(7, 6)), ("hard", opposite)):
        folder = tmp_path / name
        data = write_test_rows(folder, "test", rows)
        recipes.append(make_selecting_recipe(tiny_folder, folder, test_data=data))
        events.append(train(recipes[-1]))
        for comparison in read_run_record(folder / "run").comparisons:
            scores += [comparison.difference] if comparison.metric == "loss" else []
    assert scores[1] - scores[0] > 0.3, "training helps one set far more than the other"
    assert select_decisions(events[0]) == select_decisions(events[1])
    records = [read_run_record(tmp_path / name / "run") for name in ("easy", "hard")]
    assert records[0].selected_step == records[1].selected_step
    assert 0 < records[0].selected_step < records[0].steps, "a choice was made"
    assert read_adapter_bytes(recipes[0]) == read_adapter_bytes(recipes[1])


def test_what_is_measured_during_training_is_no_test_data(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows and prompts that reach the model while a choice is open."""
    data = write_test_rows(tmp_path, "test", build_sum_rows(900, 6))
    measured: list[str] = []
    original = measure.eval_during_training

    def record_items(session: Any, items: EvalItems, **keys: Any) -> Iterator[Event]:
        measured.extend(document.id for document in items.eval_documents)
        measured.extend(prompt.id for prompt in items.selection_prompts)
        return original(session, items, **keys)

    monkeypatch.setattr(guarded_loop, "eval_during_training", record_items)
    events = train(make_selecting_recipe(tiny_folder, tmp_path, test_data=data))
    assert measured
    assert not [row_id for row_id in measured if row_id.startswith("test.jsonl")]
    steps = [e.step for e in events if isinstance(e, Score) and e.task.startswith("test")]
    assert set(steps) == {0, max(steps)}, "measured before and after only"


def test_scores_of_other_tasks_choose_nothing() -> None:
    def make_scores(step: int, test_loss: float) -> list[Score]:
        values = {("eval", "loss"): 1 / step, ("test", "loss"): test_loss, ("test", "chrf"): 1.0}
        return [
            Score(task, metric, value, value, value, 9, step)
            for (task, metric), value in values.items()
        ]

    points: list[EvalPoint] = []
    for step, test_loss in ((1, 0.0), (2, 9.0)):
        point = EvalPoint.from_scores(step, make_scores(step, test_loss), ["chrf"])
        assert point is not None
        assert point.mean_metric is None
        points.append(point)
    best = select_best(points, 0.02)
    assert best is not None
    assert best.step == 2
    only_test = [score for score in make_scores(1, 0.0) if score.task == "test"]
    assert EvalPoint.from_scores(1, only_test, ["chrf"]) is None


@pytest.mark.parametrize(
    ("changed", "is_limited"),
    [({}, True), ({"guard": {"forgetting": "off"}}, False), ({"eval_data": None}, False)],
    ids=["eval_data", "guard off", "no eval_data"],
)
def test_the_report_names_both_roles_of_retention_data(
    tiny_folder: Path, tmp_path: Path, changed: Json, is_limited: bool
) -> None:
    texts = [{"text": f"text number {n}", "domain": "ab"[n % 2]} for n in range(12)]
    values = {
        "retention_data": write_test_rows(tmp_path, "general", texts),
        "test_data": write_test_rows(tmp_path, "test", build_sum_rows(900, 6)),
        "num_train_epochs": 1,
    }
    train(make_selecting_recipe(tiny_folder, tmp_path, **(values | changed)))
    page = Path(api.write_report(tmp_path / "run")).read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", html.unescape(page))
    assert (BOTH_ROLES in text) == is_limited


def test_without_test_data_the_eval_rows_are_measured_and_are_no_result(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """`none` holds nothing back: all of eval_data selects, and no verdict comes from it."""
    plain = make_selecting_recipe(tiny_folder, tmp_path / "plain")
    recipe = make_selecting_recipe(
        tiny_folder, tmp_path / "none", test_data="none", num_train_epochs=2
    )
    assert recipe.has_no_test
    assert not plain.has_no_test
    events = train(recipe)
    losses = [e for e in events if isinstance(e, Score) and (e.task, e.metric) == ("eval", "loss")]
    assert {score.n for score in losses} == {6}
    assert not [e for e in events if isinstance(e, Score) and e.task == "test"]
    assert isinstance(recipe.output_dir, Path)
    record = read_run_record(recipe.output_dir)
    comparison = next(c for c in record.comparisons if c.metric == "loss")
    assert (comparison.task, comparison.after.n) == ("eval", 6)
    by_step: dict[int, float] = {}
    for score in losses:
        by_step.setdefault(score.step, score.value)  # the last measures the selected step again
    assert comparison.after.value == pytest.approx(by_step[record.selected_step], rel=1e-5)
    assert record.verdict is not None
    assert record.verdict.name == "not measured"
    assert any("not an unbiased result" in warning for warning in record.plan.warnings)
    page = html.unescape(api.write_report(recipe.output_dir).read_text())
    assert "6 rows that also chose the checkpoint" in page
    assert "test rows were used once" not in page
    written = api.read_recipe(recipe.output_dir / "recipe.yaml")
    assert isinstance(written, Recipe)
    assert written.has_no_test, "it is no path"
