"""What a finished run has made of its model: loaded again, and checked.

    run folder -> reopen -> Workbench, its adapter loaded      run folder -> model_left -> the model alone

The weights must be as the run left them, and belong to the base that is there now. Left out: what is done with them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunesmith.core.atomic import damage
from tunesmith.core.errors import GateError, InputError
from tunesmith.core.run_dir import ADAPTER, MODEL, failure_of, plan_in, require_run, trained_in
from tunesmith.core.types import Plan
from tunesmith.model.adapters import adapter_scaled
from tunesmith.model.causal_lm import DTYPES, LanguageModel, adopt, load_network
from tunesmith.model.hub.adapter_config import WEIGHTS
from tunesmith.model.hub.provenance import check_provenance, hashes_of
from tunesmith.model.save import load_adapter
from tunesmith.session import inputs
from tunesmith.session.inputs import Facts
from tunesmith.session.session import Workbench, model_at_start, only_model, set_up


def reopen(path: Path) -> Workbench:
    """The workbench of a finished run, its adapter loaded. Raises InputError when the adapter, or what it belongs to,
    is not as the run left it."""
    path = trained_in(path)
    require_run(path)
    plan = plan_in(path)
    if plan["method"] == "full":
        what = "this takes a run with an adapter, which can be taken off"
        raise InputError(what, where=str(path), fix=f"measure it with: tunesmith eval {path}")
    known = known_again(plan, path)
    adapter = _whole(path, plan, known)
    bench = set_up(plan, known)
    load_adapter(bench.model.network, adapter / WEIGHTS)
    return bench


def left(path: Path) -> Workbench:
    """What a finished run has made of the model, an adapter on it or all of its weights, with the rows of the run.
    Raises what `reopen` raises."""
    plan, known = of_run(path)
    return only_model(plan, known, model_left(trained_in(path), plan, known))


def of_run(run: Path) -> tuple[Plan, Facts]:
    """The plan of a finished run, of several stages that of the last one, and its facts."""
    path = trained_in(run)
    require_run(path)
    plan = plan_in(path)
    return plan, known_again(plan, path)


def known_again(plan: Plan, path: Path) -> Facts:
    """The facts of a run but for the adapter that it went on with, which its own one holds."""
    return inputs.regather(dataclasses.replace(plan, recipe={**plan.recipe, "adapter_from": None}), path)


def model_left(path: Path, plan: Plan, known: Facts) -> LanguageModel:
    """What a finished run has made of the model, to be measured. Raises what `reopen` raises."""
    saved, dtype = _whole(path, plan, known), DTYPES[plan["dtype"]]
    if plan["method"] == "full":
        return adopt(load_network(saved, dtype, known.machine.device), dtype, plan["attention"])
    model = model_at_start(plan, known)
    load_adapter(model.network, saved / WEIGHTS)
    return model


def _whole(path: Path, plan: Plan, known: Facts) -> Path:
    """The folder of the trained weights, checked."""
    saved = path / (MODEL if plan["method"] == "full" else ADAPTER)
    if problem := failure_of(path):
        raise GateError(f"this run failed: {problem}", where=str(path))
    if not saved.is_dir():
        what = f"this run has no {'model' if saved.name == MODEL else 'adapter'} yet"
        raise InputError(what, where=str(path), fix=f"finish it: tunesmith resume {path}")
    if problem := damage(saved):
        raise InputError(f"not as the run wrote it: {problem}", where=str(saved), fix="put the files back")
    check_provenance(saved, hashes_of(known.model.path), known.renderer, plan["now"])
    return saved


@contextmanager
def before_training(bench: Workbench, plan: Plan) -> Iterator[None]:
    """The model that a plan's training started from: the base, or the base with the adapter that it went on with."""
    start = inputs.start_of(plan, bench.facts.model.path)
    if start is not None:
        load_adapter(bench.model.network, start.weights)
    with adapter_scaled(bench.model.network, 0 if start is None else 1):
        yield
