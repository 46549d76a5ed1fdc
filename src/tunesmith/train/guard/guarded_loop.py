"""The middle of the story: steps, looks at what became of the model, checkpoints, and the way back.

    Course(run, bench, before).events() -> the events of training, while it is guarded

After a step whatever is due is looked at: held-out rows, probes. The guard judges, then a checkpoint is saved, so none
is written of a state that was just found bad. When the guard says so the run goes back to its newest checkpoint that a
later look found nothing against, and on from there, changed. At the end the best checkpoint is taken. All that is
decided follows from events; a resumed run reads its own, and decides the same. Left out: what is bad (train/guard.py),
what is changed then (goingback.py), which is the best (train/selection.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.events import PROBES, Event, Sample, Saved, Score, StepResult, Verdict
from tunesmith.core.run_dir import RunFolder
from tunesmith.core.types import Json, Plan
from tunesmith.evaluate.custom_metric import shown
from tunesmith.evaluate.measure import Items, eval_scores, general_bits
from tunesmith.evaluate.results import Measured
from tunesmith.model.oom import memory_errors
from tunesmith.plan.guard import OFF, guards
from tunesmith.plan.rehearsal import next_ratio
from tunesmith.session.inputs import Facts
from tunesmith.session.session import Workbench
from tunesmith.train.best_checkpoint import Look, best_of, exhausted
from tunesmith.train.guard.detectors import LOOK, Guard, worst
from tunesmith.train.guard.probes import Probes, probe_set
from tunesmith.train.guard.rollback import rollback_to
from tunesmith.train.loop import Settings, Training
from tunesmith.train.resume import Start
from tunesmith.train.signals import StopWish

MOST_ROLLBACKS = 3


@dataclass(frozen=True, eq=False)
class Run:
    """What the parts of the story share."""

    folder: RunFolder
    plan: Plan
    facts: Facts
    items: Items
    start: Start
    wish: StopWish


class Course:
    """A training under guard. `training` stands where it is; `saved` is the newest step with a checkpoint, `steps` are
    those that were taken in the end."""

    def __init__(self, run: Run, bench: Workbench, before: Measured) -> None:
        self.run, self.bench, self.before, self.plan = run, bench, before, run.plan
        self.training = Training(bench.model, bench.documents_of, Settings.of(run.plan))
        self.saved = self.steps = 0
        self.guarding = guards(self.plan)
        chosen = probe_set(self.plan, run.facts, run.items.texts) if self.guarding else None
        self.probes = Probes(bench, chosen) if chosen else None
        self.probing = bool(self.probes and self.plan["probe_steps"])
        self.margin = float("inf") if self.plan["guard_forgetting"] == OFF else self.plan["forgetting_margin"]
        self._begun: list[Event] = []  # what was measured before the first step
        self._fold([])

    def events(self) -> Iterator[Event]:
        """Raises GateError when there is nothing good to go back to, or a guard says stop."""
        yield from self._begin()
        for event in self._guarded_steps():
            self.saved = event.step if isinstance(event, Saved) else self.saved
            yield event
            self.run.wish.obey()
        yield from self._keep_the_best()

    def save(self) -> Saved:
        """A checkpoint; the best one so far, and the one to go back to, outlive newer ones."""
        training, best = self.training, best_of(self.looks, self.margin)
        good = next((step for step in self.run.folder.steps_saved() if step <= self.guard.safe), 0)
        needed = sum(3 * p.numel() * p.element_size() for p in training.parameters.values())
        facts, kept = self.run.start.identity, {good} | ({best.step} if best else set())
        with self.run.folder.checkpoint(training.step, facts=facts, needed_bytes=needed, keep=kept) as target:
            training.save(target)
        return Saved(training.step, f"checkpoints/step-{training.step}")

    # ------------------------------------------------------------ the start

    def _begin(self) -> Iterator[Event]:
        """The first probe is of the model before training: weights of a checkpoint come after it."""
        if self.guarding and self.plan["probe_steps"] and not self.probes:
            yield Verdict("probes", "warn", "no role but test_data has two prompts: what the model says is not watched")
        self._begun = list(self._probed(0)) if self.probes else []
        if self.probing:
            yield from self._begun
        if self.run.start.checkpoint is not None:
            self.training.restore(self.run.start.checkpoint)
            self.training.change(self.run.folder.rollbacks())
            self.saved = self.training.step
        events = self.run.folder.events()
        self._fold(_typed(events, self.training.step))
        told = sum(event.get("level") == "rollback" for event in events)
        yield from (one.verdict for one in self.run.folder.rollbacks()[told:])  # of a kill just after it went back

    def _probed(self, step: int) -> Iterator[Event]:
        assert self.probes
        with self.run.wish.at_once(), memory_errors():
            self.bench.model.network.eval()
            if self.probing and step == 0:
                found = [*self.probes.expected(), *self.probes.take(0, self.training.optimizer)]
            elif self.probing and step % self.plan["probe_steps"] == 0:
                found = list(self.probes.take(step, self.training.optimizer))
            else:
                found = list(self.probes.forgotten(step))
        yield from found

    def _fold(self, events: list[Event]) -> None:
        """What guard and selection know, from what was seen before; of a look that was cut short, nothing."""
        self.history = events
        self.guard, self.looks = Guard.of(self.plan, probing=self.probing), list[Look]()
        whole = {event.step for event in events if isinstance(event, Verdict)}
        for event in (*self._begun, *events):
            if isinstance(event, Verdict):
                self._end_look(event.step)
            elif isinstance(event, StepResult) or event.step == 0 or event.step in whole:
                self.guard.see(event)

    def _end_look(self, step: int) -> list[Verdict]:
        scores = [event for event in self.history if isinstance(event, Score) and event.step == step]
        if look := Look.of(step, scores, [shown(metric) for metric in self.plan["metrics"]]):
            self.looks.append(look)
        return self.guard.judge(step) if any(score.task == PROBES for score in scores) else []

    # ------------------------------------------------------------ steps

    def _guarded_steps(self) -> Iterator[Event]:
        if self._due() and not self._looked():  # a signal came before its look
            yield from self._look([])
        self._stop_early()
        while (event := self._next()) is not None:
            if not isinstance(event, Verdict) or event.level == "warn":
                yield event
            verdicts = [event] if isinstance(event, Verdict) else []
            if isinstance(event, StepResult):
                self.history.append(event)
                verdicts = self.guard.see(event)
                yield from (one for one in verdicts if one.level == "warn")
                yield from self._look(verdicts)
            if (found := worst(verdicts)) is not None:
                yield from self._go_back(found)
            elif isinstance(event, StepResult):
                yield from self._save_if_due()
                self._stop_early()

    def _next(self) -> Event | None:
        """What broke down for good is a verdict, as long as there is something to go back to."""
        try:
            return next(self.training, None)
        except GateError as error:
            if self.plan["guard_collapse"] != "rollback" or self._good() is None:
                raise
            return Verdict("non-finite", "rollback", error.what, self.training.step)

    def _save_if_due(self) -> Iterator[Event]:
        step, best = self.training.step, best_of(self.looks, self.margin)
        if step < self.plan.steps and (step % self.plan["save_steps"] == 0 or (best and best.step == step)):
            yield self.save()

    def _stop_early(self) -> None:
        if exhausted(self.looks, self.margin, self.plan["patience"]):
            self.training.stop()

    # ------------------------------------------------------------ looks

    def _evaluating(self) -> bool:
        """At held-out rows: where the plan says so, and once more at the end if there is something to compare."""
        step = self.training.step
        return self.run.items.selecting and (
            step % self.plan["eval_steps"] == 0 or (step == self.plan.steps and bool(self.looks))
        )

    def _due(self) -> bool:
        step = self.training.step
        return step > 0 and (self._evaluating() or (self.probing and step % self.plan["probe_steps"] == 0))

    def _looked(self) -> bool:
        return any(isinstance(event, Verdict) and event.step == self.training.step for event in self.history)

    def _look(self, verdicts: list[Verdict]) -> Iterator[Event]:
        """Whatever is due, ending in one verdict; those that the guard decides by are added to `verdicts`."""
        if not self._due():
            return
        step, scores = self.training.step, list[Score]()
        if self._evaluating():
            with self.run.wish.at_once(), memory_errors():
                scores = eval_scores(self.bench, self.run.items, step=step)
        for event in (*scores, *(self._probed(step) if self.probes else ())):
            if not isinstance(event, Sample):
                self.history.append(event)
                self.guard.see(event)
            yield event
        if scores:
            yield from self._rehearse(scores)
        found = self._end_look(step)
        verdicts += found
        yield from (one for one in found if one.level == "warn")
        if worst(verdicts) is None:
            told = Verdict(LOOK, "ok", self._told(), step)
            self.history.append(told)
            yield told

    def _told(self) -> str:
        step, best = self.training.step, best_of(self.looks, self.margin)
        finding = ", ".join(self.guard.finding)
        parts = [f"still {finding}" if finding else "nothing against it"] if self.probing else []
        if best:
            parts.append("the best so far" if best.step == step else f"step {best.step} is the best so far")
        return "; ".join(parts) or "looked"

    def _rehearse(self, scores: list[Score]) -> Iterator[Event]:
        """An adaptive rehearsal follows from what was measured."""
        plan, step, training = self.plan, self.training.step, self.training
        if "rehearsal_margin" not in plan.choices or step >= plan.steps or step in dict(training.ratios):
            return
        was = training.changes[-1][1] if training.changes else plan["rehearsal_ratio"]
        lost = general_bits(scores) - general_bits(self.before.scores(step=0))
        margin = plan["rehearsal_margin"]
        ratio = next_ratio(was, lost, margin)
        level, place = ("ok", "within") if lost <= margin else ("warn", "over")
        evidence = f"general text {lost:+.3f} bits per byte, {place} {margin:g}: {was:.1%} -> {ratio:.1%}"
        yield Verdict("rehearsal", level, evidence, step)
        training.rehearse(ratio)

    # ------------------------------------------------------------ back, and the end

    def _good(self) -> int | None:
        """The newest checkpoint that nothing was found against since; the one before, where that was tried already."""
        found = [step for step in self.run.folder.steps_saved() if step <= self.guard.judged]
        tried = {one.to for one in self.training.rollbacks}
        return found[1] if len(found) > 1 and found[0] in tried else next(iter(found), None)

    def _go_back(self, verdict: Verdict) -> Iterator[Event]:
        training, folder, at = self.training, self.run.folder, self.training.step
        good, fix = self._good(), "lower learning_rate, or look at the rows with `tunesmith data check`"
        where = f"step {at}"
        if verdict.level == "stop":
            yield verdict
            raise GateError(f"{verdict.kind}: {verdict.evidence}", where=where, fix=fix)
        if good is None:
            what = f"{verdict.kind}: {verdict.evidence}; no checkpoint was found good yet to go back to"
            raise GateError(what, where=where, fix=f"{fix}, or lower save_steps")
        if len(training.rollbacks) >= MOST_ROLLBACKS:
            what = f"{verdict.kind}: {verdict.evidence}; the run went back {MOST_ROLLBACKS} times already"
            raise GateError(what, where=where, fix=fix)
        training.restore(folder.checkpoint_of(good))
        training.change(folder.rollbacks())
        with memory_errors():
            rollback = rollback_to(self.bench, training, verdict, at)
        training.change(folder.go_back(rollback))
        self.saved = good
        self._fold([event for event in self.history if event.step <= good])
        yield training.rollbacks[-1].verdict

    def _keep_the_best(self) -> Iterator[Event]:
        """The weights of the best look, if they are not those at hand."""
        self.steps = last = self.training.step
        best = best_of(self.looks, self.margin)
        if best is None or best.step == last:
            return
        try:
            path = self.run.folder.checkpoint_of(best.step)
        except InputError as error:
            yield Verdict(
                "best", "warn", f"step {best.step} was the best, but {error.what}: the last one is kept", last
            )
            return
        self.training.restore(path)
        quality = "" if best.quality is None else f"answers {best.quality:.3f}, "
        yield Verdict("best", "ok", f"step {best.step} is kept: {quality}held-out loss {best.loss:.4f}", last)


def _typed(events: list[Json], step: int) -> list[Event]:
    """What a run's folder holds of the steps up to this one, as far as guard and selection fold it."""
    kinds = {"step": StepResult, "score": Score}
    found: list[Event] = []
    for event in events:
        if not 0 < event["step"] <= step:
            continue
        if event["type"] == "verdict" and event["kind"] == LOOK:
            found.append(Verdict(LOOK, event["level"], event["evidence"], event["step"]))
        elif event["type"] in kinds:
            values = {key: value for key, value in event.items() if key not in ("type", "time", "attempt")}
            found.append(kinds[event["type"]](**values))
    return found
