"""What earlier runs took corrects later plans, and a plan says so."""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import make_tiny_recipe, plan_recipe
from tunesmith.core.errors import MachineError
from tunesmith.core.json_io import parse_as, to_jsonable
from tunesmith.core.types import Plan, RunRecord
from tunesmith.plan.build import refuse_if_too_large
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
    again = plan_recipe(make_tiny_recipe(tiny_folder, tmp_path))
    assert again.config.memory_factor == pytest.approx(1.1, abs=0.001), (
        "the median of 1.2 and 1, both of the uncorrected prediction"
    )


def test_another_method_machine_or_format_is_another_kind(
    made: Plan, tiny_folder: Path, tmp_path: Path
) -> None:
    run_history.save_past_run(record(made))
    other = dataclasses.replace(
        made, machine=dataclasses.replace(made.machine, device_name="another")
    )
    assert run_history.list_past_runs(made)
    assert run_history.list_past_runs(other) == []
    measuring = dataclasses.replace(
        made, memory_bytes=made.memory_bytes | {"evaluation": 5 * 10**8}
    )
    assert run_history.list_past_runs(measuring) == []
    assert (
        plan_recipe(
            make_tiny_recipe(tiny_folder, tmp_path, method="full", lora_r="auto")
        ).config.memory_factor
        is None
    )


@pytest.mark.parametrize("changed", [{"steps": 19}, {"peak_bytes": 0}])
def test_short_runs_say_nothing(changed: dict[str, Any], made: Plan) -> None:
    run_history.save_past_run(record(made, **changed))
    assert run_history.list_past_runs(made) == []


def test_memory_beside_a_tracker_is_no_forecast_and_the_speed_is(made: Plan) -> None:
    run_history.save_past_run(record(made, peak_bytes=10**12), is_peak_exclusive=False)
    later = run_history.apply_past_runs(made)
    assert later.memory_bytes == made.memory_bytes
    assert later.config.memory_factor is None
    assert later.seconds == (pytest.approx(count_computed_tokens(made) / 500),)
    save_peaks(made, 1.1)
    later = run_history.apply_past_runs(made)
    assert later.config.memory_factor == pytest.approx(1.1, abs=0.001)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": 1}', b"\xff"])
def test_a_broken_file_is_no_experience_and_is_replaced(
    content: bytes, made: Plan, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / run_history.HISTORY_FILE).write_bytes(content)
    assert run_history.apply_past_runs(made) == made
    run_history.save_past_run(record(made))
    assert run_history.list_past_runs(made)


def test_the_factor_is_bounded_and_hardly_below_one(made: Plan) -> None:
    for times, factor in ((100, 2.0), (0.95, 0.95), (0.5, 0.9)):
        (run_history.find_cache_dir().parent / run_history.HISTORY_FILE).unlink(missing_ok=True)
        save_peaks(made, times)
        assert run_history.apply_past_runs(made).config.memory_factor == pytest.approx(
            factor, abs=0.001
        )


# ---------------------------------------------------------------- unusual runs


def save_peaks(plan: Plan, *ratios: float, seconds: float = 8.0) -> None:
    for ratio in ratios:
        peak_bytes = int(ratio * plan.memory_bytes["peak"])
        run_history.save_past_run(record(plan, peak_bytes=peak_bytes, train_seconds=seconds))


@pytest.mark.parametrize("ratios", [(2.0,), (1.0, 2.0), (2.0, 1.0), (2.0, 2.0), (5.0, 1.0, 1.0)])
def test_one_or_two_high_peaks_do_not_refuse_the_next_run(
    ratios: tuple[float, ...], made: Plan
) -> None:
    machine = dataclasses.replace(
        made.machine, available_bytes=int(1.3 * made.memory_bytes["peak"])
    )
    small = dataclasses.replace(made, machine=machine)
    refuse_if_too_large(small)
    save_peaks(small, *ratios)
    later = run_history.apply_past_runs(small)
    refuse_if_too_large(later)
    if statistics.median(ratios) > 1.3:
        (warning,) = set(later.warnings) - set(small.warnings)
        assert warning.startswith("memory: as ")
        assert "it takes 3 runs to refuse one" in warning
    else:
        assert later.warnings == small.warnings


def test_runs_that_agree_refuse_and_say_how_to_plan_without_them(made: Plan) -> None:
    machine = dataclasses.replace(
        made.machine, available_bytes=int(1.3 * made.memory_bytes["peak"])
    )
    small = dataclasses.replace(made, machine=machine)
    save_peaks(small, 1.9, 2.0, 1.9)
    with pytest.raises(MachineError, match=r"corrected by 1\.9: median of") as caught:
        refuse_if_too_large(run_history.apply_past_runs(small))
    file = Path(caught.value.fix.rpartition("delete ")[2].removesuffix(" to plan without them"))
    file.unlink()
    refuse_if_too_large(run_history.apply_past_runs(small))


def test_a_plan_that_never_fitted_is_refused_as_before(made: Plan) -> None:
    machine = dataclasses.replace(made.machine, available_bytes=made.memory_bytes["peak"] // 2)
    small = dataclasses.replace(made, machine=machine)
    save_peaks(small, 1.5)
    with pytest.raises(MachineError, match="the run needs about"):
        refuse_if_too_large(run_history.apply_past_runs(small))


def test_outliers_are_named_and_only_the_last_runs_count(made: Plan) -> None:
    save_peaks(made, 1.8, 1.8, 1.8)
    save_peaks(made, 1.1, 1.1, 2.0, 1.1, 1.1)
    later = run_history.apply_past_runs(made)
    assert later.config.memory_factor == pytest.approx(1.1, abs=0.001)
    reason = later.reasons["memory_factor"].reason
    assert "in the last 5 runs (outliers: run 2); delete " in reason


def test_one_slow_run_does_not_become_the_forecast(made: Plan) -> None:
    save_peaks(made, 1.0, 1.0, seconds=8.0)
    save_peaks(made, 1.0, seconds=800.0)
    later = run_history.apply_past_runs(made)
    assert later.seconds == (pytest.approx(count_computed_tokens(made) / 500),)
    median = "at the median speed of the last 3 runs of this kind"
    assert later.seconds_source == f"{median} (outliers, in tokens/s: run 5)"


def test_a_forecast_from_few_runs_says_so(made: Plan) -> None:
    for _ in range(2):
        save_peaks(made, 1.0)
        source = run_history.apply_past_runs(made).seconds_source
        assert source.endswith("(few: another load changes the forecast)")
    save_peaks(made, 1.0)
    source = run_history.apply_past_runs(made).seconds_source
    assert source == "at the median speed of the last 3 runs of this kind"


def test_a_file_of_single_runs_is_replaced(made: Plan, tmp_path: Path) -> None:
    save_peaks(made, 1.0)
    file = tmp_path / "cache" / run_history.HISTORY_FILE
    older = {key: runs[0] for key, runs in json.loads(file.read_text()).items()}
    file.write_text(json.dumps(older))
    assert run_history.apply_past_runs(made) == made
