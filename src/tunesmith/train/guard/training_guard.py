"""The guard of a run: folds events into verdicts.

    guard.observe_event(event) -> verdicts    after a step: loss and gradient norm
    guard.judge_probe(step) -> verdicts       after a probe: its scores against those of step 0
    guard.judge_answers(step) -> verdicts     after answers to eval_data: do they vary as expected?

The same events give the same verdicts, so a resumed run replays the events of its folder.

In: TrainStep and Score events. Out: CheckResults. Left out: what is bad (detectors.py), the
training loop around it (guarded_loop.py)."""

from __future__ import annotations

from collections.abc import Iterable

from tunesmith.core.events import (
    EVAL_TASK,
    EXPECTED_TASK,
    PROBE_TASK,
    CheckResult,
    Event,
    GenerationSample,
    Score,
    TrainStep,
)
from tunesmith.core.types import Plan
from tunesmith.train.guard.detectors import DETECTORS, Family, GuardHistory, can_judge_answers

# The kind of the verdict that closes an evaluation; other verdicts carry their detector's name.
GUARD_KIND = "guard"
EVALUATION_KIND = "evaluation"  # that no guard judged
# They see a moving average, which lags.
ONSET_DETECTORS = {"loss rise", "loss above start"}


class TrainingGuard:
    """Fold events into verdicts.

    `last_good_step` is the last step that a probe (without probes: a step) passed. A detector
    reports once when it starts to fire, not as long as it fires."""

    def __init__(
        self,
        levels: dict[Family, str],
        *,
        forgetting_margin: float,
        vocab_size: int,
        is_probing: bool,
        planned_steps: int = 0,
    ) -> None:
        """`levels` gives the level of each family; "off" disables it."""
        self.levels = levels
        self.is_probing = is_probing
        self.history = GuardHistory(
            vocab_size=vocab_size,
            forgetting_margin=forgetting_margin,
            planned_steps=planned_steps,
        )
        self.last_good_step = 0
        self._active: set[str] = set()

    @classmethod
    def from_plan(cls, plan: Plan, *, is_probing: bool) -> TrainingGuard:
        collapse = plan.config.guard_collapse
        forgetting = plan.config.guard_forgetting
        levels: dict[Family, str] = {"collapse": collapse, "forgetting": forgetting}
        levels["watch"] = "off" if collapse == forgetting == "off" else "warn"
        return cls(
            levels,
            forgetting_margin=plan.config.forgetting_margin,
            vocab_size=plan.model.vocab_size,
            is_probing=is_probing,
            planned_steps=plan.steps,
        )

    def observe_event(self, event: Event) -> list[CheckResult]:
        """Record an event; return the verdicts on it if it is a step."""
        if isinstance(event, Score) and event.task == PROBE_TASK:
            self.history.probe_scores.setdefault(event.metric, []).append(event)
        elif isinstance(event, Score) and event.task == EXPECTED_TASK:
            self.history.expected_scores[event.metric] = event.value
        elif isinstance(event, GenerationSample) and event.task == EVAL_TASK:
            self.history.add_sample(event)
        elif isinstance(event, TrainStep) and event.supervised_tokens:
            # A step without supervised tokens (all of its rows are skipped) has no loss to judge.
            self.history.add_step(event)
            return self._run_detectors("step", event.step, can_mark_good=not self.is_probing)
        return []

    def judge_probe(self, step: int) -> list[CheckResult]:
        """Return the verdicts on a probe whose scores were observed."""
        return self._run_detectors("probe", step, can_mark_good=True)

    def judge_answers(self, step: int) -> list[CheckResult]:
        """Return the verdicts on complete answers to eval_data that were observed."""
        return self._run_detectors("answers", step, can_mark_good=False)

    def is_watching(self, name: str) -> bool:
        """Return whether a detector may say anything."""
        return self.levels[DETECTORS[name].family] != "off"

    def should_confirm(self, step: int) -> bool:
        """Return whether more answers are worth generating to show that some are constant."""
        is_watched = self.levels["watch"] != "off" and "constant answer" not in self._active
        return is_watched and can_judge_answers(self.history, step)

    @property
    def safe_step(self) -> int:
        """The last step that stays good whatever is detected next.

        A moving average lags: it started to rise where it was lowest."""
        if not self.history.steps:
            return self.last_good_step
        return min(self.last_good_step, self.history.lowest_step)

    @property
    def active_detectors(self) -> list[str]:
        """Names of the detectors that fire now."""
        return [name for name in DETECTORS if name in self._active]

    def _run_detectors(self, trigger: str, step: int, *, can_mark_good: bool) -> list[CheckResult]:
        verdicts: list[CheckResult] = []
        for name, detector in DETECTORS.items():
            level = self.levels[detector.family]
            if detector.trigger != trigger or level == "off":
                continue
            evidence = detector.detect(self.history)
            if not evidence:
                self._active.discard(name)
                continue
            if name not in self._active:
                verdicts.append(CheckResult(name, level, evidence, step))  # type: ignore[arg-type]
            self._active.add(name)
        active_levels = {self.levels[DETECTORS[name].family] for name in self._active}
        if self._active & ONSET_DETECTORS:
            self.last_good_step = self.safe_step
        elif can_mark_good and active_levels <= {"warn"}:
            self.last_good_step = step
        return verdicts


def select_worst(verdicts: Iterable[CheckResult]) -> CheckResult | None:
    """Return the verdict that decides: the first stop, else the first rollback, else None."""
    for level in ("stop", "rollback"):
        for verdict in verdicts:
            if verdict.level == level:
                return verdict
    return None
