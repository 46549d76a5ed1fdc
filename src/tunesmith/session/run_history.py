"""What earlier runs took on this machine, in a small file of the cache; plans predict from it.

    save_past_run(record)       after a run whose peak memory is its own process's
    apply_past_run(plan)        corrects the memory, and adds the time at the measured speed

Runs are alike if they had the same processor, model shape, method, dtype, evaluation and version of
tunesmith. The correction is a setting of the plan. Left out: averages over runs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.atomic import make_dirs, write_file
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.json_io import dump_json, parse_as, read_json
from tunesmith.core.types import Plan, PlanValue, RunRecord, __version__
from tunesmith.model.hub.resolve import find_cache_dir
from tunesmith.plan.flops import count_computed_tokens
from tunesmith.plan.memory_budget import apply_memory_factor

HISTORY_FILE = "run_history.json"
MIN_STEPS = 20  # shorter runs have not seen the largest pack or a steady speed
# hardly below 1: the next run may have longer rows, and too little memory ends it
MIN_FACTOR = 0.9
MAX_FACTOR = 2.0


@dataclass(frozen=True)
class PastRun:
    """The last run of a kind."""

    run: str
    predicted_bytes: int  # without correction
    peak_bytes: int
    tokens_per_second: float  # shared prefixes count once


def save_past_run(record: RunRecord) -> None:
    """Save what a run took; a file that cannot be written is skipped."""
    if record.steps < MIN_STEPS or record.peak_bytes <= 0:
        return
    plan = record.plan
    computed_tokens = record.tokens - record.shared_tokens
    past_run = PastRun(
        run=str(Path(plan.config.output_dir).absolute()),
        predicted_bytes=plan.memory_bytes["peak"] - plan.memory_bytes.get("correction", 0),
        peak_bytes=record.peak_bytes,
        tokens_per_second=computed_tokens / max(record.train_seconds, 1e-9),
    )
    history = _read_history() | {make_run_key(plan): past_run}
    try:
        make_dirs(_get_history_path().parent)
        write_file(_get_history_path(), dump_json(history, indent=1))
    except MachineError:
        return


def find_past_run(plan: Plan) -> PastRun | None:
    return _read_history().get(make_run_key(plan))


def make_run_key(plan: Plan) -> str:
    """Return a key that alike runs share."""
    machine = plan.machine
    model = plan.model
    shape = f"{model.model_type} {model.num_layers}x{model.hidden_size}"
    settings = f"{plan.config.method} {plan.config.dtype}" + (
        ", measured" if plan.memory_bytes.get("evaluation") else ""
    )
    return f"{machine.device_name}, {machine.cores} cores; {shape}; {settings}; {__version__}"


def apply_past_run(plan: Plan) -> Plan:
    """Correct a plan by the last run of its kind, if there is one."""
    past_run = find_past_run(plan)
    if past_run is None:
        return plan
    ratio = past_run.peak_bytes / past_run.predicted_bytes
    factor = round(min(max(ratio, MIN_FACTOR), MAX_FACTOR), 3)
    reason = (
        f"{past_run.run} took {past_run.peak_bytes / 1e9:.2f} GB, and "
        f"{past_run.predicted_bytes / 1e9:.2f} GB were predicted"
    )
    plan_value = PlanValue(factor, "rule", reason, confidence="measured here")
    return dataclasses.replace(
        plan.with_settings(memory_factor=plan_value),
        memory_bytes=apply_memory_factor(plan.memory_bytes, factor),
        phase_bytes={name: int(size * factor) for name, size in plan.phase_bytes.items()},
        seconds=(count_computed_tokens(plan) / past_run.tokens_per_second,),
        seconds_source=f"at the speed of {past_run.run}",
    )


def _get_history_path() -> Path:
    return find_cache_dir().parent / HISTORY_FILE


def _read_history() -> dict[str, PastRun]:
    """Return the saved runs; a missing or foreign file is empty."""
    try:
        return parse_as(dict[str, PastRun], read_json(_get_history_path()))
    except (InputError, OSError):
        return {}
