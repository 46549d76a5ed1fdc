"""`advise --measure` from rows to a verdict, on a tiny model: what is asked, what is kept, what is
refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tiny_runs import chat, recipe, save_writer_folder, sums, write_rows
from tunesmith import advise_measured
from tunesmith.advise.measured.arms import Arm
from tunesmith.advise.measured.experiment import ExperimentStart, MeasuredAdvice
from tunesmith.advise.measured.knowledge_check import check_knowledge, explain_no_facts
from tunesmith.advise.measured.retrieval import PassageIndex, open_passages
from tunesmith.advise.measured.run_arm import (
    ArmResult,
    ArmRunner,
    plan_for_size,
    run_arm,
    sample_examples,
    select_items,
)
from tunesmith.advise.measured.time_budget import (
    count_fitting_items,
    estimate_seconds,
    measure_timings,
    split_by_budget,
)
from tunesmith.cli.views.measured_advice import report_experiment
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import to_jsonable
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs

SCHEMA = {
    "type": "object",
    "properties": {"sum": {"enum": [1, 2]}},
    "required": ["sum"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_writer_folder(tmp_path_factory.mktemp("writer") / "writer")


def wish(model: Path, folder: Path, **changed: Any) -> Recipe:
    """30 training rows and 22 held-out ones; of no use is what test_data holds."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    values = {
        "data": str(write_rows(folder / "rows.jsonl", sums(1, 30))),
        "eval_data": str(write_rows(folder / "eval.jsonl", sums(100, 22))),
        "test_data": str(write_rows(folder / "test.jsonl", sums(200, 2))),
        "metrics": ["exact_match"],
        "batch_size": 8,
    }
    return recipe(model, folder, **(values | changed))


TEXTS: dict[str, Any] = {
    "stage": "cpt",
    "batch_size": "auto",
    "metrics": "auto",
    "batch_tokens": 512,
}


def subject_of(
    model: Path, folder: Path, passages: PassageIndex | None = None, **changed: Any
) -> ArmRunner:
    known = inputs.load_inputs(wish(model, folder, **changed))
    plan = inputs.make_plan(known)
    return ArmRunner.from_plan(plan, known, select_items(known), passages)


@pytest.mark.slow
def test_a_measure_that_is_stopped_goes_on_and_ends_in_a_verdict(
    writer: Path, tmp_path: Path
) -> None:
    asked = {"minutes": 0.02, "folder": tmp_path / "kept"}
    first = advise_measured(wish(writer, tmp_path), **asked)
    begun, zero = next(first), next(first)
    first.close()  # type: ignore[attr-defined]
    assert isinstance(begun, ExperimentStart)
    assert isinstance(zero, ArmResult)
    assert (begun.items, begun.available_items, zero.arm, len(zero.answers)) == (20, 22, Arm(), 20)
    _, *outcomes, advice = advise_measured(wish(writer, tmp_path), **asked)
    assert outcomes[0] == zero, "taken from the folder, its seconds too"
    assert isinstance(advice, MeasuredAdvice)
    assert (advice.metric, advice.items, advice.training_rows) == ("exact_match", 20, 30)
    assert advice.decision.conclusion == (
        "undecided" if advice.decision.untried_kinds else "nothing"
    ), "the model writes letters"
    assert len(outcomes) + len(advice.skipped) == len(begun.arms) + len(begun.skipped)
    assert {out.reason[:5] for out in advice.skipped} <= {"about", "a pro"}
    assert "test.jsonl" not in json.dumps(to_jsonable(advice))
    _, *again, _ = advise_measured(wish(writer, tmp_path, metrics=["contains"]), **asked)
    assert again[: len(outcomes)] == outcomes, "another metric grades the same answers"
    changed = wish(
        writer, tmp_path, eval_data=str(write_rows(tmp_path / "other.jsonl", sums(150, 22)))
    )
    _, other, *_ = advise_measured(changed, **asked)
    assert other != zero


def test_an_arm_that_was_killed_in_the_middle_keeps_its_answers(
    writer: Path, tmp_path: Path
) -> None:
    asked = {"minutes": 0.001, "folder": tmp_path / "kept"}
    _, zero, _ = advise_measured(wish(writer, tmp_path), **asked)
    kept = (tmp_path / "kept" / "answers.jsonl").read_bytes()
    assert len(kept.splitlines()) == 20
    for file in (tmp_path / "kept").glob("*.json"):
        if b'"prompt_tokens"' in file.read_bytes() and b'"speed"' not in file.read_bytes():
            file.unlink()  # as if the arm had not come to its end
    _, again, _ = advise_measured(wish(writer, tmp_path), **asked)
    assert again != zero, "it was timed anew"
    assert again.answers == zero.answers  # type: ignore[union-attr]
    assert (tmp_path / "kept" / "answers.jsonl").read_bytes() == kept, "nothing was generated again"


def test_every_kind_of_arm_is_asked_its_way(writer: Path, tmp_path: Path) -> None:
    (tmp_path / "docs.txt").write_text(
        "\n\n".join(f"{n} and {n * n} make {n + n * n}. " * 5 for n in range(100, 105))
    )
    changed = {"schema": str(tmp_path / "schema.json"), "metrics": ["json_valid"]}
    passages = open_passages(tmp_path / "docs.txt")
    subject = subject_of(writer, tmp_path, passages, **changed)
    subject = dataclasses.replace(subject, items=subject.items[:4])
    before = {name: weight.clone() for name, weight in subject.model.network.state_dict().items()}
    renderer = subject.inputs.renderer

    def told(arm: Arm) -> str:
        return renderer.decode(subject.build_questions(arm)[0].prompt_ids)

    assert told(Arm()).count("and") == 1
    assert told(Arm(shots=2)).count("assistant\n") == 3
    assert told(Arm(shots=2, shot_layout="labelled")).count("Output:") == 3
    assert "100 and 10000 make 10100" in told(Arm(passages=1))
    assert told(Arm(shots=2, seed=1)) != told(Arm(shots=2))
    constrained = run_arm(subject, Arm(is_constrained=True))
    assert all(json.loads(answer)["sum"] in (1, 2) for answer in constrained.answers.values())
    free, trained = run_arm(subject, Arm()), run_arm(subject, Arm(examples=25))
    assert trained.answers != free.answers
    assert trained.train_seconds > 0 == free.train_seconds
    after = subject.model.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "the base is as it was"
    assert run_arm(subject, Arm(examples=25)).answers == trained.answers, (
        "every training has the same start"
    )
    assert run_arm(subject, Arm()).answers == free.answers
    long = dataclasses.replace(subject, passages=PassageIndex(["100 and 10000 " * 60] * 3))
    with pytest.raises(InputError, match="exceed the context of 512"):
        run_arm(long, Arm(passages=3))


def test_examples_are_training_rows_and_more_are_the_same_and_others(
    writer: Path, tmp_path: Path
) -> None:
    subject = subject_of(writer, tmp_path)
    ids = [example.id for example in sample_examples(subject.rows, 0, 10)]
    assert ids[:4] == [example.id for example in sample_examples(subject.rows, 0, 4)]
    assert all(row.startswith("rows.jsonl") for row in ids)
    assert ids != [example.id for example in sample_examples(subject.rows, 1, 10)]
    assert all(item.id.startswith("eval.jsonl") for item in subject.items)
    plan = plan_for_size(subject, 25)
    assert (plan.data["data"].rows, plan.config.lora_r, plan.steps) == (25, subject.plan.config.lora_r, 4)


def test_the_minutes_decide_how_many_items_and_arms(writer: Path, tmp_path: Path) -> None:
    subject = subject_of(writer, tmp_path)
    speed = measure_timings(subject)
    assert min(speed.prefill_seconds, speed.decode_seconds, speed.single_decode_seconds) > 0
    assert count_fitting_items(subject, speed, 1e6) == 22
    assert count_fitting_items(subject, speed, 1e-6) == 20
    cost = {Arm(): 10.0, Arm(shots=2): 3.0, Arm(examples=25): 20.0, Arm(shots=4): 1.0}
    assert split_by_budget(list(cost), 15, cost.__getitem__) == (
        [Arm(), Arm(shots=2), Arm(shots=4)],
        [Arm(examples=25)],
    )
    assert split_by_budget(list(cost), 1, cost.__getitem__)[0] == [Arm()]
    assert estimate_seconds(subject, speed, Arm(examples=25)) > estimate_seconds(
        subject, speed, Arm(is_constrained=True)
    )


def test_what_the_base_knows_is_counted(writer: Path, tmp_path: Path) -> None:
    facts_of = [chat(f"what is {n}?", f"w{n}") for n in range(30)]
    subject = subject_of(writer, tmp_path, data=str(write_rows(tmp_path / "facts.jsonl", facts_of)))
    assert explain_no_facts(subject) == ""
    found = check_knowledge(subject, 12)
    assert (found.rows, found.counts) == (12, {"highly": 0, "maybe": 0, "weakly": 0, "unknown": 12})
    assert (found.unknown_share, found.high) == (1.0, 1.0)
    assert 0.7 < found.low < 0.8
    labels = [chat(f"what is {n}?", "ab"[n % 2]) for n in range(30)]
    subject = subject_of(writer, tmp_path, data=str(write_rows(tmp_path / "labels.jsonl", labels)))
    assert explain_no_facts(subject) == "many answers are alike, as labels are"
    long = [chat(f"what is {n}?", f"{n} " * 20) for n in range(30)]
    subject = subject_of(writer, tmp_path, data=str(write_rows(tmp_path / "long.jsonl", long)))
    assert explain_no_facts(subject) == "half of the answers have more than 12 words"


def test_it_is_shown(writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    *begun, advice = advise_measured(
        wish(writer, tmp_path), minutes=0.001, folder=tmp_path / "kept", target=0.5
    )
    for found in (*begun, advice):
        if (view := report_experiment(found)) is not None:
            Console(width=120).print(view)
    printed = to_jsonable(advice)["decision"]
    assert (printed["conclusion"], printed["untried_kinds"]) == ("undecided", ["prompts", "training"]), (
        "--json says it as well"
    )
    told = capsys.readouterr()
    assert told.out.startswith("Not decided yet: prompts and training had no room in the time")
    assert "zero-shot" in told.out
    assert "a target lower than 0.5" in told.out
    assert "20 of 22 items, " in told.err


def test_held_out_rows_that_are_kept_for_a_test_are_told(
    writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = next(
        advise_measured(
            wish(writer, tmp_path, test_data=()), minutes=0.001, folder=tmp_path / "kept"
        )
    )
    assert isinstance(begun, ExperimentStart)
    assert begun.available_items + begun.test_rows == 22
    report_experiment(begun)
    assert (
        f"{begun.available_items} items ({begun.test_rows} rows are kept as test_data), "
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("changed", "asked", "told"),
    [
        ({"eval_data": (), "test_data": ()}, {}, "no held-out items to ask"),
        ({"schema": "no.json"}, {}, "schema"),
        ({}, {"minutes": 0}, "no time"),
        ({}, {"minutes": float("nan")}, "no time"),
        ({}, {"target": 1.5}, "between 0 and 1"),
        ({}, {"metric": "bleu"}, "no metric 'bleu'"),
        ({}, {"documents": "nowhere"}, "nowhere"),
        (TEXTS, {}, "stage: cpt has none"),
    ],
    ids=["items", "schema", "minutes", "no number", "target", "metric", "documents", "stage"],
)
def test_what_cannot_be_measured_is_refused(
    changed: dict[str, Any], asked: dict[str, Any], told: str, writer: Path, tmp_path: Path
) -> None:
    if changed is TEXTS:
        texts = [
            str(write_rows(tmp_path / f"{n}.jsonl", [{"text": f"{n}{n} texts"}] * 2)) for n in "abc"
        ]
        changed = {**TEXTS, **dict(zip(("data", "eval_data", "test_data"), texts, strict=True))}
    with pytest.raises(InputError) as refusal:
        list(advise_measured(wish(writer, tmp_path, **changed), folder=tmp_path / "kept", **asked))
    assert told in str(refusal.value)
    assert not (tmp_path / "kept").exists() or not list((tmp_path / "kept").iterdir())


def test_a_schema_that_is_none_is_refused(writer: Path, tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text('{"type": "text"}')
    changed = {"schema": str(tmp_path / "none.json"), "metrics": ["json_valid"]}
    with pytest.raises(InputError, match="not a JSON schema"):
        list(advise_measured(wish(writer, tmp_path, **changed), folder=tmp_path / "kept"))
    with pytest.raises(InputError, match="there is a file of this name"):
        list(advise_measured(wish(writer, tmp_path), folder=tmp_path / "none.json"))
