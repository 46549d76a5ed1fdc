"""The guarded training loop: step, evaluate, judge, roll back or save.

    GuardedTraining(context, session, baseline).run_events() -> events

After a step, whatever is due is measured: eval_data, generation probes, general text. The guard
judges, and only then is a checkpoint saved, so no checkpoint holds a state that was just rejected.
A rollback restores the newest good checkpoint and changes something; the last one ends the run. In
the end the weights of the best checkpoint are restored.

Every decision follows from events. A resumed run replays the events of its folder and judges the
step of its checkpoint again, so it decides what an uninterrupted run decides.

In: a RunContext, an open Session, the metrics before training. Out: events, checkpoints.
Left out: what is bad (detectors.py), which checkpoint is the best (best_checkpoint.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.events import (
    EVAL_TASK,
    PROBE_TASK,
    CheckpointSaved,
    CheckResult,
    Event,
    GenerationSample,
    Rollback,
    Score,
    TrainStep,
)
from tunesmith.core.ranks import SINGLE_PROCESS, Ranks
from tunesmith.core.run_dir import RunFolder
from tunesmith.core.types import Document, Plan
from tunesmith.evaluate.custom_metric import format_metric_name
from tunesmith.evaluate.items import EvalItems
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.evaluate.measure import eval_during_training, get_general_bits
from tunesmith.evaluate.results import EvalResults
from tunesmith.evaluate.statistics import MIN_ITEMS, compute_robust_sd
from tunesmith.model.machine_errors import machine_errors
from tunesmith.plan.guard import OFF, has_guard
from tunesmith.plan.rehearsal import compute_next_ratio
from tunesmith.session.inputs import RunInputs
from tunesmith.session.session import Session
from tunesmith.train.best_checkpoint import (
    EvalPoint,
    describe_choice,
    select_best,
    should_stop_early,
)
from tunesmith.train.guard.detectors import DETECTORS
from tunesmith.train.guard.probes import GenerationProbe, build_prompt_set
from tunesmith.train.guard.training_guard import (
    EVALUATION_KIND,
    GUARD_KIND,
    TrainingGuard,
    select_worst,
)
from tunesmith.train.loop import TrainingLoop
from tunesmith.train.optimizer import SCALE_KIND
from tunesmith.train.resume import ResumeState
from tunesmith.train.signals import GracefulStop

MAX_ROLLBACKS = 3
NO_CHECKPOINT_FIX = "lower save_steps and eval_steps"
ROLLBACK_FIX = "lower learning_rate, or check the rows with `tunesmith data check`"


@dataclass(frozen=True, eq=False)
class RunContext:
    """Shared by all parts of a run."""

    folder: RunFolder
    plan: Plan
    inputs: RunInputs
    items: EvalItems
    resume_state: ResumeState
    stop: GracefulStop
    ranks: Ranks = SINGLE_PROCESS


class GuardedTraining:
    """A training run with evaluation, guard and checkpoints.

    `saved_step` is the step of the newest checkpoint, `final_step` the last step that was trained;
    after the run `loop.step` is the step of the best checkpoint."""

    def __init__(self, context: RunContext, session: Session, baseline: EvalResults) -> None:
        self.context = context
        self.session = session
        self.baseline = baseline
        self.plan = plan = context.plan
        self.loop = TrainingLoop(
            session.model,
            session.load_documents,
            plan.config,
            steps=plan.steps,
            ranks=context.ranks,
        )
        self.saved_step = 0
        self.final_step = 0
        self.metric_names = [format_metric_name(metric) for metric in plan.config.metrics]
        self.forgetting_margin: float = plan.config.forgetting_margin
        if plan.config.guard_forgetting == OFF:
            self.forgetting_margin = float("inf")
        self.probes: GenerationProbe | None = None
        if has_guard(plan):
            prompt_set = build_prompt_set(plan, context.inputs, context.items.general_texts)
            self.probes = GenerationProbe(session, prompt_set) if prompt_set else None
        self.is_probing = bool(self.probes and plan.config.probe_steps)
        # Then no step is good before expected answers were read again.
        can_read_answers = bool(self.probes and self.probes.prompt_set.is_held_out)
        has_evaluations = context.items.has_training_eval and plan.config.eval_steps <= plan.steps
        self.is_judged_by_probes = self.is_probing or (can_read_answers and has_evaluations)
        # Everything below follows from the events so far: see _replay.
        self.baseline_events: list[Event] = []  # probes before the first step
        self.history: list[Event] = []
        self.guard = self._make_guard()
        self.eval_points: list[EvalPoint] = []
        self.restored_step: TrainStep | None = None  # the step of the resumed checkpoint

    def _make_guard(self) -> TrainingGuard:
        return TrainingGuard.from_plan(self.plan, is_probing=self.is_judged_by_probes)

    def run_events(self) -> Iterator[Event]:
        """Train to the end and yield every event.

        Raise GateError when the guard ends the run and nothing good was saved."""
        yield from self._start()
        for event in self._iter_loop_events():
            verdicts: list[CheckResult] = []
            is_due = isinstance(event, TrainStep) and self._is_anything_due()
            if isinstance(event, TrainStep):
                if event is not self.restored_step:  # which the previous attempt has yielded
                    yield event
                self.history.append(event)
                verdicts = self.guard.observe_event(event)
            elif isinstance(event, CheckResult) and event.kind != SCALE_KIND:
                # out of memory, or a non-finite step
                verdicts = [event]
            else:
                yield event
            if is_due:
                verdicts += yield from self._evaluate_and_judge()
            yield from [verdict for verdict in verdicts if verdict.level == "warn"]
            worst = select_worst(verdicts)
            if worst is not None:
                yield from self._roll_back(worst)
                continue
            if is_due:
                yield self._summarize_evaluation()
            if isinstance(event, TrainStep):
                if self._is_save_due():
                    yield self.save_checkpoint()
                self._stop_early()
        yield from self._restore_best()

    # ------------------------------------------------------------ start and resume

    def _start(self) -> Iterator[Event]:
        """Probe the model before training, then restore the checkpoint of a resumed run."""
        if has_guard(self.plan) and self.plan.config.probe_steps and not self.probes:
            evidence = (
                "generation probes are off: "
                "eval_data, rehearsal and retention_data have fewer than two prompts"
            )
            yield CheckResult("probes", "warn", evidence)
        yield from self._warn_of_few_items()
        if self.probes:
            self.baseline_events = self._run_probes(self.probes, 0)
        if self.is_probing:
            yield from self.baseline_events
        checkpoint_dir = self.context.resume_state.checkpoint_dir
        rollbacks = self.context.folder.load_rollbacks()
        if checkpoint_dir is not None:
            self.loop.restore(checkpoint_dir)
            self.saved_step = self.loop.step
        elif self._can_roll_back_to_start():
            self.save_checkpoint()
        self.loop.set_rollbacks(rollbacks)
        if rollbacks and rollbacks[-1].is_end and rollbacks[-1].to == self.loop.step:
            self.loop.stop()  # what is left is to measure
        recorded = self.context.folder.load_events()
        events = _select_events(recorded, self.loop.step)
        for event in events:
            if isinstance(event, TrainStep) and event.step == self.loop.step:
                self.restored_step = event
        # The step of the checkpoint is judged again: a signal may have come before that.
        self._replay([event for event in events if event.step < self.loop.step])
        # A process that was killed right after a rollback did not write its event.
        num_recorded = sum(
            isinstance(event, CheckResult) and event.level == "rollback" for event in recorded
        )
        for rollback in rollbacks[num_recorded:]:
            yield rollback.check_result

    def _warn_of_few_items(self) -> Iterator[CheckResult]:
        """Warn of detectors that judge an interval and have too few items to do so."""
        if not self.probes:
            return
        prompt_set = self.probes.prompt_set
        num_prompts = len(prompt_set.prompts)
        for name, num_items, unit in (
            ("forgetting", len(prompt_set.texts), "general texts"),
            ("answers unlearned", num_prompts * prompt_set.is_held_out, "prompts"),
            ("overfitting", num_prompts * self.is_probing, "prompts"),
        ):
            if self.guard.is_watching(name) and 0 < num_items < MIN_ITEMS:
                evidence = f"not watched: {num_items} {unit}, needs {MIN_ITEMS}"
                yield CheckResult(name, "warn", evidence)

    def _replay(self, events: list[Event]) -> None:
        """Rebuild history, guard and evaluations from earlier events.

        An evaluation that was interrupted, so that it has no verdict of the guard, is left out."""
        self.history = events
        self.guard = self._make_guard()
        self.eval_points = []
        evaluated_steps = {event.step for event in events if isinstance(event, CheckResult)}
        for event in (*self.baseline_events, *events):
            if isinstance(event, CheckResult):
                self._judge_evaluation(event.step)
            elif isinstance(event, TrainStep) or event.step == 0 or event.step in evaluated_steps:
                self.guard.observe_event(event)

    def _iter_loop_events(self) -> Iterator[Event]:
        """Yield the restored step of a resumed run, then the events of the training loop.

        Weights that are beyond repair are a verdict."""
        if self.restored_step is not None:
            yield self.restored_step
        while True:
            try:
                event = next(self.loop, None)
            except GateError as error:
                event = self._judge_non_finite(error)
            if event is None:
                return
            yield event

    # ------------------------------------------------------------ evaluation

    def _judge_non_finite(self, error: GateError) -> CheckResult:
        """Return the verdict on values that are not finite. Raise the error without a guard, or
        without a checkpoint to go back to."""
        if self.plan.config.guard_collapse == OFF or self._find_good_step() is None:
            raise error
        level = "rollback" if self.plan.config.guard_collapse == "rollback" else "stop"
        return CheckResult("non-finite", level, error.message, self.loop.step)

    def _is_anything_due(self) -> bool:
        return self._is_eval_due() or self._is_probe_due()

    def _is_eval_due(self) -> bool:
        """Return whether eval_data is due: every eval_steps, and at the end if it was before."""
        step = self.loop.step
        is_last = step == self.plan.steps and bool(self.eval_points)
        is_due = step % self.plan.config.eval_steps == 0 or is_last
        return self.context.items.has_training_eval and is_due

    def _is_probe_due(self) -> bool:
        return self.is_probing and self.loop.step % self.plan.config.probe_steps == 0

    def _evaluate_and_judge(self) -> Generator[Event, None, list[CheckResult]]:
        """Measure what is due and yield its events; return the verdicts on it."""
        try:
            yield from self._evaluate()
            return self._judge_evaluation(self.loop.step)
        except GateError as error:
            return [self._judge_non_finite(error)]

    def _evaluate(self) -> Iterator[Event]:
        """Measure what is due and yield its scores and samples; adapt the rehearsal ratio."""
        step = self.loop.step
        scores: list[Score] = []
        if self._is_eval_due():
            for event in self._measure_eval_data(step):
                if isinstance(event, Score):
                    scores.append(event)
                yield self._observe_measure(event)
        if self.probes:
            for event in self._run_probes(self.probes, step):
                yield self._observe_measure(event)
        if scores and self.plan.config.rehearsal_margin is not None:
            yield from self._adapt_rehearsal(scores, self.plan.config.rehearsal_margin)

    def _measure_eval_data(self, step: int) -> Iterator[Score | GenerationSample]:
        """Yield each result as soon as it is known: a sweep may stop the run at the first."""
        measures = eval_during_training(
            self.session,
            self.context.items,
            step=step,
            should_confirm=self.guard.should_confirm(step),
        )
        while True:
            with self.context.stop.immediate(), machine_errors():
                event = next(measures, None)
            if event is None:
                return
            yield event

    def _observe_measure(self, event: Event) -> Event:
        """Show the guard a result, if it judges it; return it."""
        if not isinstance(event, GenerationSample) or event.task == EVAL_TASK:
            self.history.append(event)
            self.guard.observe_event(event)
        return event

    def _run_probes(self, probes: GenerationProbe, step: int) -> list[Event]:
        with self.context.stop.immediate(), machine_errors():
            self.session.model.network.eval()
            if not self._is_probe_due():
                return list(probes.measure_losses(step))
            expected = probes.measure_expected() if step == 0 else ()
            loop = self.loop
            probe = probes.run_probe(step, loop.optimizer, loop.update_ratios)
            return [*expected, *probe]

    def _judge_evaluation(self, step: int) -> list[CheckResult]:
        """Add the evaluation of a step to the eval points; return the verdicts on its probe."""
        scores = [
            event for event in self.history if isinstance(event, Score) and event.step == step
        ]
        eval_point = EvalPoint.from_scores(step, scores, self.metric_names)
        if eval_point is not None:
            self.eval_points.append(eval_point)
        has_probe = any(score.task == PROBE_TASK for score in scores)
        verdicts = self.guard.judge_probe(step) if has_probe else []
        has_answers = any(
            isinstance(event, GenerationSample) and event.step == step for event in self.history
        )
        return verdicts + (self.guard.judge_answers(step) if has_answers else [])

    def _summarize_evaluation(self) -> CheckResult:
        """Return the verdict that closes an evaluation which the run passed."""
        step = self.loop.step
        parts: list[str] = []
        if self.is_probing:
            detectors = ", ".join(self.guard.active_detectors)
            parts.append(f"still active: {detectors}" if detectors else "ok")
        best = self._select_best()
        if best is not None:
            parts.append("best checkpoint so far" + f": step {best.step}" * (best.step != step))
        kind = GUARD_KIND if has_guard(self.plan) else EVALUATION_KIND
        summary = CheckResult(kind, "ok", "; ".join(parts) or "done", step)
        self.history.append(summary)
        return summary

    def _adapt_rehearsal(self, scores: Iterable[Score], margin: float) -> Iterator[Event]:
        """Set the rehearsal ratio of the next steps by how much general text was forgotten."""
        loop = self.loop
        step = loop.step
        if step >= self.plan.steps or step in dict(loop.ratios):
            return
        previous_ratio = self.plan.config.rehearsal_ratio
        if loop.ratio_changes:
            previous_ratio = loop.ratio_changes[-1][1]
        assert previous_ratio is not None, "an adaptive ratio has a start"
        baseline_bits = get_general_bits(self.baseline.iter_scores(step=0))
        forgotten_bits = get_general_bits(scores) - baseline_bits
        ratio = compute_next_ratio(previous_ratio, forgotten_bits, margin)
        is_within = forgotten_bits <= margin
        evidence = (
            f"general text {forgotten_bits:+.3f} bits per byte, "
            f"{'within' if is_within else 'over'} the margin of {margin:g}: "
            f"ratio {previous_ratio:.1%} -> {ratio:.1%}"
        )
        yield CheckResult("rehearsal", "ok" if is_within else "warn", evidence, step)
        loop.set_rehearsal_ratio(ratio)

    # ------------------------------------------------------------ checkpoints

    def _can_roll_back_to_start(self) -> bool:
        """Return whether the guard may go back before there is another checkpoint. One of all
        weights takes three times their bytes: such a run fails instead."""
        config = self.plan.config
        reactions = {config.guard_collapse, config.guard_forgetting}
        return bool(reactions & {"rollback", "stop"}) and config.method != "full"

    def _stop_early(self) -> None:
        patience = self.plan.config.patience
        if should_stop_early(self.eval_points, self.forgetting_margin, patience):
            self.loop.stop()

    def _select_best(self) -> EvalPoint | None:
        return select_best(self.eval_points, self.forgetting_margin)

    def _is_save_due(self) -> bool:
        """Return whether the step is to be saved: every save_steps, and if it is the best so far.

        The last step is not: its weights become the adapter."""
        step = self.loop.step
        if step == self.saved_step or step >= self.plan.steps:
            return False
        best = self._select_best()
        is_best = best is not None and best.step == step
        return step % self.plan.config.save_steps == 0 or is_best

    def save_checkpoint(self) -> CheckpointSaved:
        """Save a checkpoint; keep the best one, and the newest one that is surely good."""
        loop = self.loop
        keep_steps: set[int] = set()
        best = self._select_best()
        if best is not None:
            keep_steps.add(best.step)
        for step in self.context.folder.list_saved_steps():  # newest first
            if step <= self.guard.safe_step:
                keep_steps.add(step)
                break
        with self.context.folder.checkpoint(
            loop.step,
            metadata=self.context.resume_state.fingerprint,
            needed_bytes=loop.state_bytes,
            keep_steps=keep_steps,
        ) as checkpoint_dir:
            loop.save(checkpoint_dir)
        self.saved_step = loop.step
        return CheckpointSaved(loop.step, f"checkpoints/step-{loop.step}")

    def _find_good_step(self) -> int | None:
        """Return the newest checkpoint that the guard passed.

        If the run went back to that one before, return the one before it, but never give up the
        best so far."""
        candidates = [
            step
            for step in self.context.folder.list_saved_steps()
            if step <= self.guard.last_good_step
        ]
        tried_steps = {rollback.to for rollback in self.loop.rollbacks}
        best_step = self._find_end_step()
        if len(candidates) > 1 and candidates[0] in tried_steps and candidates[0] != best_step:
            return candidates[1]
        return candidates[0] if candidates else None

    def _find_end_step(self) -> int | None:
        """Return the step of the best checkpoint that the guard passed, None if none of them was
        evaluated."""
        saved_steps = self.context.folder.list_saved_steps()
        good_points: list[EvalPoint] = []
        for point in self.eval_points:
            if point.step <= self.guard.last_good_step and point.step in saved_steps:
                good_points.append(point)
        best = select_best(good_points, self.forgetting_margin)
        return None if best is None else best.step

    def _roll_back(self, verdict: CheckResult) -> Iterator[Event]:
        """Restore a good checkpoint and change something, or end the run with the best one; raise
        GateError without any."""
        loop = self.loop
        folder = self.context.folder
        failed_step = loop.step
        good_step = self._find_good_step()
        if good_step is None:
            message = f"{verdict.kind}: {verdict.evidence}; no good checkpoint was saved before it"
            fix = f"{ROLLBACK_FIX}, or {NO_CHECKPOINT_FIX}"
            raise GateError(message, where=f"step {failed_step}", fix=fix)
        is_end = verdict.level == "stop" or len(loop.rollbacks) >= MAX_ROLLBACKS
        if is_end:
            good_step = self._find_end_step() or good_step
        loop.restore(folder.find_checkpoint(good_step))
        loop.set_rollbacks(folder.load_rollbacks())
        if is_end:
            rollback = build_end(verdict, failed_step, good_step)
            loop.stop()
        else:
            with machine_errors():
                rollback = build_rollback(self.session, loop, verdict, failed_step)
        loop.set_rollbacks(folder.record_rollback(rollback))
        self.saved_step = good_step
        self._replay([event for event in self.history if event.step <= good_step])
        yield loop.rollbacks[-1].check_result

    def _restore_best(self) -> Iterator[Event]:
        """Restore the weights of the best checkpoint, unless the last step is the best."""
        self.loop.compare_ranks()
        self.final_step = self.loop.step
        best = self._select_best()
        if best is None:
            return
        margin = self.forgetting_margin
        reason = describe_choice(best, self.eval_points, margin)
        if best.step == self.final_step:
            has_within = any(point.is_within(margin) for point in self.eval_points)
            if has_within and not best.is_within(margin):
                yield CheckResult("best", "ok", f"using the last step: {reason}", self.final_step)
            return
        try:
            path = self.context.folder.find_checkpoint(best.step)
        except InputError as error:
            evidence = f"step {best.step} was the best, but {error.message}"
            best = self._select_saved()
            used = "the last step" if best is None else f"step {best.step}"
            yield CheckResult("best", "warn", f"{evidence}: using {used}", self.final_step)
            if best is not None:
                self.loop.restore(self.context.folder.find_checkpoint(best.step))
            return
        self.loop.restore(path)
        evidence = f"using step {best.step}: {reason}"
        yield CheckResult("best", "ok", evidence, self.final_step)

    def _select_saved(self) -> EvalPoint | None:
        """Return the best evaluation that has a checkpoint, None if that is the last step."""
        steps = {*self.context.folder.list_saved_steps(), self.final_step}
        saved = [point for point in self.eval_points if point.step in steps]
        best = select_best(saved, self.forgetting_margin)
        return None if best is None or best.step == self.final_step else best


def _select_events(events: Sequence[Event], last_step: int) -> list[Event]:
    """Return the events of steps 1 to `last_step` that guard and selection depend on."""
    selected: list[Event] = []
    for event in events:
        is_verdict = isinstance(event, CheckResult) and event.kind in (GUARD_KIND, EVALUATION_KIND)
        is_answer = isinstance(event, GenerationSample) and event.task == EVAL_TASK
        is_needed = is_verdict or is_answer or isinstance(event, TrainStep | Score)
        if 0 < event.step <= last_step and is_needed:
            selected.append(event)
    return selected


# ---------------------------------------------------------------- rollback


LR_FACTOR = 0.5
# What rows can cause: of drift in answers or general text they are not the cause.
ROW_KINDS = {"loss rise", "loss above start", "loss spike", "gradient spike", "non-finite"}
# A suspect row's loss exceeds the median by so many robust standard deviations, and is twice it.
OUTLIER_SDS = 6.0
# And by so many nats per token: once rows are learned, the hardest correct ones have several times
# the median.
MIN_EXCESS_NATS = 0.5
MAX_ROW_SHARE = 0.4  # more suspects than this share of the rows are no exception
MAX_DOCUMENTS = 512
MAX_SHOWN_ROWS = 5


def build_end(verdict: CheckResult, failed_step: int, best_step: int) -> Rollback:
    """Return the rollback that ends a run: training did not get past `failed_step`."""
    weights = "the weights before training" if best_step == 0 else "its weights are the result"
    return Rollback(
        step=failed_step,
        to=best_step,
        kind=verdict.kind,
        evidence=verdict.evidence,
        change=f"training ends there: {weights}",
        is_end=True,
    )


def build_rollback(
    session: Session, training: TrainingLoop, verdict: CheckResult, failed_step: int
) -> Rollback:
    """Return the rollback from `failed_step` to the step that `training` was restored to, with the
    first of three changes that applies: more rehearsal data after forgetting; after a loss that
    rose, without a few rows whose loss is far above the others' under the good model; half the
    learning rate."""
    rollback = Rollback(
        step=failed_step, to=training.step, kind=verdict.kind, evidence=verdict.evidence, change=""
    )
    is_forgetting = verdict.kind in DETECTORS and DETECTORS[verdict.kind].family == "forgetting"
    if is_forgetting and session.rehearsal is not None:
        ratio = session.plan.config.rehearsal_ratio
        if training.ratio_changes:
            ratio = training.ratio_changes[-1][1]
        assert ratio is not None, "rehearsal data comes with a ratio"
        ratio = compute_next_ratio(ratio, 1.0, 0.0)
        change = f"continuing with {ratio:.0%} rehearsal"
        return dataclasses.replace(rollback, change=change, rehearsal_ratio=ratio)
    is_of_rows = verdict.kind in ROW_KINDS
    rows = _find_suspect_rows(session, training, failed_step) if is_of_rows else ()
    if rows:
        noun = "row" if len(rows) == 1 else "rows"
        change = f"continuing without {len(rows)} {noun}: {', '.join(rows[:MAX_SHOWN_ROWS])}"
        if len(rows) > MAX_SHOWN_ROWS:
            change += f" and {len(rows) - MAX_SHOWN_ROWS} more"
        return dataclasses.replace(rollback, change=change, rows=rows)
    change = f"continuing with {LR_FACTOR:g} times the learning rate"
    return dataclasses.replace(rollback, change=change, lr_factor=LR_FACTOR)


def _find_suspect_rows(
    session: Session, training: TrainingLoop, failed_step: int
) -> tuple[str, ...]:
    """Return rows of the failed steps with an outlying loss under the good model."""
    skipped_rows = {row for rollback in training.rollbacks for row in rollback.rows}
    # General text is unlikely once the data is learned, which is no fault of it.
    task_session = dataclasses.replace(session, rehearsal=None)
    documents: list[Document] = []
    for step in range(training.step + 1, failed_step + 1):
        if len(documents) == MAX_DOCUMENTS:
            break
        for document in task_session.load_documents(step):
            is_trained = document.is_correct and document.weights_L.any()
            if is_trained and document.id not in skipped_rows and len(documents) < MAX_DOCUMENTS:
                documents.append(document)
    session.model.network.eval()
    config = session.plan.config
    likelihoods = compute_nll(
        session.model, documents, config.pack_length, share=config.share_prefixes
    )
    losses = [nats / tokens for _, nats, tokens in sorted(likelihoods)]
    return find_outliers(documents, losses)


def find_outliers(documents: Sequence[Document], losses: Sequence[float]) -> tuple[str, ...]:
    """Return the ids of rows with an outlying loss; none if there are many, or too few rows."""
    if not losses:
        return ()
    median_loss = median(losses)
    excess = max(OUTLIER_SDS * compute_robust_sd(losses), median_loss, MIN_EXCESS_NATS)
    rows: dict[str, None] = {}  # an ordered set
    for document, loss in zip(documents, losses, strict=True):
        if loss > median_loss + excess:
            rows[document.id] = None
    num_rows = len({document.id for document in documents})
    return tuple(rows) if len(rows) <= MAX_ROW_SHARE * num_rows else ()
