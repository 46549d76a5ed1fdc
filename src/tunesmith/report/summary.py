"""The verdict: what changed, is it real, what it cost. It comes first, and says no more than the
intervals do.

In: a Story. Out: a headline, one sentence, and three lists. A measure is better or worse by the
same rule as in the terminal (significance.py): what would not be shown as one of several claims is
marked, and does not count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.core.atomic import format_bytes
from tunesmith.core.events import GENERAL_TASK
from tunesmith.core.formatting import format_duration
from tunesmith.core.types import Comparison, RunRecord
from tunesmith.evaluate.scale_choice import describe_bargain
from tunesmith.evaluate.significance import NO_DIFFERENCE, describe_evidence, judge_comparisons
from tunesmith.report.html import Content, Html, make_tag, quote_text
from tunesmith.report.run_data import ReportData

Outcome = Literal["better", "worse", "doubtful", "same"]
OUTCOMES: dict[str, Outcome] = {"better": "better", "worse": "worse", NO_DIFFERENCE: "same"}
MAX_CAUTIONS = 8
UNITS = {"bits_per_byte": "bits per byte", "loss": "nats per token"}


@dataclass(frozen=True)
class Summary:
    """`tone` colours it: good | bad | mixed | open."""

    tone: str
    headline: str
    sentence: str


@dataclass(frozen=True)
class Claim:
    """A comparison and what may be concluded. `words`: the verdict; `behind`: what stands behind
    it, in a few words."""

    comparison: Comparison
    outcome: Outcome
    verdict: str
    evidence: str


def build_claims(record: RunRecord) -> tuple[Claim, ...]:
    judged = zip(record.comparisons, judge_comparisons(record.comparisons), strict=True)
    return tuple(
        Claim(comparison, OUTCOMES.get(words, "doubtful"), words, describe_evidence(comparison))
        for comparison, words in judged
    )


def build_summary(story: ReportData) -> Summary:
    record = story.record
    if story.failure:
        failure_line = story.failure.splitlines()[0]
        return Summary(
            "bad",
            "A gate stopped this run",
            f"{failure_line} Nothing here may be used as a result.",
        )
    if record is None:
        done = f"{story.steps_done:,} of {story.steps_planned:,} steps are taken"
        return Summary("open", "Not finished", f"{done}: nothing is measured after training yet.")
    if not record.comparisons:
        reason = "The recipe names neither test_data nor retention_data, so nothing can be said of what training did."
        return Summary("open", "Trained, not measured", reason)
    task, is_graded = select_task_claims(record)
    general = [claim for claim in build_claims(record) if claim.comparison.task == GENERAL_TASK]
    outcomes = [claim.outcome for claim in task]
    heads = [*_describe_task(outcomes, is_graded=is_graded), *_describe_general(general)]
    sentences = [_count_outcomes(outcomes, is_graded=is_graded)]
    if cheaper := describe_bargain(record.scales):
        sentences.append(
            f"On the rows to choose by, {cheaper}; other measures were not taken there."
        )
    return Summary(
        _choose_tone(outcomes, [claim.outcome for claim in general]),
        " ".join(heads),
        " ".join(sentences),
    )


def select_task_claims(record: RunRecord) -> tuple[list[Claim], bool]:
    """What the headline goes by, and whether these are grades of answers: likelihoods speak only
    where nothing was graded."""
    task_claims = [claim for claim in build_claims(record) if claim.comparison.task != GENERAL_TASK]
    metrics = record.plan["metrics"] if "metrics" in record.plan.choices else ()
    graded = [
        claim
        for claim in task_claims
        if claim.comparison.metric in metrics
        or claim.comparison.metric.startswith(("breaks ", "says "))
    ]
    return graded or task_claims, bool(graded)


def _describe_task(outcomes: Sequence[str], *, is_graded: bool) -> Iterator[str]:
    if not outcomes:
        return
    if {"better", "worse"} <= set(outcomes):
        yield (
            "Answers are better by some measures, worse by others."
            if is_graded
            else "Better and worse on test rows."
        )
    elif "better" in outcomes:
        yield "The answers are better." if is_graded else "Test rows are predicted better."
    elif "worse" in outcomes:
        yield "The answers are worse." if is_graded else "Test rows are predicted worse."
    else:
        yield f"No difference shown {'in the answers' if is_graded else 'on test rows'}."


def _describe_general(general: Sequence[Claim]) -> Iterator[str]:
    """Of a loss that several claims together would not show, it is said that it may be one."""
    words = {"worse": "General text got worse.", "better": "General text got better."}
    for claim in general[:1]:
        is_doubtful_loss = claim.outcome == "doubtful" and claim.verdict.startswith("worse")
        yield (
            "General text may have got worse."
            if is_doubtful_loss
            else words.get(claim.outcome, "No change shown on general text.")
        )


def _choose_tone(outcomes: Sequence[str], general: Sequence[str]) -> str:
    if "worse" in outcomes:
        return "mixed" if "better" in outcomes else "bad"
    if "better" in outcomes:
        return "mixed" if "worse" in general else "good"
    return "bad" if "worse" in general else "open"


def _count_outcomes(outcomes: Sequence[str], *, is_graded: bool) -> str:
    if not outcomes:
        return "Only general text was measured: the recipe names no test_data."
    noun = "measure" if len(outcomes) == 1 else "measures"
    kind = "of the answers" if is_graded else "of how likely the test rows are"
    better, worse = outcomes.count("better"), outcomes.count("worse")
    same = len(outcomes) - better - worse
    if len(outcomes) > 1 and len(outcomes) in (better, worse):
        return f"All {len(outcomes)} measures {kind} are {outcomes[0]}."
    return f"Of {len(outcomes)} {noun} {kind}: {better} better, {worse} worse, {same} with no difference shown."


def render_summary(story: ReportData) -> Html:
    summary = build_summary(story)
    columns = [
        ("What changed", _render_changes(story)),
        ("Is it real?", _describe_evidence(story)),
        ("What it cost", _describe_costs(story)),
    ]
    lists = [
        make_tag(
            "div", make_tag("h2", title), make_tag("ul", [make_tag("li", item) for item in items])
        )
        for title, items in columns
        if items
    ]
    title = make_tag("h1", summary.headline, id="verdict-title")
    body = [
        make_tag("p", summary.sentence, class_="lead"),
        make_tag("div", lists, class_="columns"),
        _render_cautions(story),
    ]
    return make_tag(
        "section", title, body, id="verdict", class_=summary.tone, aria_labelledby="verdict-title"
    )


def render_change(claim: Claim) -> list[Content]:
    """field_f1 0.203 → 0.965, and below it +0.762 (+0.712 to +0.811), better."""
    comparison, unit = claim.comparison, UNITS.get(claim.comparison.metric, "")
    change = f"{format_signed(comparison.difference)} ({format_signed(comparison.low)} to {format_signed(comparison.high)})"
    name = make_tag(
        "span",
        make_tag("b", quote_text(format_measure(comparison))),
        make_tag("span", f", {unit}", class_="soft") if unit else None,
    )
    return [
        make_tag(
            "div",
            name,
            make_tag("span", f"{comparison.before.value:.3f} → {comparison.after.value:.3f}"),
        ),
        make_tag(
            "div",
            make_tag("span", change, class_="soft"),
            make_tag("b", claim.verdict, class_=f"outcome {claim.outcome}"),
        ),
    ]


def format_signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def format_measure(comparison: Comparison) -> str:
    """Without the task where it is the usual one, or says it all."""
    if comparison.task == "test":
        return comparison.metric.replace("_", " ")
    return (
        comparison.task
        if comparison.task == GENERAL_TASK
        else f"{comparison.task}: {comparison.metric}".replace("_", " ")
    )


def _render_changes(story: ReportData) -> list[Content]:
    """Grades of answers first, in the order of the recipe, then likelihoods."""
    if story.record is None:
        return []
    task, _ = select_task_claims(story.record)
    rest = [
        claim
        for claim in build_claims(story.record)
        if claim.comparison.task != GENERAL_TASK and claim not in task
    ]
    return [make_tag("div", render_change(claim), class_="change") for claim in [*task, *rest]]


def _render_cautions(story: ReportData) -> Html | None:
    cautions: list[Content] = [
        quote_text(text) for part in story.stages for text in part.plan.warnings
    ]
    drift = story.record.input_changes if story.record else ()
    cautions += [["went on though this had changed: ", quote_text(text)] for text in drift]
    cautions += [
        [
            f"step {one['step']}: ",
            quote_text(one["kind"]),
            ": ",
            quote_text(one["evidence"].partition("\n")[0]),
        ]
        for part in story.stages
        for one in part.select_events("verdict")
        if one["level"] != "ok"
    ]
    if not cautions:
        return None
    more = (
        make_tag("li", f"{len(cautions) - MAX_CAUTIONS} more below")
        if len(cautions) > MAX_CAUTIONS
        else None
    )
    items = [make_tag("li", one) for one in cautions[:MAX_CAUTIONS]]
    return make_tag(
        "div", make_tag("h2", "Keep in mind"), make_tag("ul", items, more), class_="cautions"
    )


def _describe_evidence(story: ReportData) -> list[Content]:
    record = story.record
    if record is None:
        return []
    lines: list[Content] = []
    if record.comparisons:
        items = [
            f"{one.after.n} of {GENERAL_TASK if one.task == GENERAL_TASK else 'the test'}"
            for one in record.comparisons
        ]
        lines.append(
            f"Measured before and after on the same items ({', '.join(dict.fromkeys(items))}), paired."
        )
        lines.append(_describe_counts(build_claims(record)))
        if any(part.plan.data.get("test_data") for part in story.stages):
            lines.append(
                "The test rows were read for this comparison only: nothing was trained on or chosen by them."
            )
    seeds = sorted({str(part.plan["seed"]) for part in story.stages if "seed" in part.plan.choices})
    lines.append(
        f"One run (seed {', '.join(seeds)}): how much another seed would differ is not in the intervals."
    )
    bad = [one for one in record.preflight if one.level != "ok"]
    proofs = (
        f"All {len(record.preflight)} checks before training passed, on the real model and rows."
    )
    lines.append(
        proofs
        if not bad
        else f"{len(bad)} of {len(record.preflight)} checks before training did not pass."
    )
    return lines


def _describe_counts(claims: Sequence[Claim]) -> str:
    n, clear = len(claims), sum(claim.outcome in ("better", "worse") for claim in claims)
    if n == 1:
        return (
            "Its 95% interval leaves out zero."
            if clear
            else "Its 95% interval does not leave out zero."
        )
    return (
        f"{clear} of {n} differences are shown, each by its 95% interval and all together by Holm's rule: that chance "
        "alone shows any of them is 5% likely at most."
    )


def _describe_costs(story: ReportData) -> list[Content]:
    record = story.record
    if record is None:
        return []
    lines: list[Content] = []
    for claim in build_claims(record):
        if claim.comparison.task == GENERAL_TASK:
            lines.append(make_tag("div", render_change(claim), class_="change"))
    if not lines:
        lines.append("What it forgot was not measured: the recipe names no retention_data.")
    lines.append(
        f"{format_duration(record.train_seconds)} of training: {record.steps:,} steps, {record.tokens:,} tokens."
    )
    machine = record.plan.machine
    lines.append(
        f"{format_bytes(record.peak_bytes)} of memory at most, on {machine.device_name} ({machine.cores} cores)."
    )
    if (weights := find_weights_file(record)) is not None:
        lines.append(
            f"{format_bytes(weights.stat().st_size)} to store: {weights.parent.name}/{weights.name}."
        )
    return lines


def find_weights_file(record: RunRecord) -> Path | None:
    """The file of the trained weights, if it is still there."""
    files = (
        Path(record.adapter) / name for name in ("adapter_model.safetensors", "model.safetensors")
    )
    return next((file for file in files if file.is_file()), None)
