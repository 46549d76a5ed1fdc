"""Answers before and after: right or wrong, field by field or word by word, wrong ones first.

In: ReportData. Out: SamplesView. The first few samples become HTML in samples.html.jinja; all of
them are data for page.js, which shows a few more at a time, so that ten thousand stay usable.

The metric that decides what is right is that of the error analysis, else the first one that grades
answers, else exact match with the expected answer. A JSON object is compared by its fields. Of
other texts, the words that differ from the expected answer are marked; without one, the words that
differ between before and after. Texts that have little in common are not marked.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal, cast

from tunesmith.core.events import GenerationSample
from tunesmith.data.answer_values import format_field_name, split_fields
from tunesmith.report.run_data import Grades, ReportData, collect_grades

SampleState = Literal[
    "wrong", "broken", "fixed", "right", "better", "worse", "mixed", "same", "ungraded"
]
# Label and outcome (the class of its color) of each state, in the order of the list.
STATES: dict[SampleState, tuple[str, str]] = {
    "broken": ("broken", "worse"),
    "wrong": ("still wrong", "doubtful"),
    "worse": ("worse", "worse"),
    "mixed": ("better and worse", "mixed"),
    "same": ("same grade", "same"),
    "better": ("better", "better"),
    "fixed": ("fixed", "better"),
    "right": ("still right", "same"),
    "ungraded": ("not graded", "same"),
}
RIGHT_STATES = ("fixed", "right")
WRONG_STATES = ("wrong", "broken")
# Key of a filter -> its label, and what to say if no answer passes it.
FILTERS: dict[str, tuple[str, str]] = {
    "all": ("All", "There are no answers."),
    "wrong-now": ("Wrong now", "No answer is wrong."),
    "right-now": ("Right now", "No answer is right."),
    "fixed": ("Fixed", "Training fixed no answer."),
    "broken": ("Broken", "Training broke no answer: none was right before and is wrong now."),
    "better": ("Better", "No answer got a better grade."),
    "worse": ("Worse", "No answer got a worse grade."),
    "changed": ("Changed", "No answer changed."),
}
NUM_STATIC_SAMPLES = 10
PRINTED_SAMPLES = (("wrong", 3), ("broken", 1), ("fixed", 2))
MAX_CHIPS = 8
MAX_FIELD_ROWS = 60
MAX_VALUE_CHARS = 2_000
MAX_TEXT_CHARS = 20_000
WORD_PATTERN = re.compile(r"\w+|\s+|[^\w\s]")
MAX_DIFF_WORDS = 600  # longer texts are not aligned word by word: difflib takes quadratic time
MIN_SIMILARITY = 0.3  # share of the letters that are common, for marks to help


@dataclass(frozen=True)
class FieldDiff:
    """A field of the expected or answered object; None where an answer lacks it."""

    name: str
    expected: str | None
    before: str | None
    after: str | None
    is_right: bool


@dataclass(frozen=True)
class SampleDiff:
    """A row of the data; texts are lists of pieces, unmarked and marked in turn."""

    id: str
    prompt: str
    context: str  # messages before the prompt
    expected: list[str]
    before: list[str]
    after: list[str]
    fields: list[FieldDiff]  # empty unless the expected answer and one more are JSON objects
    changed: bool
    state: SampleState
    grades: list[tuple[str, float, float]]  # metric, before, after
    grade: float  # of the answer after training: mean of the grades from 0 to 1
    poor_metrics: list[str]  # by which the answer after training is below 1

    @property
    def label(self) -> str:
        return STATES[self.state][0]

    @property
    def outcome(self) -> str:
        return STATES[self.state][1]

    @property
    def wrong_fields(self) -> list[str]:
        return [field.name for field in self.fields if not field.is_right]

    @property
    def faults(self) -> list[str]:
        """Return what chips select by: wrong fields, or poor metrics of answers without fields."""
        return self.wrong_fields if self.fields else self.poor_metrics

    @property
    def panes(self) -> list[tuple[str, list[str]]]:
        """The texts that no table of fields shows, with their titles."""
        panes = [("Expected", self.expected), ("Before", self.before), ("After", self.after)]
        if self.fields:
            has_before = any(field.before is not None for field in self.fields)
            has_after = any(field.after is not None for field in self.fields)
            panes = [("Before", [] if has_before else self.before)]
            panes.append(("After", [] if has_after else self.after))
        return [(title, pieces) for title, pieces in panes if pieces]

    @property
    def data(self) -> dict[str, object]:
        """The sample as page.js draws it."""
        return {
            "id": self.id,
            "prompt": self.prompt,
            "context": self.context,
            "fields": [list(vars(field).values()) for field in self.fields],
            "wrongFields": self.wrong_fields,
            "faults": self.faults,
            "panes": self.panes,
            "changed": self.changed,
            "state": self.state,
            "label": self.label,
            "outcome": self.outcome,
            "grades": self.grades,
        }


@dataclass(frozen=True)
class SamplesView:
    """Answers, the worst first."""

    diffs: list[SampleDiff]
    metric: str  # that decides what is right; empty if no answer is graded so

    @property
    def static(self) -> list[SampleDiff]:
        """The samples that are shown without JavaScript."""
        return self.diffs[:NUM_STATIC_SAMPLES]

    @property
    def printed(self) -> list[SampleDiff]:
        """A few samples for paper: wrong ones and fixed ones."""
        selected: list[SampleDiff] = []
        for state, count in PRINTED_SAMPLES:
            selected += [diff for diff in self.diffs if diff.state == state][:count]
        return selected or self.diffs[:5]

    @property
    def data(self) -> dict[str, object]:
        messages = {name: message for name, (_, message) in FILTERS.items()}
        return {
            "samples": [diff.data for diff in self.diffs],
            "messages": messages,
            "fields": [name for name, _ in self.chips],
        }

    @property
    def filters(self) -> list[tuple[str, str, int]]:
        """Key, label and number of answers of each filter, in the order of the buttons."""
        states = Counter(diff.state for diff in self.diffs)
        counts = {
            "all": len(self.diffs),
            "wrong-now": sum(states[state] for state in WRONG_STATES),
            "right-now": sum(states[state] for state in RIGHT_STATES),
            "fixed": states["fixed"],
            "broken": states["broken"],
            "better": states["better"],
            "worse": states["worse"],
            "changed": sum(diff.changed for diff in self.diffs),
        }
        hidden = (
            ("better", "worse", "changed") if self.metric else ("wrong-now", "right-now", "fixed")
        )
        if not self.metric:
            hidden = (*hidden, "broken")
        return [(key, FILTERS[key][0], counts[key]) for key in FILTERS if key not in hidden]

    @property
    def chips(self) -> list[tuple[str, int]]:
        """Fields with wrong answers, or metrics below 1, the worst first."""
        counts: Counter[str] = Counter()
        for diff in self.diffs:
            counts.update(diff.faults)
        return counts.most_common(MAX_CHIPS)


def build_samples(run: ReportData) -> SamplesView | None:
    diffs = build_sample_diffs(run)
    if not diffs:
        return None
    grades = collect_grades(run)
    metric = select_deciding_metric(run, grades)
    if not metric and any(diff.state in (*RIGHT_STATES, *WRONG_STATES) for diff in diffs):
        metric = "exact match"
    order = list(STATES)
    ranked = sorted(diffs, key=lambda diff: (order.index(diff.state), diff.grade))
    return SamplesView(ranked, metric)


def build_sample_diffs(run: ReportData) -> list[SampleDiff]:
    """Return the answers in the order of the rows."""
    grades = collect_grades(run)
    metric = select_deciding_metric(run, grades)
    return [
        _diff_pair(before, after, grades.get(before.id, {}), metric)
        for before, after in run.get_sample_pairs()
    ]


def select_deciding_metric(run: ReportData, grades: dict[str, Grades]) -> str:
    """Return the metric that says whether an answer is right; empty if none is 0 or 1 only."""
    errors = run.record.errors if run.record else None
    if errors is not None:
        is_counted = errors.is_binary or errors.right > 0
        return errors.metric if is_counted else ""
    values: dict[str, set[float]] = {}
    for row in grades.values():
        for metric, (before, after, higher_is_better) in row.items():
            if higher_is_better:
                values.setdefault(metric, set()).update((before, after))
    binary = [metric for metric, grade in values.items() if grade <= {0, 1}]
    return "exact_match" if "exact_match" in binary else next(iter(binary), "")


def _diff_pair(
    before: GenerationSample, after: GenerationSample, grades: Grades, metric: str
) -> SampleDiff:
    graded = grades or _grade_exact_match(before, after)
    expected = indent_json(_truncate(after.expected))
    before_text = indent_json(_truncate(before.answer))
    after_text = indent_json(_truncate(after.answer))
    after_grades = [value for _, value, is_better in graded.values() if is_better]
    return SampleDiff(
        id=before.id,
        prompt=_truncate(after.prompt),
        context=_truncate(after.context),
        expected=mark_similar(expected, after_text) if expected else [],
        before=mark_similar(before_text, expected or after_text),
        after=mark_similar(after_text, expected or before_text),
        fields=compare_fields(after.expected, before.answer, after.answer),
        changed=before.answer != after.answer,
        state=_classify_answer(graded, metric or "exact match"),
        grades=[(name, grade[0], grade[1]) for name, grade in grades.items()],
        grade=sum(after_grades) / len(after_grades) if after_grades else 0.0,
        poor_metrics=[
            name for name, (_, value, is_better) in grades.items() if is_better and value < 1
        ],
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


def _classify_answer(grades: Grades, metric: str) -> SampleState:
    if metric in grades:
        before, after, _ = grades[metric]
        if after >= 1:
            return "right" if before >= 1 else "fixed"
        return "broken" if before >= 1 else "wrong"
    return _classify_grades(grades)


def _classify_grades(grades: Grades) -> SampleState:
    if not grades:
        return "ungraded"
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


# ---------------------------------------------------------------- field by field


def compare_fields(expected: str, before: str, after: str) -> list[FieldDiff]:
    """Return a row per field of the expected object, then of what the answers add to it.

    Empty unless the expected answer and one of the others are JSON objects."""
    texts = (expected, before, after)
    objects = [split_fields(text) for text in texts]
    expected_fields, before_fields, after_fields = (fields or {} for fields in objects)
    if not expected_fields or not (before_fields or after_fields):
        return []
    names = list(dict.fromkeys([*expected_fields, *after_fields, *before_fields]))
    values = [_list_long_values(text) for text in texts]
    rows: list[FieldDiff] = []
    for name in names[:MAX_FIELD_ROWS]:
        shown = [
            long_values.get(name, fields[name]) if fields and name in fields else None
            for fields, long_values in zip(objects, values, strict=True)
        ]
        is_right = after_fields.get(name) == expected_fields.get(name)
        rows.append(FieldDiff(name, *shown, is_right=is_right))
    return rows


def _list_long_values(text: str) -> dict[str, str]:
    """Return the values of the outermost fields as JSON, of other texts none."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    values: dict[str, str] = {}
    for name, item in cast("dict[str, Any]", value).items():
        if not isinstance(item, dict):
            shown = json.dumps(item, ensure_ascii=False)
            is_long = len(shown) > MAX_VALUE_CHARS
            values[format_field_name(name)] = f"{shown[:MAX_VALUE_CHARS]} …" if is_long else shown
    return values


def indent_json(text: str) -> str:
    """Break a JSON object or list into lines; leave other texts as they are."""
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        value: Any = json.loads(text)
        indented = json.dumps(value, ensure_ascii=False, indent=2)
    except (ValueError, RecursionError):
        return text
    is_same = "".join(indented.split()) == "".join(text.split())  # no key twice, no other spelling
    return indented if is_same and len(indented) <= MAX_TEXT_CHARS else text


# ---------------------------------------------------------------- word by word


def mark_similar(text: str, other: str) -> list[str]:
    """Split a text into pieces that are, in turn, in the other text and not in it.

    mark_similar("a b c", "a c") -> ["a ", "b ", "c"]; joined, the pieces are the text. A long text,
    or one that has little in common with the other, is one piece."""
    words = WORD_PATTERN.findall(text)
    others = WORD_PATTERN.findall(other)
    if max(len(words), len(others)) > MAX_DIFF_WORDS:
        return [text]
    pieces = [""]
    for kind, first, last, _, _ in SequenceMatcher(
        None, words, others, autojunk=False
    ).get_opcodes():
        is_marked = kind in ("delete", "replace")
        if is_marked != (len(pieces) % 2 == 0):
            pieces.append("")
        pieces[-1] += "".join(words[first:last])
    num_common = sum(len(piece.strip()) for piece in pieces[::2])
    return pieces if num_common >= MIN_SIMILARITY * len(text.strip()) else [text]
