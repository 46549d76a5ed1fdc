"""What earlier runs took on this machine, in a small file of the cache; plans predict from it.

    save_past_run(record)       after a run whose peak memory is its own process's
    apply_past_runs(plan)       corrects the memory, and adds the time at the measured speed

Runs are alike if they had the same processor or GPU, model shape, method, dtype, evaluation and
version of tunesmith. The median of the last few counts, so that one unusual run is not the
forecast. The correction is a setting of the plan.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.atomic import make_dirs, write_file
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.formatting import format_bytes
from tunesmith.core.json_io import dump_json, parse_as, read_json
from tunesmith.core.types import Plan, PlanValue, RunRecord, __version__
from tunesmith.model.hub.built_in import find_cache_dir
from tunesmith.plan.flops import count_computed_tokens
from tunesmith.plan.memory_budget import apply_memory_factor
from tunesmith.plan.step_memory import has_enough_memory

HISTORY_FILE = "run_history.json"
MIN_STEPS = 20  # shorter runs have not seen the largest pack or a steady speed
# hardly below 1: the next run may have longer rows, and too little memory ends it
MIN_FACTOR = 0.9
MAX_FACTOR = 2.0
MAX_RUNS = 5  # of a kind
MIN_RUNS = 3  # that may refuse a plan: below, the median is one run, or half of it is
OUTLIER_RATIO = 1.25  # a run is named if it is further from the median


@dataclass(frozen=True)
class PastRun:
    """The time and memory of an earlier run."""

    run: str
    predicted_bytes: int  # without correction
    peak_bytes: int  # 0: not of the run alone
    tokens_per_second: float  # shared prefixes count once

    @property
    def name(self) -> str:
        return Path(self.run).name

    @property
    def ratio(self) -> float:
        return self.peak_bytes / self.predicted_bytes


def save_past_run(record: RunRecord, *, is_peak_exclusive: bool = True) -> None:
    """Save what a run took; a file that cannot be written is skipped.

    Without `is_peak_exclusive`, the memory of the process was not the run's alone, such as beside a
    tracker: only its speed counts."""
    if record.steps < MIN_STEPS or record.peak_bytes <= 0:
        return
    plan = record.plan
    computed_tokens = record.tokens - record.shared_tokens
    past_run = PastRun(
        run=str(Path(plan.config.output_dir).absolute()),
        predicted_bytes=plan.memory_bytes["peak"] - plan.memory_bytes.get("correction", 0),
        peak_bytes=record.peak_bytes if is_peak_exclusive else 0,
        tokens_per_second=computed_tokens / max(record.train_seconds, 1e-9),
    )
    history = _read_history()
    key = make_run_key(plan)
    history[key] = [*history.get(key, []), past_run][-MAX_RUNS:]
    try:
        make_dirs(_get_history_path().parent)
        write_file(_get_history_path(), dump_json(history, indent=1))
    except MachineError:
        return


def list_past_runs(plan: Plan) -> list[PastRun]:
    """Return the last runs of a plan's kind, oldest first."""
    runs = _read_history().get(make_run_key(plan), [])
    return [run for run in runs if run.predicted_bytes > 0 and run.tokens_per_second > 0]


def make_run_key(plan: Plan) -> str:
    """Return a key that alike runs share."""
    machine = plan.machine
    model = plan.model
    shape = f"{model.model_type} {model.num_layers}x{model.hidden_size}"
    settings = f"{plan.config.method} {plan.config.dtype}" + (
        ", measured" if plan.memory_bytes.get("evaluation") else ""
    )
    hardware = f"{machine.device_name}, {machine.cores} cores"
    if machine.device == "cuda":
        hardware = f"cuda {machine.device_name}, {format_bytes(machine.memory_bytes)}"
    return f"{hardware}; {shape}; {settings}; {__version__}"


def apply_past_runs(plan: Plan) -> Plan:
    """Correct a plan by the last runs of its kind, if there are any.

    Fewer than MIN_RUNS never make a plan too large that fits without them: a single high peak may
    be a mistake, and a refused run cannot measure again."""
    runs = list_past_runs(plan)
    if not runs:
        return plan
    names = runs[0].name if len(runs) == 1 else f"the last {len(runs)} runs of this kind"
    speed = statistics.median(run.tokens_per_second for run in runs)
    plan = dataclasses.replace(
        plan,
        seconds=(count_computed_tokens(plan) / speed,),
        seconds_source=_explain_speed(runs, names, speed),
    )
    runs = [run for run in runs if run.peak_bytes]
    if not runs:
        return plan
    corrected = _correct_memory(plan, runs)
    if len(runs) >= MIN_RUNS or has_enough_memory(corrected) or not has_enough_memory(plan):
        return corrected
    peak = format_bytes(corrected.memory_bytes["peak"])
    free = format_bytes(plan.machine.available_bytes)
    warning = (
        f"memory: as {names} measured, this run would need {peak} with {free} free; it is planned "
        f"without that, since it takes {MIN_RUNS} runs to refuse one"
    )
    return dataclasses.replace(plan, warnings=(*plan.warnings, warning))


def _explain_speed(runs: Sequence[PastRun], names: str, speed: float) -> str:
    """Name the runs that the forecast comes from, and those that were much faster or slower."""
    if len(runs) < MIN_RUNS:
        how = "" if len(runs) == 1 else "mean "
        return f"at the {how}speed of {names} (few: another load changes the forecast)"
    text = f"at the median speed of {names}"
    if outliers := _list_outliers(runs, [run.tokens_per_second for run in runs], speed):
        text += f" (outliers, in tokens/s: {', '.join(outliers)})"
    return text


def _list_outliers(runs: Sequence[PastRun], values: Sequence[float], median: float) -> list[str]:
    outliers: list[str] = []
    for run, value in zip(runs, values, strict=True):
        if not median / OUTLIER_RATIO <= value <= median * OUTLIER_RATIO:
            outliers.append(f"{run.name} {value:.3g}")
    return outliers


def _correct_memory(plan: Plan, runs: Sequence[PastRun]) -> Plan:
    median = statistics.median(run.ratio for run in runs)
    factor = round(min(max(median, MIN_FACTOR), MAX_FACTOR), 3)
    plan_value = PlanValue(
        factor, "rule", _explain_factor(runs, median), confidence="measured here"
    )
    return dataclasses.replace(
        plan.with_settings(memory_factor=plan_value),
        memory_bytes=apply_memory_factor(plan.memory_bytes, factor),
        phase_bytes={name: int(size * factor) for name, size in plan.phase_bytes.items()},
    )


def _explain_factor(runs: Sequence[PastRun], median: float) -> str:
    """Name what was measured, the outliers, and how to plan without it."""
    last = runs[-1]
    measured = (
        f"{last.name} took {last.peak_bytes / 1e9:.2f} GB, but "
        f"{last.predicted_bytes / 1e9:.2f} GB were predicted"
    )
    if len(runs) > 1:
        measured = f"median of measured to predicted memory in the last {len(runs)} runs"
    outliers = _list_outliers(runs, [run.ratio for run in runs], median)
    if outliers:
        measured += f" (outliers: {', '.join(outliers)})"
    return f"{measured}; delete {_get_history_path()} to plan without them"


def _get_history_path() -> Path:
    return find_cache_dir().parent / HISTORY_FILE


def _read_history() -> dict[str, list[PastRun]]:
    """Return the saved runs; a missing or foreign file is empty."""
    try:
        return parse_as(dict[str, list[PastRun]], read_json(_get_history_path()))
    except (InputError, OSError):
        return {}
