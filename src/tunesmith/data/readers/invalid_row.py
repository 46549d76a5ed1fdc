"""Rows that cannot be used: the reason for each, and how many there are for each reason.

Readers and parsers raise `InvalidRow`; `RejectedRows` collects them. A problem of a file, the
model or the machine is an InputError or MachineError instead, and is never collected."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from tunesmith.core.errors import InputError

MAX_SHOWN_ROWS = 5
MAX_MESSAGE_CHARS = 300

Reason = Literal[
    # bytes
    "too long", "not UTF-8", "NUL character", "lone surrogate",
    # JSON and CSV
    "not JSON", "not CSV", "not an object", "duplicate key", "NaN or infinity",
    "number too large", "nested too deep", "too many values", "wrong number of fields",
    # content of the row
    "missing key", "not messages", "too many messages", "unknown role", "null content", "not text",
    "empty text", "empty answer", "no answer at the end", "nothing trained", "wrong weight",
    "wrong tool call", "wrong tools", "contradiction", "equal sides",
    "different prompts", "no label",
    "wrong mark", "nothing bad",
    # the verdict of a review
    "bad verdict", "unsettled verdict", "unknown verdict",
    # a constraint of the recipe: the row is excluded, which is not an error
    "never",
    # the chat template
    "cannot be rendered",
]  # fmt: skip


class InvalidRow(InputError):
    """One row cannot be used. `reason` is the kind that such rows are counted by."""

    def __init__(self, reason: Reason, message: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(message, where=where, fix=fix)
        self.reason: Reason = reason


class RejectedRows:
    """The rejected rows of a data set: their indices, counts by reason, and a few of each."""

    def __init__(self) -> None:
        self.indices = array("q")  # pairs: index of the file, index of the row in that file
        self.counts: Counter[Reason] = Counter()
        self.examples: dict[Reason, list[InvalidRow]] = {}

    def add(self, part_index: int, row: int, problem: InvalidRow) -> None:
        """Record a rejected row: row `row` of file `part_index`."""
        self.indices.extend((part_index, row))
        self.count(problem)

    def count(self, problem: InvalidRow) -> None:
        """Count a rejected row without recording its index."""
        self.counts[problem.reason] += 1
        examples = self.examples.setdefault(problem.reason, [])
        if len(examples) < MAX_SHOWN_ROWS:
            # A new exception: the traceback of the raised one would keep the row in memory.
            message = problem.message[:MAX_MESSAGE_CHARS]
            examples.append(
                InvalidRow(problem.reason, message, where=problem.where, fix=problem.fix)
            )

    def iter_indices(self) -> Iterator[tuple[int, int]]:
        """Yield (index of the file, index of the row in that file) of each recorded row."""
        yield from zip(self.indices[::2], self.indices[1::2], strict=True)

    def build_empty_error(self, where: str) -> InputError:
        """Return the error for a data set without a single valid row."""
        fix = next((problems[0].fix for problems in self.examples.values()), "")
        message = f"none of the {self.counts.total():,} rows can be used: {self.summarize()}"
        return InputError(message, where=where, fix=fix)

    def summarize(self) -> str:
        """Return counts by reason, then the first rows, one per line."""
        summary = ", ".join(f"{count:,} {reason}" for reason, count in self.counts.most_common())
        problems = [problem for problems in self.examples.values() for problem in problems]
        for problem in problems[:MAX_SHOWN_ROWS]:
            summary += f"\n  {problem.where}: {problem.message}"
        num_hidden = self.counts.total() - min(len(problems), MAX_SHOWN_ROWS)
        if num_hidden:
            summary += f"\n  and {num_hidden:,} more"
        return summary
