"""Two trained models: what their seeds add to the difference, and what is said without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fake_runs import PLAN, make_comparison, make_record, write_run
from tunesmith.core.types import Comparison
from tunesmith.evaluate.model_ref import ModelRef, compare_models
from tunesmith.evaluate.regression_gate import build_gates
from tunesmith.evaluate.results import EvalResults, MetricValues, compare_measurements
from tunesmith.evaluate.seed_noise import SeedSpread, add_seed_noise, compute_spread, read_spreads
from tunesmith.evaluate.statistics import (
    compute_p_value,
    describe_evidence,
    judge_comparison,
)

IDS = tuple(f"test.jsonl:{i}" for i in range(40))


def compare_rates(right_before: int, right_after: int) -> Comparison:
    sides = [(1.0,) * right + (0.0,) * (40 - right) for right in (right_before, right_after)]
    return compare_measurements(*(MetricValues("test", "exact_match", IDS, v) for v in sides))


def test_one_seed_each_is_no_verdict_even_where_the_items_would_give_one() -> None:
    comparison = compare_rates(10, 30)
    assert judge_comparison(comparison) == "better"
    noisy = add_seed_noise(comparison, None)
    assert judge_comparison(noisy) == "seed noise unknown"
    assert noisy.seed_low is not None
    assert noisy.seed_low < comparison.low
    assert (noisy.low, noisy.high) == (comparison.low, comparison.high)
    assert "with what seeds usually add" in describe_evidence(noisy)
    same = add_seed_noise(compare_rates(10, 11), None)
    assert judge_comparison(same) == "no difference shown"


@pytest.mark.parametrize(("sd", "verdict"), [(0.01, "better"), (0.3, "no difference shown")])
def test_measured_seeds_decide(sd: float, verdict: str) -> None:
    noisy = add_seed_noise(compare_rates(10, 30), SeedSpread(sd, 4))
    assert judge_comparison(noisy) == verdict
    assert (compute_p_value(noisy) < 0.05) == (verdict == "better")


def test_the_spread_is_pooled_within_recipes() -> None:
    assert compute_spread([[1.0], [2.0]]) is None
    spread = compute_spread([[1.0, 1.2], [5.0, 5.0, 5.3], [9.0]])
    assert spread is not None
    assert (spread.sd, spread.degrees) == (pytest.approx(((0.02 + 0.06) / 3) ** 0.5), 3)


def test_runs_beside_show_the_spread_by_task_and_a_damaged_one_is_passed_over(
    tmp_path: Path,
) -> None:
    """Test rows and general text may have the same metric."""
    for seed, (test, general) in enumerate([(0.5, 1.0), (0.9, 1.1)]):
        plan = replace(PLAN, recipe={"model": "tiny", "seed": seed})
        comparisons = (
            make_comparison("bits_per_byte", 2.0, test, 0.1, higher_is_better=False),
            make_comparison("bits_per_byte", 0.9, general, 0.1, task="general text"),
        )
        record = make_record(plan, comparisons=comparisons)
        write_run(tmp_path / f"run-{seed}", plan=plan, record=record)
    damaged = write_run(tmp_path / "run-2", record=make_record())
    (damaged / "record.json").write_text("{")
    spreads = read_spreads([tmp_path / "run-0", tmp_path / "run-1"])
    sds = {task: spreads[task, "bits_per_byte"].sd for task in ("test", "general text")}
    assert sds == {"test": pytest.approx(0.4 / 2**0.5), "general text": pytest.approx(0.1 / 2**0.5)}


def test_the_interval_holds_for_other_seeds() -> None:
    """Two recipes of three seeds each that are equal: at most 6% are called different."""
    random = np.random.default_rng(0)
    false_verdicts = 0
    for _ in range(1500):
        seeds = 5 + random.normal(0, 0.3, (2, 3))
        items = random.normal(0, 1, 40)
        means = [items + side.mean() + random.normal(0, 0.2, 40) for side in seeds]
        sides = [MetricValues("test", "loss", IDS, tuple(each.tolist())) for each in means]
        spread = compute_spread(seeds.tolist())
        comparison = add_seed_noise(compare_measurements(*sides), spread, (3, 3))
        false_verdicts += judge_comparison(comparison) in ("better", "worse")
    assert 0.02 < false_verdicts / 1500 <= 0.06


def test_a_gate_is_on_the_weights_whatever_the_seed() -> None:
    noisy = add_seed_noise(compare_rates(30, 10), None)
    (gate,) = build_gates([noisy], None)
    assert not gate.passed
    assert gate.message.endswith(": worse")


def test_a_file_and_a_base_have_no_seeds_between_them() -> None:
    values = MetricValues("test", "exact_match", IDS, (0.0,) * 40)
    results = [EvalResults((values,)), EvalResults((replace(values, values=(1.0,) * 40),))]
    compared = compare_models([ModelRef("base"), ModelRef("answers.jsonl")], results)
    assert judge_comparison(compared.comparisons[0]) == "better"
    assert (compared.comparisons[0].seed_low, compared.notes) == (None, ())
