"""Exchange rows with annotation tools: Label Studio and Argilla.

    Dataset, tool -> write_tasks -> a JSON file to import there
    an export of the tool -> import_reviews -> JSON Lines of rows with `review`

The row itself travels along as text and comes back unchanged: only the verdict of an export is
used. Formats: Label Studio's task JSON (label-studio-sdk 2.1), and what `records.to_json` of
Argilla 2.8 writes, without dates and with ids for users. Left out: the servers of the tools, and
the labeling interface (docs/guides/data.md)."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from jsonschema import Draft202012Validator

from tunesmith.core.atomic import write_file
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json, read_json
from tunesmith.core.types import Json
from tunesmith.data.checks.text_stats import extract_row_texts
from tunesmith.data.dataset import Dataset
from tunesmith.data.formats.parse import REVIEW_KEY
from tunesmith.data.golden_set import VERDICTS
from tunesmith.data.sampler import permute_rows

VERDICT_FIELD = "verdict"  # the question that reviewers answer
ROW_KEY = "row"
MAX_VALUES = 2_000_000  # of an export: 100 per task of 20,000


@dataclass(frozen=True)
class Review:
    """The verdict of one reviewer on one row."""

    reviewer: str
    date: str
    verdict: str


@dataclass(frozen=True)
class ReviewImport:
    """The result of `import_reviews`."""

    path: str
    tool: str
    rows: int
    unanswered_rows: int
    verdicts: dict[str, int]


class _ReviewedRow(NamedTuple):
    """The parts of a task that both tools show or store."""

    id: str
    question: str
    answer: str
    row: str  # JSON, without its review
    review: Review | None  # if the row already has one


def write_tasks(dataset: Dataset, tool: str, path: Path) -> int:
    """Write all rows as tasks of an annotation tool and return their number.

    The order is random but always the same, so the first tasks are a fair sample. Raises InputError
    for an unknown tool and an existing file."""
    if tool not in TOOLS:
        fix = f"use one of {', '.join(TOOLS)}"
        raise InputError(f"unknown tool {tool!r:.40}", where="--tool", fix=fix)
    _refuse_existing(path)
    tasks: list[Json] = []
    for index in permute_rows(0, 0, len(dataset)).tolist():
        tasks.append(TOOLS[tool].build_task(_extract_row(dataset, index)))
    write_file(path, dump_json(tasks, indent=1))
    return len(tasks)


def import_reviews(path: Path, output_path: Path, default_date: str | None = None) -> ReviewImport:
    """Convert an export of either tool to a file of reviewed rows.

    `default_date` is used for reviews without a date. Raises InputError for other files, unknown
    verdicts, and rows on which reviewers disagree."""
    _refuse_existing(output_path)
    tasks = _read_tasks(path)
    name = _detect_tool(tasks)
    if name is None:
        message = "neither tasks of Label Studio nor records of Argilla"
        fix = "export as JSON; from Label Studio as JSON, not JSON-MIN"
        raise InputError(message, where=str(path), fix=fix)
    tool = TOOLS[name]
    lines: list[bytes] = []
    verdicts: Counter[str] = Counter()
    for index, task in enumerate(tasks):
        where = f"{path}[{index}]"
        for problem in Draft202012Validator(tool.schema).iter_errors(task):
            message = f"not an export of {name}: {problem.json_path}: {problem.message:.100}"
            raise InputError(message, where=where)
        row, reviews = tool.parse_reviews(task, default_date, where)
        if review := _merge_reviews(reviews, where):
            lines.append(dump_json(row | {REVIEW_KEY: review}))
            verdicts[review.verdict] += 1
    if not lines:
        fix = f"answer `{VERDICT_FIELD}` in the tool, and submit"
        raise InputError("no row has a verdict", where=str(path), fix=fix)
    write_file(output_path, b"".join(lines))
    num_unanswered = len(tasks) - len(lines)
    return ReviewImport(str(output_path), name, len(lines), num_unanswered, dict(verdicts))


def _refuse_existing(path: Path) -> None:
    if path.exists():
        fix = "choose another file with --out, or remove it"
        raise InputError("the file already exists", where=str(path), fix=fix)


def _read_tasks(path: Path) -> list[Json]:
    tasks = read_json(path, fix="export the tasks in parts", max_values=MAX_VALUES)
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise InputError("not a JSON array of objects", where=str(path), fix="export as JSON")
    return tasks


def _detect_tool(tasks: list[Json]) -> str | None:
    for name, tool in TOOLS.items():
        if tasks and all(tool.key in task for task in tasks):
            return name
    return None


def _merge_reviews(reviews: list[Review], where: str) -> Review | None:
    """Return the newest review; the verdicts must agree."""
    for review in reviews:
        if review.verdict not in VERDICTS:
            fix = f"the choices are {', '.join(VERDICTS)}"
            raise InputError(f"unknown verdict {review.verdict!r:.40}", where=where, fix=fix)
    if len({review.verdict for review in reviews}) > 1:
        verdicts = ", ".join(f"{review.reviewer}: {review.verdict}" for review in reviews)
        fix = "settle it in the tool, and export again"
        raise InputError(f"reviewers disagree: {verdicts}", where=where, fix=fix)
    return max(reviews, key=lambda review: review.date, default=None)


def _extract_row(dataset: Dataset, index: int) -> _ReviewedRow:
    row = dict(dataset.read_row(index).data)
    row_texts = extract_row_texts(dataset.read_example(index))
    existing = row.pop(REVIEW_KEY, None)
    review = None
    if isinstance(existing, dict) and set(existing) >= {"reviewer", "date", "verdict"}:
        reviewer = str(existing["reviewer"])
        review = Review(reviewer, str(existing["date"]), str(existing["verdict"]))
    question = "\n\n".join(row_texts.texts[:-1])
    row_text = json.dumps(row, ensure_ascii=False)
    return _ReviewedRow(dataset.get_id(index), question, row_texts.answer, row_text, review)


def _parse_row(text: Any, where: str) -> Json:
    try:
        row = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        fix = "review a file that tunesmith wrote for the tool: it contains the rows"
        raise InputError(f"`{ROW_KEY}` is not the original row", where=where, fix=fix)
    return row


def _parse_date(text: str, default_date: str | None, where: str) -> str:
    text = text or default_date or ""
    if not text:
        fix = "pass the date of the reviews: --date 2026-11-25"
        raise InputError("the review has no date", where=where, fix=fix)
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        message = f"the date of the review is {text!r:.40}"
        raise InputError(message, where=where, fix="write it as 2026-11-25") from None


# ---------------------------------------------------------------- Label Studio


def build_label_studio_task(row: _ReviewedRow) -> Json:
    """Build a task, with the existing review as its annotation."""
    data = {"id": row.id, "question": row.question, "answer": row.answer, ROW_KEY: row.row}
    if row.review is None:
        return {"data": data}
    result = {
        "from_name": VERDICT_FIELD,
        "to_name": "answer",
        "type": "choices",
        "value": {"choices": [row.review.verdict]},
    }
    annotation = {
        "completed_by": {"email": row.review.reviewer},
        "created_at": f"{row.review.date}T00:00:00Z",
        "result": [result],
    }
    return {"data": data, "annotations": [annotation]}


def parse_label_studio_reviews(
    task: Json, default_date: str | None, where: str
) -> tuple[Json, list[Review]]:
    """Return the row and the newest review of each reviewer, without cancelled ones."""

    def get_timestamp(annotation: Json) -> str:
        return str(annotation.get("created_at", ""))

    newest: dict[str, Review] = {}
    annotations: list[Json] = task.get("annotations") or []
    for annotation in sorted(annotations, key=get_timestamp):
        if annotation.get("was_cancelled") or annotation.get("skipped"):
            continue
        reviewer = annotation.get("completed_by")
        if isinstance(reviewer, dict):
            reviewer = reviewer.get("email") or reviewer.get("id")
        results: list[Json] = annotation.get("result") or []
        for result in results:
            if result.get("from_name") != VERDICT_FIELD:
                continue
            choices: list[Any] = result.get("value", {}).get("choices", [])
            for verdict in choices:
                review_date = _parse_date(get_timestamp(annotation)[:10], default_date, where)
                newest[str(reviewer)] = Review(str(reviewer), review_date, str(verdict))
    return _parse_row(task["data"].get(ROW_KEY), where), list(newest.values())


# Checked against an export before it is read.
LABEL_STUDIO_SCHEMA: Json = {
    "properties": {
        "data": {"type": "object"},
        "annotations": {
            "type": ["array", "null"],
            "items": {
                "type": "object",
                "required": ["completed_by"],
                "properties": {
                    "result": {
                        "type": ["array", "null"],
                        "items": {
                            "type": "object",
                            "properties": {
                                "value": {
                                    "type": "object",
                                    "properties": {"choices": {"type": "array"}},
                                }
                            },
                        },
                    }
                },
            },
        },
    }
}


# ---------------------------------------------------------------- Argilla


def build_argilla_record(row: _ReviewedRow) -> Json:
    """Build a record, with the existing review as its response."""
    metadata = {ROW_KEY: row.row}
    responses: Json = {}
    if row.review:
        metadata |= {"reviewer": row.review.reviewer, "date": row.review.date}
        user_id = _make_user_id(row.review.reviewer)
        responses = {VERDICT_FIELD: [{"value": row.review.verdict, "user_id": user_id}]}
    return {
        "id": row.id,
        "fields": {"question": row.question, "answer": row.answer},
        "metadata": metadata,
        "suggestions": {},
        "responses": responses,
        "vectors": {},
        "status": "completed" if row.review else "pending",
    }


def parse_argilla_reviews(
    record: Json, default_date: str | None, where: str
) -> tuple[Json, list[Review]]:
    """Return the row and its reviews; reviewers are ids, except those of `build_argilla_record`."""
    metadata = record.get("metadata") or {}
    reviews: list[Review] = []
    for response in (record.get("responses") or {}).get(VERDICT_FIELD, ()):
        reviewer = str(response["user_id"])
        date_text = ""
        if "reviewer" in metadata and reviewer == _make_user_id(metadata["reviewer"]):
            reviewer = metadata["reviewer"]
            date_text = str(metadata.get("date", ""))
        review_date = _parse_date(date_text, default_date, where)
        reviews.append(Review(reviewer, review_date, str(response["value"])))
    return _parse_row(metadata.get(ROW_KEY), where), reviews


def _make_user_id(name: str) -> str:
    """Return a deterministic UUID, which Argilla needs for a user."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, name))


ARGILLA_SCHEMA: Json = {
    "properties": {
        "metadata": {"type": "object"},
        "responses": {
            "type": "object",
            "properties": {
                VERDICT_FIELD: {
                    "type": "array",
                    "items": {"type": "object", "required": ["value", "user_id"]},
                }
            },
        },
    }
}


# ---------------------------------------------------------------- the tools


class AnnotationTool(NamedTuple):
    """How the files of a tool are written, recognized, checked and read."""

    build_task: Callable[[_ReviewedRow], Json]
    parse_reviews: Callable[[Json, str | None, str], tuple[Json, list[Review]]]
    key: str  # only this tool has it
    schema: Json


TOOLS: dict[str, AnnotationTool] = {
    "label-studio": AnnotationTool(
        build_label_studio_task, parse_label_studio_reviews, "data", LABEL_STUDIO_SCHEMA
    ),
    "argilla": AnnotationTool(
        build_argilla_record, parse_argilla_reviews, "fields", ARGILLA_SCHEMA
    ),
}
