"""Answers before and after side by side, differences marked, with filters.

In: a Story. Out: a section with the first few as HTML, and all of them as data for page.js, which
shows a few dozen at a time: ten thousand stay usable. With an expected answer, what is marked
differs from it; without one, before and after differ from each other. Better and worse come from
how the answers were graded, or else from whether they are right."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from tunesmith.core.events import GenerationSample
from tunesmith.report.html import Html, make_section, make_tag, quote_text
from tunesmith.report.run_data import ReportData, collect_grades
from tunesmith.report.word_diff import mark_differences

SampleState = Literal["better", "worse", "mixed", "same"]
Grades = dict[str, tuple[float, float, bool]]
STATE_LABELS: dict[SampleState, str] = {
    "better": "better",
    "worse": "worse",
    "mixed": "better and worse",
    "same": "graded alike",
}
NUM_STATIC_SAMPLES = 5
MAX_TEXT_CHARS = 20_000  # characters of a text; the rest is cut, and said so


@dataclass(frozen=True)
class SampleDiff:
    """One row. `before`, `after` and `expected` are pieces in turn unmarked and marked."""

    id: str
    prompt: str
    expected: list[str]
    before: list[str]
    after: list[str]
    changed: bool
    state: SampleState
    grades: list[tuple[str, float, float]]


def render_samples(story: ReportData) -> Html | None:
    sample_diffs = build_sample_diffs(story)
    if not sample_diffs:
        return None
    counts = Counter(sample_diff.state for sample_diff in sample_diffs)
    changed = sum(sample_diff.changed for sample_diff in sample_diffs)
    summary = f"{len(sample_diffs):,} answers: {changed:,} changed, {counts['better']:,} better, {counts['worse']:,} worse."
    many = len(sample_diffs) > NUM_STATIC_SAMPLES
    note = (
        make_tag("p", f"Without scripts, the first {NUM_STATIC_SAMPLES} of them:", class_="note")
        if many
        else None
    )
    listed = make_tag(
        "div",
        [_render_sample(sample_diff) for sample_diff in sample_diffs[:NUM_STATIC_SAMPLES]],
        id="sample-list",
    )
    return make_section(
        "samples",
        "Answers side by side",
        make_tag("p", summary),
        _render_filters(sample_diffs),
        make_tag("div", note, listed, id="samples-here"),
        make_data_block("sample-data", [vars(sample_diff) for sample_diff in sample_diffs]),
    )


def build_sample_diffs(story: ReportData) -> list[SampleDiff]:
    grades = collect_grades(story)
    return [
        diff_pair(before, after, grades.get(before.id, {}))
        for before, after in story.get_sample_pairs()
    ]


def diff_pair(before: GenerationSample, after: GenerationSample, grades: Grades) -> SampleDiff:
    was, now, expected = (
        truncate_text(text) for text in (before.answer, after.answer, after.expected)
    )
    return SampleDiff(
        id=before.id,
        prompt=truncate_text(before.prompt),
        expected=mark_differences(expected, now) if expected else [],
        before=mark_differences(was, expected or now),
        after=mark_differences(now, expected or was),
        changed=before.answer != after.answer,
        state=_classify_grades(grades or _grade_exact_match(before, after)),
        grades=[(name, first, second) for name, (first, second, _) in grades.items()],
    )


def truncate_text(text: str) -> str:
    return (
        text
        if len(text) <= MAX_TEXT_CHARS
        else f"{text[:MAX_TEXT_CHARS]} … ({len(text) - MAX_TEXT_CHARS:,} more characters)"
    )


def _grade_exact_match(before: GenerationSample, after: GenerationSample) -> Grades:
    if not after.expected:
        return {}
    was, now = (
        float(sample.answer.strip() == after.expected.strip()) for sample in (before, after)
    )
    return {"right": (was, now, True)}


def _classify_grades(grades: Grades) -> SampleState:
    """Better when some grade is and none is worse; the other way round; both; neither."""
    gains = [
        second - first if higher else first - second for first, second, higher in grades.values()
    ]
    up, down = any(gain > 0 for gain in gains), any(gain < 0 for gain in gains)
    if up and down:
        return "mixed"
    return "better" if up else "worse" if down else "same"


def make_data_block(name: str, value: object) -> Html:
    """JSON for the page's script; no text in it can end the element or begin another."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Html(f'<script type="application/json" id="{name}">{text}</script>')


# ---------------------------------------------------------------- as HTML, and the filters


def _render_sample(sample_diff: SampleDiff) -> Html:
    """As page.js makes them, too."""
    panes = [
        ("Expected", sample_diff.expected),
        ("Before", sample_diff.before),
        ("After", sample_diff.after),
    ]
    grades = [
        make_tag("span", f"{name} {was:.3g} → {now:.3g}", class_="grade")
        for name, was, now in sample_diff.grades
    ]
    state = make_tag("b", STATE_LABELS[sample_diff.state], class_=f"outcome {sample_diff.state}")
    return make_tag(
        "article",
        make_tag("h3", quote_text(sample_diff.id), " ", state, class_="sample-head"),
        make_tag("p", grades, class_="grades") if grades else None,
        make_tag(
            "div",
            make_tag("h4", "Prompt"),
            quote_text(sample_diff.prompt, "pre"),
            class_="pane prompt",
        ),
        make_tag(
            "div", [_render_pane(name, pieces) for name, pieces in panes if pieces], class_="panes"
        ),
        class_="sample",
    )


def _render_pane(name: str, pieces: list[str]) -> Html:
    body = [make_tag("mark", piece) if index % 2 else piece for index, piece in enumerate(pieces)]
    return make_tag(
        "div",
        make_tag("h4", name),
        make_tag("pre", body, dir="auto"),
        class_=f"pane {name.lower()}",
    )


def _render_filters(sample_diffs: list[SampleDiff]) -> Html:
    """Hidden until the script has found its data: without it they would do nothing."""
    states = Counter(sample_diff.state for sample_diff in sample_diffs)
    changed = sum(sample_diff.changed for sample_diff in sample_diffs)
    choices = {
        "all": ("All", len(sample_diffs)),
        "changed": ("Changed", changed),
        "same": ("Unchanged", len(sample_diffs) - changed),
    }
    choices |= {
        state: (STATE_LABELS[state].capitalize(), states[state]) for state in ("better", "worse")
    }
    buttons = [
        make_tag(
            "button",
            f"{word} ",
            make_tag("span", f"{count:,}"),
            type="button",
            data_show=key,
            aria_pressed=_format_pressed(key),
        )
        for key, (word, count) in choices.items()
    ]
    search = make_tag(
        "label", "Search ", make_tag("input", type="search", id="sample-search", autocomplete="off")
    )
    group = make_tag("div", buttons, role="group", aria_label="Which answers")
    status = make_tag("p", role="status", id="sample-status")
    return make_tag(
        "div", group, search, status, id="sample-filters", class_="filters", hidden=True
    )


def _format_pressed(key: str) -> str:
    return "true" if key == "all" else "false"
