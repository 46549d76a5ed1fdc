"""Several stages in one recipe: one run after the other in one folder, each going on with what the last one left.

    Stages -> gather -> make_plan -> StagedPlan -> train -> events; resume: from the first stage that is not finished

    RUN/stages.json         the plans of all stages, made before the first began
    RUN/stages/1-cpt/       an ordinary run folder
    RUN/stages/2-sft/       another one; its adapter_from is the one before, or its model RUN/stages/1-cpt/merged
    RUN/record.json         of the whole: before is the model that the first stage began with, after is the last one;
                            before.json and after.json hold the measures item by item

What a stage is and how it goes on is run.py's business. Why so: docs/why-stages.md.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

from tunesmith.core.atomic import damage, write_file
from tunesmith.core.errors import InputError
from tunesmith.core.events import GENERAL, Event, Stage, Verdict
from tunesmith.core.json_io import from_json, json_bytes, read_json
from tunesmith.core.run_dir import (
    AFTER,
    BEFORE,
    IDENTITY,
    MODEL,
    OF_STAGES,
    PLAN,
    RECORD,
    STAGES,
    RunFolder,
    next_run_folder,
    plan_in,
)
from tunesmith.core.types import Choice, Comparison, Json, Plan, RunRecord
from tunesmith.evaluate import finished_run
from tunesmith.evaluate.measure import items_of, measure
from tunesmith.evaluate.results import RETENTION, Measured, compare_all, shown_answers
from tunesmith.model.causal_lm import LanguageModel
from tunesmith.model.oom import memory_errors
from tunesmith.plan.build import agrees, words
from tunesmith.plan.stages import StagedPlan
from tunesmith.recipe.load import kept_recipe
from tunesmith.recipe.schema import Stages
from tunesmith.session import inputs
from tunesmith.session.inputs import Facts
from tunesmith.session.reopen import known_again, model_left
from tunesmith.session.session import model_at_start, only_model
from tunesmith.train import run
from tunesmith.train.model_card import write_card
from tunesmith.train.signals import StopWish

LAYERS = "lora_target_modules"
HANDED_ON = ("method", "lora_r", "lora_alpha", LAYERS, "use_rslora", "use_dora")
BETWEEN = "between_stages"
GOES_ON, MERGED = "the adapter goes on", "merged"
ON = Choice(
    GOES_ON, "rule", "nothing is rounded, the whole run is one adapter, and the base is there without it", "ours"
)


# ---------------------------------------------------------------- before a run


def gather(stages: Stages, *, weights: bool = True) -> tuple[Facts, ...]:
    """The facts of each stage; dates are frozen at one moment."""
    wished, now = stages.recipes[0].output_dir, datetime.now()
    whole = wished if isinstance(wished, Path) else next_run_folder(Path("runs"), "run")
    return tuple(
        inputs.gather(recipe, now=now, output_dir=whole / OF_STAGES / f"{number}-{recipe.stage}", weights=weights)
        for number, recipe in enumerate(stages.recipes, start=1)
    )


def make_plan(known: Sequence[Facts]) -> StagedPlan:
    """InputError for a stage that cannot be, or cannot go on with what the one before leaves."""
    plans: list[Plan] = []
    for one in known:
        plan = inputs.make_plan(one, _handed_on(plans[-1], one) if plans else None)
        if plans and _tokens(plan) != _tokens(plans[0]):
            what = f"the stage {plan['stage']} adds other tokens than the first one, whose rows it goes on with"
            raise InputError(what, where="add_tokens", fix="add all of them in every stage")
        plans.append(plan)
    return StagedPlan(str(known[0].output_dir.parent.parent), tuple(plans))


def _tokens(plan: Plan) -> dict[str, int]:
    return plan["add_tokens"] if "add_tokens" in plan.choices else {}


def _handed_on(before: Plan, after: Facts) -> dict[str, Choice]:
    """What the stage before has decided of the next one."""
    name = Path(before["output_dir"]).name
    if why := _why_merged(before, after, name):
        return {BETWEEN: Choice(MERGED, "rule", why, "ours")}
    return {key: Choice(before[key], "rule", f"the adapter of {name}, which goes on") for key in HANDED_ON} | {
        BETWEEN: ON
    }


def _why_merged(before: Plan, after: Facts, name: str) -> str:
    """Why no adapter can go on; "" where one can, which is better."""
    if before["method"] == "full":
        return f"all weights of {name} were trained: the model that it leaves is the base of this stage"
    for key in HANDED_ON:
        wish = getattr(after.recipe, key)
        if not agrees(wish, before[key]) and not (key == LAYERS and inputs.same_layers(after, wish, before[key])):
            differs = f"{key} is {words(wish)} here, and {words(before[key])} in the adapter of {name}"
            return f"{differs}: that one goes into the weights, and what comes out is the base of this stage"
    return ""


# ---------------------------------------------------------------- a run


def train(staged: StagedPlan, known: Sequence[Facts] | None = None, *, allow_code: bool = False) -> Iterator[Event]:
    """A new run. Raises what `run.train` raises; what any stage would refuse is refused before the first begins."""
    known = known or tuple(inputs.regather(plan) for plan in staged.plans)
    for plan, one in zip(staged.plans, known, strict=True):
        run.check(plan, one, allow_code=allow_code)
    with RunFolder.create(Path(staged.output_dir)) as folder:
        folder.write_json(STAGES, staged)
        yield from _stages(folder, staged, known[0], allow_code=allow_code)


def resume(
    path: Path, *, allow_drift: bool = False, from_step: int | None = None, allow_code: bool = False
) -> Iterator[Event]:
    """Goes on with the first stage that is not finished, then with those after it. `from_step` is of that stage."""
    with RunFolder.open(path) as folder:
        if (path / RECORD).exists():
            raise InputError("this run is finished", where=str(path), fix="start a new one with another output_dir")
        allowed = {"allow_drift": allow_drift, "from_step": from_step, "allow_code": allow_code}
        yield from _stages(folder, read_staged(path), None, **allowed)


def read_staged(path: Path) -> StagedPlan:
    return from_json(StagedPlan, read_json(path / STAGES), where=str(path / STAGES))


def _stages(
    folder: RunFolder,
    staged: StagedPlan,
    first: Facts | None,
    *,
    allow_drift: bool = False,
    from_step: int | None = None,
    allow_code: bool = False,
) -> Iterator[Event]:
    places = _places(folder.path, staged)
    for number, (place, plan) in enumerate(zip(places, staged.plans, strict=True)):
        if (place / RECORD).exists():
            continue
        stage = Stage(number + 1, len(places), plan["stage"], plan.steps, f"{OF_STAGES}/{place.name}")
        folder.append_event(stage)
        yield stage
        if (place / PLAN).exists():
            yield from run.resume(place, allow_drift=allow_drift, from_step=from_step, allow_code=allow_code)
        elif number == 0:
            begun = (plan, first) if first else _begun(plan, place, {})
            yield from run.train(*begun, allow_code=allow_code)
        elif plan[BETWEEN] == GOES_ON:
            begun = _begun(plan, place, _going_on(places[number - 1]))
            yield from run.train(*begun, allow_code=allow_code)
        else:
            base, said = _model_of(places[number - 1])
            for verdict in said:
                folder.append_event(verdict)
                yield verdict
            begun = _begun(plan, place, {"model": str(base.absolute()), "add_tokens": []})
            yield from run.train(*begun, allow_code=allow_code)
        from_step = None
    with StopWish(f"go on with: tunesmith resume {folder.path}") as wish, wish.at_once(), memory_errors():
        record = _record(folder.path, staged, allow_code=allow_code)
    folder.settle()
    write_card(record, read_json(places[-1] / IDENTITY), stages=[place.name for place in places])
    folder.write_json(RECORD, record)


def _places(path: Path, staged: StagedPlan) -> list[Path]:
    return [path / OF_STAGES / Path(plan["output_dir"]).name for plan in staged.plans]


def _going_on(before: Path) -> Json:
    """What a stage starts with: the adapter of the one before, and its base."""
    return {"adapter_from": str(before.absolute()), "model": plan_in(before).recipe["model"]}


def _model_of(before: Path) -> tuple[Path, list[Verdict]]:
    """The folder of the whole model that a stage left, merged if it is not there yet; and what there is to say.
    GateError when the merged weights do not answer as the run does."""
    if plan_in(before)["method"] == "full":
        return before / MODEL, []
    place, said = before / MERGED, list[Verdict]()
    if not place.exists():
        with memory_errors():
            parity = finished_run.export(before, "merged", out=place).parity
        close = f"{parity.same_answers} of {parity.prompts} answers are the run's, KL {parity.mean_kl:.1e} nats"
        said.append(Verdict(MERGED, "ok", f"{OF_STAGES}/{before.name}/{MERGED}: {close}"))
    elif problem := damage(place):
        raise InputError(f"not as it was written: {problem}", where=str(place), fix="remove it: it is made again")
    return place, said


def _begun(plan: Plan, place: Path, start: Json) -> tuple[Plan, Facts]:
    """The plan of a stage made again, now that there is something to start from. Raises InputError when its rows have
    changed since the first plan."""
    recipe = kept_recipe(plan.recipe | start)
    known = inputs.gather(recipe, now=datetime.fromisoformat(plan["now"]), output_dir=place)
    inputs.refuse_other_rows(plan, known)
    return inputs.make_plan(known, {BETWEEN: plan.choices[BETWEEN]} if start else None), known


# ---------------------------------------------------------------- after a run


def evaluate(path: Path, *, allow_code: bool = False) -> tuple[Comparison, ...]:
    """The before/after of the whole, measured again."""
    staged = read_staged(path)
    return compare_all(*_measured(path, staged, allow_code=allow_code), step=staged.steps)


def _measured(path: Path, staged: StagedPlan, *, allow_code: bool) -> tuple[Measured, Measured]:
    """What every stage measures, on the model that the first began with and on what the last one left."""
    places = _places(path, staged)
    plans = [plan_in(place) for place in places]
    known = [known_again(plan, place) for plan, place in zip(plans, places, strict=True)]
    items = [items_of(plan, one, allow_code=allow_code) for plan, one in zip(plans, known, strict=True)]
    texts = [plan.recipe["retention_data"] for plan in plans]
    for number in range(len(items)):
        if texts[number] in texts[number + 1 :]:
            items[number] = dataclasses.replace(items[number], texts=())

    def of_all(model: LanguageModel, step: int) -> Measured:
        stages = zip(places, plans, known, items, strict=True)
        found = [
            _of_stage(place.name, measure(only_model(plan, one, model), those, step=step))
            for place, plan, one, those in stages
        ]
        return _joined(found)

    after = of_all(model_left(places[-1], plans[-1], known[-1]), staged.steps)
    start = inputs.start_of(plans[0], known[0].model.path)
    before = of_all(model_at_start(plans[0], dataclasses.replace(known[0], adapter=start)), 0)
    return before, after


def _of_stage(name: str, measured: Measured) -> Measured:
    """Its tasks and items under the name of the stage; general text is the same for all."""
    own = [
        one if one.task == GENERAL else dataclasses.replace(one, task=f"{name} {one.task}")
        for one in measured.measurements
    ]
    contents = {role if role == RETENTION else f"{name} {role}": rows for role, rows in measured.contents.items()}
    return dataclasses.replace(measured, measurements=tuple(own), contents=contents)


def _joined(of_stages: Sequence[Measured]) -> Measured:
    return Measured(
        tuple(one for measured in of_stages for one in measured.measurements),
        tuple(sample for measured in of_stages for sample in measured.samples),
        {role: rows for measured in of_stages for role, rows in measured.contents.items()},
        tuple(row for measured in of_stages for row in measured.shown),
    )


def _record(path: Path, staged: StagedPlan, *, allow_code: bool) -> RunRecord:
    """Sums over the stages, and the whole's own before and after."""
    places = _places(path, staged)
    of_stages = [from_json(RunRecord, read_json(place / RECORD), where=str(place / RECORD)) for place in places]
    before, after = _measured(path, staged, allow_code=allow_code)
    for name, measured in ((BEFORE, before), (AFTER, after)):
        write_file(path / name, json_bytes(measured, indent=2))
    return dataclasses.replace(
        of_stages[-1],
        moved=(),  # of the last stage alone, as are its scales
        scales=(),
        proof=tuple(verdict for one in of_stages for verdict in one.proof),
        comparisons=compare_all(before, after, step=staged.steps),
        samples=shown_answers(before, after),
        steps=sum(one.steps for one in of_stages),
        tokens=sum(one.tokens for one in of_stages),
        train_seconds=sum(one.train_seconds for one in of_stages),
        peak_bytes=max(one.peak_bytes for one in of_stages),
        task_tokens=dict(sum((Counter(one.task_tokens) for one in of_stages), Counter[str]())),
        shared_tokens=sum(one.shared_tokens for one in of_stages),
        drift=tuple(dict.fromkeys(text for one in of_stages for text in one.drift)),
    )
