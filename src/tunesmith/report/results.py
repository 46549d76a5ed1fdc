"""Before and after with their intervals, and what the trained weights gain and lose when scaled.

In: a Story. Out: sections, or None where there is nothing to show.
"""

from __future__ import annotations

from tunesmith.report.chart import strip
from tunesmith.report.markup import Content, Html, quoted, section, table, tag
from tunesmith.report.story import Story
from tunesmith.report.verdict import Claim, claims_of, signed
from tunesmith.types import Score


def results_section(story: Story) -> Html | None:
    record = story.record
    if record is None or not record.comparisons:
        return None
    head = ["Measure", "n", "Before", "After", "Change", "← worse · better →", "Verdict"]
    note = tag(
        "p",
        "Each change is the mean of the differences item by item, with its 95% interval; in the drawing zero is the "
        "line in the middle, better is to the right, and every row has its own scale.",
        class_="note",
    )
    rows = [_row(one) for one in claims_of(record)]
    return section(
        "results", "Before and after", table(head, rows, numbers=(1, 2, 3, 4), label="Before and after"), note
    )


def _row(claim: Claim) -> list[Content]:
    one = claim.of
    hint = None if one.higher_is_better else tag("span", " lower is better", class_="soft")
    task = None if one.task == "test" else tag("span", quoted(one.task), class_="over")
    return [
        [task, quoted(one.metric.replace("_", " ")), hint],
        str(one.after.n),
        _value(one.before),
        _value(one.after),
        [signed(one.difference), tag("span", f"{signed(one.low)} to {signed(one.high)}", class_="interval")],
        _strip(claim),
        [tag("b", claim.words, class_=f"outcome {claim.outcome}"), _behind(claim)],
    ]


def _value(score: Score) -> list[Content]:
    return [f"{score.value:.3f}", tag("span", f"{score.low:.3f} to {score.high:.3f}", class_="interval")]


def _behind(claim: Claim) -> Html | None:
    return tag("span", claim.behind, class_="under") if claim.behind else None


def _strip(claim: Claim) -> Html:
    """Turned so that better is to the right."""
    one, turn = claim.of, 1 if claim.of.higher_is_better else -1
    low, high = sorted((turn * one.low, turn * one.high))
    label = f"{signed(one.difference)}, from {signed(one.low)} to {signed(one.high)}: {claim.words}"
    return strip(low, turn * one.difference, high, style=claim.outcome, label=label)
