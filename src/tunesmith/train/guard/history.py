"""What a guard has seen of a run so far: steps with the moving average of their loss, and the
measures of probes.

In: StepResults and Scores, in the order of the way that counts. Left out: what they mean
(guard.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tunesmith.core.events import Score, TrainStep
from tunesmith.evaluate.significance import compute_robust_sd

EMA_SPAN = 10  # steps of the moving average
START_STEPS = 5  # steps that stand for the start
MEDIAN_WINDOW = 50  # steps of a running median


@dataclass
class GuardHistory:
    """What a detector may look at: of the way that counts, in order."""

    steps: list[TrainStep] = field(default_factory=list[TrainStep])
    loss_averages: list[float] = field(default_factory=list[float])  # of the loss, after each step
    probe_scores: dict[str, list[Score]] = field(
        default_factory=dict[str, list[Score]]
    )  # by measure
    expected_scores: dict[str, float] = field(default_factory=dict[str, float])
    vocab_size: int = 0
    forgetting_margin: float = math.inf  # bits per byte that may be forgotten

    def add_step(self, step: TrainStep) -> None:
        rate = 2 / (EMA_SPAN + 1)
        previous = self.loss_averages[-1] if self.loss_averages else step.loss
        # While there are few, the plain mean: an average that starts at one step follows that one
        # for too long.
        rate = max(rate, 1 / (len(self.loss_averages) + 1))
        self.loss_averages.append(previous + rate * (step.loss - previous))
        self.steps.append(step)

    def get_latest(self, measure: str) -> float | None:
        """Of the last probe."""
        return self.probe_scores[measure][-1].value if measure in self.probe_scores else None

    def get_baseline(self, measure: str) -> float:
        return self.probe_scores[measure][0].value

    @property
    def start_loss(self) -> float:
        """The loss that training began with."""
        first = self.steps[:START_STEPS]
        return sum(step.loss for step in first) / len(first)

    @property
    def lowest_step(self) -> int:
        """Where the moving average was lowest, once it stands for more than its first steps."""
        indices = range(min(START_STEPS, len(self.loss_averages) - 1), len(self.loss_averages))
        return self.steps[min(indices, key=self.loss_averages.__getitem__)].step

    @property
    def loss_noise(self) -> float:
        """How losses vary around the moving average before them."""
        previous = self.loss_averages[-MEDIAN_WINDOW - 1 : -1]
        if not previous:
            return 0.0
        return compute_robust_sd(
            [
                s.loss - average
                for s, average in zip(self.steps[-len(previous) :], previous, strict=True)
            ]
        )
