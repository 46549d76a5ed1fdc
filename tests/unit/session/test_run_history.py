"""What earlier runs took corrects later plans, and a plan says so."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import make_tiny_recipe, plan_recipe
from tunesmith.core.json_io import parse_as, to_jsonable
from tunesmith.core.types import Plan, RunRecord
from tunesmith.plan.flops import count_computed_tokens
from tunesmith.session import run_history


@pytest.fixture
def made(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return plan_recipe(make_tiny_recipe(tiny_folder, tmp_path))


def record(plan: Plan, **changed: Any) -> RunRecord:
    values: dict[str, Any] = {
        "version": "0",
        "plan": plan,
        "preflight": (),
        "comparisons": (),
        "steps": 30,
        "tokens": 5000,
        "shared_tokens": 1000,
        "train_seconds": 8.0,
        "peak_bytes": int(1.2 * plan.memory_bytes["peak"]),
        "adapter": "adapter",
    }
    return RunRecord(**(values | changed))


def test_a_later_plan_expects_what_the_last_run_took(
    made: Plan, tiny_folder: Path, tmp_path: Path
) -> None:
    assert made.config.memory_factor is None
    run_history.save_past_run(record(made))
    later = plan_recipe(make_tiny_recipe(tiny_folder, tmp_path))
    assert later.config.memory_factor == pytest.approx(1.2, abs=0.001)
    assert later.reasons["memory_factor"].confidence == "measured here"
    assert later.memory_bytes["peak"] == pytest.approx(1.2 * made.memory_bytes["peak"], rel=1e-3)
    assert later.memory_bytes["peak"] == sum(
        v for name, v in later.memory_bytes.items() if name != "peak"
    )
    assert later.seconds == (pytest.approx(count_computed_tokens(later) / 500),)
    assert "run" in later.seconds_source
    read = parse_as(Plan, to_jsonable(later))
    assert read.reasons["memory_factor"] == later.reasons["memory_factor"], (
        "a plan says what it was made with"
    )
    assert (read.memory_bytes, read.seconds) == (later.memory_bytes, later.seconds)
    run_history.save_past_run(record(later, peak_bytes=made.memory_bytes["peak"]))
    assert plan_recipe(make_tiny_recipe(tiny_folder, tmp_path)).config.memory_factor == 1.0, (
        "of the uncorrected prediction"
    )


def test_another_method_machine_or_format_is_another_kind(
    made: Plan, tiny_folder: Path, tmp_path: Path
) -> None:
    run_history.save_past_run(record(made))
    other = dataclasses.replace(
        made, machine=dataclasses.replace(made.machine, device_name="another")
    )
    assert run_history.find_past_run(made) is not None
    assert run_history.find_past_run(other) is None
    measuring = dataclasses.replace(
        made, memory_bytes=made.memory_bytes | {"evaluation": 5 * 10**8}
    )
    assert run_history.find_past_run(measuring) is None
    assert (
        plan_recipe(
            make_tiny_recipe(tiny_folder, tmp_path, method="full", lora_r="auto")
        ).config.memory_factor
        is None
    )


@pytest.mark.parametrize("changed", [{"steps": 19}, {"peak_bytes": 0}])
def test_short_runs_say_nothing(changed: dict[str, Any], made: Plan) -> None:
    run_history.save_past_run(record(made, **changed))
    assert run_history.find_past_run(made) is None


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": 1}', b"\xff"])
def test_a_broken_file_is_no_experience_and_is_replaced(
    content: bytes, made: Plan, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / run_history.HISTORY_FILE).write_bytes(content)
    assert run_history.apply_past_run(made) == made
    run_history.save_past_run(record(made))
    assert run_history.find_past_run(made) is not None


def test_the_factor_is_bounded_and_hardly_below_one(made: Plan) -> None:
    for times, factor in ((100, 2.0), (0.95, 0.95), (0.5, 0.9)):
        run_history.save_past_run(record(made, peak_bytes=int(times * made.memory_bytes["peak"])))
        assert run_history.apply_past_run(made).config.memory_factor == pytest.approx(
            factor, abs=0.001
        )
