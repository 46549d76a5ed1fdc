"""Models that no file has measured yet, each by the items of a run or of a file: a base, an adapter, a checkpoint, an
adapter at another scale, another model.

    a Side and a run's items, or `--data FILE` -> a model -> Measured

Left out: what files say already (versus.py), how two are compared (evaluate/paired.py).
"""

from __future__ import annotations

import dataclasses
from datetime import datetime
from pathlib import Path

from tunesmith.core.atomic import damage
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import read_json
from tunesmith.core.run_dir import plan_in, trained_in
from tunesmith.core.types import Choice, Comparison, Plan
from tunesmith.data.constraints import Never
from tunesmith.data.dataset import open_dataset
from tunesmith.evaluate.measure import items_of, measure
from tunesmith.evaluate.model_ref import Side
from tunesmith.evaluate.results import Measured, compare_all
from tunesmith.model.adapters import adapter_scaled, trainable
from tunesmith.model.causal_lm import LanguageModel
from tunesmith.model.hub.adapter_config import CONFIG
from tunesmith.recipe.fields import DataSource
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs
from tunesmith.session.inputs import Facts
from tunesmith.session.reopen import model_left, of_run
from tunesmith.session.session import model_at_start, only_model
from tunesmith.train.checkpoint import load_weights

# What another model is asked: the rest of a recipe is about training, or about the model of the run.
ASKED = (
    *("data", "eval_data", "eval_split", "test_data", "retention_data", "never", "stage", "metrics", "schema"),
    *("skip_bad", "seed", "max_length", "pack_length", "dtype"),
)


@dataclasses.dataclass(frozen=True)
class Exam:
    """What is measured instead of a run's own items: the rows of `data`, by these metrics. Nothing: as it was."""

    data: Path | None = None
    metrics: tuple[str, ...] = ()
    allow_code: bool = False


def measured_by(side: Side, other: Side, exam: Exam) -> Measured:
    """A side that no file has measured, on the items of its own run, of the other side's, or of the exam."""
    if side.run is not None:
        return _after(side, *of_run(side.run), exam)
    plan, known = _planned(_asked_of(side.name, other.run, exam))
    return _measured(*_under(plan, known, exam), model_at_start(plan, known), exam)


def before_and_after(side: Side, exam: Exam) -> tuple[Comparison, ...]:
    """A run, a checkpoint, a scale or an adapter beside the model that it began with. Raises InputError for a model
    alone, which has none."""
    if side.run is None and not is_adapter(Path(side.name)):
        raise InputError(
            "a model alone has no before", where=side.name, fix="compare it with another: tunesmith compare"
        )
    if side.run is None:
        plan, known = _planned(_asked_of(side.name, None, exam))
        model, asked = model_at_start(plan, known), _under(plan, known, exam)
        after = _measured(*asked, model, exam)
        with adapter_scaled(model.network, 0):
            return compare_all(_measured(*asked, model, exam), after, step=0)
    plan, known = of_run(side.run)
    start = inputs.start_of(plan, known.model.path)
    begun = model_at_start(plan, dataclasses.replace(known, adapter=start))
    before = _measured(*_under(plan, known, exam), begun, exam)
    del begun
    return compare_all(before, _after(side, plan, known, exam), step=plan.steps)


def _planned(wish: Recipe) -> tuple[Plan, Facts]:
    known = inputs.gather(wish, now=datetime.now(), output_dir=Path("runs"))
    return inputs.make_plan(known), known


def _after(side: Side, plan: Plan, known: Facts, exam: Exam) -> Measured:
    """A side of a run: what it has made of the model, at a checkpoint or a scale."""
    model = _model_of(side, plan, known)
    with adapter_scaled(model.network, side.scale):
        return _measured(*_under(plan, known, exam), model, exam)


def _model_of(side: Side, plan: Plan, known: Facts) -> LanguageModel:
    assert side.run is not None
    if side.checkpoint is None:
        if plan["method"] == "full" and side.scale != 1:
            raise InputError("this run has no adapter to scale", where=side.name, fix="name the run alone")
        return model_left(trained_in(side.run), plan, known)
    if not side.checkpoint.is_dir():
        there = ", ".join(sorted(path.name for path in side.checkpoint.parent.iterdir())) or "none"
        raise InputError("there is no such checkpoint", where=side.name, fix=f"there are: {there}")
    if problem := damage(side.checkpoint):
        raise InputError(f"not as the run wrote it: {problem}", where=side.name, fix="take another checkpoint")
    model = model_at_start(plan, known)
    load_weights(side.checkpoint, trainable(model.network))
    return model


def _asked_of(name: str, run: Path | None, exam: Exam) -> Recipe:
    """A recipe whose items are those of the run or the exam, and whose model is the one that is named."""
    if run is None and exam.data is None:
        what = "nothing says what to measure it on"
        raise InputError(what, where=name, fix="name a run on the other side, or a file: --data test.jsonl")
    wish: dict[str, object] = {}
    if run is not None:
        written = plan_in(trained_in(run)).recipe
        wish = {key: written[key] for key in ASKED if written.get(key) not in (None, "auto", [])}
        wish["model"] = written["model"]
    else:
        wish["data"] = str(exam.data)
    if exam.metrics:
        wish["metrics"] = list(exam.metrics)
    if not is_adapter(Path(name)):
        return Recipe.model_validate(wish | {"model": name})
    base = wish.get("model") or read_json(Path(name) / CONFIG).get("base_model_name_or_path")
    if not base:
        raise InputError(
            "the adapter does not say what its base is", where=name, fix="compare it with a run of that base"
        )
    return Recipe.model_validate(wish | {"model": base, "adapter_from": name})


def is_adapter(path: Path) -> bool:
    """Whether it is the folder of an adapter, ours or PEFT's."""
    return (path / CONFIG).is_file()


def _under(plan: Plan, known: Facts, exam: Exam) -> tuple[Plan, Facts]:
    """With the rows and metrics of the exam. Raises InputError with file:line for a row that cannot be used."""
    if exam.metrics:
        choice = Choice(exam.metrics, "you", "asked for")
        plan = dataclasses.replace(plan, choices={**plan.choices, "metrics": choice})
    if exam.data is None:
        return plan, known
    never, pairs = Never(known.recipe.never, held_out=True), plan["stage"] == "preference"
    rows = open_dataset([DataSource(path=exam.data)], known.renderer, pairs=pairs, never=never)
    if bad := [problem for problems in rows.rejects.first.values() for problem in problems]:
        raise bad[0]
    return plan, dataclasses.replace(known, datasets={**known.datasets, "test_data": rows})


def _measured(plan: Plan, known: Facts, model: LanguageModel, exam: Exam) -> Measured:
    items = items_of(plan, known, allow_code=exam.allow_code)
    if not (items.questions or items.test_documents or items.texts or items.held_out):
        fix = "give rows to measure: --data test.jsonl"
        raise InputError("the run has neither test_data nor retention_data", where=known.recipe.model, fix=fix)
    return measure(only_model(plan, known, model), items, step=0)
