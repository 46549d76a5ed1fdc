"""The plans of several stages as one object: what stages.py makes, trains and keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.core.types import DataReport, Plan


@dataclass(frozen=True)
class StagedPlan:
    """A plan for each of several stages, as decided before the first of them; they share a run
    folder."""

    output_dir: str
    plans: tuple[Plan, ...]

    def __getitem__(self, key: str) -> Any:
        """A value of the last stage, or of the whole."""
        return self.output_dir if key == "output_dir" else self.plans[-1][key]

    @property
    def steps(self) -> int:
        return sum(plan.steps for plan in self.plans)

    @property
    def data(self) -> dict[str, DataReport]:
        """The reports, by stage and role."""
        return {
            f"{plan['stage']} {role}": report
            for plan in self.plans
            for role, report in plan.data.items()
        }
