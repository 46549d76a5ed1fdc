"""Runs on 4-bit weights, from the recipe to the reopened run."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tiny_runs import (
    build_sum_rows,
    make_chat_row,
    make_tiny_recipe,
    plan_recipe,
    read_adapter_bytes,
    run_until_saved,
    select_steps,
    train,
    write_eval_files,
    write_rows,
)
from tunesmith.core.errors import InputError
from tunesmith.core.events import CheckResult
from tunesmith.core.json_io import read_json
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs, planner
from tunesmith.session.fingerprint import build_fingerprint
from tunesmith.session.reopen import load_trained_session
from tunesmith.train import run

pytestmark = pytest.mark.promise


def qlora(model: Path, folder: Path, **changed: Any) -> Recipe:
    return make_tiny_recipe(model, folder, method="qlora", **changed)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_is_proven_trains_and_is_reopened(
    dtype: str, tiny_folder: Path, tmp_path: Path
) -> None:
    wish = qlora(tiny_folder, tmp_path, dtype=dtype, **write_eval_files(tmp_path / "held-out"))
    events = train(wish)
    messages = {event.kind: event.evidence for event in events if isinstance(event, CheckResult)}
    assert messages["4-bit weights"].startswith("14 matrices, ")
    assert messages["logits match transformers"].startswith(
        "relative difference at most 0.00%" if dtype == "fp32" else "relative difference at most "
    )
    steps = select_steps(events)
    assert len(steps) == 3
    assert steps[-1].loss < steps[0].loss
    first, again = (
        read_json(tmp_path / "run" / "record.json")["comparisons"],
        tunesmith.evaluate(tmp_path / "run").comparisons,
    )
    assert [c["after"]["value"] for c in first] == [c.after.value for c in again]
    assert len(list(tunesmith.chat(tmp_path / "run", ["1 and 1"]))) == 1


def test_the_base_is_another_than_that_of_lora(tiny_folder: Path, tmp_path: Path) -> None:
    wishes = [
        qlora(tiny_folder, tmp_path / "a"),
        make_tiny_recipe(tiny_folder, tmp_path / "b", method="lora"),
    ]
    small, plain = (select_steps(train(wish))[0].loss for wish in wishes)
    assert small != plain
    assert small == pytest.approx(plain, rel=0.1)


def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    straight = qlora(tiny_folder, tmp_path / "straight")
    train(straight)
    broken = qlora(tiny_folder, tmp_path / "broken", save_steps=1)
    run_inputs = inputs.load_inputs(broken)
    run_until_saved(run.train(planner.make_plan(run_inputs), run_inputs), 1)
    assert select_steps(list(run.resume(tmp_path / "broken" / "run")))[0].step == 2
    assert read_adapter_bytes(broken) == read_adapter_bytes(straight)


def test_going_on_with_its_adapter(tiny_folder: Path, tmp_path: Path) -> None:
    first = select_steps(train(qlora(tiny_folder, tmp_path / "a", learning_rate=0.1)))
    wish = qlora(
        tiny_folder, tmp_path / "b", lora_r="auto", adapter_from=str(tmp_path / "a" / "run")
    )
    events = train(wish)
    assert select_steps(events)[0].loss < 0.95 * first[0].loss


def test_without_bitsandbytes_a_plan_names_the_extra(tiny_folder: Path, tmp_path: Path) -> None:
    run_inputs = inputs.load_inputs(qlora(tiny_folder, tmp_path))
    versions = {
        name: version
        for name, version in run_inputs.machine.versions.items()
        if name != "bitsandbytes"
    }
    run_inputs = dataclasses.replace(
        run_inputs, machine=dataclasses.replace(run_inputs.machine, versions=versions)
    )
    with pytest.raises(InputError, match=r"pip install '\.\[qlora\]'"):
        planner.make_plan(run_inputs)
    assert not (tmp_path / "run").exists()


def test_without_bitsandbytes_a_run_is_not_reopened(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(qlora(tiny_folder, tmp_path))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"pip install '\.\[qlora\]'"):
        load_trained_session(tmp_path / "run")


def test_another_bitsandbytes_is_another_run(tiny_folder: Path, tmp_path: Path) -> None:
    for wish, named in (
        (qlora(tiny_folder, tmp_path / "a"), True),
        (make_tiny_recipe(tiny_folder, tmp_path / "b"), False),
    ):
        run_inputs = inputs.load_inputs(wish)
        assert (
            "bitsandbytes" in build_fingerprint(plan_recipe(wish), run_inputs, {})["versions"]
        ) == named


def test_a_machine_without_bf16_is_told_what_it_costs(tiny_folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [make_chat_row("a", "b"), *build_sum_rows(1, 3)])
    messages = plan_recipe(qlora(tiny_folder, tmp_path, data=str(rows), dtype="fp32")).warnings
    assert any("dequantized to fp32" in warning for warning in messages)
    assert not any(
        "dequantized" in warning
        for warning in plan_recipe(qlora(tiny_folder, tmp_path, dtype="bf16")).warnings
    )
