"""What a step that trains may bring: an interval of a metric on the test rows.

In: a Comparison, the scores on eval_data during its run. Out: a Forecast, which a NextStep carries:
the metric after the step minus the metric now. It is wide: two trainings of equal worth answer
differently, and what a step gains is known from this run alone. Left out: which step is due
(next_steps.py), what it takes (plan/resolved.py), whether it held (benchmarks/tasks/scores.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from tunesmith.core.events import EVAL_TASK, Event, Score
from tunesmith.core.types import Comparison
from tunesmith.evaluate.seed_noise import add_seed_noise

LIKELIHOODS = ("loss", "bits_per_byte")
MIN_CHANGE = 0.01  # of a likelihood, on the same documents: less is no trend (ours)


class Forecast(NamedTuple):
    metric: str  # task and metric
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Trend:
    """A measure on eval_data: its best value, and those at half of the run and at its end, which
    has twice the steps."""

    best: Score
    half: Score
    end: Score

    @property
    def noise(self) -> float:
        """The change that two equal checkpoints may show: the half-width of the 95% CI of one, as
        for answers of a correlation of 0.5; of a likelihood a share of it."""
        if self.end.metric in LIKELIHOODS:
            return MIN_CHANGE * self.end.value
        return (self.end.high - self.end.low) / 2

    @property
    def gain(self) -> float:
        """Return by how much the end is better than the half."""
        return _count_gain(self.half, self.end)

    @property
    def is_improving(self) -> bool:
        return self.gain > self.noise

    @property
    def is_worsening(self) -> bool:
        """Return whether the best was in the first half, and the end is worse beyond noise."""
        is_early = self.best.step <= self.half.step
        return is_early and _count_gain(self.end, self.best) > self.noise

    @property
    def text(self) -> str:
        first, last = (f"{each.value:.3f} at step {each.step}" for each in (self.half, self.end))
        return f"eval {self.end.metric} was {first} and {last}"


def find_trend(events: Iterable[Event], metric: str) -> Trend | None:
    """Return the trend of a metric, else of a likelihood; None with fewer than two evaluations."""
    by_metric: dict[str, list[Score]] = {}
    for event in events:
        if isinstance(event, Score) and event.task in (EVAL_TASK, f"{EVAL_TASK}: mean of tasks"):
            by_metric.setdefault(event.metric, []).append(event)
    for name in (metric, *LIKELIHOODS):
        scores = by_metric.get(name, [])
        if len(scores) > 1:
            end = scores[-1]
            half = min(scores[:-1], key=lambda score: abs(2 * score.step - end.step))
            best = max(scores, key=lambda score: _count_gain(end, score))
            return Trend(best, half, end)
    return None


def _count_gain(first: Score, last: Score) -> float:
    change = last.value - first.value
    return -change if last.metric in LIKELIHOODS else change


# ---------------------------------------------------------------- intervals


def make_forecast(now: Comparison, gain: float, reason: str) -> Forecast:
    """Return an interval from no gain up to `gain`, with the noise of another training to both
    sides: no grade is above 1, no loss below 0, and what has no bound may double."""
    noise = compute_noise(now)
    value = now.after.value
    room = 1 - value if now.higher_is_better and value <= 1 else value
    low = -noise
    high = min(gain + noise, room)
    if not now.higher_is_better:
        low = -high
        high = noise
    metric = f"{now.task} {now.metric}"
    return Forecast(metric, low, high, f"{metric} {low:+.3f} to {high:+.3f}: {reason}")


def forecast_longer(now: Comparison, trend: Trend | None) -> Forecast:
    """Twice the steps bring at most what the last doubling brought, since returns diminish."""
    if trend is None or trend.end.metric != now.metric:
        return make_forecast(now, math.inf, "how much is left to gain is not known")
    reason = f"the last doubling of the steps brought {trend.gain:+.3f} on eval_data"
    return make_forecast(now, max(0.0, trend.gain), reason)


def compute_noise(now: Comparison) -> float:
    """Return the half-width of the 95% interval between two trainings of equal worth: of grades as
    if they answered independently, else that of the change from the base; and of seeds."""
    items = (now.high - now.low) / 2
    if now.higher_is_better:
        items = math.sqrt(2) * (now.after.high - now.after.low) / 2
    again = replace(now, before=now.after, difference=0.0, low=-items, high=items)
    return add_seed_noise(again, None).seed_high or items
