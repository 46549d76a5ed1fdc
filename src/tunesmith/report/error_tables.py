"""What is still wrong with the answers of a run: tables of errors, confusions, floors.

In: ReportData. Out: ErrorsView, which errors.html.jinja draws, or None where no answer was graded.
Left out: counting the errors (evaluate/error_analysis.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from tunesmith.core.evidence import MAX_GROUPS, Confusion, ErrorAnalysis, ErrorGroup, ErrorTable
from tunesmith.report.run_data import ReportData

MAX_OPEN_GROUPS = 8  # of the table that is always shown
MAX_MATRIX_LABELS = 8  # a wider matrix is not read; the pairs most often confused are
TITLES = {
    "label": "By label, lowest F1 first",
    "field": "By field",
    "expected_value": "By expected value",
    "task": "By task",
    "format": "By form of the answer",
}
# The first of these with a wrong answer is shown open.
OPEN_TABLES = ("label", "field", "format", "expected_value", "task")
BAR_WIDTH = 120  # pixels


@dataclass(frozen=True)
class GroupView:
    group: ErrorGroup
    bar: float  # pixels
    field: str  # that the link selects; empty: the rows of the group

    @property
    def interval(self) -> str:
        return f"{self.group.low:.0%} to {self.group.high:.0%}"

    @property
    def link(self) -> str:
        """The text of the link to the wrong answers; only the first ones have their ids."""
        count = len(self.group.rows)
        if self.field or count == self.group.wrong:
            return f"{self.group.wrong:,} wrong"
        return f"first {count} of {self.group.wrong:,}"


@dataclass(frozen=True)
class TableView:
    by: str
    title: str
    name: str  # of the column of groups
    groups: tuple[GroupView, ...]
    omitted: int
    has_before: bool
    has_only_here: bool
    has_training: bool


@dataclass(frozen=True)
class ErrorsView:
    analysis: ErrorAnalysis
    open_table: TableView | None
    tables: tuple[TableView, ...]
    confusions: tuple[Confusion, ...]
    matrix: dict[str, dict[str | None, int]]  # expected -> answered -> rows; empty: too many labels
    red_lines: tuple[str, ...]  # constants, and floors that are not beaten

    @property
    def wrong(self) -> int:
        return self.analysis.n - self.analysis.right

    @property
    def has_right_and_wrong(self) -> bool:
        """Whether an answer below 1 is wrong: none reaches 1 by metrics such as chrf."""
        return self.analysis.is_binary or self.analysis.right > 0

    @property
    def metric(self) -> str:
        return self.analysis.metric.replace("_", " ")


def build_errors(run: ReportData) -> ErrorsView | None:
    analysis = run.record.errors if run.record else None
    if analysis is None:
        return None
    chosen = _choose_open_table(analysis)
    open_table = None if chosen is None else _build_table(chosen, is_open=True)
    tables: list[TableView] = []
    for table in analysis.tables:
        if (
            open_table is None
            or len(table.groups) > len(open_table.groups)
            or (open_table.by != table.by)
        ):
            tables.append(_build_table(table))
    unbeaten = [floor for floor in analysis.floors if not floor.is_beaten]
    return ErrorsView(
        analysis=analysis,
        open_table=open_table,
        tables=tuple(tables),
        confusions=analysis.confusions[:MAX_GROUPS],
        matrix=_build_matrix(analysis),
        red_lines=(
            *(shortcut.description for shortcut in analysis.shortcuts),
            *(f"not beaten: {floor.description}" for floor in unbeaten[:MAX_OPEN_GROUPS]),
        ),
    )


def _choose_open_table(analysis: ErrorAnalysis) -> ErrorTable | None:
    """Return the table to show first: that of the form if most answers do not even have that."""
    form = analysis.get_table("format")
    if form is not None and any(2 * group.wrong > group.n for group in form.groups):
        return form
    for by in OPEN_TABLES:
        table = analysis.get_table(by)
        if table is not None and any(group.wrong for group in table.groups):
            return table
    return None


def _build_matrix(analysis: ErrorAnalysis) -> dict[str, dict[str | None, int]]:
    table = analysis.get_table("label")
    if table is None or len(table.groups) + table.omitted > MAX_MATRIX_LABELS:
        return {}
    matrix: dict[str, dict[str | None, int]] = {}
    for each in sorted(table.groups, key=lambda group: group.name):
        matrix[each.name] = {each.name: each.n - each.wrong}
    for confusion in analysis.confusions:
        matrix[confusion.expected][confusion.answered] = confusion.n
    return matrix


def _build_table(table: ErrorTable, *, is_open: bool = False) -> TableView:
    groups = table.groups
    omitted = table.omitted
    if is_open:
        groups = groups[:MAX_OPEN_GROUPS]
        omitted += len(table.groups) - len(groups)
    is_field = table.by == "field"
    views: list[GroupView] = []
    for group in groups:
        bar = round(BAR_WIDTH * min(1.0, max(0.0, group.error)), 1)
        views.append(GroupView(group, bar, group.name if is_field else ""))
    return TableView(
        by=table.by,
        title=TITLES.get(table.by, f"By {table.by}"),
        name=table.by.replace("_", " "),
        groups=tuple(views),
        omitted=omitted,
        has_before=any(group.wrong_before is not None for group in groups),
        has_only_here=any(group.only_here for group in groups),
        has_training=any(group.training_rows is not None for group in groups),
    )
