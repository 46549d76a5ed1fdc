"""What a finished run has made of its model: loaded again, and checked.

    run folder -> reopen -> Workbench, its adapter loaded      run folder -> model_left -> the model alone

The weights must be as the run left them, and belong to the base that is there now. Left out: what
is done with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
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
from tunesmith.model.adapters import scaled_adapter
from tunesmith.model.causal_lm import DTYPES, PackedCausalLM, load_network, wrap_model
from tunesmith.model.hub.adapter_config import ADAPTER_WEIGHTS_FILE
from tunesmith.model.save import load_adapter
from tunesmith.session import inputs
from tunesmith.session.inputs import RunInputs
from tunesmith.session.provenance import check_provenance, hash_weight_files
from tunesmith.session.session import Session, load_starting_model, open_eval_session, open_session


def reopen_session(path: Path) -> Session:
    """The workbench of a finished run, its adapter loaded. Raises InputError when the adapter, or
    what it belongs to, is not as the run left it."""
    path = find_weights_dir(path)
    require_run(path)
    plan = read_run_plan(path)
    if plan.config.method == "full":
        message = "this takes a run with an adapter, which can be taken off"
        raise InputError(message, where=str(path), fix=f"measure it with: tunesmith eval {path}")
    inputs = reload_inputs(plan, path)
    adapter = _find_trained_weights(path, plan, inputs)
    session = open_session(plan, inputs)
    load_adapter(session.model.network, adapter / ADAPTER_WEIGHTS_FILE)
    return session


def load_trained_session(path: Path) -> Session:
    """What a finished run has made of the model, an adapter on it or all of its weights, with the
    rows of the run. Raises what `reopen` raises."""
    plan, inputs = load_plan_and_inputs(path)
    return open_eval_session(plan, inputs, load_trained_model(find_weights_dir(path), plan, inputs))


def load_plan_and_inputs(run: Path) -> tuple[Plan, RunInputs]:
    """The plan of a finished run, of several stages that of the last one, and its facts."""
    path = find_weights_dir(run)
    require_run(path)
    plan = read_run_plan(path)
    return plan, reload_inputs(plan, path)


def reload_inputs(plan: Plan, path: Path) -> RunInputs:
    """The facts of a run but for the adapter that it went on with, which its own one holds."""
    return inputs.reload_inputs(
        dataclasses.replace(plan, recipe={**plan.recipe, "adapter_from": None}), path
    )


def load_trained_model(path: Path, plan: Plan, inputs: RunInputs) -> PackedCausalLM:
    """What a finished run has made of the model, to be measured. Raises what `reopen` raises."""
    weights_dir, dtype = _find_trained_weights(path, plan, inputs), DTYPES[plan.config.dtype]
    if plan.config.method == "full":
        return wrap_model(
            load_network(weights_dir, dtype, inputs.machine.device), dtype, plan.config.attention
        )
    model = load_starting_model(plan, inputs)
    load_adapter(model.network, weights_dir / ADAPTER_WEIGHTS_FILE)
    return model


def _find_trained_weights(path: Path, plan: Plan, inputs: RunInputs) -> Path:
    """The folder of the trained weights, checked."""
    weights_dir = path / (MODEL_DIR if plan.config.method == "full" else ADAPTER_DIR)
    if problem := read_failure(path):
        raise GateError(f"this run failed: {problem}", where=str(path))
    if not weights_dir.is_dir():
        message = f"this run has no {'model' if weights_dir.name == MODEL_DIR else 'adapter'} yet"
        raise InputError(message, where=str(path), fix=f"finish it: tunesmith resume {path}")
    if problem := verify_dir(weights_dir):
        raise InputError(
            f"not as the run wrote it: {problem}", where=str(weights_dir), fix="put the files back"
        )
    check_provenance(
        weights_dir, hash_weight_files(inputs.model.path), inputs.renderer, plan.config.now
    )
    return weights_dir


@contextmanager
def starting_model(session: Session, plan: Plan) -> Iterator[None]:
    """The model that a plan's training started from: the base, or the base with the adapter that it
    went on with."""
    adapter = inputs.load_starting_adapter(plan, session.inputs.model.path)
    if adapter is not None:
        load_adapter(session.model.network, adapter.weights_path)
    with scaled_adapter(session.model.network, 0 if adapter is None else 1):
        yield
