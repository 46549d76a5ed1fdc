"""A row's columns as a question, in one of the forms that the recipe gives for its task.

    Row, forms -> Row with a `prompt`; what it answers stays its `completion`

Which form a row has, and which other rows are shown before it, follows from its content alone: any
run asks it alike, and so do the measures before and after. Examples are training rows of the same
task, never the row itself. What stands in a column is put in as it is; braces in it mean nothing.
Left out: which rows may be shown (shots.py)."""

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
from tunesmith.data.hashing import hash_text
from tunesmith.data.readers.columns import build_unknown_name_error
from tunesmith.data.readers.invalid_row import InvalidRow
from tunesmith.recipe.fields import DataSource, PromptForm, parse_prompt


@dataclass(frozen=True, eq=False)
class FewShotExamples:
    """P different training rows of a task."""

    read_row: Callable[[int], Row]
    rows_P: np.ndarray  # int64, what `read` takes
    contents_P: np.ndarray  # uint64

    def sample(self, content: int, count: int) -> list[Row]:
        """So many of them, none with this content. P is larger than `count`."""
        positions: list[int] = []
        attempt = 0
        while len(positions) < count:
            position = _hash_to_index(content, f"shot {attempt}", len(self.rows_P))
            attempt += 1
            if position not in positions and int(self.contents_P[position]) != content:
                positions.append(position)
        return [self.read_row(int(self.rows_P[position])) for position in positions]


@dataclass(frozen=True, eq=False)
class PromptFormatter:
    """How the rows of a file are asked. `turns`: the model has a chat template, so an example is
    two turns."""

    forms: tuple[PromptForm, ...]
    has_template: bool
    examples: FewShotExamples | None = None  # none yet: nothing is shown

    @property
    def max_shots(self) -> int:
        """The most that a form shows."""
        return max(form.shots for form in self.forms)

    def with_examples(self, examples: FewShotExamples | None) -> PromptFormatter:
        return dataclasses.replace(self, examples=examples)

    def format_row(self, row: Row) -> Row:
        """The row with its question. Raises BadRow for a column that it lacks."""
        content = hash_row(row)
        form = self.forms[_hash_to_index(content, "form", len(self.forms))]
        example_rows = self.examples.sample(content, form.shots) if self.examples else []
        turns = [
            part
            for example_row in example_rows
            for part in (fill_prompt(form, example_row), _get_answer(example_row))
        ] + [fill_prompt(form, row)]
        columns = {column for form in self.forms for column in list_columns(form)}
        other_values = {key: value for key, value in row.data.items() if key not in columns}
        return Row(row.id, {**other_values, "prompt": self._build_prompt(turns)})

    def _build_prompt(self, turns: Sequence[str]) -> str | list[Json]:
        if len(turns) == 1:
            return turns[0]
        if self.has_template:
            return [
                {"role": ("user", "assistant")[i % 2], "content": turn}
                for i, turn in enumerate(turns)
            ]
        *shots, question = turns
        return (
            "".join(
                f"{shot_question}{answer}\n\n"
                for shot_question, answer in zip(shots[::2], shots[1::2], strict=True)
            )
            + question
        )

    def compute_digests(self, row: Row) -> tuple[int, int]:
        """Of the whole row, and of what its questions ask, in whatever form."""
        columns = dict.fromkeys(column for form in self.forms for column in list_columns(form))
        return hash_row(row), hash_text(
            _to_text({column: row.data.get(column) for column in columns})
        )


def make_prompt_formatter(
    file: DataSource, first_rows: Sequence[Row], has_template: bool
) -> tuple[PromptFormatter, str]:
    """How a file is asked, and that in words. `first`: a few rows of it. Raises InputError for
    another format, for a place that no column has, and for rows without an answer."""
    where = str(file.path)
    if file.format not in ("auto", "completion"):
        message = f"prompts ask for a `completion`, and these are to be {file.format} rows"
        raise InputError(
            message, where=where, fix="leave format out, and say which column is the completion"
        )
    columns = list(dict.fromkeys(key for row in first_rows for key in row.data))
    for column in dict.fromkeys(column for form in file.prompts for column in list_columns(form)):
        if columns and column not in columns:
            raise build_unknown_name_error(
                f"prompts: the file has no column `{column}`", column, columns, where
            )
    if columns and "completion" not in columns:
        fix = f"say which column is the answer: `columns: {{completion: {columns[-1]:.40}}}`"
        raise InputError("prompts ask for a `completion`, and no row has one", where=where, fix=fix)
    shot_notes = [f"{form.shots} examples before it" for form in file.prompts if form.shots]
    shot_notes += ["none"] * (len(file.prompts) > len(shot_notes) > 0)
    reason = f"asked in {len(file.prompts)} form{'s' * (len(file.prompts) > 1)}" + (
        f", with {' or '.join(dict.fromkeys(shot_notes))}" if shot_notes else ""
    )
    return PromptFormatter(file.prompts, has_template), reason


def list_columns(form: PromptForm) -> list[str]:
    return [column for _, column in parse_prompt(form.prompt) if column is not None]


def fill_prompt(form: PromptForm, row: Row) -> str:
    """The question that a form makes of a row. Raises BadRow for a column that the row lacks."""
    pieces: list[str] = []
    for text, column in parse_prompt(form.prompt):
        pieces.append(text)
        if column is None:
            continue
        if row.data.get(column) is None:
            raise InvalidRow(
                "missing key", f"the column `{column}` is missing", where=row.id, fix="drop the row"
            )
        pieces.append(_to_text(row.data[column]))
    return "".join(pieces)


def hash_row(row: Row) -> int:
    """64-bit digest of all that a row holds, white space evened out."""
    normalized = {key: " ".join(_to_text(value).split()) for key, value in row.data.items()}
    return hash_text(json.dumps(normalized, sort_keys=True))


def _get_answer(row: Row) -> str:
    return _to_text(row.data["completion"])


def _to_text(value: Any) -> str:
    return (
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    )


def _hash_to_index(content: int, salt: str, count: int) -> int:
    """A number below `count`."""
    digest = hashlib.blake2b(f"{salt}\0{content}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % count
