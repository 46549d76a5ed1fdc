"""The story of a run; read this first.

    plan -> prove -> measure before -> train while guarding -> measure after -> write the record

In: a Plan. Out: events as they happen, and a run folder: plan.json, fingerprint.json, data.json,
events.jsonl, eval_before.json, eval_after.json, checkpoints/, adapter/, record.json. `resume` tells
the same story from the newest checkpoint on.

Of several ranks, this is the story of rank 0; the others follow its commands (follow.py).

Whoever watches a run sees its events and nothing else: the terminal prints them, the folder stores
them. A signal stops a run where nothing is lost. When a gate refuses, its reason is the last event.

Left out: several stages in one recipe (stages.py), deciding values (plan/)."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import yaml

from tunesmith.core.atomic import atomic_dir, hash_file
from tunesmith.core.errors import GateError, InputError, Interrupted, MachineError
from tunesmith.core.events import CheckResult, Event, TrainStep
from tunesmith.core.hardware import read_peak_bytes
from tunesmith.core.json_io import dump_json
from tunesmith.core.ranks import SINGLE_PROCESS, RankFailed, Ranks
from tunesmith.core.run_dir import (
    ADAPTER_DIR,
    EVAL_AFTER_FILE,
    EVAL_BEFORE_FILE,
    FAILED_CHECK,
    FINGERPRINT_FILE,
    MODEL_DIR,
    PLAN_FILE,
    PREFLIGHT_FILE,
    RECIPE_FILE,
    RECORD_FILE,
    REJECTED_FILE,
    RESOLVED_FILE,
    RunFolder,
    find_parent_run,
    is_free,
    read_all_events,
    read_run_plan,
)
from tunesmith.core.token_shard import refuse_group_size
from tunesmith.core.types import Comparison, Json, Plan, RunRecord, ScalePoint, __version__
from tunesmith.data.rejects import refuse_unusable_rows, write_rejected_rows
from tunesmith.data.tokenizer.tokenizer_json import append_tokens
from tunesmith.evaluate.adapter_scaling import measure_scale_curve
from tunesmith.evaluate.error_analysis import analyze_run_errors
from tunesmith.evaluate.items import EvalItems, build_eval_items
from tunesmith.evaluate.loglikelihood import check_likelihood_displacement
from tunesmith.evaluate.measure import measure_items
from tunesmith.evaluate.results import (
    EvalResults,
    compare_results,
    compute_kl_scores,
    select_sample_pairs,
)
from tunesmith.evaluate.run_verdict import judge_run
from tunesmith.model.adapters import get_trainable_parameters
from tunesmith.model.hub.adapter_config import ADAPTER_WEIGHTS_FILE
from tunesmith.model.machine_errors import machine_errors
from tunesmith.model.save import (
    check_saved_adapter,
    save_adapter,
    save_model,
    save_serving_files,
)
from tunesmith.plan.build import refuse_if_too_large
from tunesmith.plan.resolved import resolve_recipe
from tunesmith.session import inputs
from tunesmith.session.fingerprint import build_fingerprint
from tunesmith.session.identity import build_provenance, write_provenance
from tunesmith.session.inputs import RunInputs
from tunesmith.session.session import Session, open_session
from tunesmith.train import base_reference
from tunesmith.train.follow import BEGIN, check_ranks, start_ranks
from tunesmith.train.generated_rows import add_self_rehearsal, add_synthetic_pairs
from tunesmith.train.guard.guarded_loop import GuardedTraining, RunContext
from tunesmith.train.model_card import write_card
from tunesmith.train.preflight import run_preflight
from tunesmith.train.resume import (
    ResumeState,
    check_kernels,
    prepare_resume,
    read_input_changes,
)
from tunesmith.train.signals import GracefulStop

# ---------------------------------------------------------------- two ways to begin


def train(
    plan: Plan,
    run_inputs: RunInputs | None = None,
    *,
    allow_code: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
    before: EvalResults | None = None,
) -> Iterator[Event]:
    """Start a run in the plan's output_dir and yield its events.

    `run_inputs` are what the plan was made from; without them they are loaded again. Of several
    `ranks` this is rank 0; the others `follow`. `before` are the metrics before training, if
    another run has measured them on this model and items. Raise InputError or MachineError before
    anything is loaded when the run cannot fit, be measured or be written; GateError when
    preflight or the guard refuses; Interrupted after a signal."""
    path = Path(plan.config.output_dir)
    refuse_on_ranks(plan, ranks, is_new=True)
    run_inputs = run_inputs or inputs.reload_inputs(plan)
    rejected_path = path / REJECTED_FILE if is_free(path) else None
    items = check_run(plan, run_inputs, rejected_path, allow_code=allow_code)
    is_stage = find_parent_run(path) != path
    resume_hint = _resume_hint(path) if is_stage else "nothing was trained; start the run again"
    is_patient = ranks.world > 1
    with GracefulStop(resume_hint, is_patient=is_patient) as stop, RunFolder.create(path) as folder:
        with stop.immediate(), machine_errors():
            plan, run_inputs, first_events = add_self_rehearsal(plan, run_inputs, folder, ranks)
            fingerprint = build_fingerprint(plan, run_inputs, plan.recipe)
            first_events = (*check_kernels(plan, run_inputs), *first_events)
        state = ResumeState(fingerprint, first_events=first_events)
        folder.write_json(FINGERPRINT_FILE, fingerprint)
        write_rejected_rows(path / REJECTED_FILE, run_inputs.datasets, plan.data)
        folder.write_json(PLAN_FILE, plan)  # from here on it is a run, which can be resumed
        stop.resume_hint = _resume_hint(path)
        if before is not None:
            folder.write_json(EVAL_BEFORE_FILE, before)
        _write_run_metadata(folder, plan)
        context = RunContext(folder, plan, run_inputs, items, state, stop, ranks)
        yield from _persist_events(folder, _run_events(context))


def resume(
    path: Path,
    *,
    allow_changes: bool = False,
    checkpoint: int | None = None,
    allow_code: bool = False,
    ranks: Ranks = SINGLE_PROCESS,
) -> Iterator[Event]:
    """Continue a run from its newest valid checkpoint, or from that of step `checkpoint`, on any
    number of ranks.

    Raise InputError when its inputs have changed; with `allow_changes` the run continues with a
    warning, and is measured before training again."""
    stopping = GracefulStop(_resume_hint(path), is_patient=ranks.world > 1)
    with stopping as stop, RunFolder.open(path) as folder:
        plan = read_run_plan(path)
        refuse_finished(path)
        refuse_on_ranks(plan, ranks)
        _write_run_metadata(folder, plan)
        with stop.immediate():
            run_inputs = inputs.reload_inputs_unchecked(plan, path)
            state = prepare_resume(
                folder, plan, run_inputs, allow_changes=allow_changes, checkpoint=checkpoint
            )
            items = build_eval_items(plan, run_inputs, allow_code=allow_code)
        if state.has_changes:
            (path / EVAL_BEFORE_FILE).unlink(missing_ok=True)
        context = RunContext(folder, plan, run_inputs, items, state, stop, ranks)
        yield from _persist_events(folder, _run_events(context))


def check_run(
    plan: Plan,
    run_inputs: RunInputs,
    rejected_path: Path | None = None,
    *,
    allow_code: bool = False,
) -> EvalItems:
    """Refuse what can be refused before anything is loaded; return what will be measured.

    `rejected_path` is a file for invalid rows. `allow_code` lets custom metrics run."""
    if plan.recipe.get("sweep"):
        fix = "run `tunesmith tune sweep`, or remove it to train once"
        raise InputError("the recipe describes a sweep of several runs", where="sweep", fix=fix)
    refuse_if_too_large(plan)
    refuse_unusable_rows(
        run_inputs.datasets,
        plan.data,
        rejected_path,
        skip_invalid=run_inputs.recipe.skip_invalid,
    )
    return build_eval_items(plan, run_inputs, allow_code=allow_code)


def refuse_on_ranks(plan: Plan, ranks: Ranks, *, is_new: bool = False) -> None:
    """Raise InputError for a plan that these ranks cannot run; one that is resumed may have other
    ranks than at its start, which share weights as far as their number allows."""
    refuse_group_size(plan.config.context_parallel_size, ranks)
    shard_size = plan.config.dp_shard_size
    if is_new and ranks.world % shard_size:
        raise InputError(
            f"dp_shard_size is {shard_size}, but the number of processes ({ranks.world}) is not a "
            "multiple of it",
            where="dp_shard_size",
            fix=f"start a multiple of {shard_size} processes with torchrun or --gpus, or leave "
            "dp_shard_size at auto",
        )
    if ranks.world > 1 and plan.config.step_in_backward:
        raise InputError(
            "the plan updates each weight in the backward pass, before several ranks could sum "
            "its gradients",
            where="max_grad_norm: 0",
            fix="set max_grad_norm: 1, which keeps all gradients, or train in one process",
        )


def refuse_finished(path: Path) -> None:
    """Raise InputError if the run in this folder is finished."""
    if (path / RECORD_FILE).exists():
        fix = "start a new run with another output_dir"
        raise InputError("this run is finished", where=str(path), fix=fix)


def _resume_hint(path: Path) -> str:
    return f"continue with: tunesmith resume {find_parent_run(path)}"


# ---------------------------------------------------------------- the story


def _run_events(context: RunContext) -> Generator[Event]:
    started = time.time()
    folder = context.folder
    items = context.items
    fingerprint = context.resume_state.fingerprint
    schema = context.inputs.response_schema  # a file, which may be gone at the end
    yield from context.resume_state.first_events
    yield from start_ranks(context.ranks, folder.path, context.plan, fingerprint)

    # Prove.
    with context.stop.immediate(), machine_errors():
        session, preflight_results = _prove(context)
    yield from preflight_results

    # Measure before, while the weights are those of the start.
    with context.stop.immediate(), machine_errors():
        before = base_reference.measure_before_training(folder, session, items)
        references = base_reference.load_base_references(folder, session, items)
        session, pair_results = add_synthetic_pairs(session, folder)
        session = base_reference.add_references(session, folder)
    yield from (*before.iter_scores(step=0), *pair_results)

    # Train while guarding, then measure after.
    training = _begin_training(context, session, before)
    try:
        for event in training.run_events():
            yield event
            context.stop.raise_if_requested(elsewhere=context.ranks.has_signal)
        step = training.loop.step  # of the weights that are measured
        weights_dir = _save_weights(context, session, schema)
        with context.stop.immediate(), machine_errors():
            after = measure_items(session, items, step=step, base_references=references)
            scales = measure_scale_curve(session, items, step=step, before=before, after=after)
    except Interrupted:
        if training.loop.step > training.saved_step:
            yield training.save_checkpoint()
        raise
    folder.write_json(EVAL_AFTER_FILE, after)
    yield from after.iter_scores(step=step)
    comparisons = compare_results(before, after, step=step)
    yield from check_likelihood_displacement(comparisons, step)

    # Write the record.
    folder.flush()
    record = _build_record(
        context,
        preflight=tuple(preflight_results),
        before=before,
        after=after,
        comparisons=comparisons,
        scales=scales,
        weights_dir=weights_dir,
        training=training,
    )
    _write_record(folder, record, fingerprint, started)
    base_reference.delete_base_states(folder)


def _prove(context: RunContext) -> tuple[Session, Sequence[CheckResult]]:
    """Open the session and check it on rows of the run."""
    session = _open_on_ranks(context)
    results = run_preflight(session.model, session.samples)
    context.folder.write_json(PREFLIGHT_FILE, {"checks": results})
    return session, results


def _open_on_ranks(context: RunContext) -> Session:
    """Open the session, whose model computes on these ranks; with sharded weights all ranks open
    it together, or none."""
    try:
        session = open_session(context.plan, context.inputs, context.ranks)
    except RankFailed:
        check_ranks(context.ranks)
        raise
    session.model.ranks = context.ranks
    if session.model.shards is not None:
        check_ranks(context.ranks)
    return session


def _begin_training(context: RunContext, session: Session, before: EvalResults) -> GuardedTraining:
    """Return the training, once all ranks are ready and have the same weights."""
    context.ranks.send(BEGIN)
    check_ranks(context.ranks)
    training = GuardedTraining(context, session, before)
    training.loop.compare_ranks()
    context.stop.is_joint = context.ranks.world > 1  # a checkpoint needs ranks that listen
    return training


def _write_record(folder: RunFolder, record: RunRecord, fingerprint: Json, started: float) -> None:
    """Write the record with the whole time and the verdict, and the model card before it."""
    total_seconds = _sum_earlier_seconds(folder.path, started) + time.time() - started
    record = dataclasses.replace(record, total_seconds=total_seconds)
    record = dataclasses.replace(record, verdict=judge_run(record, folder.path))
    write_card(record, fingerprint)
    folder.write_json(RECORD_FILE, record)


def _persist_events(folder: RunFolder, events: Generator[Event]) -> Iterator[Event]:
    """Write every event to disk before anyone sees it; if a gate refuses, write that last.

    When the disk does not take a line, warn once: it waits in memory for the next one."""
    step = 0
    has_warned = False
    with closing(events):
        try:
            for event in events:
                step = event.step
                problem = folder.append_event(event)
                if problem and not has_warned:
                    has_warned = True
                    evidence = f"{problem}: events wait in memory until there is room"
                    yield CheckResult("events.jsonl", "warn", evidence, step)
                yield event
        except GateError as error:
            folder.append_event(CheckResult(FAILED_CHECK, "stop", str(error), step))
            raise
        except MachineError as error:
            hint = _resume_hint(folder.path)
            error.fix = f"{error.fix}, then {hint}" if error.fix else hint
            raise


# ---------------------------------------------------------------- what a run leaves


def _write_run_metadata(folder: RunFolder, plan: Plan) -> None:
    """Write recipe.yaml and resolved.yaml, unless they are there, and data.json.

    An attempt that was killed may have left neither."""
    for name, recipe in ((RECIPE_FILE, plan.recipe), (RESOLVED_FILE, resolve_recipe(plan))):
        if not (folder.path / name).exists():
            text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
            folder.write_text(name, text)
    folder.write_text("data.json", dump_json(plan.data, indent=2).decode())


def _save_weights(context: RunContext, session: Session, schema: Json | None) -> Path:
    """Save the trained weights, what serving needs to behave as in training, and provenance."""
    plan = context.plan
    network = session.model.network
    base_dir = session.inputs.model.path
    renderer = session.renderer
    fingerprint = context.resume_state.fingerprint
    has_adapter = plan.config.method != "full"
    weights_sha256 = ""
    target = context.folder.path / (ADAPTER_DIR if has_adapter else MODEL_DIR)
    trained = get_trainable_parameters(network).values()
    needed_bytes = sum(p.numel() * p.element_size() for p in trained)
    with atomic_dir(target, metadata=fingerprint, needed_bytes=needed_bytes) as scratch:
        if has_adapter:
            save_adapter(network, scratch, plan.values, base_dir)
            check_saved_adapter(network, scratch)
            weights_sha256 = hash_file(scratch / ADAPTER_WEIGHTS_FILE)
        else:
            save_model(network, scratch, base_dir, session.model.dtype)
        tokenizer_json = None
        if new_tokens := renderer.tokenizer.new_tokens:
            base_tokenizer_json = (base_dir / "tokenizer.json").read_bytes()
            tokenizer_json = append_tokens(base_tokenizer_json, new_tokens)
        save_serving_files(
            scratch,
            base_dir,
            templates={name: template.source for name, template in renderer.templates.items()},
            end_ids=renderer.end_ids,
            tokenizer_json=tokenizer_json,
        )
        provenance = build_provenance(
            session.inputs.model.name,
            fingerprint["base_sha256"],
            fingerprint["config"],
            renderer,
            plan.config.now,
            schema=schema,
            weights_sha256=weights_sha256,
        )
        write_provenance(scratch, provenance)
    return target


def _build_record(
    context: RunContext,
    *,
    preflight: tuple[CheckResult, ...],
    before: EvalResults,
    after: EvalResults,
    comparisons: tuple[Comparison, ...],
    scales: tuple[ScalePoint, ...],
    weights_dir: Path,
    training: GuardedTraining,
) -> RunRecord:
    """Return the record of a finished run."""
    folder = context.folder
    steps = [event for event in folder.load_events() if isinstance(event, TrainStep)]
    train_peak_bytes = max((event.peak_bytes for event in steps), default=0)
    task_tokens: Counter[str] = Counter()
    for event in steps:
        task_tokens.update(event.task_tokens)
    return RunRecord(
        version=__version__,
        plan=context.plan,
        preflight=preflight,
        comparisons=comparisons,
        steps=len(steps),
        tokens=sum(event.tokens for event in steps),
        train_seconds=sum(event.seconds for event in steps),
        peak_bytes=max(train_peak_bytes, read_peak_bytes(context.plan.machine.device)),
        task_tokens=dict(task_tokens),
        adapter=str(weights_dir),
        samples=select_sample_pairs(before, after),
        shared_tokens=sum(event.shared_tokens for event in steps),
        input_changes=read_input_changes(folder.path),
        kl_scores=compute_kl_scores(before, after, step=training.loop.step),
        rollbacks=folder.load_rollbacks(),
        scales=scales,
        selected_step=training.loop.step,
        train_peak_bytes=train_peak_bytes,
        errors=analyze_run_errors(before, after, context.plan, context.inputs),
    )


def _sum_earlier_seconds(path: Path, started: float) -> float:
    """Return how long the attempts before this process took, from their first event to the last."""
    times: dict[int, list[float]] = {}
    for logged in read_all_events(path):
        if logged.time < started:
            times.setdefault(logged.attempt, []).append(logged.time)
    return sum(max(attempt_times) - min(attempt_times) for attempt_times in times.values())
