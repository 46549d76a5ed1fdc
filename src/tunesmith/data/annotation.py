"""Rows to people and back: files that Label Studio and Argilla import, and what they export once rows are reviewed.

    Dataset, tool -> tasks_of -> a JSON file to import there; its export -> read_reviews -> rows with `review`

The row itself travels along as text and comes back as it was; nothing that was changed in the tool but the verdict is
taken. Formats: the tasks of Label Studio's JSON (label-studio-sdk 2.1), and what `records.to_json` of Argilla 2.8
writes: it has no dates, and users are ids. Left out: their servers, and the form that asks (docs/data.md).
"""

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
from tunesmith.core.json_io import json_bytes
from tunesmith.core.types import Json
from tunesmith.data.checks.text_stats import row_of
from tunesmith.data.dataset import Dataset
from tunesmith.data.formats.row_formats import REVIEW
from tunesmith.data.golden_set import VERDICTS
from tunesmith.data.sampler import order

QUESTION = "verdict"  # that people answer
ROW = "row"


@dataclass(frozen=True)
class Review:
    reviewer: str
    date: str
    verdict: str


@dataclass(frozen=True)
class Reviewed:
    path: str
    tool: str
    rows: int
    left_out: int  # tasks that nobody has answered
    verdicts: dict[str, int]


def write_tasks(dataset: Dataset, tool: str, path: Path) -> int:
    """All rows, in a random order that is always the same, so that a part of them is a fair sample. Raises InputError
    for an unknown tool and a file that is there already."""
    if tool not in TOOLS:
        raise InputError(f"unknown tool {tool!r:.40}", where="--tool", fix=f"one of {', '.join(TOOLS)}")
    _refuse_old(path)
    make = TOOLS[tool][0]
    tasks = [make(dataset, int(index)) for index in order(0, 0, len(dataset))]
    write_file(path, json_bytes(tasks, indent=1))
    return len(tasks)


def read_reviews(path: Path, to: Path, when: str | None = None) -> Reviewed:
    """An export of either tool, told by its keys, as a file of reviewed rows. `when`: of reviews that have none. Raises
    InputError for what is no export, for verdicts that are none, and where reviewers of a row disagree."""
    _refuse_old(to)
    tasks = _read(path)
    tool = next((tool for tool, (_, _, key) in TOOLS.items() if all(key in task for task in tasks)), None)
    if tool is None or not tasks:
        fix = "export as JSON: of Label Studio the whole format, not JSON-MIN"
        raise InputError("neither tasks of Label Studio nor records of Argilla", where=str(path), fix=fix)
    lines: list[bytes] = []
    verdicts: dict[str, int] = {}
    for number, task in enumerate(tasks):
        where = f"{path}[{number}]"
        for problem in Draft202012Validator(SCHEMAS[tool]).iter_errors(task):
            raise InputError(f"not as {tool} writes it: {problem.json_path}: {problem.message:.100}", where=where)
        row, reviews = TOOLS[tool][1](task, when, where)
        if review := _agreed(reviews, where):
            lines.append(json_bytes(row | {REVIEW: review}))
            verdicts[review.verdict] = verdicts.get(review.verdict, 0) + 1
    if not lines:
        raise InputError("no row has a verdict", where=str(path), fix=f"answer `{QUESTION}` in the tool, and submit")
    write_file(to, b"".join(lines))
    return Reviewed(str(to), tool, len(lines), len(tasks) - len(lines), verdicts)


def _refuse_old(path: Path) -> None:
    if path.exists():
        raise InputError("it is there already", where=str(path), fix="name another file with --to, or remove it")


def _read(path: Path) -> list[Json]:
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", where=str(path)) from error
    if not isinstance(found, list) or not all(isinstance(task, dict) for task in found):
        raise InputError("not a JSON array of objects", where=str(path), fix="export as JSON")
    return found


def _agreed(reviews: list[Review], where: str) -> Review | None:
    """The newest of them."""
    for review in reviews:
        if review.verdict not in VERDICTS:
            fix = f"the choices are {', '.join(VERDICTS)}"
            raise InputError(f"the verdict is {review.verdict!r:.40}", where=where, fix=fix)
    if len({review.verdict for review in reviews}) > 1:
        said = ", ".join(f"{review.reviewer}: {review.verdict}" for review in reviews)
        raise InputError(f"reviewers disagree: {said}", where=where, fix="settle it in the tool, and export again")
    return max(reviews, key=lambda review: review.date, default=None)


def _row(told: Any, where: str) -> Json:
    try:
        row = json.loads(told)
    except (TypeError, ValueError):
        row = None
    if not isinstance(row, dict):
        fix = "review a file of `tunesmith data review`: it has the rows in it"
        raise InputError(f"`{ROW}` is not the row as it was", where=where, fix=fix)
    return row


def _of(dataset: Dataset, index: int) -> tuple[str, str, str, Review | None]:
    """(question, answer, the row as JSON without its review, the review that it has already)."""
    row, seen = dict(dataset.row(index).data), row_of(dataset.example(index))
    old = row.pop(REVIEW, None)
    known = isinstance(old, dict) and set(old) >= {"reviewer", "date", "verdict"}
    review = Review(*(str(old[key]) for key in ("reviewer", "date", "verdict"))) if known else None
    return "\n\n".join(seen.texts[:-1]), seen.answer, json.dumps(row, ensure_ascii=False), review


# ---------------------------------------------------------------- Label Studio


def label_studio_task(dataset: Dataset, index: int) -> Json:
    asked, answer, row, review = _of(dataset, index)
    task: Json = {"data": {"id": dataset.id(index), "question": asked, "answer": answer, ROW: row}}
    if review:
        chosen = {"from_name": QUESTION, "to_name": "answer", "type": "choices", "value": {"choices": [review.verdict]}}
        when = f"{review.date}T00:00:00Z"
        task["annotations"] = [{"completed_by": {"email": review.reviewer}, "created_at": when, "result": [chosen]}]
    return task


def label_studio_reviews(task: Json, when: str | None, where: str) -> tuple[Json, list[Review]]:
    """Of each reviewer the newest annotation; cancelled ones, and those without a verdict, are none."""
    newest: dict[str, Review] = {}
    told = [one for one in task.get("annotations") or () if not (one.get("was_cancelled") or one.get("skipped"))]
    for annotation in sorted(told, key=lambda one: str(one.get("created_at", ""))):
        by = annotation.get("completed_by")
        reviewer = str((by.get("email") or by.get("id")) if isinstance(by, dict) else by)
        for verdict in _choices(annotation):
            newest[reviewer] = Review(reviewer, _date(str(annotation.get("created_at", ""))[:10], when, where), verdict)
    return _row(task["data"].get(ROW), where), list(newest.values())


def _choices(annotation: Json) -> Iterator[str]:
    for result in annotation.get("result") or ():
        if result.get("from_name") == QUESTION:
            yield from map(str, result.get("value", {}).get("choices", ()))


def _date(told: str, given: str | None, where: str) -> str:
    if not (told or given):
        raise InputError("the review has no date", where=where, fix="say when it was made: --date 2026-11-25")
    try:
        return date.fromisoformat(told or str(given)).isoformat()
    except ValueError:
        raise InputError(f"the date of the review is {told or given!r:.40}", where=where) from None


# ---------------------------------------------------------------- Argilla


def argilla_record(dataset: Dataset, index: int) -> Json:
    asked, answer, row, review = _of(dataset, index)
    metadata, responses = {ROW: row}, {}
    if review:
        metadata |= {"reviewer": review.reviewer, "date": review.date}
        responses = {QUESTION: [{"value": review.verdict, "user_id": _user(review.reviewer)}]}
    return {
        "id": dataset.id(index),
        "fields": {"question": asked, "answer": answer},
        "metadata": metadata,
        "suggestions": {},
        "responses": responses,
        "vectors": {},
        "status": "completed" if review else "pending",
    }


def argilla_reviews(record: Json, given: str | None, where: str) -> tuple[Json, list[Review]]:
    """Users are ids; one whom we have written ourselves has a name again."""
    metadata, reviews = record.get("metadata") or {}, []
    for response in (record.get("responses") or {}).get(QUESTION, ()):
        own = "reviewer" in metadata and response["user_id"] == _user(metadata["reviewer"])
        reviewer = metadata["reviewer"] if own else str(response["user_id"])
        when = _date(str(metadata.get("date", "")) if own else "", given, where)
        reviews.append(Review(reviewer, when, str(response["value"])))
    return _row(metadata.get(ROW), where), reviews


def _user(name: str) -> str:
    """An id, as Argilla wants it, that is always the same."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, name))


Make = Callable[[Dataset, int], Json]
Read = Callable[[Json, str | None, str], tuple[Json, list[Review]]]
TOOLS: dict[str, tuple[Make, Read, str]] = {  # how a row is written, how it is read, a key that only this tool has
    "label-studio": (label_studio_task, label_studio_reviews, "data"),
    "argilla": (argilla_record, argilla_reviews, "fields"),
}


def _object(required: tuple[str, ...] = (), **properties: Json) -> Json:
    return {"type": "object", "required": list(required), "properties": properties}


def _array(items: Json) -> Json:
    return {"type": ["array", "null"], "items": items}


SCHEMAS: dict[str, Json] = {  # of what is looked at
    "label-studio": _object(
        data=_object(),
        annotations=_array(
            _object(("completed_by",), result=_array(_object(value=_object(choices={"type": "array"}))))
        ),
    ),
    "argilla": _object(
        metadata=_object(),
        responses=_object((), **{QUESTION: {"type": "array", "items": _object(("value", "user_id"))}}),
    ),
}
