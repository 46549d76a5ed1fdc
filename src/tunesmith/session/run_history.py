"""What runs on this machine have taken, kept in one small file of the cache: later plans predict
from it.

    remember(record)      after a run of its own process, whose peak is the run's
    corrected(plan)       its memory times what the last such run took of its prediction, and the time at its speed

A run is such a run on the same processor, for a model of the same shape, by the same method and
number format, measured or not before, by the same version. The factor is written into the plan: a
plan.json says what it was made with. Left out: averages over runs."""

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
from tunesmith.plan.memory_budget import apply_memory_factor as corrected_parts

HISTORY_FILE = "experience.json"
MIN_STEPS = 20  # fewer have not seen the largest pack, nor a steady speed
FACTOR_BOUNDS = (
    0.9,
    2.0,
)  # hardly less than predicted: the next run may have longer rows, and too little ends it


@dataclass(frozen=True)
class PastRun:
    """The last run of a kind. `predicted_bytes` without any correction; tokens are those computed,
    shared ones once."""

    run: str
    predicted_bytes: int
    peak_bytes: int
    tokens_per_second: float


def save_past_run(record: RunRecord) -> None:
    """Nothing is lost where the file cannot be written."""
    if record.steps < MIN_STEPS or record.peak_bytes <= 0:
        return
    plan, computed_tokens = record.plan, record.tokens - record.shared_tokens
    past_run = PastRun(
        run=str(Path(plan.config.output_dir).absolute()),
        predicted_bytes=plan.memory_bytes["peak"] - plan.memory_bytes.get("correction", 0),
        peak_bytes=record.peak_bytes,
        tokens_per_second=computed_tokens / max(record.train_seconds, 1e-9),
    )
    try:
        make_dirs(_get_history_path().parent)
        write_file(
            _get_history_path(),
            dump_json(_read_history() | {make_run_key(plan): past_run}, indent=1),
        )
    except MachineError:
        return


def find_past_run(plan: Plan) -> PastRun | None:
    return _read_history().get(make_run_key(plan))


def make_run_key(plan: Plan) -> str:
    """What makes two runs alike."""
    machine, model = plan.machine, plan.model
    shape = f"{model.model_type} {model.num_layers}x{model.hidden_size}"
    settings = f"{plan.config.method} {plan.config.dtype}" + (
        ", measured" if plan.memory_bytes.get("evaluation") else ""
    )
    return f"{machine.device_name}, {machine.cores} cores; {shape}; {settings}; {__version__}"


def apply_past_run(plan: Plan) -> Plan:
    """As it is where no such run is known."""
    past_run = find_past_run(plan)
    if past_run is None:
        return plan
    factor = round(
        min(
            max(past_run.peak_bytes / past_run.predicted_bytes, FACTOR_BOUNDS[0]), FACTOR_BOUNDS[1]
        ),
        3,
    )
    reason = f"{past_run.run} took {past_run.peak_bytes / 1e9:.2f} GB of {past_run.predicted_bytes / 1e9:.2f} predicted"
    plan_value = PlanValue(factor, "rule", reason, confidence="measured here")
    return dataclasses.replace(
        plan.with_settings(memory_factor=plan_value),
        memory_bytes=corrected_parts(plan.memory_bytes, factor),
        phase_bytes={
            name: int(predicted_bytes * factor)
            for name, predicted_bytes in plan.phase_bytes.items()
        },
        seconds=(count_computed_tokens(plan) / past_run.tokens_per_second,),
        seconds_source=f"at the speed of {past_run.run}",
    )


def _get_history_path() -> Path:
    return find_cache_dir().parent / HISTORY_FILE


def _read_history() -> dict[str, PastRun]:
    """Empty when there is no file, or one that is not ours."""
    try:
        return parse_as(dict[str, PastRun], read_json(_get_history_path()))
    except (InputError, OSError):
        return {}
