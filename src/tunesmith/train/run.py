"""The story of a run; read this first.

    plan -> prove -> measure -> train, saving and evaluating -> measure again -> record

In: a Plan. Out: events as they happen, and a run folder that holds everything: plan.json, identity.json, data.json,
events.jsonl, before.json, after.json, checkpoints/, adapter/, record.json. `resume` tells the same story from the last
checkpoint on. The events are the only coupling to whoever watches: the command line prints them, the folder keeps them.
A signal ends a run where nothing is lost; a gate's no is the last event of it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import yaml

from tunesmith.core.atomic import new_folder
from tunesmith.core.errors import GateError, InputError, Interrupted, MachineError
from tunesmith.core.events import Event, Verdict
from tunesmith.core.run_dir import (
    ADAPTER,
    AFTER,
    BEFORE,
    FAILED,
    IDENTITY,
    MODEL,
    PLAN,
    RECIPE,
    RECORD,
    REJECTED,
    RunFolder,
    is_free,
    plan_in,
    whole_run,
)
from tunesmith.core.types import Plan, RunRecord, __version__
from tunesmith.data.leakage import refuse_tested
from tunesmith.data.rejects import refuse_bad_rows, write_rejected
from tunesmith.evaluate.adapter_scaling import scale_curve
from tunesmith.evaluate.measure import Items, items_of, measure
from tunesmith.evaluate.preference import displaced, with_references
from tunesmith.evaluate.results import Measured, compare_all, moved, shown_answers
from tunesmith.model.adapters import trainable
from tunesmith.model.hub.provenance import provenance_of, write_provenance
from tunesmith.model.oom import memory_errors
from tunesmith.model.save import save_adapter, save_model, save_serving_files
from tunesmith.plan.build import refuse_without_room
from tunesmith.session import inputs
from tunesmith.session.fingerprint import identity_of
from tunesmith.session.inputs import Facts
from tunesmith.session.session import Workbench, set_up
from tunesmith.train import base_reference
from tunesmith.train.guard.guarded_loop import Course, Run
from tunesmith.train.model_card import write_card
from tunesmith.train.preflight import prove
from tunesmith.train.resume import Start, drift_of, go_on
from tunesmith.train.self_rehearsal import with_own_rows
from tunesmith.train.signals import StopWish
from tunesmith.train.synthetic_pairs import with_made_pairs


def train(plan: Plan, known: Facts | None = None, *, allow_code: bool = False) -> Iterator[Event]:
    """A new run; `known` are the facts that the plan was made from, gathered again if not given. Raises MachineError
    or InputError before anything is loaded when it cannot fit, be measured or be written, GateError when the proof
    fails, Interrupted after a signal."""
    known, path = known or inputs.regather(plan), Path(plan["output_dir"])
    items = check(plan, known, path / REJECTED if is_free(path) else None, allow_code=allow_code)
    anew = "nothing is trained yet: start it again" if whole_run(path) == path else _going_on(path)
    with StopWish(anew) as wish, RunFolder.create(path) as folder:
        with wish.at_once(), memory_errors():
            plan, known, news = with_own_rows(plan, known, folder)
            start = Start(identity_of(plan, known, plan.recipe), news=news)
        folder.write_json(IDENTITY, start.identity)
        write_rejected(path / REJECTED, known.datasets, plan.data)
        folder.write_json(PLAN, plan)  # from here on it is a run, which can be resumed
        wish.resume_with = _going_on(path)
        _describe(folder, plan)
        yield from _keep(folder, _story(Run(folder, plan, known, items, start, wish)))


def check(plan: Plan, known: Facts, rejected: Path | None = None, *, allow_code: bool = False) -> Items:
    """What is refused before anything is loaded, and else what will be measured. `rejected`: a file for bad rows.
    `allow_code`: metrics of the user's own may run."""
    refuse_without_room(plan)
    refuse_tested(known.datasets)
    refuse_bad_rows(known.datasets, plan.data, rejected, skip_bad=known.recipe.skip_bad)
    return items_of(plan, known, allow_code=allow_code)


def resume(
    path: Path, *, allow_drift: bool = False, from_step: int | None = None, allow_code: bool = False
) -> Iterator[Event]:
    """Goes on after the newest checkpoint that can be trusted, or after that of `from_step`. Raises InputError when
    what the run stands on has changed; with `allow_drift` it says so, and takes the first measures again."""
    with StopWish(_going_on(path)) as wish, RunFolder.open(path) as folder:
        plan = plan_in(path)
        if (path / RECORD).exists():
            raise InputError("this run is finished", where=str(path), fix="start a new one with another output_dir")
        _describe(folder, plan)
        with wish.at_once():
            known = inputs.gather_as_is(plan, path)
            start = go_on(folder, plan, known, allow_drift=allow_drift, from_step=from_step)
            items = items_of(plan, known, allow_code=allow_code)
        if start.drifted:
            (path / BEFORE).unlink(missing_ok=True)
        yield from _keep(folder, _story(Run(folder, plan, known, items, start, wish)))


def _going_on(path: Path) -> str:
    return f"go on with: tunesmith resume {whole_run(path)}"


def _describe(folder: RunFolder, plan: Plan) -> None:
    """What people read of the plan; an attempt that was killed may have left without it."""
    if not (folder.path / RECIPE).exists():
        folder.write_text(RECIPE, yaml.safe_dump(plan.recipe, sort_keys=False, allow_unicode=True))
    folder.write_json("data.json", plan.data)


def _keep(folder: RunFolder, events: Generator[Event]) -> Iterator[Event]:
    """Every event is on disk before anyone sees it, or one warning is. A gate's no is the last event of a run."""
    step, warned = 0, False
    with closing(events):
        try:
            for event in events:
                step, problem = event.step, folder.append_event(event)
                if problem and not warned:
                    warned = True
                    yield Verdict("events.jsonl", "warn", f"{problem}: lines wait in memory for room", step)
                yield event
        except GateError as error:
            folder.append_event(Verdict(FAILED, "stop", str(error), step))
            raise
        except MachineError as error:
            error.fix = ", then ".join(filter(None, (error.fix, _going_on(folder.path))))
            raise


def _story(run: Run) -> Generator[Event]:
    yield from run.start.news
    with run.wish.at_once(), memory_errors():
        bench = set_up(run.plan, run.facts)
        proof = prove(bench.model, bench.probe)
    yield from proof
    with run.wish.at_once(), memory_errors():
        before = base_reference.before(run.folder, bench, run.items, run.start.identity)
        bases = base_reference.bases(run.folder, bench, run.items)
        bench, made = with_made_pairs(bench, run.folder)
        bench = with_references(bench, run.folder)
    yield from before.scores(step=0)
    yield from made
    course = Course(run, bench, before)
    try:
        yield from course.events()
        adapter = _save(run, bench)
        with run.wish.at_once(), memory_errors():
            store = base_reference.store_of(run.folder.path, run.start.identity, adapter)
            after = measure(bench, run.items, step=course.steps, bases=bases, store=store)
            scales = scale_curve(bench, run.items, step=course.steps, before=before, after=after)
    except Interrupted:
        if course.training.step > course.saved:
            yield course.save()
        raise
    run.folder.write_json(AFTER, after)
    yield from after.scores(step=course.steps)
    yield from displaced(compare_all(before, after, step=course.steps), course.steps)
    run.folder.settle()
    record = _record(run, proof, (before, after), adapter, course.steps)
    record = dataclasses.replace(record, scales=scales, kept_step=course.training.step)
    write_card(record, run.start.identity)
    run.folder.write_json(RECORD, record)
    base_reference.forget(run.folder)


def _save(run: Run, bench: Workbench) -> Path:
    """The trained weights, with what serving needs to behave as training did, and what they belong to."""
    plan, base, network = run.plan, bench.facts.model.path, bench.model.network
    values = {key: choice.value for key, choice in plan.choices.items()}
    adapted = plan["method"] != "full"
    target = run.folder.path / (ADAPTER if adapted else MODEL)
    needed = sum(p.numel() * p.element_size() for p in trainable(network).values())
    with new_folder(target, facts=run.start.identity, needed_bytes=needed) as scratch:
        if adapted:
            save_adapter(network, scratch, values, base)
        else:
            save_model(network, scratch, base, bench.model.dtype)
        templates = {name: template.source for name, template in bench.renderer.templates.items()}
        new = bench.renderer.tokenizer.new
        save_serving_files(scratch, base, templates=templates, end_ids=bench.renderer.end_ids, new=new)
        hashes = run.start.identity["base_sha256"]
        write_provenance(scratch, provenance_of(bench.facts.model.name, hashes, bench.renderer, plan["now"]))
    return target


def _record(
    run: Run, proof: Iterable[Verdict], measured: tuple[Measured, Measured], adapter: Path, step: int
) -> RunRecord:
    """`step`: when it was measured again, those that were refused counted."""
    before, after = measured
    steps = [event for event in run.folder.events() if event["type"] == "step"]
    return RunRecord(
        version=__version__,
        plan=run.plan,
        proof=tuple(proof),
        comparisons=compare_all(before, after, step=step),
        steps=len(steps),
        tokens=sum(event["tokens"] for event in steps),
        train_seconds=sum(event["seconds"] for event in steps),
        peak_bytes=max((event["peak_bytes"] for event in steps), default=0),
        task_tokens=dict(sum((Counter(event["task_tokens"]) for event in steps), Counter[str]())),
        adapter=str(adapter),
        samples=shown_answers(before, after),
        shared_tokens=sum(event["shared_tokens"] for event in steps),
        drift=drift_of(run.folder.path),
        moved=moved(before, after, step=step),
        rollbacks=run.folder.rollbacks(),
    )
