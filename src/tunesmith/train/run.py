"""The story of a run; read this first.

    plan -> prove -> measure -> train, saving and evaluating -> measure again -> record

In: a Plan. Out: events as they happen, and a run folder that holds everything: plan.json,
identity.json, data.json, events.jsonl, before.json, after.json, checkpoints/, adapter/,
record.json. `resume` tells the same story from the last checkpoint on. The events are the only
coupling to whoever watches: the command line prints them, the folder keeps them. A signal ends a
run where nothing is lost; a gate's no is the last event of it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path

import yaml

from tunesmith.core.atomic import atomic_dir
from tunesmith.core.errors import GateError, InputError, Interrupted, MachineError
from tunesmith.core.events import CheckResult, Event
from tunesmith.core.run_dir import (
    ADAPTER_DIR,
    EVAL_AFTER_FILE,
    EVAL_BEFORE_FILE,
    FAILED_CHECK,
    FINGERPRINT_FILE,
    MODEL_DIR,
    PLAN_FILE,
    RECIPE_FILE,
    RECORD_FILE,
    REJECTED_FILE,
    RunFolder,
    find_parent_run,
    is_free,
    read_run_plan,
)
from tunesmith.core.types import Plan, RunRecord, __version__
from tunesmith.data.leakage import refuse_test_leakage
from tunesmith.data.rejects import refuse_invalid_rows, write_rejected_rows
from tunesmith.data.tokenizer.tokenizer_json import append_tokens
from tunesmith.evaluate.adapter_scaling import measure_scale_curve
from tunesmith.evaluate.answer_cache import open_answer_cache
from tunesmith.evaluate.measure import EvalItems, build_eval_items, measure_items
from tunesmith.evaluate.preference import check_displacement
from tunesmith.evaluate.results import (
    EvalResults,
    compare_results,
    compute_kl_scores,
    select_sample_pairs,
)
from tunesmith.model.adapters import get_trainable_parameters
from tunesmith.model.oom import memory_errors
from tunesmith.model.save import save_adapter, save_model, save_serving_files
from tunesmith.plan.build import refuse_if_too_large
from tunesmith.session import inputs
from tunesmith.session.fingerprint import build_fingerprint
from tunesmith.session.inputs import RunInputs
from tunesmith.session.provenance import build_provenance, write_provenance
from tunesmith.session.session import Session, open_session
from tunesmith.train import base_reference
from tunesmith.train.guard.guarded_loop import GuardedTraining, RunContext
from tunesmith.train.model_card import write_card
from tunesmith.train.preflight import run_preflight
from tunesmith.train.resume import ResumeState, prepare_resume, read_drift
from tunesmith.train.self_rehearsal import add_self_rehearsal
from tunesmith.train.signals import GracefulStop
from tunesmith.train.synthetic_pairs import add_synthetic_pairs


def train(
    plan: Plan, run_inputs: RunInputs | None = None, *, allow_code: bool = False
) -> Iterator[Event]:
    """A new run; `known` are the facts that the plan was made from, gathered again if not given.
    Raises MachineError or InputError before anything is loaded when it cannot fit, be measured or
    be written, GateError when the proof fails, Interrupted after a signal."""
    run_inputs, path = run_inputs or inputs.reload_inputs(plan), Path(plan.config.output_dir)
    items = check_run(
        plan, run_inputs, path / REJECTED_FILE if is_free(path) else None, allow_code=allow_code
    )
    resume_hint = (
        "nothing is trained yet: start it again"
        if find_parent_run(path) == path
        else _resume_hint(path)
    )
    with GracefulStop(resume_hint) as stop, RunFolder.create(path) as folder:
        with stop.immediate(), memory_errors():
            plan, run_inputs, first_events = add_self_rehearsal(plan, run_inputs, folder)
            resume_state = ResumeState(
                build_fingerprint(plan, run_inputs, plan.recipe), first_events=first_events
            )
        folder.write_json(FINGERPRINT_FILE, resume_state.fingerprint)
        write_rejected_rows(path / REJECTED_FILE, run_inputs.datasets, plan.data)
        folder.write_json(PLAN_FILE, plan)  # from here on it is a run, which can be resumed
        stop.resume_hint = _resume_hint(path)
        _write_run_metadata(folder, plan)
        yield from _persist_events(
            folder, _run_events(RunContext(folder, plan, run_inputs, items, resume_state, stop))
        )


def check_run(
    plan: Plan,
    run_inputs: RunInputs,
    rejected_path: Path | None = None,
    *,
    allow_code: bool = False,
) -> EvalItems:
    """What is refused before anything is loaded, and else what will be measured. `rejected`: a file
    for bad rows. `allow_code`: metrics of the user's own may run."""
    refuse_if_too_large(plan)
    refuse_test_leakage(run_inputs.datasets)
    refuse_invalid_rows(
        run_inputs.datasets,
        plan.data,
        rejected_path,
        should_skip_invalid=run_inputs.recipe.skip_bad,
    )
    return build_eval_items(plan, run_inputs, allow_code=allow_code)


def resume(
    path: Path, *, allow_drift: bool = False, from_step: int | None = None, allow_code: bool = False
) -> Iterator[Event]:
    """Goes on after the newest checkpoint that can be trusted, or after that of `from_step`. Raises
    InputError when what the run stands on has changed; with `allow_drift` it says so, and takes the
    first measures again."""
    with GracefulStop(_resume_hint(path)) as stop, RunFolder.open(path) as folder:
        plan = read_run_plan(path)
        if (path / RECORD_FILE).exists():
            raise InputError(
                "this run is finished",
                where=str(path),
                fix="start a new one with another output_dir",
            )
        _write_run_metadata(folder, plan)
        with stop.immediate():
            run_inputs = inputs.reload_inputs_unchecked(plan, path)
            resume_state = prepare_resume(
                folder, plan, run_inputs, allow_drift=allow_drift, from_step=from_step
            )
            items = build_eval_items(plan, run_inputs, allow_code=allow_code)
        if resume_state.has_drifted:
            (path / EVAL_BEFORE_FILE).unlink(missing_ok=True)
        yield from _persist_events(
            folder, _run_events(RunContext(folder, plan, run_inputs, items, resume_state, stop))
        )


def _resume_hint(path: Path) -> str:
    return f"go on with: tunesmith resume {find_parent_run(path)}"


def _write_run_metadata(folder: RunFolder, plan: Plan) -> None:
    """What people read of the plan; an attempt that was killed may have left without it."""
    if not (folder.path / RECIPE_FILE).exists():
        folder.write_text(
            RECIPE_FILE, yaml.safe_dump(plan.recipe, sort_keys=False, allow_unicode=True)
        )
    folder.write_json("data.json", plan.data)


def _persist_events(folder: RunFolder, events: Generator[Event]) -> Iterator[Event]:
    """Every event is on disk before anyone sees it, or one warning is. A gate's no is the last
    event of a run."""
    step, has_warned = 0, False
    with closing(events):
        try:
            for event in events:
                step, problem = event.step, folder.append_event(event)
                if problem and not has_warned:
                    has_warned = True
                    yield CheckResult(
                        "events.jsonl", "warn", f"{problem}: lines wait in memory for room", step
                    )
                yield event
        except GateError as error:
            folder.append_event(CheckResult(FAILED_CHECK, "stop", str(error), step))
            raise
        except MachineError as error:
            error.fix = ", then ".join(filter(None, (error.fix, _resume_hint(folder.path))))
            raise


def _run_events(context: RunContext) -> Generator[Event]:
    yield from context.resume_state.first_events
    with context.stop.immediate(), memory_errors():
        session = open_session(context.plan, context.inputs)
        preflight_results = run_preflight(session.model, session.samples)
    yield from preflight_results
    with context.stop.immediate(), memory_errors():
        before = base_reference.measure_before_training(
            context.folder, session, context.items, context.resume_state.fingerprint
        )
        references = base_reference.load_base_references(context.folder, session, context.items)
        session, pair_results = add_synthetic_pairs(session, context.folder)
        session = base_reference.add_references(session, context.folder)
    yield from before.iter_scores(step=0)
    yield from pair_results
    guarded_training = GuardedTraining(context, session, before)
    try:
        yield from guarded_training.run_events()
        weights_dir = _save_weights(context, session)
        with context.stop.immediate(), memory_errors():
            answer_cache = open_answer_cache(
                context.folder.path, context.resume_state.fingerprint, weights_dir
            )
            after = measure_items(
                session,
                context.items,
                step=guarded_training.final_step,
                base_references=references,
                cache=answer_cache,
            )
            scales = measure_scale_curve(
                session, context.items, step=guarded_training.final_step, before=before, after=after
            )
    except Interrupted:
        if guarded_training.training.step > guarded_training.saved_step:
            yield guarded_training.save_checkpoint()
        raise
    context.folder.write_json(EVAL_AFTER_FILE, after)
    yield from after.iter_scores(step=guarded_training.final_step)
    yield from check_displacement(
        compare_results(before, after, step=guarded_training.final_step),
        guarded_training.final_step,
    )
    context.folder.flush()
    record = _build_record(
        context, preflight_results, (before, after), weights_dir, guarded_training.final_step
    )
    record = dataclasses.replace(
        record, scales=scales, selected_step=guarded_training.training.step
    )
    write_card(record, context.resume_state.fingerprint)
    context.folder.write_json(RECORD_FILE, record)
    base_reference.delete_base_states(context.folder)


def _save_weights(context: RunContext, session: Session) -> Path:
    """The trained weights, with what serving needs to behave as training did, and what they belong
    to."""
    plan, base_dir, network = context.plan, session.inputs.model.path, session.model.network
    values = {key: choice.value for key, choice in plan.choices.items()}
    has_adapter = plan.config.method != "full"
    target = context.folder.path / (ADAPTER_DIR if has_adapter else MODEL_DIR)
    needed_bytes = sum(
        p.numel() * p.element_size() for p in get_trainable_parameters(network).values()
    )
    with atomic_dir(
        target, metadata=context.resume_state.fingerprint, needed_bytes=needed_bytes
    ) as scratch:
        if has_adapter:
            save_adapter(network, scratch, values, base_dir)
        else:
            save_model(network, scratch, base_dir, session.model.dtype)
        templates = {name: template.source for name, template in session.renderer.templates.items()}
        tokenizer_json = None
        if new_tokens := session.renderer.tokenizer.new_tokens:
            base_tokenizer_json = (base_dir / "tokenizer.json").read_bytes()
            tokenizer_json = append_tokens(base_tokenizer_json, new_tokens)
        save_serving_files(
            scratch,
            base_dir,
            templates=templates,
            end_ids=session.renderer.end_ids,
            tokenizer_json=tokenizer_json,
        )
        hashes = context.resume_state.fingerprint["base_sha256"]
        write_provenance(
            scratch,
            build_provenance(session.inputs.model.name, hashes, session.renderer, plan.config.now),
        )
    return target


def _build_record(
    context: RunContext,
    preflight_results: Iterable[CheckResult],
    results: tuple[EvalResults, EvalResults],
    weights_dir: Path,
    step: int,
) -> RunRecord:
    """`step`: when it was measured again, those that were refused counted."""
    before, after = results
    steps = [event for event in context.folder.load_events() if event["type"] == "step"]
    return RunRecord(
        version=__version__,
        plan=context.plan,
        preflight=tuple(preflight_results),
        comparisons=compare_results(before, after, step=step),
        steps=len(steps),
        tokens=sum(event["tokens"] for event in steps),
        train_seconds=sum(event["seconds"] for event in steps),
        peak_bytes=max((event["peak_bytes"] for event in steps), default=0),
        task_tokens=dict(sum((Counter(event["task_tokens"]) for event in steps), Counter[str]())),
        adapter=str(weights_dir),
        samples=select_sample_pairs(before, after),
        shared_tokens=sum(event["shared_tokens"] for event in steps),
        input_changes=read_drift(context.folder.path),
        kl_scores=compute_kl_scores(before, after, step=step),
        rollbacks=context.folder.load_rollbacks(),
    )
