"""Named tasks in a run: tokens and scores by task, held-out tasks apart, and names that cannot
be."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tiny_runs import (
    build_sum_rows,
    make_chat_row,
    make_tiny_recipe,
    plan_recipe,
    read_adapter_bytes,
    run_until_saved,
    select_steps,
    train,
    write_rows,
)
from tunesmith.core.errors import InputError
from tunesmith.core.events import PROBE_TASK, Score
from tunesmith.core.json_io import parse_as, read_json
from tunesmith.core.types import Json, RunRecord
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs
from tunesmith.train import run

pytestmark = pytest.mark.promise


def echoes(first: int, count: int) -> list[Json]:
    return [make_chat_row(f"say {n}", f"{n}") for n in range(first, first + count)]


def source(path: Path, rows: list[Json], **more: Any) -> Json:
    path.parent.mkdir(parents=True, exist_ok=True)
    return {"path": str(write_rows(path, rows)), **more}


def wish(model: Path, folder: Path, **changed: Any) -> Recipe:
    """Two tasks that train, sums and echoes; a third one that is measured only."""
    values = {
        "data": [
            source(folder / "a.jsonl", build_sum_rows(1, 4), name="sums"),
            source(folder / "echo.jsonl", echoes(1, 2)),
        ],
        "test_data": [
            source(folder / "b.jsonl", build_sum_rows(50, 3), name="sums"),
            source(folder / "c.jsonl", echoes(50, 2), name="echo"),
            source(
                folder / "d.jsonl",
                [make_chat_row(f"twice {n}", f"{n} {n}") for n in range(3)],
                name="twice",
            ),
        ],
    }
    return make_tiny_recipe(model, folder, **(values | changed))


def test_tokens_and_scores_are_counted_by_task(tiny_folder: Path, tmp_path: Path) -> None:
    events = train(wish(tiny_folder, tmp_path))
    record = parse_as(RunRecord, read_json(tmp_path / "run" / "record.json"))
    report = record.plan.data["data"]
    assert report.task_rows == {"sums": 4, "echo": 2}
    assert record.task_tokens == report.task_tokens
    assert (
        sum(record.task_tokens.values())
        == record.tokens
        == sum(step.tokens for step in select_steps(events))
    )
    names = ["sums", "echo", "mean of tasks", "twice (held out)"]
    actual = {(item.task, item.metric): item.after.n for item in record.comparisons}
    expected = [(f"test: {name}", metric) for metric in ("exact_match", "loss") for name in names]
    assert list(actual) == expected
    assert list(actual.values()) == [3, 2, 5, 3] * 2
    assert [after.id for _, after in record.samples] == ["b.jsonl:1", "c.jsonl:1", "d.jsonl:1"], (
        "one of each task"
    )
    remaining = read_json(tmp_path / "run" / "eval_after.json")["samples"]
    assert (
        len(remaining)
        == len({sample["id"] for sample in remaining})
        == sum(record.plan.data["test_data"].task_rows.values())
    )


def test_a_split_keeps_the_tasks(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [
        source(tmp_path / "in/a.jsonl", build_sum_rows(1, 60), name="sums"),
        source(tmp_path / "in/b.jsonl", echoes(1, 60)),
    ]
    events = train(
        wish(tiny_folder, tmp_path, data=rows, test_data=[], eval_split=0.5, max_steps=1)
    )
    scores = [event for event in events if isinstance(event, Score) and event.step == 1]
    looked_at = {score.task for score in scores if score.task != PROBE_TASK}
    names = ("sums", "b", "mean of tasks")
    assert looked_at == {f"{role}: {name}" for role in ("eval", "test") for name in names}


def test_without_names_nothing_is_divided(tiny_folder: Path, tmp_path: Path) -> None:
    files = [
        source(tmp_path / "in" / name, build_sum_rows(first, 3))
        for name, first in (("a.jsonl", 1), ("b.jsonl", 9))
    ]
    test = [
        source(tmp_path / "in" / name, build_sum_rows(first, 2))
        for name, first in (("c.jsonl", 50), ("d.jsonl", 60))
    ]
    events = train(wish(tiny_folder, tmp_path, data=files, test_data=test))
    assert {event.task for event in events if isinstance(event, Score)} == {"test"}
    assert not any(step.task_tokens for step in select_steps(events))


def test_a_held_out_task_that_shares_rows_with_training_is_refused(
    tiny_folder: Path, tmp_path: Path
) -> None:
    test = [source(tmp_path / "new.jsonl", [*echoes(90, 2), *build_sum_rows(2, 1)], name="new")]
    with pytest.raises(
        InputError,
        match=r"1 of 3 held-out 'new' rows is also in data: new.jsonl:3 is a.j",
    ):
        inputs.load_inputs(wish(tiny_folder, tmp_path, test_data=test))


def test_a_task_of_one_row_is_refused_before_anything_is_trained(
    tiny_folder: Path, tmp_path: Path
) -> None:
    test = [
        source(tmp_path / "in/b.jsonl", build_sum_rows(50, 3), name="sums"),
        source(tmp_path / "one.jsonl", echoes(50, 1)),
    ]
    with pytest.raises(InputError, match="1 row of task 'one'"):
        train(wish(tiny_folder, tmp_path, test_data=test))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"data": [{"path": "a.jsonl", "name": "x"}, {"path": "x.jsonl"}]},
            "data has the task 'x' twice",
        ),
        ({"test_data": [{"path": "b.jsonl", "name": "a[b"}]}, "a name has letters, digits"),
        (
            {"stage": "cpt", "batch_size": "auto"},
            "data: name and prompts have no effect with stage: cpt",
        ),
        (
            {"data": [{"path": "a.jsonl", "name": "rehearsal"}], "rehearsal": {"data": "c.jsonl"}},
            "the name 'rehearsal' is reserved for rehearsal rows",
        ),
    ],
    ids=["twice", "brackets", "texts", "rehearsal"],
)
def test_names_that_cannot_be(
    changed: Json, message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=message.replace("[", r"\[")):
        wish(tiny_folder, tmp_path, **changed)


MIXED = {
    "mixture": {"limit": 3, "temperature": 2},
    "batch_size": 1,
    "save_steps": 3,
    "num_train_epochs": 2,
}


def test_a_mixture_has_its_shares_and_is_planned(tiny_folder: Path, tmp_path: Path) -> None:
    events = train(wish(tiny_folder, tmp_path, **MIXED))
    record = parse_as(RunRecord, read_json(tmp_path / "run" / "record.json"))
    assert record.plan.config.mixture == {"sums": 3, "echo": 2}
    assert "sums 60% of the rows" in record.plan.reasons["mixture"].reason
    assert Counter(task for step in select_steps(events) for task in step.task_tokens) == {
        "sums": 6,
        "echo": 4,
    }
    assert record.plan.steps == 10
    planned = 2 * record.plan.tokens_per_epoch
    assert record.tokens == pytest.approx(planned, rel=0.1), (
        "rows of a task are not all of one length"
    )


def test_a_mixture_goes_on_to_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    straight, broken = (
        wish(tiny_folder, tmp_path / name, **MIXED) for name in ("straight", "broken")
    )
    events = train(straight)
    run_until_saved(run.train(plan_recipe(broken)), step=6)
    again = list(run.resume(tmp_path / "broken" / "run"))
    assert [step.task_tokens for step in select_steps(again)] == [
        step.task_tokens for step in select_steps(events)
    ][6:]
    assert read_adapter_bytes(broken) == read_adapter_bytes(straight)


def test_rehearsal_keeps_its_share_of_a_mixture(tiny_folder: Path, tmp_path: Path) -> None:
    texts = source(tmp_path / "texts.jsonl", [{"text": f"general text {n}"} for n in range(30)])
    train(wish(tiny_folder, tmp_path, **MIXED, rehearsal={"data": texts["path"], "ratio": 0.5}))
    record = parse_as(RunRecord, read_json(tmp_path / "run" / "record.json"))
    assert record.task_tokens["rehearsal"] / record.tokens == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(
    "mixture", [{"limit": 0}, {"temperature": 0}, {"temperature": -1}, {"limit": True}, {"rate": 1}]
)
def test_mixtures_that_cannot_be(mixture: Json, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=f"mixture.{next(iter(mixture))}"):
        wish(tiny_folder, tmp_path, mixture=mixture)


def test_held_out_rows_are_asked_as_their_task_is(tiny_folder: Path, tmp_path: Path) -> None:
    """Forms with examples too: the same before and after, and after a resume."""
    rows = [{"a": n, "b": n + 1, "completion": str(2 * n + 1)} for n in range(12)]
    forms = ["{a} and {b}", {"prompt": "{a}+{b}=", "shots": 1}]
    files = {
        "data": [source(tmp_path / "in/a.jsonl", rows[:8], name="sums", prompts=forms)],
        "test_data": [source(tmp_path / "in/b.jsonl", rows[8:], name="sums")],
        "save_steps": 2,
    }
    straight, broken = (
        wish(tiny_folder, tmp_path / name, **files) for name in ("straight", "broken")
    )
    run_inputs = inputs.load_inputs(straight)
    requested = [run_inputs.datasets["test_data"].read_example(row).messages for row in range(4)]
    assert {len(messages) for messages in requested} == {2, 4}
    train(straight)
    run_until_saved(run.train(plan_recipe(broken)), step=2)
    list(run.resume(tmp_path / "broken" / "run"))
    assert read_adapter_bytes(broken) == read_adapter_bytes(straight)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("no place", r"no \{column\}"),
        ("{a:>3}", r"a placeholder is \{column\}"),
        ("{a", "expected '}'"),
        ("{}", "a placeholder is"),
        ("{completion}", "which is the answer"),
        ({"prompt": "{a}", "shots": -1}, "shots"),
    ],
)
def test_prompts_that_cannot_be(
    prompts: Any, message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=message):
        wish(tiny_folder, tmp_path, data=[{"path": "a.jsonl", "prompts": prompts}])
