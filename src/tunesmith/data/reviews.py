"""Reviews of rows by people: to a table and back, with corrections and disagreements.

    Dataset -> write_reviews -> a CSV file with the columns of COLUMNS
    such files with verdicts -> import_reviews -> JSON Lines of rows with `review`, ReviewImport

The row travels along as JSON. Of several verdicts of one reviewer on a row, the later counts.
Where reviewers differ, the row becomes `unsettled`, and a second table lists their verdicts; a
verdict that is filled in there decides. A correction replaces the answer, which is then good; the
review keeps the answer that was corrected. Left out: what verdicts do (golden_set.py, formats/),
and how far reviewers agree (agreement.py)."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from jsonschema.protocols import Validator

from tunesmith.core.atomic import write_file
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json, read_file
from tunesmith.core.types import Json
from tunesmith.data.agreement import Agreement, measure_agreement
from tunesmith.data.checks.text_stats import extract_row_texts
from tunesmith.data.dataset import Dataset
from tunesmith.data.formats.parse import REVIEW_KEY
from tunesmith.data.golden_set import VERDICTS
from tunesmith.data.json_schema import find_violation, make_validator
from tunesmith.data.sampler import permute_rows

REVIEW_FIELDS = ("verdict", "reviewer", "date", "reason")
COLUMNS: tuple[str, ...] = (
    "id",
    "question",
    "answer",
    "correction",
    *REVIEW_FIELDS,
    "verdicts",
    "row",
)
UNSETTLED = "unsettled"
ANSWER_KEYS = ("messages", "conversations", "completion", "output", "chosen", "text")
FORMULA_SIGNS = ("=", "+", "-", "@")  # with which a spreadsheet takes a text for a formula
MAX_CELL = 16 * 2**20  # characters

Cells = dict[str, str]


@dataclass(frozen=True)
class Review:
    """One verdict of one reviewer. `decides` if it settles those of others."""

    reviewer: str
    date: str
    verdict: str
    reason: str
    correction: str
    decides: bool

    def to_json(self) -> Json:
        fields = ("reviewer", "date", "verdict", "reason", "correction")
        return {name: getattr(self, name) for name in fields if getattr(self, name)}


@dataclass(frozen=True)
class ReviewImport:
    """The result of `import_reviews`."""

    path: str
    rows: int
    unanswered_rows: int
    replaced_verdicts: int  # by a later one of the same reviewer
    corrected_rows: int
    verdicts: dict[str, int]
    agreement: Agreement | None  # None if no row has two reviewers
    disagreements: str  # the table to settle, "" if there are none


def write_reviews(dataset: Dataset, path: Path) -> int:
    """Write all rows to a CSV file and return their number.

    The order is random but always the same, so the first rows are a fair sample. Raises InputError
    for an existing file."""
    _refuse_existing(path)
    lines: list[Cells] = []
    for index in permute_rows(0, 0, len(dataset)).tolist():
        row = dict(dataset.read_row(index).data)
        texts = extract_row_texts(dataset.read_example(index))
        review = row.pop(REVIEW_KEY, None)
        earlier: Json = review if isinstance(review, dict) else {}
        cells = {name: str(earlier.get(name, "")) for name in REVIEW_FIELDS}
        cells |= {"id": dataset.get_id(index), "row": json.dumps(row, ensure_ascii=False)}
        cells |= {"question": "\n\n".join(texts.texts[:-1]), "answer": texts.answer}
        lines.append(cells)
    _write_table(lines, path)
    return len(dataset)


def _write_table(lines: Iterable[Cells], path: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="")
    writer.writeheader()
    for cells in lines:
        quoted = {"question", "answer", "correction"}
        writer.writerow({
            name: f"'{cell}" if name in quoted and cell.startswith(FORMULA_SIGNS) else cell
            for name, cell in cells.items()
        })  # fmt: skip
    write_file(path, text.getvalue().encode("utf-8-sig"))  # so that Excel reads UTF-8


# ---------------------------------------------------------------- import


def import_reviews(
    paths: Sequence[Path],
    output_path: Path,
    *,
    reviewer: str = "",
    day: str = "",
    schema: Json | None = None,
) -> ReviewImport:
    """Write the rows that have a verdict, with their review. `reviewer` and `day` are used where a
    row names none. `schema` is the one of answers.

    Raises InputError with the line for unknown verdicts, and corrections that break the schema or
    are another spelling of a label; and for a file that has no row of the others."""
    disagreements_path = output_path.with_suffix(".disagreements.csv")
    for path in (output_path, disagreements_path):
        _refuse_existing(path)
    validator = make_validator(schema) if schema is not None else None
    tables = {path: list(_read_cells(path)) for path in paths}
    _refuse_other_rows(tables)
    lines = [line for table in tables.values() for line in table]
    labels = Counter(cells["answer"] for _, cells in lines)
    cells_by_row: dict[str, Cells] = {}
    reviews: dict[str, list[Review]] = {}
    for where, cells in lines:
        cells_by_row.setdefault(cells["row"], cells)
        if cells["verdict"] or cells["correction"]:
            _parse_row(cells["row"], where)
            _refuse_correction(cells, labels, validator, where)
            reviews.setdefault(cells["row"], []).append(_parse_review(cells, reviewer, day, where))
    if not reviews:
        fix = f"fill in the column verdict: {', '.join(VERDICTS)}"
        raise InputError("no row has a verdict", where=str(paths[0]), fix=fix)
    latest = {row: _drop_replaced(row_reviews) for row, row_reviews in reviews.items()}
    rows = {row: _settle(cells_by_row[row], row_reviews) for row, row_reviews in latest.items()}
    verdicts = Counter(row[REVIEW_KEY]["verdict"] for row in rows.values())
    if verdicts[UNSETTLED]:
        unsettled = [key for key, row in rows.items() if row[REVIEW_KEY]["verdict"] == UNSETTLED]
        lines_to_settle = [_list_verdicts(cells_by_row[key], latest[key]) for key in unsettled]
        _write_table(lines_to_settle, disagreements_path)
    write_file(output_path, b"".join(map(dump_json, rows.values())))
    return ReviewImport(
        path=str(output_path),
        rows=len(rows),
        unanswered_rows=len(cells_by_row) - len(rows),
        replaced_verdicts=sum(map(len, reviews.values())) - sum(map(len, latest.values())),
        corrected_rows=sum("corrected_from" in row[REVIEW_KEY] for row in rows.values()),
        verdicts=dict(verdicts),
        agreement=measure_agreement(list(map(_list_opinions, latest.values()))),
        disagreements=str(disagreements_path) if verdicts[UNSETTLED] else "",
    )


def _list_opinions(reviews: Sequence[Review]) -> list[str]:
    """Return the verdicts of a row without the one that decides."""
    return [review.verdict for review in reviews if not review.decides]


def _refuse_existing(path: Path) -> None:
    if path.exists():
        fix = "choose another file with --out, or remove it"
        raise InputError("the file already exists", where=str(path), fix=fix)


def _refuse_other_rows(tables: Mapping[Path, Sequence[tuple[str, Cells]]]) -> None:
    """Raise InputError for a table that has no row of the other ones."""
    for path, table in tables.items():
        rows = {cells["row"] for _, cells in table}
        other_tables = (other for other_path, other in tables.items() if other_path != path)
        other_rows = {cells["row"] for other in other_tables for _, cells in other}
        if other_rows and not rows & other_rows:
            fix = "import files of different rows one by one"
            raise InputError("no row of the other files is in it", where=str(path), fix=fix)


def _read_cells(path: Path) -> Iterator[tuple[str, Cells]]:
    """Yield (file:line, cell by column) of every row. Raises InputError for a file that is not the
    CSV of `write_reviews`."""
    fix = "save the file of `tunesmith data export-reviews` as CSV, in UTF-8 and with commas"
    csv.field_size_limit(MAX_CELL)
    try:
        text = read_file(path).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        names = reader.fieldnames or ()
        if missing := [name for name in ("verdict", "row") if name not in names]:
            raise InputError(f"no column {missing[0]}", where=f"{path}:1", fix=fix)
        for cells in reader:
            stripped = {name: (cells.get(name) or "").strip() for name in COLUMNS}
            for name in ("answer", "correction"):
                if stripped[name].startswith(tuple(f"'{sign}" for sign in FORMULA_SIGNS)):
                    stripped[name] = stripped[name][1:]
            yield f"{path}:{reader.line_num}", stripped
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"not CSV: {error}", where=str(path), fix=fix) from None


def _parse_row(text: str, where: str) -> Json:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        fix = "leave the column row as it was written"
        raise InputError("`row` is not the original row", where=where, fix=fix)
    return row


def _parse_review(cells: Cells, reviewer: str, day: str, where: str) -> Review:
    verdict = cells["verdict"].lower() or "bad"  # an answer that is corrected
    if verdict not in VERDICTS:
        fix = f"the choices are {', '.join(VERDICTS)}"
        raise InputError(f"unknown verdict {verdict!r:.40}", where=where, fix=fix)
    name = cells["reviewer"] or reviewer
    if not name:
        fix = "fill in the column, or pass --reviewer NAME"
        raise InputError("the review has no reviewer", where=where, fix=fix)
    text = cells["date"] or day
    try:
        review_date = date.fromisoformat(text).isoformat()
    except ValueError:
        message = f"the date of the review is {text!r:.40}"
        fix = "write it as 2026-11-25, in the column or with --date"
        raise InputError(message, where=where, fix=fix) from None
    decides = bool(cells["verdicts"])
    return Review(name, review_date, verdict, cells["reason"], cells["correction"], decides)


# ---------------------------------------------------------------- corrections


def _refuse_correction(
    cells: Cells, labels: Mapping[str, int], validator: Validator | None, where: str
) -> None:
    """Raise InputError for a correction that no run could use."""
    correction = cells["correction"]
    if not correction:
        return
    if _correct(json.loads(cells["row"]), cells["answer"], correction) is None:
        fix = "leave the columns answer and row as they were written"
        raise InputError("the row does not have this answer", where=where, fix=fix)
    same = [label for label in labels if label.casefold() == correction.casefold()]
    if same and correction not in same:
        message = f"the correction {correction!r:.40} is {same[0]!r:.40} in other rows"
        raise InputError(message, where=where, fix="write each label in one way")
    is_json = cells["answer"].startswith(("{", "["))
    if validator is None and not is_json:
        return
    try:
        value = json.loads(correction)
    except (ValueError, RecursionError) as error:
        fix = "write JSON, as the answer was" if is_json else "write JSON, as the schema says"
        raise InputError(f"the correction is not JSON: {error}", where=where, fix=fix) from None
    if validator and (violation := find_violation(value, validator)):
        message = f"the correction violates the schema: {violation}"
        raise InputError(message, where=where, fix="correct it")


def _correct(row: Json, answer: str, correction: str) -> Json | None:
    """Return the row with its answer replaced, None if it has none that equals `answer`."""
    for key in ANSWER_KEYS:
        value: Any = row.get(key)
        if isinstance(value, str) and value.strip() == answer:
            return row | {key: correction}
        if isinstance(value, list) and value and isinstance(value[-1], dict):
            last: Json = value[-1]
            for name in ("content", "value"):
                if str(last.get(name, "")).strip() == answer:
                    return row | {key: [*value[:-1], last | {name: correction}]}
    return None


# ---------------------------------------------------------------- verdicts of one row


def _drop_replaced(reviews: Sequence[Review]) -> list[Review]:
    """Return the latest review of each reviewer, the latest of all last. One that decides does not
    replace the opinion of the same reviewer."""
    latest: dict[tuple[str, bool], Review] = {}
    for review in sorted(reviews, key=lambda review: review.date):
        latest.pop((review.reviewer, review.decides), None)
        latest[review.reviewer, review.decides] = review
    return list(latest.values())


def _settle(cells: Cells, reviews: Sequence[Review]) -> Json:
    """Return the row with its review: the one verdict, or the one that decides, or unsettled."""
    row: Json = json.loads(cells["row"])
    final = replace(reviews[-1], reviewer=", ".join(review.reviewer for review in reviews))
    if deciding := [review for review in reviews if review.decides]:
        final = deciding[-1]
    elif len({(review.verdict, review.correction) for review in reviews}) > 1:
        final = replace(final, verdict=UNSETTLED, reason="", correction="")
    entry = final.to_json()
    if entry.pop("correction", ""):
        corrected = _correct(row, cells["answer"], final.correction)
        assert corrected is not None, "such corrections are refused"
        row = corrected
        entry |= {"verdict": "good", "corrected_from": cells["answer"]}
    if len(reviews) > 1:
        entry["reviews"] = [review.to_json() for review in reviews]
    return row | {REVIEW_KEY: entry}


def _list_verdicts(cells: Cells, reviews: Sequence[Review]) -> Cells:
    """Return the line in which a row is settled."""
    parts = [
        f"{review.reviewer}: {review.verdict}"
        + f" ({review.reason})" * bool(review.reason)
        + f" -> {review.correction}" * bool(review.correction)
        for review in reviews
    ]
    columns = ("id", "question", "answer", "row")
    return {name: cells[name] for name in columns} | {"verdicts": "; ".join(parts)}
