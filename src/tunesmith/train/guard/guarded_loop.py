"""The middle of the story: steps, looks at what became of the model, checkpoints, and the way back.

    Course(run, bench, before).events() -> the events of training, while it is guarded

After a step whatever is due is looked at: held-out rows, probes. The guard judges, then a
checkpoint is saved, so none is written of a state that was just found bad. When the guard says so
the run goes back to its newest checkpoint that a later look found nothing against, and on from
there, changed. At the end the best checkpoint is taken. All that is decided follows from events; a
resumed run reads its own, and decides the same. Left out: what is bad (train/guard.py), what is
changed then (goingback.py), which is the best (train/selection.py)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.events import (
    PROBE_TASK,
    CheckpointSaved,
    CheckResult,
    Event,
    GenerationSample,
    Score,
    TrainStep,
)
from tunesmith.core.run_dir import RunFolder
from tunesmith.core.types import Json, Plan
from tunesmith.evaluate.custom_metric import format_metric_name
from tunesmith.evaluate.measure import EvalItems, eval_during_training, get_general_bits
from tunesmith.evaluate.results import EvalResults
from tunesmith.model.oom import memory_errors
from tunesmith.plan.guard import OFF, has_guard
from tunesmith.plan.rehearsal import compute_next_ratio
from tunesmith.session.inputs import RunInputs
from tunesmith.session.session import Session
from tunesmith.train.best_checkpoint import EvalPoint, select_best, should_stop_early
from tunesmith.train.guard.detectors import GUARD_KIND, TrainingGuard, select_worst
from tunesmith.train.guard.probes import GenerationProbe, build_prompt_set
from tunesmith.train.guard.rollback import build_rollback
from tunesmith.train.loop import TrainingConfig, TrainingLoop
from tunesmith.train.resume import ResumeState
from tunesmith.train.signals import GracefulStop

MAX_ROLLBACKS = 3


@dataclass(frozen=True, eq=False)
class RunContext:
    """What the parts of the story share."""

    folder: RunFolder
    plan: Plan
    inputs: RunInputs
    items: EvalItems
    resume_state: ResumeState
    stop: GracefulStop


class GuardedTraining:
    """A training under guard. `training` stands where it is; `saved` is the newest step with a
    checkpoint, `steps` are those that were taken in the end."""

    def __init__(self, context: RunContext, session: Session, baseline: EvalResults) -> None:
        self.context, self.session, self.baseline, self.plan = (
            context,
            session,
            baseline,
            context.plan,
        )
        self.training = TrainingLoop(
            session.model, session.load_documents, TrainingConfig.from_plan(context.plan)
        )
        self.saved_step = self.final_step = 0
        self.is_guarding = has_guard(self.plan)
        prompt_set = (
            build_prompt_set(self.plan, context.inputs, context.items.general_texts)
            if self.is_guarding
            else None
        )
        self.probes = GenerationProbe(session, prompt_set) if prompt_set else None
        self.is_probing = bool(self.probes and self.plan.config.probe_steps)
        self.forgetting_margin = (
            float("inf") if self.plan.config.guard_forgetting == OFF else self.plan.config.forgetting_margin
        )
        self._initial_events: list[Event] = []  # what was measured before the first step
        self._replay_history([])

    def run_events(self) -> Iterator[Event]:
        """Raises GateError when there is nothing good to go back to, or a guard says stop."""
        yield from self._start()
        for event in self._run_guarded_steps():
            self.saved_step = event.step if isinstance(event, CheckpointSaved) else self.saved_step
            yield event
            self.context.stop.raise_if_requested()
        yield from self._restore_best()

    def save_checkpoint(self) -> CheckpointSaved:
        """A checkpoint; the best one so far, and the one to go back to, outlive newer ones."""
        training, best = self.training, select_best(self.eval_points, self.forgetting_margin)
        good_step = next(
            (
                step
                for step in self.context.folder.list_saved_steps()
                if step <= self.guard.safe_step
            ),
            0,
        )
        needed_bytes = sum(3 * p.numel() * p.element_size() for p in training.parameters.values())
        fingerprint, protected_steps = (
            self.context.resume_state.fingerprint,
            {good_step} | ({best.step} if best else set()),
        )
        with self.context.folder.checkpoint(
            training.step,
            metadata=fingerprint,
            needed_bytes=needed_bytes,
            keep_steps=protected_steps,
        ) as checkpoint_dir:
            training.save(checkpoint_dir)
        return CheckpointSaved(training.step, f"checkpoints/step-{training.step}")

    # ------------------------------------------------------------ the start

    def _start(self) -> Iterator[Event]:
        """The first probe is of the model before training: weights of a checkpoint come after
        it."""
        if self.is_guarding and self.plan.config.probe_steps and not self.probes:
            yield CheckResult(
                "probes",
                "warn",
                "no role but test_data has two prompts: what the model says is not watched",
            )
        self._initial_events = list(self._run_probes(0)) if self.probes else []
        if self.is_probing:
            yield from self._initial_events
        if self.context.resume_state.checkpoint is not None:
            self.training.restore(self.context.resume_state.checkpoint)
            self.training.set_rollbacks(self.context.folder.load_rollbacks())
            self.saved_step = self.training.step
        events = self.context.folder.load_events()
        self._replay_history(_parse_events(events, self.training.step))
        num_recorded = sum(event.get("level") == "rollback" for event in events)
        yield from (
            rollback.check_result
            for rollback in self.context.folder.load_rollbacks()[num_recorded:]
        )  # of a kill just after it went back

    def _run_probes(self, step: int) -> Iterator[Event]:
        assert self.probes
        with self.context.stop.immediate(), memory_errors():
            self.session.model.network.eval()
            if self.is_probing and step == 0:
                events = [
                    *self.probes.measure_expected(),
                    *self.probes.run_probe(0, self.training.optimizer),
                ]
            elif self.is_probing and step % self.plan.config.probe_steps == 0:
                events = list(self.probes.run_probe(step, self.training.optimizer))
            else:
                events = list(self.probes.measure_forgetting(step))
        yield from events

    def _replay_history(self, events: list[Event]) -> None:
        """What guard and selection know, from what was seen before; of a look that was cut short,
        nothing."""
        self.history = events
        self.guard, self.eval_points = (
            TrainingGuard.from_plan(self.plan, is_probing=self.is_probing),
            list[EvalPoint](),
        )
        evaluated_steps = {event.step for event in events if isinstance(event, CheckResult)}
        for event in (*self._initial_events, *events):
            if isinstance(event, CheckResult):
                self._record_eval(event.step)
            elif isinstance(event, TrainStep) or event.step == 0 or event.step in evaluated_steps:
                self.guard.observe_event(event)

    def _record_eval(self, step: int) -> list[CheckResult]:
        scores = [
            event for event in self.history if isinstance(event, Score) and event.step == step
        ]
        if eval_point := EvalPoint.from_scores(
            step, scores, [format_metric_name(metric) for metric in self.plan.config.metrics]
        ):
            self.eval_points.append(eval_point)
        return (
            self.guard.judge_probe(step)
            if any(score.task == PROBE_TASK for score in scores)
            else []
        )

    # ------------------------------------------------------------ steps

    def _run_guarded_steps(self) -> Iterator[Event]:
        if self._is_due() and not self._is_evaluated():  # a signal came before its look
            yield from self._evaluate_if_due([])
        self._stop_early()
        while (event := self._take_event()) is not None:
            if not isinstance(event, CheckResult) or event.level == "warn":
                yield event
            verdicts = [event] if isinstance(event, CheckResult) else []
            if isinstance(event, TrainStep):
                self.history.append(event)
                verdicts = self.guard.observe_event(event)
                yield from (verdict for verdict in verdicts if verdict.level == "warn")
                yield from self._evaluate_if_due(verdicts)
            if (worst_verdict := select_worst(verdicts)) is not None:
                yield from self._roll_back(worst_verdict)
            elif isinstance(event, TrainStep):
                yield from self._save_if_due()
                self._stop_early()

    def _take_event(self) -> Event | None:
        """What broke down for good is a verdict, as long as there is something to go back to."""
        try:
            return next(self.training, None)
        except GateError as error:
            if self.plan.config.guard_collapse != "rollback" or self._find_good_step() is None:
                raise
            return CheckResult("non-finite", "rollback", error.message, self.training.step)

    def _save_if_due(self) -> Iterator[Event]:
        step, best = self.training.step, select_best(self.eval_points, self.forgetting_margin)
        if step < self.plan.steps and (
            step % self.plan.config.save_steps == 0 or (best and best.step == step)
        ):
            yield self.save_checkpoint()

    def _stop_early(self) -> None:
        if should_stop_early(self.eval_points, self.forgetting_margin, self.plan.config.patience):
            self.training.stop()

    # ------------------------------------------------------------ looks

    def _is_eval_due(self) -> bool:
        """At held-out rows: where the plan says so, and once more at the end if there is something
        to compare."""
        step = self.training.step
        return self.context.items.has_training_eval and (
            step % self.plan.config.eval_steps == 0
            or (step == self.plan.steps and bool(self.eval_points))
        )

    def _is_due(self) -> bool:
        step = self.training.step
        return step > 0 and (
            self._is_eval_due() or (self.is_probing and step % self.plan.config.probe_steps == 0)
        )

    def _is_evaluated(self) -> bool:
        return any(
            isinstance(event, CheckResult) and event.step == self.training.step
            for event in self.history
        )

    def _evaluate_if_due(self, verdicts: list[CheckResult]) -> Iterator[Event]:
        """Whatever is due, ending in one verdict; those that the guard decides by are added to
        `verdicts`."""
        if not self._is_due():
            return
        step, scores = self.training.step, list[Score]()
        if self._is_eval_due():
            with self.context.stop.immediate(), memory_errors():
                scores = eval_during_training(self.session, self.context.items, step=step)
        for event in (*scores, *(self._run_probes(step) if self.probes else ())):
            if not isinstance(event, GenerationSample):
                self.history.append(event)
                self.guard.observe_event(event)
            yield event
        if scores:
            yield from self._adapt_rehearsal(scores)
        guard_verdicts = self._record_eval(step)
        verdicts += guard_verdicts
        yield from (verdict for verdict in guard_verdicts if verdict.level == "warn")
        if select_worst(verdicts) is None:
            summary = CheckResult(GUARD_KIND, "ok", self._format_status(), step)
            self.history.append(summary)
            yield summary

    def _format_status(self) -> str:
        step, best = self.training.step, select_best(self.eval_points, self.forgetting_margin)
        detectors = ", ".join(self.guard.active_detectors)
        parts = (
            [f"still {detectors}" if detectors else "nothing against it"] if self.is_probing else []
        )
        if best:
            parts.append(
                "the best so far" if best.step == step else f"step {best.step} is the best so far"
            )
        return "; ".join(parts) or "looked"

    def _adapt_rehearsal(self, scores: list[Score]) -> Iterator[Event]:
        """An adaptive rehearsal follows from what was measured."""
        plan, step, training = self.plan, self.training.step, self.training
        if (
            plan.config.rehearsal_margin is None
            or step >= plan.steps
            or step in dict(training.ratios)
        ):
            return
        previous_ratio = (
            training.ratio_changes[-1][1] if training.ratio_changes else plan.config.rehearsal_ratio
        )
        forgotten_bits = get_general_bits(scores) - get_general_bits(
            self.baseline.iter_scores(step=0)
        )
        margin = plan.config.rehearsal_margin
        ratio = compute_next_ratio(previous_ratio, forgotten_bits, margin)
        level, relation = ("ok", "within") if forgotten_bits <= margin else ("warn", "over")
        evidence = f"general text {forgotten_bits:+.3f} bits per byte, {relation} {margin:g}: {previous_ratio:.1%} -> {ratio:.1%}"
        yield CheckResult("rehearsal", level, evidence, step)
        training.set_rehearsal_ratio(ratio)

    # ------------------------------------------------------------ back, and the end

    def _find_good_step(self) -> int | None:
        """The newest checkpoint that nothing was found against since; the one before, where that
        was tried already."""
        candidates = [
            step
            for step in self.context.folder.list_saved_steps()
            if step <= self.guard.last_good_step
        ]
        tried_steps = {rollback.to for rollback in self.training.rollbacks}
        return (
            candidates[1]
            if len(candidates) > 1 and candidates[0] in tried_steps
            else next(iter(candidates), None)
        )

    def _roll_back(self, verdict: CheckResult) -> Iterator[Event]:
        training, folder, failed_step = self.training, self.context.folder, self.training.step
        good_step, fix = (
            self._find_good_step(),
            "lower learning_rate, or look at the rows with `tunesmith data check`",
        )
        where = f"step {failed_step}"
        if verdict.level == "stop":
            yield verdict
            raise GateError(f"{verdict.kind}: {verdict.evidence}", where=where, fix=fix)
        if good_step is None:
            message = f"{verdict.kind}: {verdict.evidence}; no checkpoint was found good yet to go back to"
            raise GateError(message, where=where, fix=f"{fix}, or lower save_steps")
        if len(training.rollbacks) >= MAX_ROLLBACKS:
            message = f"{verdict.kind}: {verdict.evidence}; the run went back {MAX_ROLLBACKS} times already"
            raise GateError(message, where=where, fix=fix)
        training.restore(folder.find_checkpoint(good_step))
        training.set_rollbacks(folder.load_rollbacks())
        with memory_errors():
            rollback = build_rollback(self.session, training, verdict, failed_step)
        training.set_rollbacks(folder.record_rollback(rollback))
        self.saved_step = good_step
        self._replay_history([event for event in self.history if event.step <= good_step])
        yield training.rollbacks[-1].check_result

    def _restore_best(self) -> Iterator[Event]:
        """The weights of the best look, if they are not those at hand."""
        self.final_step = last_step = self.training.step
        best = select_best(self.eval_points, self.forgetting_margin)
        if best is None or best.step == last_step:
            return
        try:
            path = self.context.folder.find_checkpoint(best.step)
        except InputError as error:
            yield CheckResult(
                "best",
                "warn",
                f"step {best.step} was the best, but {error.message}: the last one is kept",
                last_step,
            )
            return
        self.training.restore(path)
        metric_text = "" if best.mean_metric is None else f"answers {best.mean_metric:.3f}, "
        yield CheckResult(
            "best",
            "ok",
            f"step {best.step} is kept: {metric_text}held-out loss {best.loss:.4f}",
            last_step,
        )


def _parse_events(events: list[Json], step: int) -> list[Event]:
    """What a run's folder holds of the steps up to this one, as far as guard and selection fold
    it."""
    event_classes = {"step": TrainStep, "score": Score}
    parsed_events: list[Event] = []
    for event in events:
        if not 0 < event["step"] <= step:
            continue
        if event["type"] == "verdict" and event["kind"] == GUARD_KIND:
            parsed_events.append(
                CheckResult(GUARD_KIND, event["level"], event["evidence"], event["step"])
            )
        elif event["type"] in event_classes:
            values = {
                key: value for key, value in event.items() if key not in ("type", "time", "attempt")
            }
            parsed_events.append(event_classes[event["type"]](**values))
    return parsed_events
