"""Tables whose columns have the usual names of the hub, as questions and answers.

    first rows -> find_table -> Table (columns and a prompt, as a recipe would give them)

    text, label                  classification: the prompt asks for the label of the text
    premise, hypothesis, label   classification of several columns together
    question, answer             the question is the prompt

A prompt depends on the names of the columns alone, so training, held-out and served rows have the
same. Upper case does not count. Left out: filling in the prompt (prompt_templates.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tunesmith.core.errors import InputError
from tunesmith.core.types import Row
from tunesmith.data.formats.parse import CLASS_COLUMNS, FORMATS, TEXT_COLUMNS
from tunesmith.data.readers.decode import describe_type

MAX_LABEL_CHARS = 80  # of a label: longer answers are texts
ANSWER_PAIRS = (
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("instruction", "response"),
    ("input", "output"),
)


class Table(NamedTuple):
    """How a file of columns is read."""

    inputs: tuple[str, ...]  # columns in the prompt
    answer: str  # the column that is trained
    prompt: str
    reason: str  # shown to the user
    has_classes: bool  # the answer is a label

    def map_columns(self, columns: Mapping[str, str]) -> dict[str, str]:
        """Return the columns of a recipe, {our name: column of the file}, with the answer."""
        mapped = {name: column for name, column in columns.items() if name != self.answer}
        return {**mapped, "completion": columns.get(self.answer, self.answer)}


def find_table(rows: Sequence[Row], has_template: bool) -> Table | None:
    """Return how these first rows are read; None if they are not a table with usual names.

    Raises InputError for labels that are texts or lists."""
    columns: dict[str, str] = {}  # lower case -> name in the file
    for column in dict.fromkeys(key for row in rows for key in row.data):
        columns.setdefault(_normalize(column), column)
    if any(set(each.keys) <= set(columns) for name, each in FORMATS.items() if name != "text"):
        return None
    separator = "" if has_template else "\n\n"  # before the answer
    pair = next((pair for pair in ANSWER_PAIRS if set(pair) <= set(columns)), None)
    if pair and not {"label", "label_text", "label_name"} & set(columns):
        question, answer = (columns[name] for name in pair)
        reason = f"`{question}` is the prompt and `{answer}` the completion"
        return Table((question,), answer, f"{{{question}}}{separator}", reason, False)
    label = next((name for name in CLASS_COLUMNS if name in columns), None)
    inputs = {name: column for name, column in columns.items() if name in TEXT_COLUMNS}
    if label is None or not inputs:
        return None
    labels = _check_labels(rows, columns[label], next(iter(inputs.values())))
    prompt = _write_prompt(inputs, label) + separator
    names = " and ".join(f"`{column}`" for column in inputs.values())
    reason = f"`{columns[label]}` is the class of {names}; the prompt is {prompt!r}"
    if labels and all(value.isdecimal() for value in labels):
        reason += "; the labels are numbers without names (a column `label_text` would have them)"
    return Table(tuple(inputs.values()), columns[label], prompt, reason, True)


def name_columns(inputs: Sequence[str], answer: str, *, has_classes: bool) -> dict[str, str]:
    """Return {our name: column of the file} with which a recipe names the columns of a table."""
    if not has_classes:
        return {"prompt": inputs[0], "completion": answer}
    return {_normalize(column): column for column in (*inputs, answer)}


def _normalize(column: str) -> str:
    return column.strip().lower().replace(" ", "_")


def _check_labels(rows: Sequence[Row], column: str, text_column: str) -> list[str]:
    """Return the labels of the rows. Raises InputError for one that is a long text or a list."""
    labels: list[str] = []
    for row in rows:
        value = row.data.get(column)
        if value is None:
            continue
        if not isinstance(value, (str, int, float)) or len(str(value)) > MAX_LABEL_CHARS:
            fix = f"map the columns: `columns: {{prompt: {text_column}, completion: {column}}}`"
            message = f"`{column}` should be a short label, but is {describe_type(value)}"
            if isinstance(value, str):
                message = f"`{column}` should be a short label, but has {len(value):,} characters"
            raise InputError(message, where=row.id, fix=fix)
        labels.append(str(value))
    return labels


def _write_prompt(inputs: Mapping[str, str], label: str) -> str:
    label = label.partition("_")[0]
    subject = " and ".join(name.replace("_", " ") for name in inputs)
    question = f"What is the {label} of this {subject}? Answer with the {label} alone."
    if len(inputs) == 1:
        return f"{question}\n\n{{{next(iter(inputs.values()))}}}"
    values = [f"{name.replace('_', ' ')}: {{{column}}}" for name, column in inputs.items()]
    return "\n\n".join([question, *values])
