"""The `never` constraints of the recipe: the rows that break one, and their treatment.

    Example, constraints -> Example with `banned_spans`, or InvalidRow, or Violation

A training answer that matches is excluded (modes `filter`, and `pair` on the chosen side), or its
matching spans are trained away from (`ban`). `negative: true` in a row marks its answer as bad;
`negative: false` marks the match as correct. Held-out rows are never excluded: negative ones are
prompts that ask for a violation. Left out: the loss of a banned span (train/losses.py), and how
often a model breaks a constraint (evaluate/)."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import regex

from tunesmith.core.errors import InputError
from tunesmith.core.types import CharSpan, Example
from tunesmith.data.readers.invalid_row import InvalidRow
from tunesmith.recipe.fields import Constraint

MAX_MATCH_SECONDS = 2.0  # per pattern and answer; longer is catastrophic backtracking
MAX_MATCH_SHARE = 0.5  # of all answers; a pattern that matches more does not describe what is bad
MAX_SHOWN_ROWS = 3
MAX_EXCERPT_CHARS = 60


@dataclass(frozen=True)
class ConstraintMatch:
    """One match of a constraint in an answer."""

    name: str  # of the constraint
    mode: str
    span: CharSpan
    excerpt: str


class Violation(InvalidRow):
    """A row excluded because its answer breaks a constraint."""

    def __init__(self, example: Example, match: ConstraintMatch) -> None:
        message = f"the answer breaks {match.name!r}: {match.excerpt!r}"
        fix = 'correct the answer, or add `"negative": false` to the row if the match is fine'
        super().__init__("never", message, where=example.id, fix=fix)
        self.match = match
        self.is_negative = bool(example.negative)


@dataclass(frozen=True)
class ConstraintSet:
    """The constraints of one role."""

    constraints: tuple[Constraint, ...] = ()
    is_held_out: bool = False  # rows are evaluated, not trained
    can_ban: bool = True  # if not, rows that break a `ban` constraint are excluded too

    @property
    def has_pair_constraints(self) -> bool:
        """Rows may lack a rejected side: the base model's own bad answer becomes it."""
        return any(constraint.mode == "pair" for constraint in self.constraints)

    def mark_violations(self, example: Example) -> Example:
        """Mark the banned spans of an example.

        Raises Violation for a row to exclude, InvalidRow for a negative row without a match."""
        if example.negative is False or not (self.constraints or example.negative):
            return example
        if example.negative and example.rejected is not None:
            message = "a preference pair cannot be negative"
            fix = "remove `negative`: the rejected side already says what is bad"
            raise InvalidRow("contradiction", message, where=example.id, fix=fix)
        if example.negative == "whole" and (self.can_ban or self.is_held_out):
            return _mark_spans(example, _match_full_answers(example))
        matches: list[ConstraintMatch] = []
        for constraint in self.constraints:
            matches += _find_matches(constraint, example)
        if self.is_held_out:
            if not example.negative:
                return example
            return _mark_spans(example, matches or _match_full_answers(example))
        for match in matches:
            if match.mode != "ban" or not self.can_ban:
                raise Violation(example, match)
        if example.negative and not matches:
            message = "the row is negative, but no constraint matches it"
            fix = (
                "add a `never` constraint with `mode: ban` that matches it, "
                'set `"negative": "whole"`, or remove the row'
            )
            raise InvalidRow("nothing bad", message, where=example.id, fix=fix)
        return _mark_spans(example, matches) if matches else example


def _mark_spans(example: Example, matches: Sequence[ConstraintMatch]) -> Example:
    spans = tuple(match.span for match in matches)
    names = tuple(dict.fromkeys(match.name for match in matches))
    return dataclasses.replace(example, banned_spans=spans, violations=names)


def _iter_answers(example: Example) -> Iterator[tuple[int, str]]:
    """Yield (message index, stripped text) of each trained answer; a plain text is message 0."""
    if example.text is not None:
        yield 0, example.text.strip()
    for i, (message, weight) in enumerate(zip(example.messages, example.turn_weights, strict=True)):
        if weight > 0:
            yield i, message["content"].strip()


def _match_full_answers(example: Example) -> list[ConstraintMatch]:
    matches: list[ConstraintMatch] = []
    for message_index, answer in _iter_answers(example):
        if answer:
            span = CharSpan(message_index, 0, len(answer))
            excerpt = answer[:MAX_EXCERPT_CHARS]
            matches.append(ConstraintMatch("negative rows", "ban", span, excerpt))
    return matches


def _find_matches(constraint: Constraint, example: Example) -> list[ConstraintMatch]:
    matches: list[ConstraintMatch] = []
    for message_index, answer in _iter_answers(example):
        for start, end in find_spans(constraint, answer, example.id):
            span = CharSpan(message_index, start, end)
            excerpt = answer[start:end][:MAX_EXCERPT_CHARS]
            matches.append(ConstraintMatch(constraint.name, constraint.mode, span, excerpt))
    return matches


def find_spans(constraint: Constraint, text: str, where: str) -> list[tuple[int, int]]:
    """Return (start, end) of each match in a text. Raises InputError if a pattern is too slow."""
    pattern = constraint.matcher
    if not isinstance(pattern, str):
        return pattern(text)
    try:
        spans = [match.span() for match in regex.finditer(pattern, text, timeout=MAX_MATCH_SECONDS)]
    except TimeoutError:
        message = (
            f"the pattern takes over {MAX_MATCH_SECONDS:g} seconds on {where}, "
            f"a text of {len(text):,} characters"
        )
        fix = "do not nest repeats: `(a+)+` tries every way to split a text, `a+` only one"
        raise InputError(message, where=f"never: {constraint.name}", fix=fix) from None
    except MemoryError:
        message = f"the pattern needs too much memory on {where}"
        fix = "do not let the pattern call itself, nor nest repeats"
        raise InputError(message, where=f"never: {constraint.name}", fix=fix) from None
    return [(start, end) for start, end in spans if start < end]


# ---------------------------------------------------------------- counts


@dataclass
class ConstraintCounts:
    """How many rows break each constraint."""

    num_answers: int = 0  # rows that are not marked negative
    unmarked: Counter[str] = field(default_factory=Counter[str])  # of those
    filtered: Counter[str] = field(default_factory=Counter[str])
    banned: Counter[str] = field(default_factory=Counter[str])
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def count_example(self, example: Example) -> None:
        """Count a row that is not excluded."""
        is_negative = bool(example.negative)
        self.num_answers += not is_negative
        for name in example.violations:
            self.banned[name] += 1
            self._count_break(name, example.id, is_negative)

    def count_violation(self, violation: Violation) -> None:
        """Count an excluded row."""
        name = violation.match.name
        self.num_answers += not violation.is_negative
        self.filtered[name] += 1
        label = f"{violation.where} {violation.match.excerpt!r}"
        self._count_break(name, label, violation.is_negative)

    def _count_break(self, name: str, label: str, is_negative: bool) -> None:
        self.unmarked[name] += not is_negative
        if not is_negative and len(self.examples[name]) < MAX_SHOWN_ROWS:
            self.examples[name].append(label)

    def refuse_broad_constraints(self, path: str) -> None:
        """Raise InputError for a constraint that most answers break."""
        for name, count in self.unmarked.items():
            if count > MAX_MATCH_SHARE * self.num_answers:
                message = f"{count:,} of {self.num_answers:,} answers in {path} break it:"
                for line in self.examples[name]:
                    message += f"\n  {line}"
                fix = 'use a narrower pattern, or mark bad rows with `"negative": true`'
                raise InputError(message, where=f"never: {name}", fix=fix)
