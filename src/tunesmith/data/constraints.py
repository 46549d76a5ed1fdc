"""What no answer may say: which rows break a constraint of the recipe, and what becomes of them.

    Example, constraints -> the Example, its bad places marked (`banned`); or BadRow, Violation

Where rows train, an answer that matches is left out (`filter`; `pair`, where it should be the better one), or its
matching places are trained away from (`ban`). `negative: true` in a row says that its answer is bad, `negative: false`
that the match is rightly there. Held-out rows are never left out: negative ones are prompts that ask for a violation,
others may match rightly.
Left out: what a place costs (train/losses.py), how often a model breaks a constraint (evaluate).
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import regex

from tunesmith.core.errors import InputError
from tunesmith.core.types import Example, Span
from tunesmith.data.readers.invalid_row import BadRow
from tunesmith.recipe.fields import Constraint

SECONDS = 2.0  # for one pattern on one answer; more is no work but backtracking
MOST_MATCHED = 0.5  # of all answers: more, and the pattern says nothing about what is bad
SHOWN = 3
EXCERPT = 60  # characters


class Violation(BadRow):
    """A row whose answer breaks a constraint that leaves such rows out."""

    def __init__(self, example: Example, found: Match) -> None:
        what = f"the answer breaks {found.name!r}: {found.excerpt!r}"
        fix = 'correct the answer, or write `"negative": false` into the row if it is right here'
        super().__init__("never", what, where=example.id, fix=fix)
        self.found, self.marked = found, bool(example.negative)


@dataclass(frozen=True)
class Match:
    name: str
    mode: str
    span: Span
    excerpt: str


@dataclass(frozen=True)
class Never:
    """The constraints as they hold for one role. `held_out`: rows are measured. `bans`: matching places can be trained
    away from; without it such rows are left out too."""

    constraints: tuple[Constraint, ...] = ()
    held_out: bool = False
    bans: bool = True

    @property
    def pairing(self) -> bool:
        """Rows may come without a worse side: the base model's own bad answer will be it."""
        return any(constraint.mode == "pair" for constraint in self.constraints)

    def judged(self, example: Example) -> Example:
        """Raises Violation for a row to leave out, BadRow for a negative row that nothing says the fault of."""
        if example.negative is False or not (self.constraints or example.negative):
            return example
        if example.negative and example.rejected is not None:
            fix = "drop `negative`: the rejected side says what is bad"
            raise BadRow("contradiction", "a pair that is negative", where=example.id, fix=fix)
        if example.negative == "whole" and (self.bans or self.held_out):
            return _marked(example, list(_whole(example)))
        found = [match for c in self.constraints for match in matches(c, example)]
        if self.held_out:
            return _marked(example, found or list(_whole(example))) if example.negative else example
        for match in found:
            if match.mode != "ban" or not self.bans:
                raise Violation(example, match)
        if example.negative and not found:
            raise _nothing_bad(example)
        return _marked(example, found) if found else example


def _nothing_bad(example: Example) -> BadRow:
    fix = 'add a `never` constraint with `mode: ban` that matches it, write `"negative": "whole"`, or drop the row'
    what = "the row is negative, and nothing says what is bad in it"
    return BadRow("nothing bad", what, where=example.id, fix=fix)


def _marked(example: Example, found: Sequence[Match]) -> Example:
    names = tuple(dict.fromkeys(match.name for match in found))
    return dataclasses.replace(example, banned=tuple(match.span for match in found), breaks=names)


def answers_of(example: Example) -> Iterator[tuple[int, str]]:
    """(message, what it says without the white space around it) of each trained answer; a plain text is message 0."""
    if example.text is not None:
        yield 0, example.text.strip()
    for i, (message, weight) in enumerate(zip(example.messages, example.turn_weights, strict=True)):
        if weight > 0:
            yield i, message["content"].strip()


def _whole(example: Example) -> Iterator[Match]:
    for message, said in answers_of(example):
        if said:
            yield Match("negative rows", "ban", Span(message, 0, len(said)), said[:EXCERPT])


def matches(constraint: Constraint, example: Example) -> Iterator[Match]:
    """Raises InputError when the pattern takes too long."""
    for message, said in answers_of(example):
        for start, end in spans(constraint, said, example.id):
            yield Match(constraint.name, constraint.mode, Span(message, start, end), said[start:end][:EXCERPT])


def spans(constraint: Constraint, text: str, where: str) -> list[tuple[int, int]]:
    """Where a constraint matches a text. Raises InputError when the pattern takes too long."""
    find = constraint.find
    if not isinstance(find, str):
        return find(text)
    try:
        found = [match.span() for match in regex.finditer(find, text, timeout=SECONDS)]
    except TimeoutError:
        what = f"the pattern takes over {SECONDS:g} seconds on {where}, a text of {len(text):,} characters"
        fix = "repeat nothing inside a repeat: `(a+)+` tries every way to divide a text, `a+` only one"
        raise InputError(what, where=f"never: {constraint.name}", fix=fix) from None
    return [(start, end) for start, end in found if start < end]


# ---------------------------------------------------------------- counts


@dataclass
class Tally:
    """How many rows break what. `unmarked` are those that no row itself calls negative."""

    answers: int = 0  # rows that are not called negative
    unmarked: Counter[str] = field(default_factory=Counter[str])
    left_out: Counter[str] = field(default_factory=Counter[str])
    banned: Counter[str] = field(default_factory=Counter[str])
    first: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def kept(self, example: Example) -> None:
        self.answers += not example.negative
        for name in example.breaks:
            self.banned[name] += 1
            self._break(name, example.id, marked=bool(example.negative))

    def lost(self, violation: Violation) -> None:
        self.answers += not violation.marked
        self.left_out[violation.found.name] += 1
        self._break(violation.found.name, f"{violation.where} {violation.found.excerpt!r}", marked=violation.marked)

    def _break(self, name: str, shown: str, *, marked: bool) -> None:
        self.unmarked[name] += not marked
        if not marked and len(self.first[name]) < SHOWN:
            self.first[name].append(shown)

    def refuse_most(self, path: str) -> None:
        """Raises InputError for a constraint that most answers break."""
        for name, count in self.unmarked.items():
            if count > MOST_MATCHED * self.answers:
                shown = "".join(f"\n  {line}" for line in self.first[name])
                what = f"{count:,} of {self.answers:,} answers of {path} break it, over half:{shown}"
                fix = 'write a narrower pattern, or mark the rows that are meant as bad with `"negative": true`'
                raise InputError(what, where=f"never: {name}", fix=fix)
