"""Write the book: docs/results/evidence.md and a plot per experiment, from stored results.

In: experiments, their results, and the verdicts on their claims. Out: the page and SVG files in the
folder `evidence` beside it. Left out: every decision (claims.py).
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.claims import ClaimVerdict
from experiments.definitions import UNTRAINED, Experiment, Plot

from tunesmith.core.atomic import write_file
from tunesmith.core.events import Score
from tunesmith.evaluate.results import MetricValues, average_measurements, compute_score
from tunesmith.evaluate.statistics import format_p

if TYPE_CHECKING:
    from experiments.run import StoredRun

HEADER = """# Evidence: the book of claims

This page says which claims of guides hold when they are tried, on a small model and real text. Each
experiment is a folder of [experiments/](../../experiments/README.md) with its recipe, its arms, and
a guess that was committed before it ran. `make evidence` writes this page and its plots. "The
guide" is common advice on fine-tuning, in our words; E1 to E12 only number the experiments, and
*own* is one about tunesmith itself.

- A difference is paired by item after averaging over seeds, with a 95% CI. An untrained side that
  draws no rows answers the same with every seed, so it is paired with all seeds of the other side.
- p is corrected over all {claims} claims (Holm); those not run count with p = 1.
- A claim *holds* or *does not hold* if the interval lies on one side, the corrected p is below 0.05
  and each seed alone has the same sign; else it is *not decidable at this size*. *Nothing changed*:
  every item has the same value on both sides.
- A guess is a *hit* if the measured difference lies inside.
- *Rerun after a change of the product*: the first result led to the change, so the new one tests no
  guess. It counts neither as a claim that holds nor as a hit.

A result for a model of 135M parameters shows a mechanism, and no value for a larger model.
Intervals are over items: they do not cover seed-to-seed variation, and many claims have one seed.
They also count entries of one package as independent: 40 to 80 rows are of 12 to 20 packages, so
intervals on rows of the demo are too narrow, and a verdict that rests on one seed is provisional.
Other programs ran on the same machine, so minutes, which are by the clock, say nothing about speed.

Less was done than planned: one model size instead of two; 26 rows against 260 in E5, not 1,000
against 10,000; in E8 ranks on one task, a format. Some arms have no result and are named.
"""
COLUMNS = 120
WIDTH = 640  # of a plot, in pixels
LABEL_WIDTH = 190
ROW_HEIGHT = 22
MARGIN = 34


def write_page(
    page: Path,
    experiments: Sequence[Experiment],
    stored: Mapping[str, Sequence[StoredRun]],
    verdicts: Mapping[str, Sequence[ClaimVerdict]],
) -> None:
    (page.parent / "evidence").mkdir(parents=True, exist_ok=True)
    lines = [HEADER.format(claims=sum(len(each.claims) for each in experiments))]
    lines += _format_summary(experiments, verdicts)
    for experiment in experiments:
        lines += _format_experiment(page, experiment, stored[experiment.name], verdicts)
    write_file(page, ("\n".join(lines).rstrip() + "\n").encode())


def _format_summary(
    experiments: Sequence[Experiment], verdicts: Mapping[str, Sequence[ClaimVerdict]]
) -> Iterator[str]:
    flat = list(_flatten(verdicts))
    counts = Counter(each.verdict for each in flat)
    guesses = Counter(_describe_guess(each) for each in flat)
    yield "## All claims\n"
    totals = ", ".join(f"{verdict}: {count}" for verdict, count in counts.most_common())
    hits = f"Guesses: {guesses['guess hit']} hit, {guesses['guess missed']} missed."
    yield wrap_lines(f"{totals}. {hits}") + "\n"
    yield "| | claim | guess | measured difference [95% CI] | p | seeds | verdict |"
    yield "|---|---|---|---|---|---|---|"
    for experiment in experiments:
        for each in verdicts[experiment.name]:
            link = f"[{experiment.rule}](#{_make_anchor(experiment)})"
            guess, measured, p, verdict = _format_claim(each)
            seeds = str(len(each.evidence.seed_differences)) if each.evidence else ""
            cells = [link, each.claim.text, guess, measured, p, seeds, verdict]
            yield "| " + " | ".join(cells) + " |"
    yield ""


def _flatten(verdicts: Mapping[str, Sequence[ClaimVerdict]]) -> Iterator[ClaimVerdict]:
    for each in verdicts.values():
        yield from each


def _format_claim(each: ClaimVerdict) -> Iterator[str]:
    """Yield guess, difference, p and verdict."""
    low, high = each.claim.guess
    yield f"{low:+g} to {high:+g}"
    if each.evidence is None:
        yield from ("", "", f"{each.verdict}: {each.note}" if each.note else each.verdict)
        return
    comparison = each.evidence.comparison
    interval = f"{comparison.difference:+.3f} [{comparison.low:+.3f}, {comparison.high:+.3f}]"
    yield ", ".join(filter(None, (interval, _describe_guess(each))))
    yield format_p(each.adjusted_p).removeprefix("p ").removeprefix("= ")
    seeds = f", {len(each.evidence.seed_differences)} of {each.num_seeds} seeds"
    rerun = f": {each.rerun}" if each.rerun else ""
    yield f"**{each.verdict}**" + (seeds if each.lacks_seeds else "") + rerun


def _describe_guess(each: ClaimVerdict) -> str:
    if each.is_in_guess is None:
        return ""
    return "guess hit" if each.is_in_guess else "guess missed"


def wrap_lines(text: str, indent: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()),
        COLUMNS,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _make_anchor(experiment: Experiment) -> str:
    words = "".join(each for each in experiment.title.lower() if each.isalnum() or each in " -")
    return f"{experiment.rule.lower()}-{words.replace(' ', '-')}"


def _format_experiment(
    page: Path,
    experiment: Experiment,
    stored: Sequence[StoredRun],
    verdicts: Mapping[str, Sequence[ClaimVerdict]],
) -> Iterator[str]:
    yield f"## {experiment.rule} {experiment.title}\n"
    if experiment.guide:
        yield wrap_lines(f"The guide: *{experiment.guide}*") + "\n"
    yield wrap_lines(experiment.about) + "\n"
    if experiment.earlier:
        yield wrap_lines(f"Measured earlier, without a guess: {experiment.earlier}") + "\n"
    command = f"`make evidence ONLY={experiment.name}`"
    expected = f"about {experiment.minutes:g} minutes on two idle cores"
    if not stored:
        yield f"{command}, {expected}. Not run yet.\n"
        return
    minutes = sum(each.run.minutes for each in stored)
    dates = " and ".join(sorted({each.date for each in stored}))
    devices = " and ".join(sorted({each.device for each in stored}))
    versions = " and ".join(sorted({each.version for each in stored}))
    num_runs = sum(len(arm.seeds) for arm in experiment.arms.values())
    text = (
        f"{command}, {expected}. {len(stored)} of {num_runs} runs took {minutes:.0f} minutes, on "
        f"{dates}, {devices}, tunesmith {versions}."
    )
    missing = _list_missing_arms(experiment, stored)
    if missing:
        text += f" Without a result so far: {', '.join(missing)}."
    yield wrap_lines(text) + "\n"
    yield "| claim | difference | by seed |"
    yield "|---|---|---|"
    for each in verdicts[experiment.name]:
        yield f"| {each.claim.text} | {_describe_difference(each)} | {_list_seeds(each)} |"
    yield ""
    if experiment.later:
        yield wrap_lines(f"Seen afterwards: {experiment.later}") + "\n"
    yield from _format_arms(experiment, stored)
    for index, plot in enumerate(experiment.plots):
        if points := list_points(experiment, stored, plot):
            name = f"{experiment.name}-{index}.svg" if index else f"{experiment.name}.svg"
            write_file(page.parent / "evidence" / name, draw_plot(plot.label, points).encode())
            yield f"![{plot.label}, by arm](evidence/{name})\n"


def _describe_difference(each: ClaimVerdict) -> str:
    """Name what the claim compares; value and verdict are in the table of all claims."""
    margin = f", margin {each.claim.margin:g}" if each.claim.margin else ""
    items = f", {each.evidence.comparison.after.n} items" if each.evidence else ""
    return f"`{each.claim.arm}` minus `{each.claim.against}`, {each.claim.metric}{items}{margin}"


def _list_seeds(each: ClaimVerdict) -> str:
    if each.evidence is None:
        return each.verdict
    return ", ".join(f"{value:+.3f}" for value in each.evidence.seed_differences)


# ---------------------------------------------------------------- arms


@dataclass(frozen=True)
class _Row:
    """A line of the table of arms, and of its plots."""

    label: str
    runs: Sequence[StoredRun]
    is_before: bool = False  # whether it shows the model before training


def _list_rows(experiment: Experiment, stored: Sequence[StoredRun]) -> Iterator[_Row]:
    """Yield the model before training, and each arm with a result as the claims read it."""
    yield _Row("before training", stored[:1], is_before=True)
    sides = experiment.list_sides()
    for arm in experiment.arms:
        runs = [each for each in stored if each.arm == arm]
        if runs and arm not in sides and arm + UNTRAINED in sides:
            yield _Row(arm + UNTRAINED, runs, is_before=True)
        elif runs:
            yield _Row(arm, runs)


def _list_missing_arms(experiment: Experiment, stored: Sequence[StoredRun]) -> list[str]:
    finished = {each.arm for each in stored}
    return [f"`{arm}`" for arm in experiment.arms if arm not in finished]


def _format_arms(experiment: Experiment, stored: Sequence[StoredRun]) -> Iterator[str]:
    """Yield a table of the arms: plotted metrics, means over seeds with their intervals."""
    labels = [plot.label for plot in experiment.plots]
    has_steps = any(each.run.steps for each in stored)
    columns = ["steps", "tokens", "peak GB"] if has_steps else []
    names = ["arm", "seeds", *labels, *columns, "minutes"]
    yield "| " + " | ".join(names) + " |"
    yield "|" + "---|" * len(names)
    for row in _list_rows(experiment, stored):
        scores = [_find_score(row, plot) for plot in experiment.plots]
        if row.is_before and not any(scores):
            continue  # arms that only answer measure nothing before
        values = [_format_score(score) for score in scores]
        sizes = [""] * (len(columns) + 1) if row.is_before else _format_sizes(row, has_steps)
        seeds = "" if row.is_before else str(len(row.runs))
        yield "| " + " | ".join([row.label, seeds, *values, *sizes]) + " |"
    yield ""


def _format_sizes(row: _Row, has_steps: bool) -> Iterator[str]:
    first = row.runs[0].run
    if has_steps:
        yield f"{first.steps}"
        yield f"{first.tokens:,}"
        yield f"{max(each.run.peak_gigabytes for each in row.runs):.2f}"
    failure = f" ({first.failure})" if first.failure else ""
    yield f"{sum(each.run.minutes for each in row.runs):.1f}{failure}"


def _format_score(score: Score | None) -> str:
    return f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]" if score else ""


def _find_score(row: _Row, plot: Plot) -> Score | None:
    measured: list[MetricValues] = []
    for each in row.runs:
        for values in each.run.before if row.is_before else each.run.after:
            if (values.task, values.metric) == (plot.task, plot.metric):
                measured.append(values)
    return compute_score(average_measurements(measured)) if measured else None


def list_points(
    experiment: Experiment, stored: Sequence[StoredRun], plot: Plot
) -> list[tuple[str, Score]]:
    """Return (label, score) of the model before training and of each arm."""
    points: list[tuple[str, Score]] = []
    for row in _list_rows(experiment, stored):
        if score := _find_score(row, plot):
            points.append((row.label, score))
    return points


# ---------------------------------------------------------------- plot


def draw_plot(title: str, points: Sequence[tuple[str, Score]]) -> str:
    """Return a dot and its interval for each (label, score), as SVG."""
    low = min(score.low for _, score in points)
    high = max(score.high for _, score in points)
    span = (high - low) or 1.0
    height = MARGIN + ROW_HEIGHT * len(points) + 18
    room = WIDTH - LABEL_WIDTH - 70

    def scale(value: float) -> float:
        return round(LABEL_WIDTH + room * (value - low) / span, 1)

    shapes: list[str] = []
    for row, (label, score) in enumerate(points):
        y = MARGIN + ROW_HEIGHT * row + 8
        middle = y + 4
        shapes.append(
            f'<text x="{LABEL_WIDTH - 10}" y="{middle}" text-anchor="end">{escape(label)}</text>'
        )
        ends = f'x1="{scale(score.low)}" x2="{scale(score.high)}"'
        shapes.append(f'<line {ends} y1="{y}" y2="{y}" stroke="#2563eb" stroke-width="2"/>')
        shapes.append(f'<circle cx="{scale(score.value)}" cy="{y}" r="4" fill="#2563eb"/>')
        shapes.append(f'<text x="{scale(score.high) + 8}" y="{middle}">{score.value:.3f}</text>')
    box = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    style = 'font-family="sans-serif" font-size="12" fill="#333"'
    head = f'<text x="{LABEL_WIDTH}" y="18" font-weight="bold">{escape(title)}, 95% CI</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {box} {style} role="img">\n'
        f"<title>{escape(title)}</title>\n"
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>\n{head}\n'
        + "\n".join(shapes)
        + "\n</svg>\n"
    )
