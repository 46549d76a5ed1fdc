"""What to do after a run: up to three commands that follow from what was measured.

    list_next_steps(record, run, verdict_name) -> NextSteps

A step is a function of the facts of a run that returns a NextStep or None; the first MAX_STEPS of
STEPS that apply are listed. In: a RunRecord, its folder, the name of its verdict. Out: NextSteps.
Left out: the verdict (run_verdict.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote

from tunesmith.core.events import EVAL_TASK, GENERAL_TASK
from tunesmith.core.evidence import NextStep, Shortcut, VerdictName
from tunesmith.core.formatting import format_count
from tunesmith.core.run_dir import RECIPE_FILE, is_staged
from tunesmith.core.types import RunRecord
from tunesmith.data.answer_values import LOPSIDED_SHARE
from tunesmith.evaluate.metrics import BITS_PER_BYTE, FORM_METRICS, split_metric
from tunesmith.evaluate.scale_choice import (
    build_commands,
    describe_recommendation,
    recommend_scale,
)
from tunesmith.evaluate.statistics import MIN_ITEMS
from tunesmith.plan.build import MIN_STEPS
from tunesmith.recipe.fields import parse_custom_metric

MAX_STEPS = 3
EPOCHS_FACTOR = 2  # of epochs or steps of a run that was still improving at its end
MAX_NAME_CHARS = 60
GRADING_METRIC = "exact_match"
LARGE_EFFECT = 0.2  # of right answers: test rows that may miss it are too few


@dataclass(frozen=True)
class RunFacts:
    """A finished run as the steps see it."""

    record: RunRecord
    run: Path
    verdict: VerdictName

    @property
    def recipe(self) -> str:
        return quote(str(self.run / RECIPE_FILE))

    @cached_property
    def num_test_items(self) -> int:
        tests = [each.after.n for each in self.record.comparisons if is_test_task(each.task)]
        return max(tests, default=0)

    @property
    def constants(self) -> list[Shortcut]:
        errors = self.record.errors
        return [] if errors is None else [s for s in errors.shortcuts if s.kind == "constant"]

    @property
    def suspects(self) -> tuple[Shortcut, ...]:
        return self.record.errors.suspects if self.record.errors else ()

    @property
    def has_custom_metric(self) -> bool:
        return any(map(parse_custom_metric, self.record.plan.config.metrics))

    @property
    def has_forgotten(self) -> bool:
        """Whether general text got worse, and may have lost more than the limit."""
        limit = self.record.plan.config.forgetting_margin
        return any(
            each.after.n >= MIN_ITEMS and each.difference > 0 and each.high > limit
            for each in self.record.comparisons
            if (each.task, each.metric) == (GENERAL_TASK, BITS_PER_BYTE)
        )

    @property
    def has_expected_answers(self) -> bool:
        """Whether answers to the test rows can be graded: plain text has none, and of preference
        rows and KTO's another metric decides."""
        test_data = self.record.plan.data.get("test_data")
        if test_data is None or self.record.plan.config.stage != "sft":
            return False
        return "text" not in test_data.format.split(", ")

    @property
    def relative_forgetting_at_scale(self) -> float:
        """Return what general text lost at the recommended scale as a multiple of the limit; 0 if
        it is unknown."""
        best = recommend_scale(self.record.scales)
        limit = self.record.plan.config.forgetting_margin
        if best is None or best.general_lost is None or not limit:
            return 0.0
        return best.general_lost.value / limit

    @property
    def is_single_stage(self) -> bool:
        """A run of several stages has no recipe of its own to change."""
        return (self.run / RECIPE_FILE).is_file() or not is_staged(self.run)

    @property
    def has_max_steps(self) -> bool:
        """Whether max_steps ended the run, and not the epochs."""
        max_steps = self.record.plan.recipe.get("max_steps")
        return isinstance(max_steps, int) and self.record.steps >= max_steps

    @property
    def is_still_improving(self) -> bool:
        """Whether eval_data was best at the last step."""
        return "eval_data" in self.record.plan.data and (
            self.record.selected_step == self.record.steps
        )

    @property
    def was_all_right(self) -> bool:
        """Whether the model before training had nothing to learn from the test rows."""
        errors = self.record.errors
        if errors is None or split_metric(errors.metric)[0] in FORM_METRICS:
            return False
        return errors.right_before == errors.n

    @property
    def should_be_better(self) -> bool:
        is_poor = self.verdict in ("useful, not ready", "no effect")
        return self.is_single_stage and is_poor and not self.was_all_right

    @property
    def can_train_longer(self) -> bool:
        """Whether a run of epochs that should be better was still improving."""
        return self.should_be_better and self.is_still_improving and not self.has_max_steps

    def describe_unlearned(self) -> str:
        """Name a field that is answered by a constant although rows have enough other values."""
        constant = next(filter(has_other_rows, self.constants), None)
        if constant is None:
            return ""
        return f"; {shorten_name(constant.field) or 'the answer'} is not learned yet"

    def format_training(self, flags: str, suffix: str) -> str:
        """Return the command that trains the same recipe with other settings."""
        output_dir = quote(f"{self.run}-{suffix}")
        return f"tunesmith train {self.recipe} {flags} --output-dir {output_dir}"


def is_test_task(task: str) -> bool:
    """Return whether scores are of test rows: not of general text, nor of eval_data, which are
    compared where test_data is none."""
    return task != GENERAL_TASK and task.partition(":")[0] != EVAL_TASK


def list_next_steps(record: RunRecord, run: Path, verdict: VerdictName) -> tuple[NextStep, ...]:
    facts = RunFacts(record, run, verdict)
    steps: list[NextStep] = []
    for suggest_step in STEPS:
        step = suggest_step(facts)
        if step is not None and step.command not in [other.command for other in steps]:
            steps.append(step)
    return tuple(steps[:MAX_STEPS])


def list_steps_of_unfinished(run: Path) -> tuple[NextStep, ...]:
    return (NextStep("finish the run", f"tunesmith resume {quote(str(run))}"),)


# ---------------------------------------------------------------- steps


def suggest_test_rows(facts: RunFacts) -> NextStep | None:
    """More test rows where there are too few to tell."""
    if facts.verdict != "not measured" or not facts.is_single_stage:
        return None
    count = facts.num_test_items
    reason = "hold out test rows: the recipe has none"
    if count:
        reason = f"hold out more test rows: {count} are too few to tell"
    folder = quote(f"{facts.run}-split")
    command = f"tunesmith data split {facts.recipe} --out {folder} --test-share 0.2"
    return NextStep(reason, command)


def suggest_advice(facts: RunFacts) -> NextStep | None:
    """The question before training, where the base model needed none."""
    if facts.verdict not in ("no effect", "harmful") or not facts.was_all_right:
        return None
    reason = "use the base model as it is, or measure whether training can help"
    return NextStep(reason, f"tunesmith advise {facts.recipe} --measure")


def suggest_grades(facts: RunFacts) -> NextStep | None:
    """A metric of right answers, where only their form or likelihood was measured."""
    errors = facts.record.errors
    metric = split_metric(errors.metric)[0] if errors else ""
    is_graded = metric not in ("", *FORM_METRICS) or facts.has_custom_metric
    is_formless = errors is not None and not errors.right  # and so none is right
    can_grade = facts.num_test_items and facts.has_expected_answers
    if is_graded or is_formless or not can_grade:
        return None
    reason = "grade the answers: whether they are right was not measured"
    run = quote(str(facts.run))
    return NextStep(reason, f"tunesmith eval {run} --metrics {GRADING_METRIC}")


def suggest_balance(facts: RunFacts) -> NextStep | None:
    """Rows with other values for a field that is or may be a constant, where rows have few.

    Few by the limit of `data check`, so that the command shows them. Where rows have enough, the
    field is not learned yet: see suggest_smaller_batch and suggest_epochs."""
    candidates = [*facts.constants, *facts.suspects]
    constant = next((each for each in candidates if not has_other_rows(each)), None)
    if constant is None or not facts.is_single_stage:
        return None
    name = shorten_name(constant.field) or "the answer"
    value = shorten_name(constant.value) or "empty"
    if constant.training_rows is None or constant.total_rows is None:
        reason = f"{name} is nearly always {value}: count its values in the training rows"
    else:
        share = f"{constant.training_rows:,} of {constant.total_rows:,}"
        reason = f"add training rows where {name} is not {value}: {share} now"
    return NextStep(reason, f"tunesmith data check {facts.recipe}")


def has_other_rows(constant: Shortcut) -> bool:
    """Return whether enough training rows have another value than the constant."""
    if constant.training_rows is None or not constant.total_rows:
        return False
    return constant.training_rows / constant.total_rows >= 1 - LOPSIDED_SHARE


def suggest_scale(facts: RunFacts) -> NextStep | None:
    """A smaller scale of the adapter where general text lost more than the limit."""
    if not facts.has_forgotten:
        return None
    commands = build_commands(facts.record.scales, str(facts.run))
    if not commands:
        return None
    reason = f"on eval_data, {describe_recommendation(facts.record.scales)}"
    if facts.relative_forgetting_at_scale > 1:
        reason += f", still {facts.relative_forgetting_at_scale:.1f} times the limit"
    return NextStep(f"{reason}: verify it", commands[0])


def suggest_gentler_rate(facts: RunFacts) -> NextStep | None:
    """Half the learning rate where general text lost more than the limit, at a better scale too."""
    is_mended = suggest_scale(facts) is not None and facts.relative_forgetting_at_scale <= 1
    if not facts.has_forgotten or is_mended or not facts.is_single_stage:
        return None
    rate = facts.record.plan.config.learning_rate / 2
    command = facts.format_training(f"--learning-rate {rate:g}", "half-rate")
    return NextStep(f"forget less: train with half the learning rate, {rate:g}", command)


def suggest_smaller_batch(facts: RunFacts) -> NextStep | None:
    """Half the batch where a run had few steps: the same rows make twice as many.

    On the demo it is worth more than its time; docs/guides/first-run.md has the numbers."""
    batch_size = facts.record.plan.config.batch_size or 0
    if not facts.can_train_longer or facts.record.steps >= MIN_STEPS or batch_size < 2:
        return None
    reason = (
        f"halve the batch: {facts.record.steps} steps are few, and eval_data was best at the last"
        f"{facts.describe_unlearned()}"
    )
    half = batch_size // 2
    return NextStep(reason, facts.format_training(f"--batch-size {half}", f"batch-{half}"))


def suggest_epochs(facts: RunFacts) -> NextStep | None:
    """More epochs where eval_data was still best at the last step."""
    if not facts.can_train_longer:
        return None
    config = facts.record.plan.config
    reason = (
        f"train longer: eval_data was best at the last step, after {config.num_train_epochs:g} "
        f"epoch{'' if config.num_train_epochs == 1 else 's'}"
    )
    if suggest_smaller_batch(facts) is None:
        reason += facts.describe_unlearned()
    epochs = config.num_train_epochs * EPOCHS_FACTOR
    flags = f"--num-train-epochs {epochs:g}"
    return NextStep(reason, facts.format_training(flags, f"{epochs:g}-epochs"))


def suggest_max_steps(facts: RunFacts) -> NextStep | None:
    """More steps where max_steps ended a run that was still improving, or that had hardly begun."""
    if not facts.has_max_steps or not facts.should_be_better:
        return None
    steps = facts.record.steps
    had_little = facts.verdict == "no effect" and "eval_data" not in facts.record.plan.data
    if not facts.is_still_improving and not (had_little and steps < MIN_STEPS):
        return None
    reason = f"train longer: max_steps ended the run after {format_count(steps, 'step')}"
    if facts.is_still_improving:
        reason += f", and eval_data was best at the last{facts.describe_unlearned()}"
    flags = f"--max-steps {max(EPOCHS_FACTOR * steps, MIN_STEPS)}"
    if facts.record.plan.recipe.get("num_train_epochs") != "auto":
        flags += " --num-train-epochs auto"  # else they may end the run before
    return NextStep(reason, facts.format_training(flags, "longer"))


def suggest_learning_rate(facts: RunFacts) -> NextStep | None:
    """A test of learning rates where the answers are not good enough."""
    poor: tuple[VerdictName, ...] = ("useful, not ready", "no effect", "harmful")
    can_tune = "eval_data" in facts.record.plan.data and facts.record.plan.config.loss is None
    if facts.verdict not in poor or not can_tune or not facts.is_single_stage:
        return None
    if facts.verdict == "no effect" and facts.was_all_right:
        return None
    rate = facts.record.plan.config.learning_rate
    return NextStep(
        f"measure five learning rates around {rate:g}", f"tunesmith tune lr {facts.recipe}"
    )


def suggest_more_rows(facts: RunFacts) -> NextStep | None:
    """More test rows where those there are would miss even a large effect."""
    if facts.verdict != "no effect" or not facts.is_single_stage:
        return None
    errors = facts.record.errors
    tests = [each for each in facts.record.comparisons if is_test_task(each.task)]
    metric = errors.metric if errors else ""
    deciding = next((each for each in tests if each.metric == metric), None)
    if deciding is None or (deciding.min_detectable or 0.0) < LARGE_EFFECT:
        return None
    count = format_count(deciding.after.n, "test row")
    folder = quote(f"{facts.run}-split")
    return NextStep(
        f"hold out more test rows: {count} may miss an effect below {deciding.min_detectable:.2f}",
        f"tunesmith data split {facts.recipe} --out {folder} --test-share 0.2",
    )


def suggest_smaller_rate(facts: RunFacts) -> NextStep | None:
    """Half the learning rate where the run did harm."""
    if facts.verdict != "harmful" or not facts.is_single_stage:
        return None
    rate = facts.record.plan.config.learning_rate / 2
    command = facts.format_training(f"--learning-rate {rate:g}", "half-rate")
    return NextStep(f"train with half the learning rate, {rate:g}", command)


def suggest_export(facts: RunFacts) -> NextStep | None:
    if facts.verdict != "ready":
        return None
    return NextStep("export it", f"tunesmith export {quote(str(facts.run))} --to peft")


def suggest_second_seed(facts: RunFacts) -> NextStep | None:
    """Another seed where the verdict hangs on one."""
    if facts.verdict not in ("ready", "useful, not ready") or not facts.is_single_stage:
        return None
    seed = facts.record.plan.config.seed + 1
    command = facts.format_training(f"--seed {seed}", f"seed-{seed}")
    return NextStep("train with another seed: the intervals do not cover its effect", command)


def suggest_wrong_rows(facts: RunFacts) -> NextStep | None:
    """The wrong answers, where nothing else helps and there are any."""
    errors = facts.record.errors
    is_all_right = errors is not None and errors.right == errors.n
    if facts.verdict in ("ready", "not measured") or is_all_right:
        return None
    reason = "read the answers" if errors is None else "read the wrong answers"
    return NextStep(reason, f"tunesmith report {quote(str(facts.run))}")


def shorten_name(text: str) -> str:
    """Return a name of a stranger on one short line."""
    line = re.sub(r"\s+", " ", text)
    return line if len(line) <= MAX_NAME_CHARS else f"{line[: MAX_NAME_CHARS - 1]}…"


STEPS: tuple[Callable[[RunFacts], NextStep | None], ...] = (
    suggest_test_rows,
    suggest_advice,
    suggest_grades,
    suggest_smaller_rate,
    suggest_balance,
    suggest_smaller_batch,
    suggest_epochs,
    suggest_max_steps,
    suggest_scale,
    suggest_gentler_rate,
    suggest_more_rows,
    suggest_learning_rate,
    suggest_export,
    suggest_second_seed,
    suggest_wrong_rows,
)
