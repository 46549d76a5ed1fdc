"""What shows in an answer, without a reference, that it is bad.

    rules = build_rules(stable, candidate);  check_answer(answer, rules) -> {"cut": False, ...}

In: an answer as text, tokens and end. Out: check -> whether it failed, for the checks that apply.
They see collapse and form, not whether a fact is right: verdicts of people (feedback) see that.
Left out: which rates are too high (canary.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.core.types import Json
from tunesmith.evaluate.constraint_violations import find_matches
from tunesmith.evaluate.degeneration import compute_repetition
from tunesmith.evaluate.json_metrics import schema_valid
from tunesmith.recipe.fields import Constraint
from tunesmith.serve.registry import ServedModel

MAX_REPETITION = 0.5  # of the 4-grams of tokens; JSON of one form repeats up to a third
FAILED = "failed"  # the check of an answer that was not completed


@dataclass(frozen=True)
class CheckRules:
    """The rules that the answers of a route have to meet, whichever model gives them."""

    schema: Json | None = None  # for requests without a grammar
    constraints: tuple[Constraint, ...] = ()


@dataclass(frozen=True)
class CheckedAnswer:
    """An answer to check. `has_grammar`: a schema was enforced, which a cut answer breaks."""

    text: str
    tokens: Sequence[int]
    finish_reason: str  # end, stop or length
    has_grammar: bool = False


def build_rules(stable: ServedModel, candidate: ServedModel | None) -> CheckRules:
    """Return the schema that clients rely on today, and what either run must never say."""
    constraints = list(_list_constraints(stable))
    if candidate is not None:
        new = _list_constraints(candidate)
        constraints += [constraint for constraint in new if constraint not in constraints]
    schema = None if stable.source is None else stable.source.schema
    return CheckRules(schema, tuple(constraints))


def _list_constraints(model: ServedModel) -> tuple[Constraint, ...]:
    return () if model.source is None else model.source.constraints


def check_answer(answer: CheckedAnswer, rules: CheckRules) -> dict[str, bool]:
    """Return check -> whether the answer is bad. Slow patterns take seconds: runs on a worker.

    Raises InputError for a pattern of a run that takes too long."""
    checks = {
        "cut": answer.finish_reason == "length",
        "looped": compute_repetition(answer.tokens) > MAX_REPETITION,
        FAILED: False,
    }
    if answer.has_grammar:
        checks["schema_invalid"] = answer.finish_reason != "end"
    elif rules.schema is not None:
        checks["schema_invalid"] = not schema_valid(answer.text, "", rules.schema)
    if rules.constraints:
        checks["violated"] = any(
            find_matches(constraint, answer.text, "an answer") for constraint in rules.constraints
        )
    return checks
