"""A whole run in fp16, whose loss is scaled: checked, trained, stopped and resumed.

On a CPU, where fp16 is slower and computes the same as on the GPUs that need it."""

from pathlib import Path

import pytest

from tiny_runs import (
    make_tiny_recipe,
    plan_recipe,
    read_adapter_bytes,
    run_until_saved,
    select_steps,
    train,
)
from tunesmith.core.events import CheckResult
from tunesmith.core.json_io import read_json
from tunesmith.train import run
from tunesmith.train.optimizer import LossScale


@pytest.mark.promise
def test_a_run_in_fp16_passes_preflight_and_resumes_bitwise(
    tiny_folder: Path, tmp_path: Path
) -> None:
    recipes = [
        make_tiny_recipe(tiny_folder, tmp_path / name, dtype="fp16", save_steps=1) for name in "ab"
    ]
    events = train(recipes[0])
    assert [step.step for step in select_steps(events)] == [1, 2, 3]
    blocks = [e for e in events if isinstance(e, CheckResult) and "blocks match" in e.kind]
    assert [check.level for check in blocks] == ["ok"]
    plan = plan_recipe(recipes[1])
    assert any("slower than fp32" in warning for warning in plan.warnings)
    run_until_saved(run.train(plan), 2)
    folder = tmp_path / "b" / "run"
    state = read_json(folder / "checkpoints" / "step-2" / "trainer_state.json")
    assert state["loss_scale"]["finite_steps"] == 2
    list(run.resume(folder))
    assert read_adapter_bytes(recipes[1]) == read_adapter_bytes(recipes[0])


def test_repeated_steps_are_events_of_the_run(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LossScale, "from_dtype", lambda _dtype: LossScale(2.0**40))
    events = train(make_tiny_recipe(tiny_folder, tmp_path, dtype="fp16"))
    repeated = [e for e in events if isinstance(e, CheckResult) and e.kind == "loss scale"]
    assert [step.step for step in select_steps(events)] == [1, 2, 3]
    assert repeated[-1].evidence.endswith(f"{len(repeated)} repeated so far")
    assert (tmp_path / "run" / "events.jsonl").read_text().count("loss scale,") == len(repeated)
