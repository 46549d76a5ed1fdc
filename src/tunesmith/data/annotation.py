"""Rows to review as CSV and back: in a spreadsheet, or in any annotation tool that reads CSV.

    Dataset -> write_reviews -> a CSV file with the columns id, question, answer, verdict, ...
    the file with verdicts -> import_reviews -> JSON Lines of rows with `review`

The row itself travels along as JSON and comes back unchanged: only verdict, reviewer and date are
read. Left out: what a review is for (golden_set.py)."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from tunesmith.core.atomic import write_file
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json, read_file
from tunesmith.core.types import Json
from tunesmith.data.checks.text_stats import extract_row_texts
from tunesmith.data.dataset import Dataset
from tunesmith.data.formats.parse import REVIEW_KEY
from tunesmith.data.golden_set import VERDICTS
from tunesmith.data.sampler import permute_rows

REVIEW_FIELDS = ("verdict", "reviewer", "date")
COLUMNS = ("id", "question", "answer", *REVIEW_FIELDS, "row")
FORMULA_SIGNS = ("=", "+", "-", "@")  # with which a spreadsheet takes a text for a formula
MAX_CELL = 16 * 2**20  # characters


@dataclass(frozen=True)
class ReviewImport:
    """The result of `import_reviews`."""

    path: str
    rows: int
    unanswered_rows: int
    verdicts: dict[str, int]


def write_reviews(dataset: Dataset, path: Path) -> int:
    """Write all rows to a CSV file and return their number.

    The order is random but always the same, so the first rows are a fair sample. Raises InputError
    for an existing file."""
    _refuse_existing(path)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for index in permute_rows(0, 0, len(dataset)).tolist():
        row = dict(dataset.read_row(index).data)
        texts = extract_row_texts(dataset.read_example(index))
        shown = ("\n\n".join(texts.texts[:-1]), texts.answer)
        review = row.pop(REVIEW_KEY, None)
        earlier = review if isinstance(review, dict) else {}
        writer.writerow(
            [
                dataset.get_id(index),
                *(f"'{each}" if each.startswith(FORMULA_SIGNS) else each for each in shown),
                *(earlier.get(field, "") for field in REVIEW_FIELDS),
                json.dumps(row, ensure_ascii=False),
            ]
        )
    write_file(path, text.getvalue().encode("utf-8-sig"))  # so that Excel reads UTF-8
    return len(dataset)


def import_reviews(
    path: Path, output_path: Path, *, reviewer: str = "", day: str = ""
) -> ReviewImport:
    """Write the rows that have a verdict, with their review. `reviewer` and `day` are used where a
    row names none.

    Raises InputError with the line for unknown verdicts, and for rows with two of them."""
    _refuse_existing(output_path)
    reviewed: dict[str, Json] = {}
    num_unanswered = 0
    for where, cells in _read_cells(path):
        if not cells["verdict"]:
            num_unanswered += 1
            continue
        row = _parse_row(cells["row"], where)
        review = _parse_review(cells, reviewer, day, where)
        earlier = reviewed.setdefault(cells["row"], row | {REVIEW_KEY: review})[REVIEW_KEY]
        if earlier["verdict"] != review["verdict"]:
            message = f"{earlier['reviewer']}: {earlier['verdict']}, "
            message += f"{review['reviewer']}: {review['verdict']}"
            fix = "settle it, and remove one of the rows"
            raise InputError(f"reviewers disagree: {message}", where=where, fix=fix)
    if not reviewed:
        fix = f"fill in the column verdict: {', '.join(VERDICTS)}"
        raise InputError("no row has a verdict", where=str(path), fix=fix)
    write_file(output_path, b"".join(map(dump_json, reviewed.values())))
    verdicts = Counter(row[REVIEW_KEY]["verdict"] for row in reviewed.values())
    return ReviewImport(str(output_path), len(reviewed), num_unanswered, dict(verdicts))


def _refuse_existing(path: Path) -> None:
    if path.exists():
        fix = "choose another file with --out, or remove it"
        raise InputError("the file already exists", where=str(path), fix=fix)


def _read_cells(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
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
            yield (
                f"{path}:{reader.line_num}",
                {name: (cells.get(name) or "").strip() for name in COLUMNS},
            )
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


def _parse_review(cells: dict[str, str], reviewer: str, day: str, where: str) -> dict[str, str]:
    verdict = cells["verdict"].lower()
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
    return {"reviewer": name, "date": review_date, "verdict": verdict}
