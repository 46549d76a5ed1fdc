"""Rows to people and back: files that Label Studio and Argilla import, and what they export once
rows are reviewed.

    Dataset, tool -> tasks_of -> a JSON file to import there; its export -> read_reviews -> rows with `review`

The row itself travels along as text and comes back as it was; nothing that was changed in the tool
but the verdict is taken. Formats: the tasks of Label Studio's JSON (label-studio-sdk 2.1), and what
`records.to_json` of Argilla 2.8 writes: it has no dates, and users are ids. Left out: their
servers, and the form that asks (docs/guides/data.md)."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from tunesmith.core.atomic import write_file
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json
from tunesmith.core.types import Json
from tunesmith.data.checks.text_stats import extract_row_texts
from tunesmith.data.dataset import Dataset
from tunesmith.data.formats.row_formats import REVIEW_KEY
from tunesmith.data.golden_set import VERDICTS
from tunesmith.data.sampler import permutation

VERDICT_FIELD = "verdict"  # that people answer
ROW_KEY = "row"


@dataclass(frozen=True)
class Review:
    reviewer: str
    date: str
    verdict: str


@dataclass(frozen=True)
class ReviewImport:
    path: str
    tool: str
    rows: int
    unanswered_rows: int  # tasks that nobody has answered
    verdicts: dict[str, int]


def write_tasks(dataset: Dataset, tool: str, path: Path) -> int:
    """All rows, in a random order that is always the same, so that a part of them is a fair sample.
    Raises InputError for an unknown tool and a file that is there already."""
    if tool not in TOOLS:
        raise InputError(
            f"unknown tool {tool!r:.40}", where="--tool", fix=f"one of {', '.join(TOOLS)}"
        )
    _refuse_existing(path)
    build_task = TOOLS[tool][0]
    tasks = [build_task(dataset, int(index)) for index in permutation(0, 0, len(dataset))]
    write_file(path, dump_json(tasks, indent=1))
    return len(tasks)


def import_reviews(path: Path, output_path: Path, default_date: str | None = None) -> ReviewImport:
    """An export of either tool, told by its keys, as a file of reviewed rows. `when`: of reviews
    that have none. Raises InputError for what is no export, for verdicts that are none, and where
    reviewers of a row disagree."""
    _refuse_existing(output_path)
    tasks = _read_tasks(path)
    tool = next(
        (tool for tool, (_, _, key) in TOOLS.items() if all(key in task for task in tasks)), None
    )
    if tool is None or not tasks:
        fix = "export as JSON: of Label Studio the whole format, not JSON-MIN"
        raise InputError(
            "neither tasks of Label Studio nor records of Argilla", where=str(path), fix=fix
        )
    lines: list[bytes] = []
    verdicts: dict[str, int] = {}
    for index, task in enumerate(tasks):
        where = f"{path}[{index}]"
        for problem in Draft202012Validator(SCHEMAS[tool]).iter_errors(task):
            raise InputError(
                f"not as {tool} writes it: {problem.json_path}: {problem.message:.100}", where=where
            )
        row, reviews = TOOLS[tool][1](task, default_date, where)
        if review := _pick_newest_review(reviews, where):
            lines.append(dump_json(row | {REVIEW_KEY: review}))
            verdicts[review.verdict] = verdicts.get(review.verdict, 0) + 1
    if not lines:
        raise InputError(
            "no row has a verdict",
            where=str(path),
            fix=f"answer `{VERDICT_FIELD}` in the tool, and submit",
        )
    write_file(output_path, b"".join(lines))
    return ReviewImport(str(output_path), tool, len(lines), len(tasks) - len(lines), verdicts)


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise InputError(
            "it is there already", where=str(path), fix="name another file with --to, or remove it"
        )


def _read_tasks(path: Path) -> list[Json]:
    try:
        tasks = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", where=str(path)) from error
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise InputError("not a JSON array of objects", where=str(path), fix="export as JSON")
    return tasks


def _pick_newest_review(reviews: list[Review], where: str) -> Review | None:
    """The newest of them."""
    for review in reviews:
        if review.verdict not in VERDICTS:
            fix = f"the choices are {', '.join(VERDICTS)}"
            raise InputError(f"the verdict is {review.verdict!r:.40}", where=where, fix=fix)
    if len({review.verdict for review in reviews}) > 1:
        verdicts = ", ".join(f"{review.reviewer}: {review.verdict}" for review in reviews)
        raise InputError(
            f"reviewers disagree: {verdicts}",
            where=where,
            fix="settle it in the tool, and export again",
        )
    return max(reviews, key=lambda review: review.date, default=None)


def _parse_row(text: Any, where: str) -> Json:
    try:
        row = json.loads(text)
    except (TypeError, ValueError):
        row = None
    if not isinstance(row, dict):
        fix = "review a file of `tunesmith data review`: it has the rows in it"
        raise InputError(f"`{ROW_KEY}` is not the row as it was", where=where, fix=fix)
    return row


def _extract_fields(dataset: Dataset, index: int) -> tuple[str, str, str, Review | None]:
    """(question, answer, the row as JSON without its review, the review that it has already)."""
    row, row_texts = (
        dict(dataset.read_row(index).data),
        extract_row_texts(dataset.read_example(index)),
    )
    existing = row.pop(REVIEW_KEY, None)
    has_review = isinstance(existing, dict) and set(existing) >= {"reviewer", "date", "verdict"}
    review = (
        Review(*(str(existing[key]) for key in ("reviewer", "date", "verdict")))
        if has_review
        else None
    )
    return (
        "\n\n".join(row_texts.texts[:-1]),
        row_texts.answer,
        json.dumps(row, ensure_ascii=False),
        review,
    )


# ---------------------------------------------------------------- Label Studio


def build_label_studio_task(dataset: Dataset, index: int) -> Json:
    question, answer, row, review = _extract_fields(dataset, index)
    task: Json = {
        "data": {"id": dataset.get_id(index), "question": question, "answer": answer, ROW_KEY: row}
    }
    if review:
        result = {
            "from_name": VERDICT_FIELD,
            "to_name": "answer",
            "type": "choices",
            "value": {"choices": [review.verdict]},
        }
        timestamp = f"{review.date}T00:00:00Z"
        task["annotations"] = [
            {
                "completed_by": {"email": review.reviewer},
                "created_at": timestamp,
                "result": [result],
            }
        ]
    return task


def parse_label_studio_reviews(
    task: Json, default_date: str | None, where: str
) -> tuple[Json, list[Review]]:
    """Of each reviewer the newest annotation; cancelled ones, and those without a verdict, are
    none."""
    newest: dict[str, Review] = {}
    active = [
        annotation
        for annotation in task.get("annotations") or ()
        if not (annotation.get("was_cancelled") or annotation.get("skipped"))
    ]
    for annotation in sorted(active, key=lambda annotation: str(annotation.get("created_at", ""))):
        completed_by = annotation.get("completed_by")
        reviewer = str(
            (completed_by.get("email") or completed_by.get("id"))
            if isinstance(completed_by, dict)
            else completed_by
        )
        for verdict in _iter_verdicts(annotation):
            newest[reviewer] = Review(
                reviewer,
                _parse_date(str(annotation.get("created_at", ""))[:10], default_date, where),
                verdict,
            )
    return _parse_row(task["data"].get(ROW_KEY), where), list(newest.values())


def _iter_verdicts(annotation: Json) -> Iterator[str]:
    for result in annotation.get("result") or ():
        if result.get("from_name") == VERDICT_FIELD:
            yield from map(str, result.get("value", {}).get("choices", ()))


def _parse_date(text: str, default_date: str | None, where: str) -> str:
    if not (text or default_date):
        raise InputError(
            "the review has no date", where=where, fix="say when it was made: --date 2026-11-25"
        )
    try:
        return date.fromisoformat(text or str(default_date)).isoformat()
    except ValueError:
        raise InputError(
            f"the date of the review is {text or default_date!r:.40}", where=where
        ) from None


# ---------------------------------------------------------------- Argilla


def build_argilla_record(dataset: Dataset, index: int) -> Json:
    question, answer, row, review = _extract_fields(dataset, index)
    metadata, responses = {ROW_KEY: row}, {}
    if review:
        metadata |= {"reviewer": review.reviewer, "date": review.date}
        responses = {
            VERDICT_FIELD: [{"value": review.verdict, "user_id": _make_user_id(review.reviewer)}]
        }
    return {
        "id": dataset.get_id(index),
        "fields": {"question": question, "answer": answer},
        "metadata": metadata,
        "suggestions": {},
        "responses": responses,
        "vectors": {},
        "status": "completed" if review else "pending",
    }


def parse_argilla_reviews(
    record: Json, default_date: str | None, where: str
) -> tuple[Json, list[Review]]:
    """Users are ids; one whom we have written ourselves has a name again."""
    metadata, reviews = record.get("metadata") or {}, []
    for response in (record.get("responses") or {}).get(VERDICT_FIELD, ()):
        is_named = "reviewer" in metadata and response["user_id"] == _make_user_id(
            metadata["reviewer"]
        )
        reviewer = metadata["reviewer"] if is_named else str(response["user_id"])
        review_date = _parse_date(
            str(metadata.get("date", "")) if is_named else "", default_date, where
        )
        reviews.append(Review(reviewer, review_date, str(response["value"])))
    return _parse_row(metadata.get(ROW_KEY), where), reviews


def _make_user_id(name: str) -> str:
    """An id, as Argilla wants it, that is always the same."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, name))


BuildTask = Callable[[Dataset, int], Json]
ParseReviews = Callable[[Json, str | None, str], tuple[Json, list[Review]]]
TOOLS: dict[
    str, tuple[BuildTask, ParseReviews, str]
] = {  # how a row is written, how it is read, a key that only this tool has
    "label-studio": (build_label_studio_task, parse_label_studio_reviews, "data"),
    "argilla": (build_argilla_record, parse_argilla_reviews, "fields"),
}


def _build_object_schema(required: tuple[str, ...] = (), **properties: Json) -> Json:
    return {"type": "object", "required": list(required), "properties": properties}


def _build_array_schema(items: Json) -> Json:
    return {"type": ["array", "null"], "items": items}


SCHEMAS: dict[str, Json] = {  # of what is looked at
    "label-studio": _build_object_schema(
        data=_build_object_schema(),
        annotations=_build_array_schema(
            _build_object_schema(
                ("completed_by",),
                result=_build_array_schema(
                    _build_object_schema(value=_build_object_schema(choices={"type": "array"}))
                ),
            )
        ),
    ),
    "argilla": _build_object_schema(
        metadata=_build_object_schema(),
        responses=_build_object_schema(
            (),
            **{
                VERDICT_FIELD: {
                    "type": "array",
                    "items": _build_object_schema(("value", "user_id")),
                }
            },
        ),
    ),
}
