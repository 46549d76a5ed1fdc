"""What the plan says of the constraints: what becomes of the rows that break them, and how hard a
ban pushes.

In: the constraints and the report on the training rows. Out: a Choice a key, or none without
either. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.core.types import DataReport, PlanValue
from tunesmith.plan.rules import rule_value
from tunesmith.recipe.fields import Constraint

BAN_COEFFICIENT = 1.0  # Welleck 2019 weighs unlikelihood as it weighs cross-entropy


def decide_constraints(
    constraints: Sequence[Constraint], report: DataReport
) -> dict[str, PlanValue]:
    plan_values: dict[str, PlanValue] = {}
    if constraints:
        effects = [
            f"{count:,} rows left out for {name!r}" for name, count in report.filtered.items()
        ]
        effects += [
            f"{count:,} rows trained away from {name!r}" for name, count in report.banned.items()
        ]
        if any(constraint.mode == "pair" for constraint in constraints):
            effects.append(
                "rows without a worse side get the base model's own answer, where it breaks one"
            )
        value = tuple(f"{constraint.name} ({constraint.mode})" for constraint in constraints)
        plan_values["never"] = PlanValue(
            value, "user", "; ".join(effects) or "no row breaks a constraint"
        )
    if report.banned:
        reason = "the mean over bad tokens weighs as much as the mean over good ones; its gradient is bounded"
        plan_values["ban_coefficient"] = rule_value(BAN_COEFFICIENT, reason, "Welleck 2019")
    return plan_values
