"""What to do after a run: up to three commands that follow from what was measured.

    list_next_steps(record, run, verdict_name) -> NextSteps

RULES yield what applies, the most useful first; the first MAX_STEPS are listed. A good run is left
alone: training again is advised where evaluations show more than their noise, with a forecast
(forecasts.py), and not where a run beside this one has tried it. In: a RunRecord, its folder, the
name of its verdict. Out: NextSteps. Left out: the verdict (run_verdict.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from shlex import quote

from tunesmith.core.errors import InputError
from tunesmith.core.events import EVAL_TASK, GENERAL_TASK
from tunesmith.core.evidence import ErrorAnalysis, NextStep, Shortcut, VerdictName
from tunesmith.core.formatting import format_count, format_ratio
from tunesmith.core.run_dir import (
    EVENTS_FILE,
    RECIPE_FILE,
    RESOLVED_FILE,
    is_staged,
    read_events,
    read_run_record,
)
from tunesmith.core.types import Comparison, PlanConfig, RunRecord
from tunesmith.data.answer_values import LOPSIDED_SHARE
from tunesmith.evaluate.forecasts import Forecast, Trend, find_trend, forecast_longer, make_forecast
from tunesmith.evaluate.metrics import BITS_PER_BYTE, FORM_METRICS, split_metric
from tunesmith.evaluate.scale_choice import build_commands, describe_recommendation, recommend_scale
from tunesmith.evaluate.statistics import MIN_ITEMS
from tunesmith.plan.build import MIN_STEPS, normalize
from tunesmith.plan.resolved import count_steps, describe_training, estimate_seconds
from tunesmith.recipe.fields import parse_custom_metric
from tunesmith.session.tried_runs import find_tried

MAX_STEPS = 3
FACTOR = 2  # of epochs or steps of a run that was still improving at its end
MAX_NAME_CHARS = 60
LARGE_EFFECT = 0.2  # of right answers: test rows that may miss it are too few
LR_TRIALS = 5
LR_STEPS = 40  # of `tune lr`


@dataclass(frozen=True)
class Facts:
    """A finished run as the rules see it."""

    record: RunRecord
    run: Path
    verdict: VerdictName
    trend: Trend | None  # on eval_data, during the run

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
    def has_eval_data(self) -> bool:
        return "eval_data" in self.record.plan.data

    @property
    def general(self) -> Comparison | None:
        """General text, if it got worse, and may have lost more than the limit."""
        for each in self.record.comparisons:
            is_worse = each.difference > 0 and each.high > self.config.forgetting_margin
            if (each.task, each.metric) == (GENERAL_TASK, BITS_PER_BYTE) and is_worse:
                return each if each.after.n >= MIN_ITEMS else None
        return None

    @property
    def deciding(self) -> Comparison | None:
        """The comparison on test rows that decides the verdict."""
        metric = self.errors.metric if self.errors else ""
        of_metric = [each for each in self.tests if each.metric == metric]
        return next(iter(of_metric or self.tests), None)

    @property
    def max_steps(self) -> int | None:
        """The recipe's, if they ended the run and not the epochs."""
        max_steps = self.record.plan.recipe.get("max_steps")
        return max_steps if isinstance(max_steps, int) and self.record.steps >= max_steps else None

    @property
    def was_ended(self) -> bool:
        """Whether the guard ended training."""
        return bool(self.record.rollbacks) and self.record.rollbacks[-1].is_end

    @property
    def wrong(self) -> int | None:
        """How many answers are wrong; None if only their form is known."""
        errors = self.errors
        if errors is None or split_metric(errors.metric)[0] in FORM_METRICS:
            return None
        return errors.n - errors.right

    @property
    def was_all_right(self) -> bool:
        """Whether the model before training had nothing to learn from the test rows."""
        errors = self.errors if self.wrong is not None else None
        return errors is not None and errors.right_before == errors.n

    @property
    def is_at_ceiling(self) -> bool:
        """Whether so few answers are wrong that the test rows cannot show a gain."""
        return self.wrong is not None and self.wrong < MIN_ITEMS

    @property
    def should_be_better(self) -> bool:
        return self.verdict in ("useful, not ready", "no effect") and not self.is_at_ceiling

    def build_training(
        self, reason: str, key: str, value: float, suffix: str, forecast: Forecast
    ) -> NextStep:
        """Return the step that trains with one setting changed, or the result of a run that has
        tried it."""
        changes = {key: value}
        flag = f"--{key.replace('_', '-')} {normalize(value)}"
        if tried := find_tried(self.run, self.record.plan, changes):
            return self.describe_tried(flag, tried)
        output_dir = quote(f"{self.run}-{suffix}")
        command = f"tunesmith train {self.resolved} {flag} --output-dir {output_dir}"
        steps = count_steps(self.record.plan, changes)
        seconds = estimate_seconds(self.record, changes)
        text = f"{describe_training(steps, seconds)}; {forecast.text}"
        return NextStep(reason, command, *forecast[:3], steps, seconds, text)

    def describe_tried(self, flag: str, tried: Path) -> NextStep:
        reason = f"{flag} was tried in {tried}"
        now = self.deciding
        try:
            comparisons = read_run_record(tried).comparisons
        except InputError:  # unfinished, or damaged
            command = f"tunesmith report {quote(str(tried))}"
            return NextStep(f"{reason}, which has no result", command)
        for each in comparisons:
            if now and (each.task, each.metric) == (now.task, now.metric):
                values = f"{each.after.value:.3f}, {now.after.value:.3f} here"
                reason += f": {now.task} {now.metric} {values}"
        return NextStep(reason, f"tunesmith compare {self.folder} {quote(str(tried))}")

    def build_split(self, reason: str) -> NextStep:
        folder = quote(f"{self.run}-split")
        command = f"tunesmith data split {self.recipe} --out {folder} --test-share 0.2"
        return NextStep(f"hold out {reason}", command)


def list_next_steps(record: RunRecord, run: Path, verdict: VerdictName) -> tuple[NextStep, ...]:
    facts = Facts(record, run, verdict, None)
    if facts.deciding is not None and (run / EVENTS_FILE).is_file():
        facts = replace(facts, trend=find_trend(read_events(run), facts.deciding.metric))
    has_recipe = not is_staged(run) or (run / RECIPE_FILE).is_file()
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
    constants = facts.errors.shortcuts if facts.errors else ()
    constant = next((each for each in constants if not has_other_rows(each)), None)
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
    """Twice the steps where answers to eval_data still got better; else what is left to do."""
    now = facts.deciding
    trend = facts.trend
    steps = facts.record.steps
    if not facts.should_be_better or facts.was_ended or now is None:
        return
    is_best = facts.record.selected_step == steps
    if trend is not None and trend.is_improving and is_best:
        yield from build_longer(facts, now, trend.text)
    elif trend is not None and trend.is_worsening and not facts.max_steps:
        best = trend.best
        epochs = float(f"{facts.config.num_train_epochs * best.step / steps:.2g}")
        reason = f"add rows, or train less: {trend.text}, but {best.value:.3f} at step {best.step}"
        same = make_forecast(now, 0.0, "no better than now, in less time")
        yield facts.build_training(reason, "num_train_epochs", epochs, f"{epochs:g}-epochs", same)
    elif facts.max_steps and steps < MIN_STEPS and facts.verdict == "no effect":
        yield from build_longer(facts, now, f"{format_count(steps, 'step')} are few")
    elif trend is not None and not trend.is_improving and facts.verdict == "useful, not ready":
        reason = f"no gain from training longer is shown: {trend.text}, within the noise"
        reason += f" of {trend.end.n} rows, {trend.noise:.3f}; read the wrong answers, and add rows"
        yield NextStep(reason, f"tunesmith report {facts.folder}")


def build_longer(facts: Facts, now: Comparison, evidence: str) -> Iterator[NextStep]:
    """Half the batch makes twice as many steps of the same rows."""
    forecast = forecast_longer(now, facts.trend)
    if facts.max_steps:
        steps = max(FACTOR * facts.max_steps, MIN_STEPS)
        reason = f"train longer: max_steps ended the run, and {evidence}"
        yield facts.build_training(reason, "max_steps", steps, "longer", forecast)
        return
    half = (facts.config.batch_size or 0) // FACTOR
    if facts.record.steps < MIN_STEPS and half:
        reason = f"halve the batch: {facts.record.steps} steps are few, and {evidence}"
        yield facts.build_training(reason, "batch_size", half, f"batch-{half}", forecast)
    epochs = FACTOR * facts.config.num_train_epochs
    reason = f"train longer: {evidence}"
    yield facts.build_training(reason, "num_train_epochs", epochs, f"{epochs:g}-epochs", forecast)


def suggest_half_rate(facts: Facts) -> Iterator[NextStep]:
    was_ended = facts.was_ended and facts.verdict != "ready"
    if facts.deciding is not None and (was_ended or facts.verdict == "harmful"):
        forecast = make_forecast(facts.deciding, inf, "this run does not show how much better")
        yield build_half_rate(facts, "let training end: " if was_ended else "", forecast)


def suggest_forgetting_less(facts: Facts) -> Iterator[NextStep]:
    """A smaller scale of the adapter; half the rate only where no answers are to get better."""
    if facts.general is None:
        return
    scales = facts.record.scales
    limit = facts.config.forgetting_margin
    best = recommend_scale(scales)
    times = best.general_lost.value / limit if best and best.general_lost and limit else 0.0
    commands = build_commands(scales, str(facts.run))
    if commands:
        still = f", still {format_ratio(times)} the limit" if times > 1 else ""
        reason = f"on eval_data, {describe_recommendation(scales)}{still}: verify it"
        yield NextStep(reason, commands[0])
    is_lost = facts.general.low > limit and not facts.should_be_better
    if is_lost and (not commands or times > 1):
        reason = "from what is forgotten now to nothing; answers may get worse"
        forecast = make_forecast(facts.general, facts.general.difference, reason)
        yield build_half_rate(facts, "forget less: ", forecast)


def build_half_rate(facts: Facts, aim: str, forecast: Forecast) -> NextStep:
    rate = float(f"{facts.config.learning_rate / 2:g}")
    reason = f"{aim}train with half the learning rate, {rate:g}"
    return facts.build_training(reason, "learning_rate", rate, "half-rate", forecast)


def suggest_tests(facts: Facts) -> Iterator[NextStep]:
    """More test rows where they cannot show a gain, or may miss one; a test of learning rates."""
    now = facts.deciding
    record = facts.record
    if now and facts.is_at_ceiling and not facts.was_all_right and facts.verdict != "ready":
        wrong = f"{facts.wrong} of {now.after.n} answers are wrong"
        yield facts.build_split(f"more test rows: {wrong}, and a gain shows from {MIN_ITEMS} on")
    elif now and facts.verdict == "no effect" and (now.min_detectable or 0) >= LARGE_EFFECT:
        count = format_count(now.after.n, "test row")
        limit = f"{now.min_detectable:.2f}"
        yield facts.build_split(f"more test rows: {count} may miss an effect below {limit}")
    is_poor = facts.should_be_better or facts.verdict == "harmful"
    if is_poor and facts.has_eval_data and facts.config.loss is None:
        steps = LR_TRIALS * min(LR_STEPS, record.plan.steps)
        seconds = steps * record.train_seconds / max(1, record.steps)
        reason = f"measure {LR_TRIALS} learning rates around {facts.config.learning_rate:g}"
        command = f"tunesmith tune lr {facts.resolved}"
        text = f"{describe_training(steps, seconds)}; this model stays as it is"
        yield NextStep(reason, command, steps=steps, seconds=seconds, forecast=text)


def suggest_use(facts: Facts) -> Iterator[NextStep]:
    """Export what is ready, read what is wrong, and train what hangs on one seed again."""
    if facts.verdict == "ready":
        yield NextStep("export it", f"tunesmith export {facts.folder} --to peft")
    if facts.verdict not in ("ready", "not measured") and facts.wrong != 0:
        reason = "read the answers" if facts.errors is None else "read the wrong answers"
        if not facts.has_eval_data and not facts.is_at_ceiling:
            reason += "; without eval_data (or eval_split: 0.1) it is not known whether longer "
            reason += "training would help, or a smaller scale of the adapter would forget less"
        yield NextStep(reason, f"tunesmith report {facts.folder}")
    has_same_rows = not facts.record.plan.recipe.get("eval_split")  # which a seed would change
    if facts.verdict in ("ready", "useful, not ready") and facts.deciding and has_same_rows:
        seed = facts.config.seed + 1
        reason = "train with another seed: the intervals do not cover its effect"
        forecast = make_forecast(facts.deciding, 0.0, "no better than now")
        yield facts.build_training(reason, "seed", seed, f"seed-{seed}", forecast)


RULES: tuple[Callable[[Facts], Iterator[NextStep]], ...] = (
    suggest_measuring,
    suggest_half_rate,
    suggest_rows,
    suggest_longer_training,
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
    return (constant.training_rows or 0) / (constant.total_rows or 1) >= 1 - LOPSIDED_SHARE


def shorten_name(text: str) -> str:
    """Return a name of a stranger on one short line."""
    line = re.sub(r"\s+", " ", text)
    return line if len(line) <= MAX_NAME_CHARS else f"{line[: MAX_NAME_CHARS - 1]}…"
