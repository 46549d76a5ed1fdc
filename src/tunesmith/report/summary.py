"""The verdict: what changed, is it real, what it cost. It comes first, and says no more than the intervals do.

In: a Story. Out: a headline, one sentence, and three lists. A measure is better or worse by the same rule as in the
terminal (significance.py): what would not be shown as one of several claims is marked, and does not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.core.atomic import size
from tunesmith.core.events import GENERAL
from tunesmith.core.formatting import duration
from tunesmith.core.types import Comparison, RunRecord
from tunesmith.evaluate.scale_choice import bargain
from tunesmith.evaluate.significance import NOT_SHOWN, evidence, verdicts
from tunesmith.report.html import Content, Html, quoted, tag
from tunesmith.report.run_data import Story

Outcome = Literal["better", "worse", "doubtful", "same"]
OUTCOMES: dict[str, Outcome] = {"better": "better", "worse": "worse", NOT_SHOWN: "same"}
MOST_CAUTIONS = 8
UNITS = {"bits_per_byte": "bits per byte", "loss": "nats per token"}


@dataclass(frozen=True)
class Verdict:
    """`tone` colours it: good | bad | mixed | open."""

    tone: str
    headline: str
    sentence: str


@dataclass(frozen=True)
class Claim:
    """A comparison and what may be concluded. `words`: the verdict; `behind`: what stands behind it, in a few words."""

    of: Comparison
    outcome: Outcome
    words: str
    behind: str


def claims_of(record: RunRecord) -> tuple[Claim, ...]:
    told = zip(record.comparisons, verdicts(record.comparisons), strict=True)
    return tuple(Claim(one, OUTCOMES.get(words, "doubtful"), words, evidence(one)) for one, words in told)


def verdict_of(story: Story) -> Verdict:
    record = story.record
    if story.failure:
        what = story.failure.splitlines()[0]
        return Verdict("bad", "A gate stopped this run", f"{what} Nothing here may be used as a result.")
    if record is None:
        done = f"{story.steps_taken:,} of {story.steps_planned:,} steps are taken"
        return Verdict("open", "Not finished", f"{done}: nothing is measured after training yet.")
    if not record.comparisons:
        why = "The recipe names neither test_data nor retention_data, so nothing can be said of what training did."
        return Verdict("open", "Trained, not measured", why)
    task, answers = task_of(record)
    general = [one for one in claims_of(record) if one.of.task == GENERAL]
    found = [one.outcome for one in task]
    heads = [*_of_task(found, answers=answers), *_of_general(general)]
    said = [_counted(found, answers=answers)]
    if cheaper := bargain(record.scales):
        said.append(f"On the rows to choose by, {cheaper}; other measures were not taken there.")
    return Verdict(_tone(found, [one.outcome for one in general]), " ".join(heads), " ".join(said))


def task_of(record: RunRecord) -> tuple[list[Claim], bool]:
    """What the headline goes by, and whether these are grades of answers: likelihoods speak only where nothing was
    graded."""
    own = [one for one in claims_of(record) if one.of.task != GENERAL]
    metrics = record.plan["metrics"] if "metrics" in record.plan.choices else ()
    graded = [one for one in own if one.of.metric in metrics or one.of.metric.startswith(("breaks ", "says "))]
    return graded or own, bool(graded)


def _of_task(found: Sequence[str], *, answers: bool) -> Iterator[str]:
    if not found:
        return
    if {"better", "worse"} <= set(found):
        yield "Answers are better by some measures, worse by others." if answers else "Better and worse on test rows."
    elif "better" in found:
        yield "The answers are better." if answers else "Test rows are predicted better."
    elif "worse" in found:
        yield "The answers are worse." if answers else "Test rows are predicted worse."
    else:
        yield f"No difference shown {'in the answers' if answers else 'on test rows'}."


def _of_general(general: Sequence[Claim]) -> Iterator[str]:
    """Of a loss that several claims together would not show, it is said that it may be one."""
    words = {"worse": "General text got worse.", "better": "General text got better."}
    for one in general[:1]:
        maybe = one.outcome == "doubtful" and one.words.startswith("worse")
        yield (
            "General text may have got worse." if maybe else words.get(one.outcome, "No change shown on general text.")
        )


def _tone(found: Sequence[str], general: Sequence[str]) -> str:
    if "worse" in found:
        return "mixed" if "better" in found else "bad"
    if "better" in found:
        return "mixed" if "worse" in general else "good"
    return "bad" if "worse" in general else "open"


def _counted(found: Sequence[str], *, answers: bool) -> str:
    if not found:
        return "Only general text was measured: the recipe names no test_data."
    of = "measure" if len(found) == 1 else "measures"
    kind = "of the answers" if answers else "of how likely the test rows are"
    better, worse = found.count("better"), found.count("worse")
    same = len(found) - better - worse
    if len(found) > 1 and len(found) in (better, worse):
        return f"All {len(found)} measures {kind} are {found[0]}."
    return f"Of {len(found)} {of} {kind}: {better} better, {worse} worse, {same} with no difference shown."


def verdict_section(story: Story) -> Html:
    found = verdict_of(story)
    columns = [("What changed", _changes(story)), ("Is it real?", _evidence(story)), ("What it cost", _costs(story))]
    lists = [
        tag("div", tag("h2", title), tag("ul", [tag("li", item) for item in items]))
        for title, items in columns
        if items
    ]
    title = tag("h1", found.headline, id="verdict-title")
    body = [tag("p", found.sentence, class_="lead"), tag("div", lists, class_="columns"), _cautions(story)]
    return tag("section", title, body, id="verdict", class_=found.tone, aria_labelledby="verdict-title")


def change_text(claim: Claim) -> list[Content]:
    """field_f1 0.203 → 0.965, and below it +0.762 (+0.712 to +0.811), better."""
    one, unit = claim.of, UNITS.get(claim.of.metric, "")
    change = f"{signed(one.difference)} ({signed(one.low)} to {signed(one.high)})"
    name = tag("span", tag("b", quoted(name_of(one))), tag("span", f", {unit}", class_="soft") if unit else None)
    return [
        tag("div", name, tag("span", f"{one.before.value:.3f} → {one.after.value:.3f}")),
        tag("div", tag("span", change, class_="soft"), tag("b", claim.words, class_=f"outcome {claim.outcome}")),
    ]


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def name_of(one: Comparison) -> str:
    """Without the task where it is the usual one, or says it all."""
    if one.task == "test":
        return one.metric.replace("_", " ")
    return one.task if one.task == GENERAL else f"{one.task}: {one.metric}".replace("_", " ")


def _changes(story: Story) -> list[Content]:
    """Grades of answers first, in the order of the recipe, then likelihoods."""
    if story.record is None:
        return []
    task, _ = task_of(story.record)
    rest = [one for one in claims_of(story.record) if one.of.task != GENERAL and one not in task]
    return [tag("div", change_text(one), class_="change") for one in [*task, *rest]]


def _cautions(story: Story) -> Html | None:
    found: list[Content] = [quoted(text) for part in story.parts for text in part.plan.warnings]
    drift = story.record.drift if story.record else ()
    found += [["went on though this had changed: ", quoted(text)] for text in drift]
    found += [
        [f"step {one['step']}: ", quoted(one["kind"]), ": ", quoted(one["evidence"].partition("\n")[0])]
        for part in story.parts
        for one in part.of_type("verdict")
        if one["level"] != "ok"
    ]
    if not found:
        return None
    more = tag("li", f"{len(found) - MOST_CAUTIONS} more below") if len(found) > MOST_CAUTIONS else None
    items = [tag("li", one) for one in found[:MOST_CAUTIONS]]
    return tag("div", tag("h2", "Keep in mind"), tag("ul", items, more), class_="cautions")


def _evidence(story: Story) -> list[Content]:
    record = story.record
    if record is None:
        return []
    found: list[Content] = []
    if record.comparisons:
        items = [f"{one.after.n} of {GENERAL if one.task == GENERAL else 'the test'}" for one in record.comparisons]
        found.append(f"Measured before and after on the same items ({', '.join(dict.fromkeys(items))}), paired.")
        found.append(_counts(claims_of(record)))
        if any(part.plan.data.get("test_data") for part in story.parts):
            found.append("The test rows were read for this comparison only: nothing was trained on or chosen by them.")
    seeds = sorted({str(part.plan["seed"]) for part in story.parts if "seed" in part.plan.choices})
    found.append(f"One run (seed {', '.join(seeds)}): how much another seed would differ is not in the intervals.")
    bad = [one for one in record.proof if one.level != "ok"]
    proofs = f"All {len(record.proof)} checks before training passed, on the real model and rows."
    found.append(proofs if not bad else f"{len(bad)} of {len(record.proof)} checks before training did not pass.")
    return found


def _counts(claims: Sequence[Claim]) -> str:
    n, clear = len(claims), sum(one.outcome in ("better", "worse") for one in claims)
    if n == 1:
        return "Its 95% interval leaves out zero." if clear else "Its 95% interval does not leave out zero."
    return (
        f"{clear} of {n} differences are shown, each by its 95% interval and all together by Holm's rule: that chance "
        "alone shows any of them is 5% likely at most."
    )


def _costs(story: Story) -> list[Content]:
    record = story.record
    if record is None:
        return []
    found: list[Content] = []
    for one in claims_of(record):
        if one.of.task == GENERAL:
            found.append(tag("div", change_text(one), class_="change"))
    if not found:
        found.append("What it forgot was not measured: the recipe names no retention_data.")
    found.append(f"{duration(record.train_seconds)} of training: {record.steps:,} steps, {record.tokens:,} tokens.")
    machine = record.plan.machine
    found.append(f"{size(record.peak_bytes)} of memory at most, on {machine.device_name} ({machine.cores} cores).")
    if (weights := weights_of(record)) is not None:
        found.append(f"{size(weights.stat().st_size)} to store: {weights.parent.name}/{weights.name}.")
    return found


def weights_of(record: RunRecord) -> Path | None:
    """The file of the trained weights, if it is still there."""
    files = (Path(record.adapter) / name for name in ("adapter_model.safetensors", "model.safetensors"))
    return next((file for file in files if file.is_file()), None)
