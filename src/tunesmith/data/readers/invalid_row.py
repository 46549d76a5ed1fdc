"""Rows that cannot be used: each with its reason, and how many there are of each kind.

Whoever reads rows raises `BadRow`; `Rejects` collects them. What concerns a whole file, the model
or the machine is an InputError or MachineError instead, and is never collected."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Literal

from tunesmith.core.errors import InputError

MAX_SHOWN_ROWS = 5
MAX_MESSAGE_CHARS = 300  # characters of what is said about a row

Reason = Literal[
    # bytes
    "too long", "not UTF-8", "NUL character", "half a character",
    # JSON and CSV
    "not JSON", "not CSV", "not an object", "duplicate key", "NaN or infinity", "number too large", "nested too deep",
    "wrong number of fields",
    # what a row says
    "missing key", "not messages", "unknown role", "null content", "not text", "empty text", "empty answer",
    "no answer at the end", "nothing trained", "wrong weight", "wrong tool call", "wrong tools", "contradiction",
    "equal sides", "wrong mark", "nothing bad",
    # what the recipe says; left out, and no error
    "never",
    # what the chat template says
    "cannot be rendered",
]  # fmt: skip


class InvalidRow(InputError):
    """One row cannot be used. `reason` is what rows are counted by, `what` says it of this row."""

    def __init__(self, reason: Reason, message: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(message, where=where, fix=fix)
        self.reason: Reason = reason


class RejectedRows:
    """What is known of the bad rows of a data set: where they are, how many of each kind, the first
    ones of each."""

    def __init__(self) -> None:
        self.indices = array("q")  # pairs: which file of the data set, which row of the file
        self.counts: Counter[Reason] = Counter()
        self.examples: dict[Reason, list[InvalidRow]] = {}

    def add(self, part_index: int, row: int, problem: InvalidRow) -> None:
        self.indices.extend((part_index, row))
        self.count(problem)

    def count(self, problem: InvalidRow) -> None:
        """Without its place, when others know it."""
        self.counts[problem.reason] += 1
        examples = self.examples.setdefault(problem.reason, [])
        if len(examples) < MAX_SHOWN_ROWS:  # a new one: what was raised holds on to the row
            details = {"where": problem.where, "fix": problem.fix}
            examples.append(
                InvalidRow(problem.reason, problem.message[:MAX_MESSAGE_CHARS], **details)
            )

    def iter_indices(self) -> Iterator[tuple[int, int]]:
        yield from zip(self.indices[::2], self.indices[1::2], strict=True)

    def build_empty_error(self, where: str) -> InputError:
        fix = next((problems[0].fix for problems in self.examples.values()), "")
        message = f"none of the {self.counts.total():,} rows can be used: {self.summarize()}"
        return InputError(message, where=where, fix=fix)

    def summarize(self) -> str:
        """Counts by reason, then the first rows, a line each."""
        counts = ", ".join(f"{count:,} {reason}" for reason, count in self.counts.most_common())
        first = [problem for problems in self.examples.values() for problem in problems][
            :MAX_SHOWN_ROWS
        ]
        lines = "".join(f"\n  {problem.where}: {problem.message}" for problem in first)
        remaining = self.counts.total() - len(first)
        return counts + lines + (f"\n  and {remaining:,} more" if remaining else "")
