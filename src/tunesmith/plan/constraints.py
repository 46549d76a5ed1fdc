"""What the plan says of the constraints: what becomes of the rows that break them, and how hard a ban pushes.

In: the constraints and the report on the training rows. Out: a Choice a key, or none without either. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.core.types import Choice, DataReport
from tunesmith.plan.rules import rule
from tunesmith.recipe.fields import Constraint

BAN = 1.0  # Welleck 2019 weighs unlikelihood as it weighs cross-entropy


def never_choices(constraints: Sequence[Constraint], report: DataReport) -> dict[str, Choice]:
    choices: dict[str, Choice] = {}
    if constraints:
        done = [f"{count:,} rows left out for {name!r}" for name, count in report.left_out.items()]
        done += [f"{count:,} rows trained away from {name!r}" for name, count in report.banned.items()]
        if any(one.mode == "pair" for one in constraints):
            done.append("rows without a worse side get the base model's own answer, where it breaks one")
        value = tuple(f"{one.name} ({one.mode})" for one in constraints)
        choices["never"] = Choice(value, "you", "; ".join(done) or "no row breaks a constraint")
    if report.banned:
        why = "the mean over bad tokens weighs as much as the mean over good ones; its gradient is bounded"
        choices["ban_coefficient"] = rule(BAN, why, "Welleck 2019")
    return choices
