"""Load the trained model of a finished run, and check it.

    load_trained_session(run) -> Session    of any method
    load_trained_model(...)                 the model alone

The weights must be as the run wrote them, and belong to the base that is there now. Left out: what
is done with them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tunesmith.core.atomic import verify_dir
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.run_dir import (
    ADAPTER_DIR,
    MODEL_DIR,
    find_weights_dir,
    read_failure,
    read_run_plan,
    require_run,
)
from tunesmith.core.types import Plan
from tunesmith.model.causal_lm import DTYPES, PackedCausalLM, load_network
from tunesmith.model.hub.adapter_config import ADAPTER_WEIGHTS_FILE
from tunesmith.model.save import load_adapter
from tunesmith.session import inputs
from tunesmith.session.family_proof import wrap_proven
from tunesmith.session.identity import check_provenance
from tunesmith.session.inputs import RunInputs
from tunesmith.session.session import Session, load_starting_model, open_eval_session


def load_trained_session(path: Path) -> Session:
    """Open the trained model of a finished run with the rows of the run. Raises InputError if the
    weights or their inputs have changed."""
    plan, inputs = load_plan_and_inputs(path)
    return open_eval_session(plan, inputs, load_trained_model(find_weights_dir(path), plan, inputs))


def load_plan_and_inputs(run: Path) -> tuple[Plan, RunInputs]:
    """Return the plan and the inputs of a finished run, or of its last stage."""
    path = find_weights_dir(run)
    require_run(path)
    plan = read_run_plan(path)
    return plan, reload_inputs(plan, path)


def reload_inputs(plan: Plan, path: Path) -> RunInputs:
    """Reload the inputs of a run without the adapter that it started from, which its own adapter
    contains."""
    recipe = plan.recipe | {"adapter_from": None}
    return inputs.reload_inputs(dataclasses.replace(plan, recipe=recipe), path)


def load_trained_model(path: Path, plan: Plan, inputs: RunInputs) -> PackedCausalLM:
    """Load the trained model of a finished run. Raises as `load_trained_session`."""
    weights_dir = _find_trained_weights(path, plan, inputs)
    if plan.config.method == "full":
        dtype = DTYPES[plan.config.dtype]
        network = load_network(weights_dir, dtype, inputs.machine.device)
        return wrap_proven(network, dtype, plan.config.attention)
    model = load_starting_model(plan, inputs)
    load_adapter(model.network, weights_dir / ADAPTER_WEIGHTS_FILE)
    return model


def _find_trained_weights(path: Path, plan: Plan, inputs: RunInputs) -> Path:
    """Return the folder of the trained weights, once it is verified."""
    weights_dir = path / (MODEL_DIR if plan.config.method == "full" else ADAPTER_DIR)
    if problem := read_failure(path):
        raise GateError(f"this run failed: {problem}", where=str(path))
    if not weights_dir.is_dir():
        fix = f"finish it: tunesmith resume {path}"
        raise InputError(f"this run has no {weights_dir.name} yet", where=str(path), fix=fix)
    if problem := verify_dir(weights_dir):
        message = f"not as the run wrote it: {problem}"
        raise InputError(message, where=str(weights_dir), fix="restore the files")
    check_provenance(weights_dir, inputs.model.path, inputs.renderer, plan.config.now)
    return weights_dir
