"""A row's columns as a question, in one of the forms that the recipe gives for its task.

    Row, forms -> Row with a `prompt`; what it answers stays its `completion`

Which form a row has, and which other rows are shown before it, follows from its content alone: any run asks it alike,
and so do the measures before and after. Examples are training rows of the same task, never the row itself. What stands
in a column is put in as it is; braces in it mean nothing. Left out: which rows may be shown (shots.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json, Row
from tunesmith.data.hashing import text_digest
from tunesmith.data.readers.columns import unknown
from tunesmith.data.readers.invalid_row import BadRow
from tunesmith.recipe.fields import DataSource, Form, pieces_of


@dataclass(frozen=True, eq=False)
class Examples:
    """P different training rows of a task."""

    read: Callable[[int], Row]
    rows_P: np.ndarray  # int64, what `read` takes
    contents_P: np.ndarray  # uint64

    def drawn(self, content: int, count: int) -> list[Row]:
        """So many of them, none with this content. P is larger than `count`."""
        places: list[int] = []
        turn = 0
        while len(places) < count:
            place = _drawn(content, f"shot {turn}", len(self.rows_P))
            turn += 1
            if place not in places and int(self.contents_P[place]) != content:
                places.append(place)
        return [self.read(int(self.rows_P[place])) for place in places]


@dataclass(frozen=True, eq=False)
class Asking:
    """How the rows of a file are asked. `turns`: the model has a chat template, so an example is two turns."""

    forms: tuple[Form, ...]
    turns: bool
    examples: Examples | None = None  # none yet: nothing is shown

    @property
    def shots(self) -> int:
        """The most that a form shows."""
        return max(form.shots for form in self.forms)

    def showing(self, examples: Examples | None) -> Asking:
        return dataclasses.replace(self, examples=examples)

    def asked(self, row: Row) -> Row:
        """The row with its question. Raises BadRow for a column that it lacks."""
        content = content_of(row)
        form = self.forms[_drawn(content, "form", len(self.forms))]
        shown = self.examples.drawn(content, form.shots) if self.examples else []
        turns = [part for other in shown for part in (filled(form, other), _answer(other))] + [filled(form, row)]
        columns = {column for form in self.forms for column in columns_of(form)}
        kept = {key: value for key, value in row.data.items() if key not in columns}
        return Row(row.id, {**kept, "prompt": self._prompt(turns)})

    def _prompt(self, turns: Sequence[str]) -> str | list[Json]:
        if len(turns) == 1:
            return turns[0]
        if self.turns:
            return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        *shown, question = turns
        return "".join(f"{asked}{answer}\n\n" for asked, answer in zip(shown[::2], shown[1::2], strict=True)) + question

    def digests(self, row: Row) -> tuple[int, int]:
        """Of the whole row, and of what its questions ask, in whatever form."""
        columns = dict.fromkeys(column for form in self.forms for column in columns_of(form))
        return content_of(row), text_digest(_text({column: row.data.get(column) for column in columns}))


def asking_of(file: DataSource, first: Sequence[Row], turns: bool) -> tuple[Asking, str]:
    """How a file is asked, and that in words. `first`: a few rows of it. Raises InputError for another format, for a
    place that no column has, and for rows without an answer."""
    where = str(file.path)
    if file.format not in ("auto", "completion"):
        what = f"prompts ask for a `completion`, and these are to be {file.format} rows"
        raise InputError(what, where=where, fix="leave format out, and say which column is the completion")
    known = list(dict.fromkeys(key for row in first for key in row.data))
    for column in dict.fromkeys(column for form in file.prompts for column in columns_of(form)):
        if known and column not in known:
            raise unknown(f"prompts: the file has no column `{column}`", column, known, where)
    if known and "completion" not in known:
        fix = f"say which column is the answer: `columns: {{completion: {known[-1]:.40}}}`"
        raise InputError("prompts ask for a `completion`, and no row has one", where=where, fix=fix)
    forms = [f"{form.shots} examples before it" for form in file.prompts if form.shots]
    forms += ["none"] * (len(file.prompts) > len(forms) > 0)
    reason = f"asked in {len(file.prompts)} form{'s' * (len(file.prompts) > 1)}" + (
        f", with {' or '.join(dict.fromkeys(forms))}" if forms else ""
    )
    return Asking(file.prompts, turns), reason


def columns_of(form: Form) -> list[str]:
    return [column for _, column in pieces_of(form.prompt) if column is not None]


def filled(form: Form, row: Row) -> str:
    """The question that a form makes of a row. Raises BadRow for a column that the row lacks."""
    found: list[str] = []
    for text, column in pieces_of(form.prompt):
        found.append(text)
        if column is None:
            continue
        if row.data.get(column) is None:
            raise BadRow("missing key", f"the column `{column}` is missing", where=row.id, fix="drop the row")
        found.append(_text(row.data[column]))
    return "".join(found)


def content_of(row: Row) -> int:
    """64-bit digest of all that a row holds, white space evened out."""
    evened = {key: " ".join(_text(value).split()) for key, value in row.data.items()}
    return text_digest(json.dumps(evened, sort_keys=True))


def _answer(row: Row) -> str:
    return _text(row.data["completion"])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _drawn(content: int, word: str, count: int) -> int:
    """A number below `count`."""
    digest = hashlib.blake2b(f"{word}\0{content}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % count
