"""Guard history: the steps and probe scores of the current trajectory, for the detectors to read.

In: TrainSteps and Scores in order; those that a rollback discarded are absent. Left out: what they
mean (detectors.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from tunesmith.core.events import GenerationSample, Score, TrainStep
from tunesmith.evaluate.statistics import compute_robust_sd

EMA_SPAN = 10  # steps of the exponential moving average of the loss
START_STEPS = 5  # steps whose mean is the loss at the start
MEDIAN_WINDOW = 50  # steps of the running medians


@dataclass
class GuardHistory:
    """Steps and probe scores so far, oldest first."""

    steps: list[TrainStep] = field(default_factory=list[TrainStep])
    loss_averages: list[float] = field(default_factory=list[float])  # after each step
    probe_scores: dict[str, list[Score]] = field(default_factory=dict[str, list[Score]])
    expected_scores: dict[str, float] = field(default_factory=dict[str, float])
    vocab_size: int = 0
    forgetting_margin: float = math.inf  # bits per byte
    planned_steps: int = 0
    eval_samples: list[GenerationSample] = field(default_factory=list[GenerationSample])

    def add_sample(self, sample: GenerationSample) -> None:
        """Append a complete answer to a row of eval_data; only those of the last step stay."""
        if self.eval_samples and self.eval_samples[0].step != sample.step:
            self.eval_samples = []
        self.eval_samples.append(sample)

    def add_step(self, step: TrainStep) -> None:
        """Append a step and the moving average of the loss after it."""
        previous = self.loss_averages[-1] if self.loss_averages else step.loss
        # The plain mean of the first steps: an EMA would follow its first value for too long.
        rate = max(2 / (EMA_SPAN + 1), 1 / (len(self.loss_averages) + 1))
        self.loss_averages.append(previous + rate * (step.loss - previous))
        self.steps.append(step)

    def get_latest(self, metric: str) -> float | None:
        """Return the metric's value in the last probe, None if it was never measured."""
        return self.probe_scores[metric][-1].value if metric in self.probe_scores else None

    def get_baseline(self, metric: str) -> float:
        """Return the metric's value before training."""
        return self.probe_scores[metric][0].value

    @property
    def start_loss(self) -> float:
        """Mean loss of the first steps."""
        first = self.steps[:START_STEPS]
        return sum(step.loss for step in first) / len(first)

    @property
    def lowest_step(self) -> int:
        """Step with the lowest loss average, not counting the first steps."""
        first = min(START_STEPS, len(self.loss_averages) - 1)
        indices = range(first, len(self.loss_averages))
        return self.steps[min(indices, key=self.loss_averages.__getitem__)].step

    @property
    def loss_noise(self) -> float:
        """Robust standard deviation of step losses around the moving average before them."""
        previous = self.loss_averages[-MEDIAN_WINDOW - 1 : -1]
        if not previous:
            return 0.0
        recent_steps = self.steps[-len(previous) :]
        deviations = [
            step.loss - average for step, average in zip(recent_steps, previous, strict=True)
        ]
        return compute_robust_sd(deviations)
