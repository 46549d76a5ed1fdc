"""What to do after a run: up to three commands that follow from what was measured.

    list_next_steps(record, run, verdict_name) -> NextSteps

RULES yield what applies, the most useful first; the first MAX_STEPS are listed. In: a RunRecord,
its folder, the name of its verdict. Out: NextSteps. Left out: the verdict (run_verdict.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from tunesmith.core.events import EVAL_TASK, GENERAL_TASK
from tunesmith.core.evidence import ErrorAnalysis, NextStep, Shortcut, VerdictName
from tunesmith.core.formatting import format_count
from tunesmith.core.run_dir import RECIPE_FILE, RESOLVED_FILE, is_staged
from tunesmith.core.types import Comparison, PlanConfig, RunRecord
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
LARGE_EFFECT = 0.2  # of right answers: test rows that may miss it are too few


@dataclass(frozen=True)
class Facts:
    """A finished run as the rules see it."""

    record: RunRecord
    run: Path
    verdict: VerdictName

    @property
    def folder(self) -> str:
        return quote(str(self.run))

    @property
    def recipe(self) -> str:
        return quote(str(self.run / RECIPE_FILE))

    @property
    def resolved(self) -> str:
        """The recipe in which a step changes one value, and no other follows."""
        return quote(str(self.run / RESOLVED_FILE))

    @property
    def config(self) -> PlanConfig:
        return self.record.plan.config

    @property
    def errors(self) -> ErrorAnalysis | None:
        return self.record.errors

    @property
    def tests(self) -> list[Comparison]:
        return [each for each in self.record.comparisons if is_test_task(each.task)]

    @property
    def constants(self) -> list[Shortcut]:
        return [s for s in self.errors.shortcuts if s.kind == "constant"] if self.errors else []

    @property
    def has_eval_data(self) -> bool:
        return "eval_data" in self.record.plan.data

    @property
    def has_forgotten(self) -> bool:
        """Whether general text got worse, and may have lost more than the limit."""
        limit = self.config.forgetting_margin
        return any(
            each.after.n >= MIN_ITEMS and each.difference > 0 and each.high > limit
            for each in self.record.comparisons
            if (each.task, each.metric) == (GENERAL_TASK, BITS_PER_BYTE)
        )

    @property
    def has_max_steps(self) -> bool:
        """Whether max_steps ended the run, and not the epochs."""
        max_steps = self.record.plan.recipe.get("max_steps")
        return isinstance(max_steps, int) and self.record.steps >= max_steps

    @property
    def is_still_improving(self) -> bool:
        """Whether eval_data was best at the last step, which the guard did not end."""
        return (
            self.has_eval_data
            and not self.was_ended
            and self.record.selected_step == self.record.steps
        )

    @property
    def was_ended(self) -> bool:
        """Whether the guard ended training."""
        return bool(self.record.rollbacks) and self.record.rollbacks[-1].is_end

    @property
    def was_all_right(self) -> bool:
        """Whether the model before training had nothing to learn from the test rows."""
        errors = self.errors
        if errors is None or split_metric(errors.metric)[0] in FORM_METRICS:
            return False
        return errors.right_before == errors.n

    @property
    def should_be_better(self) -> bool:
        return self.verdict in ("useful, not ready", "no effect") and not self.was_all_right

    def describe_unlearned(self) -> str:
        """Name a field that is answered by a constant although rows have enough other values."""
        constant = next(filter(has_other_rows, self.constants), None)
        if constant is None:
            return ""
        return f"; {shorten_name(constant.field) or 'the answer'} is not learned yet"

    def build_training(self, reason: str, flags: str, suffix: str) -> NextStep:
        """Return the step that trains the same recipe with other settings."""
        output_dir = quote(f"{self.run}-{suffix}")
        return NextStep(
            reason, f"tunesmith train {self.resolved} {flags} --output-dir {output_dir}"
        )

    def build_split(self, reason: str) -> NextStep:
        folder = quote(f"{self.run}-split")
        command = f"tunesmith data split {self.recipe} --out {folder} --test-share 0.2"
        return NextStep(f"hold out {reason}", command)


def list_next_steps(record: RunRecord, run: Path, verdict: VerdictName) -> tuple[NextStep, ...]:
    facts = Facts(record, run, verdict)
    # A run of several stages has no recipe of its own to change.
    has_recipe = (run / RECIPE_FILE).is_file() or not is_staged(run)
    steps: dict[str, NextStep] = {}
    for rule in RULES:
        for step in rule(facts):
            names_recipe = facts.recipe in step.command or facts.resolved in step.command
            if has_recipe or not names_recipe:
                steps.setdefault(step.command, step)
    return tuple(steps.values())[:MAX_STEPS]


def list_steps_of_unfinished(run: Path) -> tuple[NextStep, ...]:
    return (NextStep("finish the run", f"tunesmith resume {quote(str(run))}"),)


# ---------------------------------------------------------------- rules


def suggest_measuring(facts: Facts) -> Iterator[NextStep]:
    if facts.verdict == "not measured":
        count = max((each.after.n for each in facts.tests), default=0)
        reason = f"more test rows: {count} are too few to tell"
        yield facts.build_split(reason if count else "test rows: the recipe has none")
    if facts.verdict in ("no effect", "harmful") and facts.was_all_right:
        reason = "use the base model as it is, or measure whether training can help"
        yield NextStep(reason, f"tunesmith advise {facts.recipe} --measure")
    if is_ungraded(facts):
        reason = "grade the answers: whether they are right was not measured"
        yield NextStep(reason, f"tunesmith eval {facts.folder} --metrics exact_match")


def suggest_rows(facts: Facts) -> Iterator[NextStep]:
    """More rows with other values than a constant, where rows have few: few by the limit of `data
    check`, so that the command shows them. Where rows have enough, it is not learned yet."""
    suspects = facts.errors.suspects if facts.errors else ()
    candidates = (*facts.constants, *suspects)
    constant = next((each for each in candidates if not has_other_rows(each)), None)
    if constant is None:
        return
    name = shorten_name(constant.field) or "the answer"
    value = shorten_name(constant.value) or "empty"
    if constant.training_rows is None or constant.total_rows is None:
        reason = f"{name} is nearly always {value}: count its values in the training rows"
    else:
        share = f"{constant.training_rows:,} of {constant.total_rows:,}"
        reason = f"add training rows where {name} is not {value}: {share} now"
    yield NextStep(reason, f"tunesmith data check {facts.recipe}")


def suggest_longer_training(facts: Facts) -> Iterator[NextStep]:
    """Half the batch makes twice as many steps of the same rows. On the demo it is worth more than
    its time; docs/guides/first-run.md has the numbers."""
    if not facts.should_be_better or not facts.is_still_improving or facts.has_max_steps:
        return
    unlearned = facts.describe_unlearned()
    half = (facts.config.batch_size or 0) // 2
    if facts.record.steps < MIN_STEPS and half:
        steps = f"{facts.record.steps} steps are few"
        reason = f"halve the batch: {steps}, and eval_data was best at the last{unlearned}"
        yield facts.build_training(reason, f"--batch-size {half}", f"batch-{half}")
        unlearned = ""
    epochs = facts.config.num_train_epochs
    count = f"{epochs:g} epoch{'' if epochs == 1 else 's'}"
    reason = f"train longer: eval_data was best at the last step, after {count}{unlearned}"
    more = f"{epochs * EPOCHS_FACTOR:g}"
    yield facts.build_training(reason, f"--num-train-epochs {more}", f"{more}-epochs")


def suggest_max_steps(facts: Facts) -> Iterator[NextStep]:
    """More steps where max_steps ended a run that was still improving, or that had hardly begun."""
    if not facts.has_max_steps or not facts.should_be_better:
        return
    steps = facts.record.steps
    is_unknown = facts.verdict == "no effect" and not facts.has_eval_data
    if not facts.is_still_improving and not (is_unknown and steps < MIN_STEPS):
        return
    reason = f"train longer: max_steps ended the run after {format_count(steps, 'step')}"
    if facts.is_still_improving:
        reason += f", and eval_data was best at the last{facts.describe_unlearned()}"
    flags = f"--max-steps {max(EPOCHS_FACTOR * steps, MIN_STEPS)}"
    if facts.record.plan.recipe.get("num_train_epochs") != "auto":
        flags += " --num-train-epochs auto"  # else they may end the run before
    yield facts.build_training(reason, flags, "longer")


def suggest_half_rate(facts: Facts) -> Iterator[NextStep]:
    if facts.was_ended:
        yield build_half_rate(facts, "let training end: ")
    elif facts.verdict == "harmful":
        yield build_half_rate(facts, "")


def suggest_forgetting_less(facts: Facts) -> Iterator[NextStep]:
    """A smaller scale of the adapter, and half the learning rate if that is not within the
    limit."""
    if not facts.has_forgotten:
        return
    scales = facts.record.scales
    best = recommend_scale(scales)
    limit = facts.config.forgetting_margin
    times = 0.0
    if best is not None and best.general_lost is not None and limit:
        times = best.general_lost.value / limit
    commands = build_commands(scales, str(facts.run))
    if commands:
        still = f", still {times:.1f} times the limit" if times > 1 else ""
        reason = f"on eval_data, {describe_recommendation(scales)}{still}: verify it"
        yield NextStep(reason, commands[0])
    if not commands or times > 1:
        yield build_half_rate(facts, "forget less: ")


def build_half_rate(facts: Facts, aim: str) -> NextStep:
    rate = f"{facts.config.learning_rate / 2:g}"
    reason = f"{aim}train with half the learning rate, {rate}"
    return facts.build_training(reason, f"--learning-rate {rate}", "half-rate")


def suggest_tests(facts: Facts) -> Iterator[NextStep]:
    """More test rows where a large effect may be missed, and a test of learning rates."""
    metric = facts.errors.metric if facts.errors else ""
    deciding = next((each for each in facts.tests if each.metric == metric), None)
    detectable = (deciding.min_detectable if deciding else None) or 0.0
    if facts.verdict == "no effect" and deciding is not None and detectable >= LARGE_EFFECT:
        count = format_count(deciding.after.n, "test row")
        yield facts.build_split(
            f"more test rows: {count} may miss an effect below {detectable:.2f}"
        )
    is_poor = facts.should_be_better or facts.verdict in ("useful, not ready", "harmful")
    if is_poor and facts.has_eval_data and facts.config.loss is None:
        rate = facts.config.learning_rate
        reason = f"measure five learning rates around {rate:g}"
        yield NextStep(reason, f"tunesmith tune lr {facts.resolved}")


def suggest_use(facts: Facts) -> Iterator[NextStep]:
    """Export what is ready, train what hangs on one seed again, and read what is wrong."""
    if facts.verdict == "ready":
        yield NextStep("export it", f"tunesmith export {facts.folder} --to peft")
    if facts.verdict in ("ready", "useful, not ready"):
        seed = facts.config.seed + 1
        reason = "train with another seed: the intervals do not cover its effect"
        yield facts.build_training(reason, f"--seed {seed}", f"seed-{seed}")
    is_all_right = facts.errors is not None and facts.errors.right == facts.errors.n
    if facts.verdict not in ("ready", "not measured") and not is_all_right:
        reason = "read the answers" if facts.errors is None else "read the wrong answers"
        yield NextStep(reason, f"tunesmith report {facts.folder}")


RULES: tuple[Callable[[Facts], Iterator[NextStep]], ...] = (
    suggest_measuring,
    suggest_half_rate,
    suggest_rows,
    suggest_longer_training,
    suggest_max_steps,
    suggest_forgetting_less,
    suggest_tests,
    suggest_use,
)


# ---------------------------------------------------------------- facts


def is_test_task(task: str) -> bool:
    """Return whether scores are of test rows: not of general text, nor of eval_data, which are
    compared where test_data is none."""
    return task != GENERAL_TASK and task.partition(":")[0] != EVAL_TASK


def is_ungraded(facts: Facts) -> bool:
    """Return whether only the form or likelihood of answers was measured.

    Plain text has no expected answers; of preference rows and KTO's another metric decides."""
    errors = facts.errors
    metric = split_metric(errors.metric)[0] if errors else ""
    has_custom_metric = any(map(parse_custom_metric, facts.config.metrics))
    is_formless = errors is not None and not errors.right  # and so none is right
    if metric not in ("", *FORM_METRICS) or has_custom_metric or is_formless:
        return False
    test_data = facts.record.plan.data.get("test_data")
    if test_data is None or not facts.tests or facts.config.stage != "sft":
        return False
    return "text" not in test_data.format.split(", ")


def has_other_rows(constant: Shortcut) -> bool:
    """Return whether enough training rows have another value than the constant."""
    if constant.training_rows is None or not constant.total_rows:
        return False
    return constant.training_rows / constant.total_rows >= 1 - LOPSIDED_SHARE


def shorten_name(text: str) -> str:
    """Return a name of a stranger on one short line."""
    line = re.sub(r"\s+", " ", text)
    return line if len(line) <= MAX_NAME_CHARS else f"{line[: MAX_NAME_CHARS - 1]}…"
