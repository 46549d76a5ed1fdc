"""The plans of several stages as one object, and verbs that take a single stage only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tunesmith.core.errors import InputError
from tunesmith.core.json_io import parse_as
from tunesmith.core.run_dir import STAGES_FILE, read_plan_json
from tunesmith.core.sealed_json import RESTORE_FIX
from tunesmith.core.types import DataReport, Plan, PlanConfig

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Stages

T = TypeVar("T")


@dataclass(frozen=True)
class StagedPlan:
    """A plan for each of several stages, as decided before the first of them; they share a run
    folder."""

    output_dir: str
    plans: tuple[Plan, ...]

    @property
    def config(self) -> PlanConfig:
        """The settings of the last stage, with the output folder of the run."""
        return dataclasses.replace(self.plans[-1].config, output_dir=self.output_dir)

    @property
    def steps(self) -> int:
        return sum(plan.steps for plan in self.plans)

    @property
    def data(self) -> dict[str, DataReport]:
        """The reports, by stage and role."""
        return {
            f"{plan.config.stage} {role}": report
            for plan in self.plans
            for role, report in plan.data.items()
        }


def read_staged_plan(run: Path) -> StagedPlan:
    """Read the plans of a run folder. Raises InputError if the file is damaged or of another
    format."""
    file = run / STAGES_FILE
    return parse_as(StagedPlan, read_plan_json(file), where=str(file), fix=RESTORE_FIX)


def require_single_stage(value: T | tuple[T, ...] | Stages) -> T:
    """Return a recipe or its inputs. Raises InputError for those of several stages."""
    from tunesmith.recipe.schema import Stages

    if isinstance(value, (tuple, Stages)):
        message = "this command works on a single stage, but the recipe has several"
        fix = "name one of them, with the keys that it needs: --stage sft"
        raise InputError(message, where="stage", fix=fix)
    return value
