"""What a guard has seen of a run so far: steps with the moving average of their loss, and the measures of probes.

In: StepResults and Scores, in the order of the way that counts. Left out: what they mean (guard.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tunesmith.core.events import Score, StepResult
from tunesmith.evaluate.significance import robust_sd

SPAN = 10  # steps of the moving average
FIRST = 5  # steps that stand for the start
RECENT = 50  # steps of a running median


@dataclass
class Seen:
    """What a detector may look at: of the way that counts, in order."""

    steps: list[StepResult] = field(default_factory=list[StepResult])
    averages: list[float] = field(default_factory=list[float])  # of the loss, after each step
    probes: dict[str, list[Score]] = field(default_factory=dict[str, list[Score]])  # by measure
    expected: dict[str, float] = field(default_factory=dict[str, float])
    vocabulary: int = 0
    margin: float = math.inf  # bits per byte that may be forgotten

    def add_step(self, step: StepResult) -> None:
        rate = 2 / (SPAN + 1)
        before = self.averages[-1] if self.averages else step.loss
        # While there are few, the plain mean: an average that starts at one step follows that one for too long.
        rate = max(rate, 1 / (len(self.averages) + 1))
        self.averages.append(before + rate * (step.loss - before))
        self.steps.append(step)

    def now(self, measure: str) -> float | None:
        """Of the last probe."""
        return self.probes[measure][-1].value if measure in self.probes else None

    def base(self, measure: str) -> float:
        return self.probes[measure][0].value

    @property
    def start(self) -> float:
        """The loss that training began with."""
        first = self.steps[:FIRST]
        return sum(step.loss for step in first) / len(first)

    @property
    def lowest_step(self) -> int:
        """Where the moving average was lowest, once it stands for more than its first steps."""
        places = range(min(FIRST, len(self.averages) - 1), len(self.averages))
        return self.steps[min(places, key=self.averages.__getitem__)].step

    @property
    def noise(self) -> float:
        """How losses vary around the moving average before them."""
        before = self.averages[-RECENT - 1 : -1]
        if not before:
            return 0.0
        return robust_sd([s.loss - average for s, average in zip(self.steps[-len(before) :], before, strict=True)])
