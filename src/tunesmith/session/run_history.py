"""What runs on this machine have taken, kept in one small file of the cache: later plans predict from it.

    remember(record)      after a run of its own process, whose peak is the run's
    corrected(plan)       its memory times what the last such run took of its prediction, and the time at its speed

A run is such a run on the same processor, for a model of the same shape, by the same method and number format, measured
or not before, by the same version. The factor is written into the plan: a plan.json says what it was made with. Left
out: averages over runs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from tunesmith.core.atomic import make_folder, write_file
from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.json_io import from_json, json_bytes, read_json
from tunesmith.core.types import Choice, Plan, RunRecord, __version__
from tunesmith.model.hub.resolve import cache_folder
from tunesmith.plan.flops import tokens_computed
from tunesmith.plan.memory_budget import corrected as corrected_parts

FILE = "experience.json"
FEWEST_STEPS = 20  # fewer have not seen the largest pack, nor a steady speed
FACTORS = (0.9, 2.0)  # hardly less than predicted: the next run may have longer rows, and too little ends it


@dataclass(frozen=True)
class Earlier:
    """The last run of a kind. `predicted_bytes` without any correction; tokens are those computed, shared ones once."""

    run: str
    predicted_bytes: int
    peak_bytes: int
    tokens_per_second: float


def remember(record: RunRecord) -> None:
    """Nothing is lost where the file cannot be written."""
    if record.steps < FEWEST_STEPS or record.peak_bytes <= 0:
        return
    plan, computed = record.plan, record.tokens - record.shared_tokens
    found = Earlier(
        run=str(Path(plan["output_dir"]).absolute()),
        predicted_bytes=plan.memory_bytes["peak"] - plan.memory_bytes.get("correction", 0),
        peak_bytes=record.peak_bytes,
        tokens_per_second=computed / max(record.train_seconds, 1e-9),
    )
    try:
        make_folder(_file().parent)
        write_file(_file(), json_bytes(_read() | {kind(plan): found}, indent=1))
    except MachineError:
        return


def earlier(plan: Plan) -> Earlier | None:
    return _read().get(kind(plan))


def kind(plan: Plan) -> str:
    """What makes two runs alike."""
    machine, model = plan.machine, plan.model
    shape = f"{model.model_type} {model.num_layers}x{model.hidden_size}"
    how = f"{plan['method']} {plan['dtype']}" + (", measured" if plan.memory_bytes.get("evaluation") else "")
    return f"{machine.device_name}, {machine.cores} cores; {shape}; {how}; {__version__}"


def corrected(plan: Plan) -> Plan:
    """As it is where no such run is known."""
    found = earlier(plan)
    if found is None:
        return plan
    factor = round(min(max(found.peak_bytes / found.predicted_bytes, FACTORS[0]), FACTORS[1]), 3)
    why = f"{found.run} took {found.peak_bytes / 1e9:.2f} GB of {found.predicted_bytes / 1e9:.2f} predicted"
    choice = Choice(factor, "rule", why, confidence="measured here")
    return dataclasses.replace(
        plan,
        choices=plan.choices | {"memory_factor": choice},
        memory_bytes=corrected_parts(plan.memory_bytes, factor),
        phase_bytes={name: int(held * factor) for name, held in plan.phase_bytes.items()},
        seconds=(tokens_computed(plan) / found.tokens_per_second,),
        seconds_from=f"at the speed of {found.run}",
    )


def _file() -> Path:
    return cache_folder().parent / FILE


def _read() -> dict[str, Earlier]:
    """Empty when there is no file, or one that is not ours."""
    try:
        return from_json(dict[str, Earlier], read_json(_file()))
    except (InputError, OSError):
        return {}
