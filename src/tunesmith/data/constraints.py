"""What no answer may say: which rows break a constraint of the recipe, and what becomes of them.

    Example, constraints -> the Example, its bad places marked (`banned`); or BadRow, Violation

Where rows train, an answer that matches is left out (`filter`; `pair`, where it should be the
better one), or its matching places are trained away from (`ban`). `negative: true` in a row says
that its answer is bad, `negative: false` that the match is rightly there. Held-out rows are never
left out: negative ones are prompts that ask for a violation, others may match rightly. Left out:
what a place costs (train/losses.py), how often a model breaks a constraint (evaluate)."""

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

MAX_MATCH_SECONDS = 2.0  # for one pattern on one answer; more is no work but backtracking
MAX_MATCH_SHARE = 0.5  # of all answers: more, and the pattern says nothing about what is bad
MAX_SHOWN_ROWS = 3
MAX_EXCERPT_CHARS = 60  # characters


class Violation(InvalidRow):
    """A row whose answer breaks a constraint that leaves such rows out."""

    def __init__(self, example: Example, match: ConstraintMatch) -> None:
        message = f"the answer breaks {match.name!r}: {match.excerpt!r}"
        fix = 'correct the answer, or write `"negative": false` into the row if it is right here'
        super().__init__("never", message, where=example.id, fix=fix)
        self.match, self.is_negative = match, bool(example.negative)


@dataclass(frozen=True)
class ConstraintMatch:
    name: str
    mode: str
    span: CharSpan
    excerpt: str


@dataclass(frozen=True)
class ConstraintSet:
    """The constraints as they hold for one role. `held_out`: rows are measured. `bans`: matching
    places can be trained away from; without it such rows are left out too."""

    constraints: tuple[Constraint, ...] = ()
    is_held_out: bool = False
    can_ban: bool = True

    @property
    def has_pair_constraints(self) -> bool:
        """Rows may come without a worse side: the base model's own bad answer will be it."""
        return any(constraint.mode == "pair" for constraint in self.constraints)

    def mark_violations(self, example: Example) -> Example:
        """Raises Violation for a row to leave out, BadRow for a negative row that nothing says the
        fault of."""
        if example.negative is False or not (self.constraints or example.negative):
            return example
        if example.negative and example.rejected is not None:
            fix = "drop `negative`: the rejected side says what is bad"
            raise InvalidRow("contradiction", "a pair that is negative", where=example.id, fix=fix)
        if example.negative == "whole" and (self.can_ban or self.is_held_out):
            return _mark_spans(example, list(_match_full_answers(example)))
        matches = [
            match for constraint in self.constraints for match in find_matches(constraint, example)
        ]
        if self.is_held_out:
            return (
                _mark_spans(example, matches or list(_match_full_answers(example)))
                if example.negative
                else example
            )
        for match in matches:
            if match.mode != "ban" or not self.can_ban:
                raise Violation(example, match)
        if example.negative and not matches:
            raise _build_no_match_error(example)
        return _mark_spans(example, matches) if matches else example


def _build_no_match_error(example: Example) -> InvalidRow:
    fix = 'add a `never` constraint with `mode: ban` that matches it, write `"negative": "whole"`, or drop the row'
    message = "the row is negative, and nothing says what is bad in it"
    return InvalidRow("nothing bad", message, where=example.id, fix=fix)


def _mark_spans(example: Example, matches: Sequence[ConstraintMatch]) -> Example:
    names = tuple(dict.fromkeys(match.name for match in matches))
    return dataclasses.replace(
        example, banned_spans=tuple(match.span for match in matches), violations=names
    )


def iter_answers(example: Example) -> Iterator[tuple[int, str]]:
    """(message, what it says without the white space around it) of each trained answer; a plain
    text is message 0."""
    if example.text is not None:
        yield 0, example.text.strip()
    for i, (message, weight) in enumerate(zip(example.messages, example.turn_weights, strict=True)):
        if weight > 0:
            yield i, message["content"].strip()


def _match_full_answers(example: Example) -> Iterator[ConstraintMatch]:
    for message_index, answer in iter_answers(example):
        if answer:
            yield ConstraintMatch(
                "negative rows",
                "ban",
                CharSpan(message_index, 0, len(answer)),
                answer[:MAX_EXCERPT_CHARS],
            )


def find_matches(constraint: Constraint, example: Example) -> Iterator[ConstraintMatch]:
    """Raises InputError when the pattern takes too long."""
    for message_index, answer in iter_answers(example):
        for start, end in find_spans(constraint, answer, example.id):
            yield ConstraintMatch(
                constraint.name,
                constraint.mode,
                CharSpan(message_index, start, end),
                answer[start:end][:MAX_EXCERPT_CHARS],
            )


def find_spans(constraint: Constraint, text: str, where: str) -> list[tuple[int, int]]:
    """Where a constraint matches a text. Raises InputError when the pattern takes too long."""
    pattern = constraint.matcher
    if not isinstance(pattern, str):
        return pattern(text)
    try:
        spans = [match.span() for match in regex.finditer(pattern, text, timeout=MAX_MATCH_SECONDS)]
    except TimeoutError:
        message = f"the pattern takes over {MAX_MATCH_SECONDS:g} seconds on {where}, a text of {len(text):,} characters"
        fix = "repeat nothing inside a repeat: `(a+)+` tries every way to divide a text, `a+` only one"
        raise InputError(message, where=f"never: {constraint.name}", fix=fix) from None
    return [(start, end) for start, end in spans if start < end]


# ---------------------------------------------------------------- counts


@dataclass
class ConstraintCounts:
    """How many rows break what. `unmarked` are those that no row itself calls negative."""

    num_answers: int = 0  # rows that are not called negative
    unmarked: Counter[str] = field(default_factory=Counter[str])
    filtered: Counter[str] = field(default_factory=Counter[str])
    banned: Counter[str] = field(default_factory=Counter[str])
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def count_example(self, example: Example) -> None:
        self.num_answers += not example.negative
        for name in example.violations:
            self.banned[name] += 1
            self._count_break(name, example.id, is_negative=bool(example.negative))

    def count_violation(self, violation: Violation) -> None:
        self.num_answers += not violation.is_negative
        self.filtered[violation.match.name] += 1
        self._count_break(
            violation.match.name,
            f"{violation.where} {violation.match.excerpt!r}",
            is_negative=violation.is_negative,
        )

    def _count_break(self, name: str, label: str, *, is_negative: bool) -> None:
        self.unmarked[name] += not is_negative
        if not is_negative and len(self.examples[name]) < MAX_SHOWN_ROWS:
            self.examples[name].append(label)

    def refuse_broad_constraints(self, path: str) -> None:
        """Raises InputError for a constraint that most answers break."""
        for name, count in self.unmarked.items():
            if count > MAX_MATCH_SHARE * self.num_answers:
                example_lines = "".join(f"\n  {line}" for line in self.examples[name])
                message = f"{count:,} of {self.num_answers:,} answers of {path} break it, over half:{example_lines}"
                fix = 'write a narrower pattern, or mark the rows that are meant as bad with `"negative": true`'
                raise InputError(message, where=f"never: {name}", fix=fix)
