"""Build a row's prompt from its columns, in one of the forms that the recipe has for its task.

    Row, forms -> Row with a `prompt`; its answer stays its `completion`

The form of a row, and the few-shot examples before it, depend on its content alone: every run
prompts it alike, and so do the evaluations before and after. Examples are other training rows of
the same task. A column's value is inserted as it is; braces in it have no meaning. Left out: the
rows that may serve as examples (few_shot.py)."""

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
from tunesmith.data.formats.parse import build_unknown_name_error
from tunesmith.data.hashing import hash_text
from tunesmith.data.readers.invalid_row import InvalidRow
from tunesmith.recipe.fields import DataSource, PromptForm, parse_prompt


@dataclass(frozen=True, eq=False)
class FewShotExamples:
    """P different training rows of a task."""

    read_row: Callable[[int], Row]
    rows_P: np.ndarray  # int64, arguments for `read_row`
    contents_P: np.ndarray  # uint64, digests

    def sample(self, content: int, count: int) -> list[Row]:
        """Return `count` rows other than the row with digest `content`; P must exceed `count`."""
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
    """Builds the prompts of a file. With a chat template, each example becomes two turns."""

    forms: tuple[PromptForm, ...]
    has_template: bool
    examples: FewShotExamples | None = None  # None: prompts have no examples
    answer_column: str = "completion"  # its name in the file

    @property
    def max_shots(self) -> int:
        """The largest number of examples in a form."""
        return max(form.shots for form in self.forms)

    @property
    def columns(self) -> list[str]:
        """The columns that the forms insert, each once, in their order."""
        names: dict[str, None] = {}
        for form in self.forms:
            columns = (column for _, column in parse_prompt(form.prompt) if column is not None)
            names.update(dict.fromkeys(columns))
        return list(names)

    def with_examples(self, examples: FewShotExamples | None) -> PromptFormatter:
        """Return the formatter with these few-shot examples."""
        return dataclasses.replace(self, examples=examples)

    def format_row(self, row: Row) -> Row:
        """Return the row with its prompt. Raises InvalidRow if it lacks a column."""
        content = hash_row(row)
        form = self.forms[_hash_to_index(content, "form", len(self.forms))]
        turns: list[str] = []
        if self.examples:
            for example_row in self.examples.sample(content, form.shots):
                turns.append(_fill_prompt(form, example_row))
                turns.append(_to_text(example_row.data["completion"]))
        turns.append(_fill_prompt(form, row))
        columns = set(self.columns)
        other_values = {key: value for key, value in row.data.items() if key not in columns}
        other_values["completion"] = self._read_answer(row)
        return Row(row.id, {**other_values, "prompt": self._build_prompt(turns)})

    def _read_answer(self, row: Row) -> Any:
        """Return the answer, a number as text. Raises InvalidRow if there is none."""
        answer: Any = row.data.get("completion")
        if answer is None or (isinstance(answer, str) and not answer.strip()):
            message = f"`{self.answer_column}` is empty"
            fix = "write the answer, or remove the row"
            raise InvalidRow("empty answer", message, where=row.id, fix=fix)
        return _to_text(answer) if isinstance(answer, (int, float)) else answer

    def _build_prompt(self, turns: Sequence[str]) -> str | list[Json]:
        """Join question, answer, question, answer, ..., question."""
        if len(turns) == 1:
            return turns[0]
        if self.has_template:
            roles = ("user", "assistant")
            return [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
        prompt = ""
        for i in range(0, len(turns) - 1, 2):
            prompt += f"{turns[i]}{turns[i + 1]}\n\n"
        return prompt + turns[-1]

    def compute_digests(self, row: Row) -> tuple[int, int]:
        """Return digests of the full row and of the columns in its prompt, whatever its form."""
        prompt_values = {column: row.data.get(column) for column in self.columns}
        return hash_row(row), hash_text(_to_text(prompt_values))


def make_prompt_formatter(
    file: DataSource, first_rows: Sequence[Row], has_template: bool
) -> tuple[PromptFormatter, str]:
    """Return the prompt formatter of a file, and a description of it.

    Raises InputError for another row format, a form with an unknown column, and rows without an
    answer."""
    where = str(file.path)
    if file.format not in ("auto", "completion"):
        message = f"prompts need `completion` rows, but the format is {file.format}"
        fix = "remove `format`, and map the column with the answer to `completion`"
        raise InputError(message, where=where, fix=fix)
    formatter = PromptFormatter(file.prompts, has_template)
    file_columns = list(dict.fromkeys(key for row in first_rows for key in row.data))
    for column in formatter.columns:
        if file_columns and column not in file_columns:
            message = f"prompts: the file has no column `{column}`"
            raise build_unknown_name_error(message, column, file_columns, where)
    if file_columns and "completion" not in file_columns:
        message = "prompts need a `completion`, but no row has one"
        fix = f"map the answer column: `columns: {{completion: {file_columns[-1]:.40}}}`"
        raise InputError(message, where=where, fix=fix)
    num_forms = len(file.prompts)
    description = f"{num_forms} prompt form{'s' * (num_forms > 1)}"
    if shots := sorted({form.shots for form in file.prompts} - {0}):
        description += f", with up to {shots[-1]} few-shot example{'s' * (shots[-1] > 1)}"
    return formatter, description


def hash_row(row: Row) -> int:
    """Return a 64-bit digest of all values of a row, with white space collapsed."""
    normalized = {key: " ".join(_to_text(value).split()) for key, value in row.data.items()}
    return hash_text(json.dumps(normalized, sort_keys=True))


def _fill_prompt(form: PromptForm, row: Row) -> str:
    """Insert the columns of a row into a form. Raises InvalidRow if the row lacks one."""
    pieces: list[str] = []
    for text, column in parse_prompt(form.prompt):
        pieces.append(text)
        if column is None:
            continue
        if row.data.get(column) is None:
            message = f"the column `{column}` is missing"
            raise InvalidRow("missing key", message, where=row.id, fix="remove the row")
        pieces.append(_to_text(row.data[column]))
    return "".join(pieces)


def _to_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _hash_to_index(content: int, salt: str, count: int) -> int:
    """Return a number from 0 to `count` - 1 that depends on the content and the salt alone."""
    digest = hashlib.blake2b(f"{salt}\0{content}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % count
