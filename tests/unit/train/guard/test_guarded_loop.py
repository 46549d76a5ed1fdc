"""A run under guard: what it sees, how it goes back and on, which checkpoint it keeps; and that it
changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tiny_runs import (
    build_sum_rows,
    make_chat_row,
    make_tiny_recipe,
    plan_recipe,
    read_adapter_bytes,
    select_steps,
    train,
    write_eval_files,
    write_rows,
)
from tunesmith.core.errors import GateError, InputError, Interrupted
from tunesmith.core.events import (
    EXPECTED_TASK,
    PROBE_TASK,
    CheckpointSaved,
    CheckResult,
    Event,
    GenerationSample,
    Score,
    TrainStep,
)
from tunesmith.core.json_io import parse_as, read_json
from tunesmith.core.run_dir import read_events, read_rollbacks, read_run_record
from tunesmith.core.types import RunRecord
from tunesmith.data.sampler import permute_rows
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs, planner
from tunesmith.train import run
from tunesmith.train.guard.guarded_loop import _select_events
from tunesmith.train.guard.probes import PROMPT_ROLES, build_prompt_set
from tunesmith.train.guard.training_guard import EVALUATION_KIND, GUARD_KIND

pytestmark = pytest.mark.promise


NOISE = "\u00ff\u00fe\u00fd" * 20


def make_corrupted_recipe(model: Path, folder: Path, **changed: Any) -> Recipe:
    """Twelve steps; both rows of step 8 are answered with noise. Checkpoints after every step."""
    folder.mkdir(parents=True)
    rows = build_sum_rows(1, 24)
    for index in permute_rows(0, 0, 24)[14:16].tolist():
        rows[index] = make_chat_row(rows[index]["messages"][0]["content"], NOISE)
    data = str(write_rows(folder / "rows.jsonl", rows))
    values = {"learning_rate": 0.02, "warmup_ratio": 0.5, "save_steps": 1} | changed
    return make_tiny_recipe(model, folder, data=data, **values)


def get_run_dir(wish: Recipe) -> Path:
    assert isinstance(wish.output_dir, Path)
    return wish.output_dir


# ---------------------------------------------------------------- what is seen


def test_probes_say_what_the_model_says_and_change_nothing(
    tiny_folder: Path, tmp_path: Path
) -> None:
    files = write_eval_files(tmp_path)
    never = [{"match": "zebra", "mode": "ban"}]
    shared: dict[str, Any] = {
        **files,
        "never": never,
        "metrics": ["json_valid"],
        "lora_dropout": 0.1,
    }
    watched, alone = (
        make_tiny_recipe(tiny_folder, tmp_path / name, **shared, guard=guard)
        for name, guard in (("watched", {"collapse": "warn", "probe_steps": 1}), ("alone", "off"))
    )
    events = train(watched)
    train(alone)
    assert read_adapter_bytes(watched) == read_adapter_bytes(alone), "guard on = guard off"
    scores = [event for event in events if isinstance(event, Score)]
    measures = {score.metric for score in scores if score.task == PROBE_TASK and score.step == 0}
    assert measures >= {
        *(
            "repetition",
            "distinct",
            "same_answer",
            "end_rate",
            "length",
            "foreign",
            "json",
        ),
        *(
            "breaks zebra",
            "base_loss",
            "answer_loss",
            "end_loss",
            "entropy",
            "kl",
            "forgotten",
        ),
    }
    assert {score.step for score in scores if score.metric == "repetition"} == {0, 1, 2, 3}
    assert {score.metric for score in scores if score.task == EXPECTED_TASK} == {
        *("distinct", "same_answer", "end_rate", "length"),
    }
    by_step = {(s.metric, s.step): s.value for s in scores if s.task == PROBE_TASK}
    assert by_step["kl", 0] == by_step["forgotten", 0] == 0
    (unchanged,) = (s for s in scores if (s.metric, s.step) == ("forgotten", 0))
    assert unchanged.low == unchanged.high == 0, "equal to the base, with nothing uncertain"
    assert by_step["kl", 3] > 0
    assert by_step["update_ratio", 3] > 0
    assert {
        event.id.partition(":")[0] for event in events if isinstance(event, GenerationSample)
    } == {"eval.jsonl"}


@pytest.mark.slow
@pytest.mark.promise
def test_full_fine_tuning_has_no_base_to_read_answers_with(
    tiny_folder: Path, tmp_path: Path
) -> None:
    files = write_eval_files(tmp_path)
    wish = make_tiny_recipe(
        tiny_folder,
        tmp_path,
        **files,
        method="full",
        lora_r="auto",
        learning_rate=1e-4,
        guard={"probe_steps": 1, "collapse": "warn"},
    )
    measures = {
        event.metric
        for event in train(wish)
        if isinstance(event, Score) and event.task == PROBE_TASK
    }
    assert not measures & {"base_loss"}
    assert measures >= {"repetition", "kl", "update_ratio"}


def test_prompts_are_never_of_test_data_and_never_one_alone(
    tiny_folder: Path, tmp_path: Path
) -> None:
    files = write_eval_files(tmp_path)
    assert "test_data" not in PROMPT_ROLES

    def get_prompt_files(**custom: str) -> set[str]:
        run_inputs = inputs.load_inputs(make_tiny_recipe(tiny_folder, tmp_path, **custom))
        texts = run.build_eval_items(planner.make_plan(run_inputs), run_inputs).general_texts
        actual = build_prompt_set(planner.make_plan(run_inputs), run_inputs, texts)
        return (
            {probe.question.id.partition(":")[0] for probe in actual.prompts} if actual else set()
        )

    assert get_prompt_files(**files) == {"eval.jsonl"}
    assert get_prompt_files(retention_data=files["retention_data"]) == {"general.jsonl"}
    assert get_prompt_files(test_data=files["test_data"]) == set()
    texts = [{"text": f"{n} and {n}"} for n in range(2)]
    one = str(write_rows(tmp_path / "one.jsonl", texts))
    assert get_prompt_files(eval_data=one, test_data=files["test_data"]) == {"one.jsonl"}, (
        "texts are gone on with"
    )


def test_without_prompts_it_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    events = train(make_tiny_recipe(tiny_folder, tmp_path, guard={"probe_steps": 1}))
    (messages,) = [
        event for event in events if isinstance(event, CheckResult) and event.kind == "probes"
    ]
    assert messages.level == "warn"
    assert "two prompts" in messages.evidence


@pytest.mark.parametrize(
    ("num_prompts", "num_texts", "unwatched"),
    [
        (5, 5, {"forgetting: 5 general texts", "answers unlearned: 5 prompts"}),
        (6, 5, {"forgetting: 5 general texts"}),
        (5, 6, {"answers unlearned: 5 prompts"}),
        (6, 6, set()),
        (6, 0, set()),
    ],
)
def test_what_few_items_leave_unwatched_is_a_warning(
    num_prompts: int, num_texts: int, unwatched: set[str], tiny_folder: Path, tmp_path: Path
) -> None:
    texts = [{"text": f"text number {n}"} for n in range(num_texts)]
    # unlike each other, so that none is dropped as a near-duplicate
    rows = [make_chat_row(letter * 9, letter.upper() * 7) for letter in "abcdefgh"]
    files = {
        "eval_data": write_rows(tmp_path / "eval.jsonl", rows[:num_prompts]),
        "test_data": write_rows(tmp_path / "test.jsonl", rows[6:]),
    }
    if texts:
        files["retention_data"] = write_rows(tmp_path / "general.jsonl", texts)
    roles = {role: str(path) for role, path in files.items()}
    events = run.train(plan_recipe(make_tiny_recipe(tiny_folder, tmp_path, **roles)))
    warnings: set[str] = set()
    for event in events:
        if isinstance(event, CheckResult) and event.kind in (
            "forgetting",
            "answers unlearned",
            "overfitting",
        ):
            assert (event.level, event.step) == ("warn", 0)
            items, _, reason = event.evidence.removeprefix("not watched: ").partition(", ")
            assert reason == "needs 6"
            warnings.add(f"{event.kind}: {items}")
        if isinstance(event, TrainStep):
            break
    events.close()  # type: ignore[attr-defined]
    assert warnings == unwatched


# ---------------------------------------------------------------- back and on


@pytest.fixture(scope="module")
def rolled_back_run(
    trained_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, list[Event]]:
    wish = make_corrupted_recipe(trained_model, tmp_path_factory.mktemp("back") / "whole")
    return wish, train(wish)


def test_it_goes_back_and_on_without_the_rows_at_fault(
    rolled_back_run: tuple[Recipe, list[Event]],
) -> None:
    wish, events = rolled_back_run
    record = parse_as(RunRecord, read_json(get_run_dir(wish) / "record.json"))
    (rollback,) = record.rollbacks
    assert (rollback.kind, rollback.step, rollback.to) == ("loss rise", 9, 6)
    assert set(rollback.rows) == {
        f"rows.jsonl:{index + 1}" for index in permute_rows(0, 0, 24)[14:16].tolist()
    }
    assert rollback.lr_factor == 1
    assert [
        event.level
        for event in events
        if isinstance(event, CheckResult) and event.kind == "loss rise"
    ] == ["rollback"]
    remaining = select_steps(read_events(get_run_dir(wish)))
    assert [event.step for event in remaining] == list(range(1, 13)), (
        "one line a step, the one that counts"
    )
    assert [event.supervised_tokens for event in remaining][7] == 0, "the slot is there, and empty"
    assert record.steps == 12
    assert max(event.loss for event in remaining) < 1
    assert any(map(is_rollback, read_events(get_run_dir(wish))))


def run_until(wish: Recipe, until: Callable[[Event], bool]) -> None:
    """Leaves a run where a killed process would have left it."""
    events = run.train(plan_recipe(wish))
    for event in events:
        if until(event):
            break
    events.close()  # type: ignore[attr-defined]


def is_rollback(event: Event) -> bool:
    return isinstance(event, CheckResult) and event.level == "rollback"


@pytest.mark.parametrize(
    "after",
    [
        "before it",
        "at once",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("a step later", "a checkpoint later")),
    ],
)
def test_killed_around_a_rollback_it_ends_with_the_same_bytes(
    after: str, rolled_back_run: tuple[Recipe, list[Event]], trained_model: Path, tmp_path: Path
) -> None:
    seen: list[Event] = []
    wanted = {"before it": 0, "at once": 1, "a step later": 2, "a checkpoint later": 3}[after]

    def should_kill(event: Event) -> bool:
        seen.append(event)
        if wanted == 0:
            return getattr(event, "path", "") == "checkpoints/step-8"
        since = [i for i, one in enumerate(seen) if is_rollback(one)]
        return bool(since) and len(seen) - since[0] == wanted

    wish = make_corrupted_recipe(trained_model, tmp_path / "killed")
    run_until(wish, should_kill)
    went_on = list(run.resume(get_run_dir(wish)))
    assert read_adapter_bytes(wish) == read_adapter_bytes(rolled_back_run[0])
    assert len(read_rollbacks(get_run_dir(wish))) == 1
    assert sum(map(is_rollback, went_on)) == (1 if after == "before it" else 0)
    remaining = [event.step for event in select_steps(read_events(get_run_dir(wish)))]
    assert remaining == list(range(1, 13))


def test_a_step_that_is_judged_again_has_the_same_update_ratio(
    tiny_folder: Path, tmp_path: Path
) -> None:
    files = write_eval_files(tmp_path)

    def read_ratios(wish: Recipe) -> dict[int, float]:
        scores = [e for e in read_events(get_run_dir(wish)) if isinstance(e, Score)]
        return {score.step: score.value for score in scores if score.metric == "update_ratio"}

    straight, killed = (
        make_tiny_recipe(
            tiny_folder, tmp_path / name, **files, save_steps=1, guard={"probe_steps": 1}
        )
        for name in ("straight", "killed")
    )
    train(straight)
    run_until(killed, lambda event: getattr(event, "path", "") == "checkpoints/step-2")
    assert set(read_ratios(killed)) == {1, 2}
    again = list(run.resume(get_run_dir(killed)))
    ratios = read_ratios(straight)
    assert min(ratios.values()) > 0
    assert read_ratios(killed) == ratios
    assert {
        event.step: event.value
        for event in again
        if isinstance(event, Score) and event.metric == "update_ratio"
    } == {step: ratios[step] for step in (2, 3)}


def test_resumed_without_the_checkpoint_that_it_went_back_to(
    trained_model: Path, tmp_path: Path
) -> None:
    wish = make_corrupted_recipe(trained_model, tmp_path / "lost")
    run_until(wish, is_rollback)
    path = get_run_dir(wish)
    (rollback,) = read_rollbacks(path)
    shutil.rmtree(path / "checkpoints" / f"step-{rollback.to}")
    with pytest.raises(
        InputError, match=r"rolled back from step \d+ to checkpoints/step-\d+, which is missing"
    ):
        list(run.resume(path))


def test_before_any_other_checkpoint_it_goes_back_to_the_start(
    trained_model: Path, tmp_path: Path
) -> None:
    whole, killed, lost = (
        make_corrupted_recipe(trained_model, tmp_path / name, save_steps=9)
        for name in ("whole", "killed", "lost")
    )
    steps = select_steps(train(whole))
    (rollback,) = read_rollbacks(get_run_dir(whole))
    assert rollback.to == 0
    assert steps[-1].step == 12
    for wish in (killed, lost):
        run_until(wish, is_rollback)
    shutil.rmtree(get_run_dir(lost) / "checkpoints" / "step-0")  # the start is made again
    for wish in (killed, lost):
        assert list(run.resume(get_run_dir(wish)))
        assert read_adapter_bytes(wish) == read_adapter_bytes(whole)


def test_without_anything_good_to_go_back_to_it_stops(trained_model: Path, tmp_path: Path) -> None:
    """All weights are not saved before the first step."""
    changed = {"method": "full", "lora_r": "auto", "learning_rate": 0.002, "save_steps": 9}
    with pytest.raises(GateError, match="no good checkpoint was saved before it") as stop:
        train(make_corrupted_recipe(trained_model, tmp_path / "none", **changed))
    assert stop.value.exit_code == 4


@pytest.mark.slow
@pytest.mark.promise
def test_stop_and_warn_and_off_are_obeyed(trained_model: Path, tmp_path: Path) -> None:
    stopped = make_corrupted_recipe(trained_model, tmp_path / "stop", guard={"collapse": "stop"})
    train(stopped)
    (end,) = read_rollbacks(get_run_dir(stopped))
    assert (end.kind, end.step, end.to, end.is_end) == ("loss rise", 9, 6, True)
    messages = [
        e
        for e in train(
            make_corrupted_recipe(trained_model, tmp_path / "warn", guard={"collapse": "warn"})
        )
        if isinstance(e, CheckResult)
    ]
    assert {(one.kind, one.level) for one in messages if one.step} >= {("loss rise", "warn")}
    events = train(make_corrupted_recipe(trained_model, tmp_path / "off", guard="off"))
    assert [event for event in events if isinstance(event, CheckResult) and event.step] == []


@pytest.mark.slow
@pytest.mark.promise
def test_it_goes_back_three_times_and_no_more(trained_model: Path, tmp_path: Path) -> None:
    """Far too high a rate: each time with half of what it was."""
    files = write_eval_files(tmp_path)
    wish = make_tiny_recipe(
        trained_model,
        tmp_path,
        **files,
        data=str(write_rows(tmp_path / "rows.jsonl", build_sum_rows(1, 24))),
        save_steps=1,
        learning_rate=1.0,
        warmup_ratio=0.5,
        guard={"probe_steps": 1, "forgetting": "off"},
    )
    events = train(wish)
    actual = read_rollbacks(get_run_dir(wish))
    assert [one.lr_factor for one in actual] == [0.5] * 3 + [1]
    assert [one.is_end for one in actual] == [False] * 3 + [True]
    record = read_run_record(get_run_dir(wish))
    assert record.selected_step == actual[-1].to == record.steps
    assert {score.step for score in events if getattr(score, "task", "") == "test"} == {
        0,
        record.selected_step,
    }
    assert record.verdict is not None
    assert "the guard ended training at step" in record.verdict.reasons[0]
    assert (get_run_dir(wish) / "adapter").exists()
    with pytest.raises(InputError, match="this run is finished"):
        run.refuse_finished(get_run_dir(wish))


@pytest.mark.slow
@pytest.mark.promise
def test_what_forgets_is_rehearsed_more(trained_model: Path, tmp_path: Path) -> None:
    """It knows answers like those of its own rows, and is trained to say something else."""
    known_texts = [{"text": json.dumps({"sum": n * n + n})} for n in range(30, 38)]
    files = {"retention_data": str(write_rows(tmp_path / "known.jsonl", known_texts))}
    other = str(
        write_rows(tmp_path / "other.jsonl", [{"text": f"other words, {n}"} for n in range(8)])
    )
    data = str(
        write_rows(
            tmp_path / "rows.jsonl", [make_chat_row(f"{n} and", "zz top " * 3) for n in range(12)]
        )
    )

    def make_forgetting_recipe(name: str, **guard: Any) -> Recipe:
        rehearsal, wish = (
            {"data": other, "ratio": 0.1},
            {"collapse": "off", "probe_steps": 1, **guard},
        )
        rates = {"learning_rate": 0.1, "warmup_ratio": 0.5}
        return make_tiny_recipe(
            trained_model,
            tmp_path / name,
            **files,
            data=data,
            save_steps=1,
            rehearsal=rehearsal,
            guard=wish,
            **rates,
        )

    assert not any(
        getattr(event, "kind", "") == "forgetting"
        for event in train(make_forgetting_recipe("much", margin=100))
    )
    train(make_forgetting_recipe("stop", forgetting="stop"))
    assert [one.kind for one in read_rollbacks(tmp_path / "stop" / "run")] == ["forgetting"]
    train(make_forgetting_recipe("back", forgetting="rollback"))
    *back, end = read_rollbacks(tmp_path / "back" / "run")
    assert [one.rehearsal_ratio for one in back] == [0.2, 0.4, 0.5]
    assert end.is_end


# ---------------------------------------------------------------- the best


def test_the_best_checkpoint_is_kept_and_not_the_last_one(
    trained_model: Path, tmp_path: Path
) -> None:
    files = write_eval_files(tmp_path)
    wish = make_tiny_recipe(
        trained_model, tmp_path, **files, eval_steps=1, save_steps=9, learning_rate=1.0, guard="off"
    )
    events = train(wish)
    losses = {
        e.step: e.value
        for e in events
        if isinstance(e, Score) and (e.task, e.metric) == ("eval", "loss")
    }
    best = min(losses, key=losses.__getitem__)
    assert best < 3, "the rate is far too high"
    record = parse_as(RunRecord, read_json(get_run_dir(wish) / "record.json"))
    assert (record.selected_step, record.steps) == (best, 3)
    saved = load_file(get_run_dir(wish) / "checkpoints" / f"step-{best}" / "state.safetensors")
    trained = load_file(get_run_dir(wish) / "adapter" / "adapter_model.safetensors")
    weights = {
        key.removeprefix("weight."): value
        for key, value in saved.items()
        if key.startswith("weight.")
    }
    assert sorted(value.sum().item() for value in weights.values()) == sorted(
        v.sum().item() for v in trained.values()
    )
    verdicts = {(one.kind, one.level) for one in events if isinstance(one, CheckResult)}
    assert {("best", "ok"), ("evaluation", "ok")} <= verdicts
    assert not any(kind == GUARD_KIND for kind, _ in verdicts), "it is off"


def test_a_warning_at_an_evaluated_step_adds_no_evaluation() -> None:
    """Of the verdicts at a step only the one that closes its evaluation is replayed: one of the
    memory may fall on the same step."""
    loss = Score("eval", "loss", 1.0, 0.9, 1.1, 8, 4)
    closing = [CheckResult(kind, "ok", "done", 4) for kind in (GUARD_KIND, EVALUATION_KIND)]
    others = [CheckResult(kind, "warn", "x", 4) for kind in ("memory", "rehearsal", "best")]
    events = [others[0], loss, *others[1:], *closing]
    assert _select_events(events, last_step=4) == [loss, *closing]


@pytest.mark.slow
@pytest.mark.promise
def test_patience_ends_a_run_that_gets_no_better_also_when_it_is_resumed(
    trained_model: Path, tmp_path: Path
) -> None:
    files = write_eval_files(tmp_path)

    def make_patient_recipe(name: str) -> Recipe:
        return make_tiny_recipe(
            trained_model,
            tmp_path / name,
            **files,
            num_train_epochs=3,
            eval_steps=1,
            save_steps=1,
            learning_rate=1.0,
            warmup_ratio=0.1,
            guard={"collapse": "off", "forgetting": "off", "patience": 2},
        )

    full, killed = make_patient_recipe("whole"), make_patient_recipe("killed")
    steps = select_steps(train(full))
    assert len(steps) < 9
    run_until(killed, lambda event: isinstance(event, CheckpointSaved) and event.step == len(steps))
    assert select_steps(list(run.resume(get_run_dir(killed)))) == []
    assert read_adapter_bytes(killed) == read_adapter_bytes(full)


def test_a_signal_before_a_look_leaves_the_look_to_the_next_attempt(
    trained_model: Path, tmp_path: Path
) -> None:
    files = write_eval_files(tmp_path)

    def make_evaluated_recipe(name: str) -> Recipe:
        return make_tiny_recipe(
            trained_model,
            tmp_path / name,
            **files,
            eval_steps=1,
            learning_rate=1e-3,
            guard={"probe_steps": 1, "collapse": "warn"},
        )

    full, stopped = make_evaluated_recipe("whole"), make_evaluated_recipe("stopped")
    train(full)

    def stop_at(step: int) -> None:
        for event in run.train(plan_recipe(stopped)):
            if event.step == step and not isinstance(event, CheckpointSaved):
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        stop_at(2)
    events = list(run.resume(get_run_dir(stopped)))
    assert {
        event.step for event in events if isinstance(event, Score) and event.metric == "repetition"
    } == {0, 2, 3}
    assert read_adapter_bytes(stopped) == read_adapter_bytes(full)

    def count_events(wish: Recipe) -> list[tuple[str, int]]:
        return sorted(
            (type(event).__name__, event.step)
            for event in read_events(get_run_dir(wish))
            if isinstance(event, Score | TrainStep)
        )

    assert count_events(stopped) == count_events(full)
