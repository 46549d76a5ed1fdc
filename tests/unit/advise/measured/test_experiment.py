"""`advise --measure` on a tiny model, from rows to a decision: prompts, results, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tiny_runs import (
    build_sum_rows,
    make_tiny_recipe,
    save_writer_folder,
    write_rows,
)
from tunesmith import advise_measured
from tunesmith.advise.measured.arms import Arm
from tunesmith.advise.measured.experiment import ExperimentStart, MeasuredAdvice, OtherBase
from tunesmith.advise.measured.retrieval import PassageIndex, open_passages
from tunesmith.advise.measured.run_arm import (
    ArmResult,
    ArmRunner,
    plan_for_size,
    run_arm,
    sample_examples,
    select_items,
)
from tunesmith.cli.views.measured_advice import report_experiment
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import to_jsonable
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs, planner

pytestmark = pytest.mark.promise


SCHEMA = {
    "type": "object",
    "properties": {"sum": {"enum": [1, 2]}},
    "required": ["sum"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_writer_folder(tmp_path_factory.mktemp("writer") / "writer")


def make_recipe(model: Path, folder: Path, **changed: Any) -> Recipe:
    """30 training rows and 22 held-out ones; test_data must not be read."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    values = {
        "data": str(write_rows(folder / "rows.jsonl", build_sum_rows(1, 30))),
        "eval_data": str(write_rows(folder / "eval.jsonl", build_sum_rows(100, 22))),
        "test_data": str(write_rows(folder / "test.jsonl", build_sum_rows(200, 2))),
        "metrics": ["exact_match"],
        "batch_size": 8,
    }
    return make_tiny_recipe(model, folder, **(values | changed))


REPEATED: dict[str, Any] = {"eval_data": "training rows"}
FEW: dict[str, Any] = {"eval_data": "five rows"}
TEXTS: dict[str, Any] = {
    "stage": "cpt",
    "batch_size": "auto",
    "metrics": "auto",
    "batch_tokens": 512,
}


def make_runner(
    model: Path, folder: Path, passages: PassageIndex | None = None, **changed: Any
) -> ArmRunner:
    run_inputs = inputs.load_inputs(make_recipe(model, folder, **changed))
    plan = planner.make_plan(run_inputs)
    return ArmRunner.from_plan(plan, run_inputs, select_items(run_inputs), passages)


@pytest.mark.slow
def test_an_interrupted_experiment_continues_to_a_decision(writer: Path, tmp_path: Path) -> None:
    options = {"minutes": 0.02, "folder": tmp_path / "store"}
    first = advise_measured(make_recipe(writer, tmp_path), **options)
    start = next(first)
    zero_shot = next(first)
    first.close()  # type: ignore[attr-defined]
    assert isinstance(start, ExperimentStart)
    assert isinstance(zero_shot, ArmResult)
    assert (start.items, start.available_items, zero_shot.arm, len(zero_shot.answers)) == (
        20,
        22,
        Arm(),
        20,
    )
    _, *results, advice = advise_measured(make_recipe(writer, tmp_path), **options)
    assert results[0] == zero_shot, "loaded from the folder, with its seconds"
    assert isinstance(advice, MeasuredAdvice)
    assert (advice.metric, advice.items, advice.training_rows) == ("exact_match", 20, 30)
    assert advice.decision.conclusion in ("undecided", "nothing"), "the model writes letters"
    assert len(results) + len(advice.skipped) == len(start.arms)
    assert {skipped.reason[:5] for skipped in advice.skipped} <= {"about", "a pro"}
    assert "test.jsonl" not in json.dumps(to_jsonable(advice))
    _, *regraded, _ = advise_measured(
        make_recipe(writer, tmp_path, metrics=["contains"]), **options
    )
    arms = [result.arm for result in results]
    graded_again = [result for result in regraded if result.arm in arms]  # others had no time left
    assert graded_again == results, "another metric grades the same answers"
    changed = make_recipe(
        writer,
        tmp_path,
        eval_data=str(write_rows(tmp_path / "other.jsonl", build_sum_rows(150, 22))),
    )
    _, other, *_ = advise_measured(changed, **options)
    assert other != zero_shot


def test_every_kind_of_arm_has_its_prompt(writer: Path, tmp_path: Path) -> None:
    (tmp_path / "docs.txt").write_text(
        "\n\n".join(f"{n} and {n * n} make {n + n * n}. " * 5 for n in range(100, 105))
    )
    changed = {"response_schema": str(tmp_path / "schema.json"), "metrics": ["json_valid"]}
    passages = open_passages(tmp_path / "docs.txt")
    runner = make_runner(writer, tmp_path, passages, **changed)
    runner = dataclasses.replace(runner, items=runner.items[:4])
    before = {name: weight.clone() for name, weight in runner.model.network.state_dict().items()}
    renderer = runner.inputs.renderer

    def render_first(arm: Arm) -> str:
        return renderer.decode(runner.build_questions(arm)[0].prompt_ids)

    assert render_first(Arm()).count("and") == 1
    assert render_first(Arm(shots=2)).count("assistant\n") == 3
    assert render_first(Arm(shots=2, shot_layout="labelled")).count("Output:") == 3
    assert "100 and 10000 make 10100" in render_first(Arm(passages=1))
    assert render_first(Arm(shots=2, seed=1)) != render_first(Arm(shots=2))
    constrained = run_arm(runner, Arm(is_constrained=True))
    assert all(json.loads(answer)["sum"] in (1, 2) for answer in constrained.answers.values())
    free = run_arm(runner, Arm())
    trained = run_arm(runner, Arm(examples=25))
    assert trained.answers != free.answers
    assert trained.train_seconds > 0 == free.train_seconds
    after = runner.model.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), (
        "the base model is restored"
    )
    assert run_arm(runner, Arm(examples=25)).answers == trained.answers, (
        "every training starts from the same weights"
    )
    assert run_arm(runner, Arm()).answers == free.answers
    long = dataclasses.replace(runner, passages=PassageIndex(["100 and 10000 " * 60] * 3))
    with pytest.raises(InputError, match="exceed the context of 512"):
        run_arm(long, Arm(passages=3))


def test_larger_samples_contain_the_smaller_ones(writer: Path, tmp_path: Path) -> None:
    runner = make_runner(writer, tmp_path)
    ids = [example.id for example in sample_examples(runner.rows, 0, 10)]
    assert ids[:4] == [example.id for example in sample_examples(runner.rows, 0, 4)]
    assert all(row.startswith("rows.jsonl") for row in ids)
    assert ids != [example.id for example in sample_examples(runner.rows, 1, 10)]
    assert all(item.id.startswith("eval.jsonl") for item in runner.items)
    plan = plan_for_size(runner, 25)
    assert (plan.data["data"].rows, plan.config.lora_r, plan.steps) == (
        25,
        runner.plan.config.lora_r,
        4,
    )


def test_the_view_shows_the_decision(
    writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    *events, advice = advise_measured(
        make_recipe(writer, tmp_path), minutes=0.001, folder=tmp_path / "store", target=0.5
    )
    for event in (*events, advice):
        if (view := report_experiment(event)) is not None:
            Console(width=120).print(view)
    decision = to_jsonable(advice)["decision"]
    assert (decision["conclusion"], decision["untried"]) == ("undecided", ["sft"]), "--json too"
    output = capsys.readouterr()
    assert output.out.startswith("Undecided: no time for training")
    assert "zero-shot" in output.out
    assert "6 items chose the arm of each approach, 14 others judge it" in output.out
    assert "target 0.5" in output.out
    assert "20 of 22 items, " in output.err


def test_rows_held_out_for_the_test_are_reported(
    writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = next(
        advise_measured(
            make_recipe(writer, tmp_path, test_data=()), minutes=1e5, folder=tmp_path / "store"
        )
    )
    assert isinstance(start, ExperimentStart)
    assert start.items == start.available_items, "all that the minutes allow"
    assert start.available_items + start.test_rows == 22
    report_experiment(start)
    assert (
        f"{start.available_items} items ({start.test_rows} rows held out as test_data), "
        in capsys.readouterr().err
    )


def test_another_base_answers_the_same_items(writer: Path, tmp_path: Path) -> None:
    other = save_writer_folder(tmp_path / "other")
    options = {"minutes": 1e5, "folder": tmp_path / "store", "base": str(other)}
    events = advise_measured(make_recipe(writer, tmp_path), **options)
    start, zero_shot, of_base = (next(events) for _ in range(3))
    assert isinstance(start, ExperimentStart)
    assert isinstance(zero_shot, ArmResult)
    assert isinstance(of_base, ArmResult)
    assert of_base.arm == Arm(base="other")
    assert of_base.arm.label == "other: zero-shot"
    assert of_base.answers.keys() == zero_shot.answers.keys()
    assert {arm.base for arm in start.arms} == {"", "other"}
    again = advise_measured(make_recipe(writer, tmp_path), **options)
    assert [next(again) for _ in range(3)][2] == of_base, "loaded from the folder"


def test_a_base_without_a_chat_template_reads_the_rows_its_way(
    writer: Path, tmp_path: Path
) -> None:
    """Its shots are no messages: they once met items that were, and the command crashed."""
    other = save_writer_folder(tmp_path / "other")
    (other / "chat_template.jinja").unlink()
    rows = [{"prompt": f"{n} and {n}?", "completion": f"{2 * n}"} for n in range(60)]
    parts = {"data": rows[:30], "eval_data": rows[30:]}
    files = {
        name: str(write_rows(tmp_path / f"{name}.jsonl", part)) for name, part in parts.items()
    }
    run_inputs = inputs.load_inputs(make_recipe(other, tmp_path, test_data=(), **files))
    base = OtherBase.load(planner.make_plan(run_inputs), run_inputs, None)
    items = select_items(inputs.load_inputs(make_recipe(writer, tmp_path, test_data=(), **files)))
    assert items[0].messages
    result = run_arm(base.make_runner(items[:5]), Arm(shots=4, base="other"))
    assert list(result.answers) == [item.id for item in items[:5]]


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        ({"eval_data": (), "test_data": ()}, {}, "no held-out items"),
        ({"response_schema": "no.json"}, {}, "schema"),
        ({}, {"minutes": 0}, "must be a positive number"),
        ({}, {"minutes": float("nan")}, "must be a positive number"),
        ({}, {"target": 90}, "between 0 and 1, not 90"),
        ({}, {"margin": 10}, "between 0 and 1, not 10"),
        (REPEATED, {}, "are also in data"),
        (FEW, {}, "5 rows have a question and an answer; at least 9 are needed"),
        ({"metrics": ["multiple_choice"]}, {}, "none of the metrics grades answers"),
        ({}, {"documents": "nowhere"}, "nowhere"),
        ({"eval_data": (), "eval_split": 0.5}, {"base": "the same"}, "hold out other rows"),
        (TEXTS, {}, "stage: cpt has no questions"),
    ],
    ids=[
        "items",
        "schema",
        "minutes",
        "no number",
        "target",
        "margin",
        "trained",
        "few",
        "metric",
        "documents",
        "base",
        "stage",
    ],
)
def test_unusable_options_are_refused(
    changed: dict[str, Any], options: dict[str, Any], message: str, writer: Path, tmp_path: Path
) -> None:
    if changed in (REPEATED, FEW):
        rows = build_sum_rows(1, 12) if changed is REPEATED else build_sum_rows(100, 5)
        changed = {"eval_data": str(write_rows(tmp_path / "items.jsonl", rows))}
    if "base" in options:
        options = {"base": str(writer)}
    if changed is TEXTS:
        texts = [
            str(write_rows(tmp_path / f"{n}.jsonl", [{"text": f"{n}{n} texts"}] * 2)) for n in "abc"
        ]
        changed = {**TEXTS, **dict(zip(("data", "eval_data", "test_data"), texts, strict=True))}
    with pytest.raises(InputError) as refusal:
        list(
            advise_measured(
                make_recipe(writer, tmp_path, **changed), folder=tmp_path / "store", **options
            )
        )
    assert message in str(refusal.value)
    assert not (tmp_path / "store").exists() or not list((tmp_path / "store").iterdir())


def test_an_invalid_schema_is_refused(writer: Path, tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text('{"type": "text"}')
    changed = {"response_schema": str(tmp_path / "none.json"), "metrics": ["json_valid"]}
    with pytest.raises(InputError, match="not a JSON schema"):
        list(advise_measured(make_recipe(writer, tmp_path, **changed), folder=tmp_path / "store"))
    with pytest.raises(InputError, match="not a folder"):
        list(advise_measured(make_recipe(writer, tmp_path), folder=tmp_path / "none.json"))
