"""An adaptive rehearsal ratio: it follows what is measured, says so, and goes on to the same
bytes."""

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tiny_runs import (
    make_tiny_recipe,
    plan_recipe,
    read_adapter_bytes,
    run_until_saved,
    select_steps,
    train,
    write_eval_files,
    write_rows,
)
from tunesmith.core.errors import Interrupted
from tunesmith.core.events import CheckResult, Event, Score, TrainStep
from tunesmith.core.types import Json
from tunesmith.plan.rehearsal import compute_next_ratio
from tunesmith.recipe.schema import Recipe
from tunesmith.train import run

pytestmark = pytest.mark.promise


# What rows in ASCII unlearn.
TEXTS: list[Json] = [{"text": f"{chr(0x3041 + n)}ぁい" + "うえお" * (1 + n % 4)} for n in range(20)]
GENERAL: list[Json] = [{"text": "おえういあ" * n} for n in (2, 3)]


def wish(model: Path, folder: Path, **changed: Any) -> Recipe:
    """Twelve steps, a look every second one, a checkpoint every fourth; at this rate much is
    forgotten."""
    folder.mkdir(parents=True, exist_ok=True)
    rehearsal = {"data": str(write_rows(folder / "texts.jsonl", TEXTS)), "ratio": "adaptive"}
    retention = {"retention_data": str(write_rows(folder / "general.jsonl", GENERAL))}
    values = {
        "rehearsal": rehearsal,
        "num_train_epochs": 4,
        "save_steps": 4,
        "eval_steps": 2,
        "learning_rate": 0.03,
    }
    return make_tiny_recipe(model, folder, **(values | retention | changed))


def messages(events: Sequence[Event]) -> list[tuple[int, str]]:
    """(step, new ratio) of every look that decided one."""
    return [
        (event.step, event.evidence.rpartition("-> ")[2])
        for event in events
        if isinstance(event, CheckResult) and event.kind == "rehearsal"
    ]


def signalled(events: Iterator[Event], step: int) -> Iterator[Event]:
    """SIGINT comes right after a step."""
    for event in events:
        yield event
        if isinstance(event, TrainStep) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("ratio", "lost", "then"),
    [
        (0.1, 0.021, 0.2),
        (0.3, 0.5, 0.5),
        (0.6, 0.5, 0.6),
        (0.1, 0.019, 0.1),
        (0.1, 0.006, 0.1),
        (0.1, 0.004, 0.05),
        (0.015, -0.1, 0.01),
        (0.0, -0.1, 0.0),
    ],
)
def test_the_ratio_follows_the_loss_within_bounds(ratio: float, lost: float, then: float) -> None:
    assert compute_next_ratio(ratio, lost, margin=0.02) == then


def test_what_is_forgotten_raises_the_ratio_from_the_next_step_on(
    tiny_folder: Path, tmp_path: Path
) -> None:
    other = str(
        write_rows(tmp_path / "other.jsonl", [{"text": "more and more" * n} for n in range(1, 9)])
    )
    no_help = {"rehearsal": {"data": other, "ratio": "adaptive"}, "learning_rate": 0.01}
    events = train(wish(tiny_folder, tmp_path, **no_help))
    looks = [(2, "20.0%"), (4, "40.0%"), (6, "50.0%"), (8, "50.0%"), (10, "50.0%")]
    assert messages(events) == looks, "none after the last step, which nothing follows"
    warned = next(
        e
        for e in events
        if isinstance(e, CheckResult) and e.kind == "rehearsal" and e.level == "warn"
    )
    assert "bits per byte, over the margin of 0.02: " in warned.evidence
    fixed = train(
        wish(tiny_folder, tmp_path / "fixed", rehearsal={"data": other}, learning_rate=0.01)
    )
    assert select_steps(events)[1].loss == select_steps(fixed)[1].loss, "begins as auto does"
    more, less = (
        sum(step.task_tokens.get("rehearsal", 0) for step in select_steps(run))
        for run in (events, fixed)
    )
    assert more > 2 * less


def test_what_is_kept_lowers_it(tiny_folder: Path, tmp_path: Path) -> None:
    looks = messages(train(wish(tiny_folder, tmp_path, learning_rate=1e-9)))
    assert [ratio for _, ratio in looks] == ["5.0%", "2.5%", "1.2%", "1.0%", "1.0%"]


@pytest.mark.parametrize("step", [4, 8])
def test_a_run_goes_on_to_the_same_bytes_and_the_same_ratios(
    step: int, tiny_folder: Path, tmp_path: Path
) -> None:
    straight, broken = (wish(tiny_folder, tmp_path / name) for name in ("straight", "broken"))
    events = train(straight)
    run_until_saved(run.train(plan_recipe(broken)), step)
    again = list(run.resume(tmp_path / "broken" / "run"))
    assert messages(again) == [look for look in messages(events) if look[0] > step]
    assert read_adapter_bytes(broken) == read_adapter_bytes(straight)


def test_a_signal_between_a_step_and_its_look_loses_no_look(
    tiny_folder: Path, tmp_path: Path
) -> None:
    straight, broken = (wish(tiny_folder, tmp_path / name) for name in ("straight", "broken"))
    events = train(straight)
    with pytest.raises(Interrupted):
        list(signalled(run.train(plan_recipe(broken)), step=6))
    again = list(run.resume(tmp_path / "broken" / "run"))
    assert messages(again) == [look for look in messages(events) if look[0] >= 6]
    assert read_adapter_bytes(broken) == read_adapter_bytes(straight)


def test_there_must_be_something_to_follow(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="adaptive needs retention_data, which it follows"):
        wish(tiny_folder, tmp_path, retention_data=None)


def test_general_text_is_tracked_beside_graded_answers(tiny_folder: Path, tmp_path: Path) -> None:
    files = write_eval_files(tmp_path)
    events = train(wish(tiny_folder, tmp_path, **files, metrics=["exact_match"], max_steps=2))
    measured = [
        (event.task, event.metric)
        for event in events
        if isinstance(event, Score) and event.step == 2 and event.task in ("eval", "general text")
    ]
    expected = [("eval", "loss"), ("eval", "exact_match"), ("general text", "bits_per_byte")]
    assert measured[:3] == expected
