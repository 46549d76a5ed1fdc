"""The guard judges few prompts by t intervals: false alarms stay rare from 5 items on."""

import numpy as np
import pytest

from tunesmith.core.events import PROBE_TASK, Score, TrainStep
from tunesmith.evaluate.results import MetricValues, compute_score
from tunesmith.evaluate.statistics import MIN_ITEMS, is_shown_above
from tunesmith.train.guard.detectors import GuardHistory, forgetting, overfitting

MARGIN = 0.02
TRIALS = 1500


def measure(name: str, values: np.ndarray, step: int = 0) -> Score:
    ids = tuple(f"text:{index}" for index in range(len(values)))
    weights = (1.0,) * len(values)
    metric = MetricValues(PROBE_TASK, name, ids, tuple(values.tolist()), weights=weights)
    return compute_score(metric, step=step)


@pytest.mark.parametrize("count", [6, 8])
def test_a_loss_at_the_margin_seldom_alarms(count: int) -> None:
    """One-sided, a 95% interval alarms in 2.5% of cases where the true loss is the margin."""
    random = np.random.default_rng(count)
    alarms = 0
    for _ in range(TRIALS):
        score = measure("forgotten", MARGIN + 0.05 * random.standard_normal(count))
        alarms += is_shown_above(score, MARGIN)
    assert 0.005 < alarms / TRIALS < 0.035


@pytest.mark.parametrize(("count", "alarms"), [(2, False), (5, False), (6, True), (8, True)])
def test_fewer_items_than_six_never_alarm(count: int, alarms: bool) -> None:
    history = GuardHistory(vocab_size=9, forgetting_margin=MARGIN)
    values = 0.5 + 0.01 * np.arange(count)
    history.probe_scores["forgotten"] = [measure("forgotten", values)]
    assert (count >= MIN_ITEMS) == alarms
    assert bool(forgetting(history)) == alarms
    for step, loss in ((1, 2.0), (2, 1.0)):
        history.add_step(TrainStep(step, loss, 9, 9, 1.0, 1e-3, 1.0, 0))
    losses = ((1, values), (2, values), (3, 4 * values))
    history.probe_scores["answer_loss"] = [measure("answer_loss", v, s) for s, v in losses]
    assert bool(overfitting(history)) == alarms
