"""Say whether the model of a run may be used: one of five verdicts, the level first, with its cost.

    judge_run(record, run) -> RunVerdict

    not measured        no test rows, or too few to show anything: fewer than MIN_ITEMS, or so few
                        that are right or wrong that not even all of them fixed would show it
    harmful             answers got worse, those to one task too if the mean of the tasks did not
                        get better; or general text lost more than the limit for no gain, or more
                        than "harmful: times the limit" in any case
    no effect           no significant difference in the deciding metric, of no task either, nor in
                        another grade of the content, unless by a constant answer; or of labels
                        no more than the form is shown to be learned (goals.py)
    useful, not ready   better, but something speaks against using it: see `reasons`
    ready               better, above every floor (floors.py), right often enough, within the
                        limit, no constant, nothing worse

What was not measured is not within the limit: with retention_data: none a run is never ready,
unless the recipe says that forgetting does not matter, `guard: {forgetting: off}`.

"Right often enough" is VERDICT_LIMITS, or the recipe's `gates` if they name the deciding metric.
The deciding metric is that of the kind of run (goals.py), else of the error analysis, else a
likelihood of the test rows. All numbers are in VERDICT_LIMITS. In: a RunRecord. Out: RunVerdict.
Left out: next steps (next_steps.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from tunesmith.core.events import GENERAL_TASK, TrainStep
from tunesmith.core.evidence import ErrorAnalysis, RunVerdict, VerdictName
from tunesmith.core.formatting import format_count, format_ratio
from tunesmith.core.run_dir import (
    RECORD_FILE,
    STAGES_DIR,
    is_staged,
    read_events,
    read_failure,
    read_run_plan,
    read_run_record,
    require_run,
)
from tunesmith.core.types import Comparison, Plan, RunRecord
from tunesmith.evaluate.custom_metric import format_metric_name
from tunesmith.evaluate.goals import (
    MEAN_OF_TASKS,
    JudgedComparison,
    describe_choices,
    describe_likelihood,
    drop_held_out,
    find_form_alone,
    is_decided_by_likelihood,
    list_likelihood_problems,
    select_deciding,
)
from tunesmith.evaluate.metrics import BITS_PER_BYTE, FORM_METRICS, METRICS, split_metric
from tunesmith.evaluate.next_steps import is_test_task, list_next_steps, list_steps_of_unfinished
from tunesmith.evaluate.statistics import (
    ALPHA,
    MIN_ITEMS,
    NO_DIFFERENCE,
    TOO_FEW_ITEMS,
    compute_mcnemar_p,
    compute_p_value,
    compute_wilson_interval,
    format_p,
    judge_comparisons,
)
from tunesmith.plan.guard import OFF
from tunesmith.plan.stages import read_staged_plan
from tunesmith.recipe.metric_limits import MetricLimit, parse_limits

VERDICT_LIMITS: dict[str, float] = {
    # share of right answers, and the lower end of its 95% CI
    "ready: right answers": 0.90,
    "ready: lower end": 0.80,
    # general text lost, in limits of the plan, with the whole interval
    "harmful: times the limit": 10.0,
    # the upper end of the interval of what general text lost, in limits of the plan
    "ready: times the limit": 1.0,
    # share of the test rows that are known to repeat training rows, in full or nearly
    "ready: repeated test rows": 0.1,
}
MAX_REASONS = 6
MAX_WRONG_GROUPS = 3
MAX_UNBEATEN = 2
MIN_TRUNCATED_SHARE = 0.1  # of the answers, to be a reason
FORGETTING_UNKNOWN = (
    "forgetting was not measured (retention_data: none): use built-in, or guard: {forgetting: off} "
    "if it does not matter"
)
RIGHT_WORDS = {
    "accuracy": "the right label",
    "exact_match": "exactly right",
    "normalized_match": "right up to case and punctuation",
    "numeric": "the right number",
    "multiple_choice": "the right choice",
    "field_f1": "right in every field",
    "contains": "right: they contain the expected text",
    "regex": "right: they match the pattern",
    "schema_valid": "valid by the schema; whether they are right was not measured",
    "json_valid": "valid JSON; whether they are right was not measured",
}
REPEAT_CHECKS = ("leaks", "near_leaks", "ngram_overlap")  # of test rows with training rows


def judge_run(record: RunRecord, run: Path) -> RunVerdict:
    """Return the verdict on a finished run; `run` is the folder that commands name."""
    judged = _judge_all(record.comparisons)
    tests = drop_held_out([pair for pair in judged if is_test_task(pair[0].task)])
    deciding = select_deciding(tests, record.errors, record.plan)
    if is_decided_by_likelihood(deciding, record.plan):  # not by answers
        record = dataclasses.replace(record, errors=None)
    reasons = _list_reasons(record, judged, deciding)
    outcomes = _list_outcomes(tests, deciding)
    if _has_side_gain(record, tests, deciding):
        outcomes |= {"better"}
    name = _choose_name(judged, outcomes, reasons, record.plan)
    form_alone = find_form_alone(record.errors, tests)
    if form_alone and name in ("ready", "useful, not ready"):
        name = "no effect"
        reasons.insert(0, form_alone)
    return RunVerdict(
        name=name,
        level=describe_level(record.errors, deciding) + describe_choices(tests),
        change=_describe_change(record.errors, deciding),
        cost=describe_cost(record.comparisons, record.plan),
        reasons=() if name == "ready" else tuple(reasons[:MAX_REASONS]),
        next_steps=list_next_steps(record, run, name),
    )


def describe_end(record: RunRecord) -> str:
    """Return why and where the guard ended training; empty if it did not."""
    if not record.rollbacks or not record.rollbacks[-1].is_end:
        return ""
    end = record.rollbacks[-1]
    return (
        f"the guard ended training at step {end.step} of {record.plan.steps} "
        f"({end.kind}: {end.evidence}); what is measured is step {end.to}"
    )


def is_collapsed(record: RunRecord) -> bool:
    """Return whether the guard ended training and nothing that it kept is better than the start."""
    has_worse = record.verdict is not None and record.verdict.name in ("no effect", "harmful")
    return bool(describe_end(record)) and (has_worse or record.selected_step == 0)


def renew_verdict(record: RunRecord, run: Path) -> RunVerdict:
    """Return the verdict of a record, with the next steps of today: one may have been tried."""
    if record.verdict is None:
        return judge_run(record, run)
    next_steps = list_next_steps(record, run, record.verdict.name)
    return dataclasses.replace(record.verdict, next_steps=next_steps)


def read_verdict(run: Path) -> RunVerdict:
    """Return the verdict on a run folder; that of its record, if there is one.

    Raises InputError for a folder that is no run, and for a damaged file."""
    require_run(run)
    if (run / RECORD_FILE).is_file():
        return renew_verdict(read_run_record(run), run)
    stages = {run: read_run_plan(run)} if not is_staged(run) else {}
    if is_staged(run):
        for plan in read_staged_plan(run).plans:
            stages[run / STAGES_DIR / Path(plan.config.output_dir).name] = plan
    steps = 0
    for folder in stages:
        trained = [event.step for event in read_events(folder) if isinstance(event, TrainStep)]
        steps += max(trained, default=0)
    failure = next(filter(None, map(read_failure, stages)), "")
    return judge_unfinished(run, steps, sum(plan.steps for plan in stages.values()), failure)


def judge_unfinished(run: Path, steps: int, planned_steps: int, failure: str) -> RunVerdict:
    """Return the verdict on a run that is in progress, interrupted or stopped by a check."""
    level = f"{steps:,} of {planned_steps:,} steps are done; nothing is measured after training yet"
    reasons = (failure.splitlines()[0],) if failure else ()
    steps_to_go = () if failure else list_steps_of_unfinished(run)
    return RunVerdict("not measured", level, reasons=reasons, next_steps=steps_to_go)


# ---------------------------------------------------------------- rules


def _judge_all(comparisons: Sequence[Comparison]) -> list[JudgedComparison]:
    """Return the comparisons with their verdicts. Of right and wrong items there are too few if
    not even all of them, fixed, would be significant: five have p = 0.06, before any correction."""
    judged: list[JudgedComparison] = []
    for comparison, verdict in zip(comparisons, judge_comparisons(comparisons), strict=True):
        n = comparison.after.independent
        can_show = len(comparisons) * compute_mcnemar_p(n, 0) < ALPHA
        is_too_small = comparison.p_value is not None and not can_show
        is_shown = verdict in ("better", "worse")
        judged.append((comparison, TOO_FEW_ITEMS if is_too_small and not is_shown else verdict))
    return judged


def _list_outcomes(
    tests: Sequence[JudgedComparison], deciding: Sequence[JudgedComparison]
) -> set[str]:
    """Return the outcomes that decide: of the mean of the tasks, or of the tasks if their mean
    shows no difference, since gains in one may hide losses in another."""
    outcomes = {verdict for _, verdict in deciding}
    if not deciding or outcomes & {"better", "worse"}:
        return outcomes
    metric = deciding[0][0].metric
    of_tasks = {verdict for comparison, verdict in tests if comparison.metric == metric}
    # what got better does not make up for what got worse
    return of_tasks - {"better"} if "worse" in of_tasks else of_tasks


def _has_side_gain(
    record: RunRecord, tests: Sequence[JudgedComparison], deciding: Sequence[JudgedComparison]
) -> bool:
    """Return whether another grade of the content got better where the deciding metric did not.

    Of a constant answer it proves nothing: an object with the most frequent values has some of its
    fields right."""
    if any(verdict in ("better", "worse", TOO_FEW_ITEMS) for _, verdict in deciding):
        return False
    if record.errors is None or record.errors.shortcuts:
        return False
    content = [pair for pair in tests if split_metric(pair[0].metric)[0] not in FORM_METRICS]
    outcomes = {verdict for c, verdict in content if _is_grade(c.metric, record.plan)}
    return "better" in outcomes and "worse" not in outcomes


def _is_grade(metric: str, plan: Plan) -> bool:
    """Return whether a metric grades answers: one of METRICS, or of the recipe's, which may be
    custom."""
    of_recipe = map(format_metric_name, plan.config.metrics)
    return split_metric(metric)[0] in METRICS or metric in of_recipe


def _choose_name(
    judged: Sequence[JudgedComparison],
    outcomes: set[str],
    reasons: Sequence[str],
    plan: Plan,
) -> VerdictName:
    if outcomes <= {TOO_FEW_ITEMS}:
        return "not measured"
    has_gain = "better" in outcomes
    general = get_general(comparison for comparison, _ in judged)
    if general is not None and general.after.n >= MIN_ITEMS and plan.config.forgetting_margin:
        limits = general.low / plan.config.forgetting_margin
        if limits > VERDICT_LIMITS["harmful: times the limit"] or (limits > 1 and not has_gain):
            return "harmful"
    if "worse" in outcomes and not has_gain:
        return "harmful"
    if not has_gain:
        return "no effect"
    return "useful, not ready" if reasons else "ready"


def _list_reasons(
    record: RunRecord, judged: Sequence[JudgedComparison], deciding: Sequence[JudgedComparison]
) -> list[str]:
    """Return what speaks against using the model, the worst first."""
    errors = record.errors
    reasons = [end] if (end := describe_end(record)) else []
    if errors is not None:
        for shortcut in errors.shortcuts:
            reasons.append(f"constant: {shortcut.description}")
        reasons += _list_unbeaten(errors)
    for comparison, verdict in judged:
        if verdict == "worse" and comparison.task != GENERAL_TASK:
            values = f"{comparison.before.value:.3f} -> {comparison.after.value:.3f}"
            reasons.append(f"{comparison.task} {comparison.metric} got worse: {values}")
    limits = parse_limits(record.plan.recipe.get("gates") or {})
    reasons += _list_missed_gates(record.comparisons, limits)
    if is_decided_by_likelihood(deciding, record.plan):
        reasons += list_likelihood_problems(judged, deciding)
    elif not any(limit.is_limit_of(c.task, c.metric) for limit in limits for c, _ in deciding):
        level_problem = _find_level_problem(errors, deciding, record.plan)
        if level_problem:
            reasons += [level_problem, *_list_wrong_parts(errors, deciding)]
    reasons += _list_right_base(errors, deciding)
    reasons += _list_repeated_rows(record.plan)
    reasons += _list_side_gains(judged, deciding, record.plan)
    return [*reasons, *_list_forgetting(record)]


def _list_forgetting(record: RunRecord) -> list[str]:
    """Return what is wrong with general text: not measured, too few texts, or too much lost."""
    general = get_general(record.comparisons)
    margin = record.plan.config.forgetting_margin
    if general is None:
        return [FORGETTING_UNKNOWN] if record.plan.config.guard_forgetting != OFF else []
    if general.after.n < MIN_ITEMS:
        return [f"{general.after.n} general texts are too few to tell what was forgotten"]
    if general.high <= VERDICT_LIMITS["ready: times the limit"] * margin:
        return []
    may = "lost" if general.low > margin else "may have lost"
    return [f"general text {may} more than the limit of {margin:g} bits per byte"]


def _list_unbeaten(errors: ErrorAnalysis) -> list[str]:
    """Return the floors that the answers are not shown to be above, the highest first."""
    floors = sorted(errors.floors, key=lambda floor: -floor.value)
    unbeaten = [floor.description for floor in floors if not floor.is_beaten]
    return [f"not shown to beat {text}" for text in unbeaten[:MAX_UNBEATEN]]


def _list_repeated_rows(plan: Plan) -> list[str]:
    """Return what test rows share with training rows: answers to those show memory, not skill."""
    report = plan.data.get("test_data")
    max_rows = VERDICT_LIMITS["ready: repeated test rows"] * report.rows if report else 0
    return [
        f"test_data: {finding.message}"
        for finding in (report.findings if report else ())
        # at other levels the rows share a prompt or a passage, and no more
        if finding.check in REPEAT_CHECKS and finding.level == "error" and finding.count > max_rows
    ]


def _list_missed_gates(
    comparisons: Sequence[Comparison], limits: Sequence[MetricLimit]
) -> list[str]:
    reasons: list[str] = []
    for limit in limits:
        for comparison in comparisons:
            value = comparison.after.value
            if limit.is_limit_of(comparison.task, comparison.metric) and not limit.is_met_by(value):
                name = f"{comparison.task} {comparison.metric}"
                reasons.append(f"{name} is {value:.3f}; your gate is {limit}")
    return reasons


def _find_level_problem(
    errors: ErrorAnalysis | None, deciding: Sequence[JudgedComparison], plan: Plan
) -> str:
    """Return why the level is not that of a model which is ready; empty if it is."""
    if errors is None:
        if not deciding:
            return ""
        metric = deciding[0][0].metric
        if metric in map(format_metric_name, plan.config.metrics):
            return f"{metric} has no value above which an answer is right: set one in `gates`"
        return "no metric grades the answers"
    name = split_metric(errors.metric)[0]
    if name in FORM_METRICS:
        return f"{name} shows the form of the answers, not whether they are right"
    if not _can_be_right(errors):
        return f"{errors.metric} has no value above which an answer is right: set one in `gates`"
    has_groups = errors.is_binary and any(each.after.groups for each, _ in deciding)
    low = errors.low if has_groups else None
    return _find_share_problem(errors.right, errors.n, low)


def _find_share_problem(right: int, n: int, low: float | None = None) -> str:
    """Return why so many right answers are too few for a model that is ready; empty if not."""
    low = compute_wilson_interval(right, n)[0] if low is None else low
    share = right / n
    min_share = VERDICT_LIMITS["ready: right answers"]
    min_low = VERDICT_LIMITS["ready: lower end"]
    if share < min_share:
        return f"{share:.0%} of the answers are right; ready needs {min_share:.0%}"
    if low < min_low:
        return (
            f"with {n} answers, the true share may be as low as {low:.0%}; "
            f"ready needs {min_low:.0%}"
        )
    return ""


def _list_right_base(
    errors: ErrorAnalysis | None, deciding: Sequence[JudgedComparison]
) -> list[str]:
    """Return that the model was right often enough before training, which did not help then."""
    if errors is None or any(verdict == "better" for _, verdict in deciding):
        return []
    if split_metric(errors.metric)[0] in FORM_METRICS or not _can_be_right(errors):
        return []
    if errors.right_before is None or _find_share_problem(errors.right_before, errors.n):
        return []
    right = f"{errors.right_before} of {errors.n} answers were right before training"
    return [f"{right}: there was little to gain"]


def _list_wrong_parts(
    errors: ErrorAnalysis | None, deciding: Sequence[JudgedComparison]
) -> list[str]:
    """Return where answers are wrong: cut off, no objects, or in the fields that are wrong most
    often."""
    parts: list[str] = []
    truncated = sum(comparison.after.truncated for comparison, _ in deciding)
    n = sum(comparison.after.n for comparison, _ in deciding)
    if truncated and truncated >= MIN_TRUNCATED_SHARE * n:
        parts.append(f"{truncated} of {n} answers reach the limit of new tokens and are cut off")
    if errors is None:
        return parts
    for by in ("format", "field"):
        table = errors.get_table(by)
        groups = [group for group in table.groups if group.wrong] if table else []
        if groups and by == "format":
            parts.append(f"{groups[0].name}: {groups[0].wrong} of {groups[0].n} answers")
        elif groups:
            head = groups[0]
            more = [f"{group.name} in {group.wrong}" for group in groups[1:MAX_WRONG_GROUPS]]
            first = f"{head.name} in {head.wrong} of {head.n} answers"
            parts.append(f"wrong most often: {', '.join([first, *more])}")
    return parts


def _list_side_gains(
    judged: Sequence[JudgedComparison], deciding: Sequence[JudgedComparison], plan: Plan
) -> list[str]:
    """Return which grades of the answers got better although the deciding metric did not, such as
    their form."""
    if not deciding or any(verdict == "better" for _, verdict in deciding):
        return []
    gains: list[str] = []
    for comparison, verdict in judged:
        if verdict == "better" and _is_grade(comparison.metric, plan):
            values = f"{comparison.before.value:.3f} -> {comparison.after.value:.3f}"
            task = "" if comparison.task == "test" else f"{comparison.task} "
            gains.append(f"{task}{comparison.metric} {values}")
    if not gains:
        return []
    head = deciding[0][0]
    subject = "the mean of the tasks" if MEAN_OF_TASKS.search(head.task) else head.metric
    return [f"{subject} did not get better, only {', '.join(gains)}"]


def _can_be_right(errors: ErrorAnalysis) -> bool:
    """Return whether an answer is right or wrong by the metric, and not better or worse."""
    return errors.is_binary or split_metric(errors.metric)[0] in RIGHT_WORDS


# ---------------------------------------------------------------- words


def describe_level(errors: ErrorAnalysis | None, deciding: Sequence[JudgedComparison] = ()) -> str:
    """Return how many answers are right, and how many were before."""
    if errors is None:
        if not deciding:
            return "No answers to test rows were measured"
        return describe_likelihood(deciding[0][0])
    if not _can_be_right(errors):
        before = "" if errors.mean_before is None else f", {errors.mean_before:.2f} before"
        return f"Mean {errors.metric} {errors.mean:.2f} of {errors.n} answers{before}"
    name = split_metric(errors.metric)[0]
    words = RIGHT_WORDS.get(name, f"right by {errors.metric}")
    before = "" if errors.right_before is None else f", {errors.right_before} before"
    head, separator, note = words.partition(";")
    verb = "answer is" if errors.n == 1 else "answers are"
    return f"{errors.right} of {errors.n} {verb} {head}{before}{separator}{note}"


def _describe_change(errors: ErrorAnalysis | None, deciding: Sequence[JudgedComparison]) -> str:
    """Return how many answers were fixed and broken, or the difference, with its significance."""
    if not deciding:
        return ""
    comparison, verdict = deciding[0]
    evidence = f"{verdict}, {format_p(compute_p_value(comparison))}"
    if verdict in (TOO_FEW_ITEMS, NO_DIFFERENCE) or len(deciding) > 1:
        evidence = verdict
    if verdict == NO_DIFFERENCE and len(deciding) == 1 and comparison.min_detectable:
        rows = format_count(comparison.after.n, "row")
        evidence = f"{verdict}; {rows} can show one of {comparison.min_detectable:.2f}"
    is_mean = MEAN_OF_TASKS.search(comparison.task) is not None
    if errors is not None and _can_be_right(errors) and errors.fixed is not None:
        separator = "; mean of the tasks" if is_mean else ""
        return f"{errors.fixed} fixed, {errors.broken} broken{separator}: {evidence}"
    interval = f"[{comparison.low:+.3f}, {comparison.high:+.3f}]"
    return f"{comparison.metric} {comparison.difference:+.3f} {interval}: {evidence}"


def describe_cost(comparisons: Sequence[Comparison], plan: Plan) -> str:
    """Return what general text lost, in times of the plan's limit."""
    general = get_general(comparisons)
    if general is None:
        return "Forgetting is not measured: retention_data is none"
    margin = plan.config.forgetting_margin
    reason = plan.reasons.get("forgetting_margin")
    owner = "your limit" if reason is not None and reason.decided_by == "user" else "the limit"
    values = f"{general.before.value:.3f} -> {general.after.value:.3f} bits per byte"
    if general.difference <= 0:
        return f"General text did not get worse ({values})"
    loss = f"General text got {general.difference / general.before.value:.1%} worse ({values})"
    if not margin:
        return f"{loss}; {owner} is 0"
    return f"{loss}: {format_ratio(general.difference / margin)} {owner} of {margin:g}"


def get_general(comparisons: Iterable[Comparison]) -> Comparison | None:
    """Return the comparison of bits per byte on general text."""
    for comparison in comparisons:
        if (comparison.task, comparison.metric) == (GENERAL_TASK, BITS_PER_BYTE):
            return comparison
    return None
