"""Answers before and after, with their differences marked and filters.

In: ReportData. Out: SamplesView. The first few samples become HTML in samples.html.jinja; all of
them are data for page.js, which shows a few dozen at a time, so that ten thousand stay usable.

With an expected answer, the words that differ from it are marked; without one, the words that
differ between before and after. Better and worse follow the grades; without any, exact match.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

from tunesmith.core.events import GenerationSample
from tunesmith.report.run_data import Grades, ReportData, collect_grades

SampleState = Literal["better", "worse", "mixed", "same"]
STATE_LABELS: dict[SampleState, str] = {
    "better": "better",
    "worse": "worse",
    "mixed": "better and worse",
    "same": "same grade",
}
NUM_STATIC_SAMPLES = 5
MAX_TEXT_CHARS = 20_000
WORD_PATTERN = re.compile(r"\w+|\s+|[^\w\s]")
MAX_DIFF_WORDS = 600  # longer texts are not aligned word by word: difflib takes quadratic time


@dataclass(frozen=True)
class SampleDiff:
    """A row of the data; texts are lists of pieces, unmarked and marked in turn."""

    id: str
    prompt: str
    expected: list[str]
    before: list[str]
    after: list[str]
    changed: bool
    state: SampleState
    grades: list[tuple[str, float, float]]  # metric, before, after

    @property
    def panes(self) -> list[tuple[str, list[str]]]:
        panes = [("Expected", self.expected), ("Before", self.before), ("After", self.after)]
        return [(title, pieces) for title, pieces in panes if pieces]


@dataclass(frozen=True)
class SamplesView:
    diffs: list[SampleDiff]

    @property
    def static(self) -> list[SampleDiff]:
        """The samples that are shown without JavaScript."""
        return self.diffs[:NUM_STATIC_SAMPLES]

    @property
    def data(self) -> list[dict[str, object]]:
        return [vars(diff) for diff in self.diffs]

    @property
    def counts(self) -> dict[str, int]:
        """Key of a filter -> number of samples that pass it, in the order of the buttons."""
        changed = sum(diff.changed for diff in self.diffs)
        states = Counter(diff.state for diff in self.diffs)
        return {
            "all": len(self.diffs),
            "changed": changed,
            "unchanged": len(self.diffs) - changed,
            "better": states["better"],
            "worse": states["worse"],
        }


def build_samples(run: ReportData) -> SamplesView | None:
    diffs = build_sample_diffs(run)
    return SamplesView(diffs) if diffs else None


def build_sample_diffs(run: ReportData) -> list[SampleDiff]:
    grades = collect_grades(run)
    return [
        _diff_pair(before, after, grades.get(before.id, {}))
        for before, after in run.get_sample_pairs()
    ]


def _diff_pair(before: GenerationSample, after: GenerationSample, grades: Grades) -> SampleDiff:
    before_text, after_text, expected = (
        _truncate(text) for text in (before.answer, after.answer, after.expected)
    )
    return SampleDiff(
        id=before.id,
        prompt=_truncate(before.prompt),
        expected=mark_differences(expected, after_text) if expected else [],
        before=mark_differences(before_text, expected or after_text),
        after=mark_differences(after_text, expected or before_text),
        changed=before.answer != after.answer,
        state=_classify_grades(grades or _grade_exact_match(before, after)),
        grades=[(metric, grade[0], grade[1]) for metric, grade in grades.items()],
    )


def _truncate(text: str) -> str:
    if len(text) <= MAX_TEXT_CHARS:
        return text
    return f"{text[:MAX_TEXT_CHARS]} … ({len(text) - MAX_TEXT_CHARS:,} more characters)"


def _grade_exact_match(before: GenerationSample, after: GenerationSample) -> Grades:
    expected = after.expected.strip()
    if not after.expected:
        return {}
    is_correct = [float(sample.answer.strip() == expected) for sample in (before, after)]
    return {"exact match": (is_correct[0], is_correct[1], True)}


def _classify_grades(grades: Grades) -> SampleState:
    gains = [
        after - before if higher_is_better else before - after
        for before, after, higher_is_better in grades.values()
    ]
    has_gain = any(gain > 0 for gain in gains)
    has_loss = any(gain < 0 for gain in gains)
    if has_gain and has_loss:
        return "mixed"
    if has_gain:
        return "better"
    return "worse" if has_loss else "same"


# ---------------------------------------------------------------- word by word


def mark_differences(text: str, other: str) -> list[str]:
    """Split a text into pieces that are, in turn, in the other text and not in it.

    mark_differences("a b c", "a c") -> ["a ", "b ", "c"]; joined, the pieces are the text.
    """
    words = WORD_PATTERN.findall(text)
    other_words = WORD_PATTERN.findall(other)
    if words == other_words:
        return [text]
    pieces = [""]
    for is_common, run in _find_runs(words, other_words):
        if is_common != (len(pieces) % 2 == 1):
            pieces.append("")
        pieces[-1] += "".join(run)
    return pieces


def _find_runs(words: Sequence[str], others: Sequence[str]) -> list[tuple[bool, Sequence[str]]]:
    """Return runs of `words` in order, each with whether it is in both texts."""
    start = _count_common_words(words, others)
    end = _count_common_words(words[start:][::-1], others[start:][::-1])
    inner = words[start : len(words) - end]
    other_inner = others[start : len(others) - end]
    runs: list[tuple[bool, Sequence[str]]] = [(True, words[:start])]
    if max(len(inner), len(other_inner)) > MAX_DIFF_WORDS:
        runs.append((False, inner))
    else:
        matcher = SequenceMatcher(None, inner, other_inner, autojunk=False)
        for kind, first, last, _, _ in matcher.get_opcodes():
            runs.append((kind == "equal", inner[first:last]))
    runs.append((True, words[len(words) - end :]))
    return [run for run in runs if run[1]]


def _count_common_words(words: Sequence[str], others: Sequence[str]) -> int:
    """Return the length of the common start."""
    for index, (word, other) in enumerate(zip(words, others, strict=False)):
        if word != other:
            return index
    return min(len(words), len(others))
