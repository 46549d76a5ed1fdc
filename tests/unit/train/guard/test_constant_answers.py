"""The guard speaks of a field that is always answered the same, at the evaluation that shows it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tiny_runs import make_chat_row, make_tiny_recipe, train, write_eval_files, write_rows
from tunesmith.core.events import EVAL_TASK, CheckResult, GenerationSample
from tunesmith.core.run_dir import read_events
from tunesmith.evaluate import measure
from tunesmith.train.guard.guarded_loop import _select_events
from tunesmith.train.guard.training_guard import TrainingGuard

LEVELS = {"collapse": "rollback", "forgetting": "warn", "watch": "warn"}


def make_guard(planned_steps: int = 60, **levels: str) -> TrainingGuard:
    return TrainingGuard(
        {**LEVELS, **levels},  # type: ignore[arg-type]
        forgetting_margin=0.02,
        vocab_size=1000,
        is_probing=False,
        planned_steps=planned_steps,
    )


def judge(
    guard: TrainingGuard, step: int, *, is_constant: bool, count: int = 64, task: str = EVAL_TASK
) -> list[CheckResult]:
    for index in range(count):
        expected = {"id": index, "flag": index % 3 == 0}
        answer = expected | ({"flag": False} if is_constant else {})
        sample = GenerationSample(
            step, f"e:{index}", "prompt", json.dumps(answer), json.dumps(expected), task
        )
        guard.observe_event(sample)
    return guard.judge_answers(step)


def test_a_constant_is_detected_at_the_next_evaluation_and_told_once() -> None:
    guard = make_guard()
    assert judge(guard, 30, is_constant=False) == []
    assert guard.should_confirm(45)
    (verdict,) = judge(guard, 45, is_constant=True)
    assert (verdict.kind, verdict.level, verdict.step) == ("constant answer", "warn", 45)
    assert verdict.evidence == "flag is false in 64 of 64 answers, expected in 42"
    assert judge(guard, 60, is_constant=True) == []
    assert not guard.should_confirm(60)
    assert guard.active_detectors == ["constant answer"]
    assert judge(guard, 60 + 1, is_constant=False) == []
    assert guard.active_detectors == []


def test_it_is_silent_where_it_cannot_know() -> None:
    assert judge(make_guard(), 10, is_constant=True) == [], "labels begin with the most frequent"
    assert not make_guard().should_confirm(10)
    assert judge(make_guard(), 45, is_constant=True, count=16) == [], "too few answers"
    assert judge(make_guard(), 45, is_constant=True, task="") == [], "answers of a probe are cut"
    assert judge(make_guard(watch="off"), 45, is_constant=True) == []
    assert not make_guard(watch="off").should_confirm(45)


@pytest.mark.parametrize(("fields", "more"), [(3, ""), (4, "; and 1 more fields")])
def test_three_constant_fields_are_named(fields: int, more: str) -> None:
    guard = make_guard()
    names = [f"flag_{number}" for number in range(fields)]
    for index in range(64):
        expected = {"id": index} | dict.fromkeys(names, index % 3 == 0)
        answer = {"id": index} | dict.fromkeys(names, False)
        texts = (json.dumps(answer), json.dumps(expected))
        guard.observe_event(GenerationSample(45, f"e:{index}", "prompt", *texts, EVAL_TASK))
    (verdict,) = guard.judge_answers(45)
    named = [f"{name} is false in 64 of 64 answers, expected in 42" for name in names[:3]]
    assert verdict.evidence == "; ".join(named) + more


def test_only_the_answers_of_the_last_evaluation_count() -> None:
    guard = make_guard()
    judge(guard, 30, is_constant=True, count=16)
    judge(guard, 45, is_constant=True, count=16)
    assert len(guard.history.eval_samples) == 16


def test_a_resumed_run_reads_the_answers_again() -> None:
    sample = GenerationSample(3, "e:1", "p", "a", "b", EVAL_TASK)
    events = [sample, dataclasses.replace(sample, task=""), dataclasses.replace(sample, step=9)]
    assert _select_events(events, 5) == [sample]


@pytest.mark.promise
def test_more_rows_are_answered_where_a_constant_is_suspected(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random model answers nothing right; its answers are replaced by those of a constant."""
    rows = [make_chat_row(f"{n}", json.dumps({"n": n % 7, "f": n % 2})) for n in range(80)]
    files = write_eval_files(tmp_path / "rows")
    files["eval_data"] = str(write_rows(tmp_path / "eval.jsonl", rows))
    build_samples = measure.build_samples

    def answer_constantly(prompts, answers, *, step):
        samples = build_samples(prompts, answers, step=step)
        return tuple(
            dataclasses.replace(sample, answer=json.dumps(json.loads(sample.expected) | {"f": 0}))
            for sample in samples
        )

    monkeypatch.setattr(measure, "build_samples", answer_constantly)
    wish = {"metrics": ["json_valid"], "eval_steps": 2}
    train(make_tiny_recipe(tiny_folder, tmp_path / "one", **files, **wish))
    events = read_events(tmp_path / "one" / "run")
    samples = [
        event for event in events if isinstance(event, GenerationSample) and event.task == EVAL_TASK
    ]
    assert {event.step: sum(s.step == event.step for s in samples) for event in samples} == {
        2: 64,
        3: 16,
    }
    verdicts = [
        event
        for event in events
        if isinstance(event, CheckResult) and event.kind == "constant answer"
    ]
    assert [(verdict.step, verdict.level) for verdict in verdicts] == [(2, "warn")]
    assert verdicts[0].evidence.startswith("f is 0 in 64 of 64 answers, expected in ")
