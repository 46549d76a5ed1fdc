"""Answers before and after side by side, differences marked, with filters.

In: a Story. Out: a section with the first few as HTML, and all of them as data for page.js, which shows a few dozen at
a time: ten thousand stay usable. With an expected answer, what is marked differs from it; without one, before and after
differ from each other. Better and worse come from how the answers were graded, or else from whether they are right.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from tunesmith.core.events import Sample
from tunesmith.report.html import Html, quoted, section, tag
from tunesmith.report.run_data import Story, grades_of
from tunesmith.report.word_diff import marked

State = Literal["better", "worse", "mixed", "same"]
Grades = dict[str, tuple[float, float, bool]]
STATES: dict[State, str] = {"better": "better", "worse": "worse", "mixed": "better and worse", "same": "graded alike"}
WRITTEN_OUT = 5
LONGEST = 20_000  # characters of a text; the rest is cut, and said so


@dataclass(frozen=True)
class Shown:
    """One row. `before`, `after` and `expected` are pieces in turn unmarked and marked."""

    id: str
    prompt: str
    expected: list[str]
    before: list[str]
    after: list[str]
    changed: bool
    state: State
    grades: list[tuple[str, float, float]]


def samples_section(story: Story) -> Html | None:
    shown = shown_of(story)
    if not shown:
        return None
    counts = Counter(one.state for one in shown)
    changed = sum(one.changed for one in shown)
    told = f"{len(shown):,} answers: {changed:,} changed, {counts['better']:,} better, {counts['worse']:,} worse."
    many = len(shown) > WRITTEN_OUT
    note = tag("p", f"Without scripts, the first {WRITTEN_OUT} of them:", class_="note") if many else None
    listed = tag("div", [_article(one) for one in shown[:WRITTEN_OUT]], id="sample-list")
    return section(
        "samples",
        "Answers side by side",
        tag("p", told),
        _filters(shown),
        tag("div", note, listed, id="samples-here"),
        data_block("sample-data", [vars(one) for one in shown]),
    )


def shown_of(story: Story) -> list[Shown]:
    grades = grades_of(story)
    return [shown_pair(before, after, grades.get(before.id, {})) for before, after in story.pairs()]


def shown_pair(before: Sample, after: Sample, grades: Grades) -> Shown:
    was, now, wanted = (cut(text) for text in (before.answer, after.answer, after.expected))
    return Shown(
        id=before.id,
        prompt=cut(before.prompt),
        expected=marked(wanted, now) if wanted else [],
        before=marked(was, wanted or now),
        after=marked(now, wanted or was),
        changed=before.answer != after.answer,
        state=_state(grades or _rightness(before, after)),
        grades=[(name, first, second) for name, (first, second, _) in grades.items()],
    )


def cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text) - LONGEST:,} more characters)"


def _rightness(before: Sample, after: Sample) -> Grades:
    if not after.expected:
        return {}
    was, now = (float(sample.answer.strip() == after.expected.strip()) for sample in (before, after))
    return {"right": (was, now, True)}


def _state(grades: Grades) -> State:
    """Better when some grade is and none is worse; the other way round; both; neither."""
    gains = [second - first if higher else first - second for first, second, higher in grades.values()]
    up, down = any(gain > 0 for gain in gains), any(gain < 0 for gain in gains)
    if up and down:
        return "mixed"
    return "better" if up else "worse" if down else "same"


def data_block(name: str, value: object) -> Html:
    """JSON for the page's script; no text in it can end the element or begin another."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Html(f'<script type="application/json" id="{name}">{text}</script>')


# ---------------------------------------------------------------- as HTML, and the filters


def _article(one: Shown) -> Html:
    """As page.js makes them, too."""
    panes = [("Expected", one.expected), ("Before", one.before), ("After", one.after)]
    grades = [tag("span", f"{name} {was:.3g} → {now:.3g}", class_="grade") for name, was, now in one.grades]
    state = tag("b", STATES[one.state], class_=f"outcome {one.state}")
    return tag(
        "article",
        tag("h3", quoted(one.id), " ", state, class_="sample-head"),
        tag("p", grades, class_="grades") if grades else None,
        tag("div", tag("h4", "Prompt"), quoted(one.prompt, "pre"), class_="pane prompt"),
        tag("div", [_pane(name, pieces) for name, pieces in panes if pieces], class_="panes"),
        class_="sample",
    )


def _pane(name: str, pieces: list[str]) -> Html:
    body = [tag("mark", piece) if place % 2 else piece for place, piece in enumerate(pieces)]
    return tag("div", tag("h4", name), tag("pre", body, dir="auto"), class_=f"pane {name.lower()}")


def _filters(shown: list[Shown]) -> Html:
    """Hidden until the script has found its data: without it they would do nothing."""
    states = Counter(one.state for one in shown)
    changed = sum(one.changed for one in shown)
    choices = {"all": ("All", len(shown)), "changed": ("Changed", changed), "same": ("Unchanged", len(shown) - changed)}
    choices |= {state: (STATES[state].capitalize(), states[state]) for state in ("better", "worse")}
    buttons = [
        tag("button", f"{word} ", tag("span", f"{count:,}"), type="button", data_show=key, aria_pressed=_pressed(key))
        for key, (word, count) in choices.items()
    ]
    search = tag("label", "Search ", tag("input", type="search", id="sample-search", autocomplete="off"))
    group = tag("div", buttons, role="group", aria_label="Which answers")
    status = tag("p", role="status", id="sample-status")
    return tag("div", group, search, status, id="sample-filters", class_="filters", hidden=True)


def _pressed(key: str) -> str:
    return "true" if key == "all" else "false"
