"""Judge the claims: paired differences with intervals, corrected together, beside the guesses.

    judge_claims(experiments, results) -> a ClaimVerdict per claim, in the order of the experiments

Values are paired by item after averaging over the seeds that both arms have; a side without
randomness has every seed of the other. The statistics are those of `tunesmith compare`: its
interval, its p-value, Holm's correction. All claims count in it, those not run as well, with p = 1:
another experiment that runs can decide an open claim, and reopens none. A claim holds only if every
seed alone has its sign. Two sides whose items are all equal, and an arm that ran again on a changed
product, decide nothing and are no guess that hit. Left out: the page (page.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from experiments.arms import ArmRun
from experiments.definitions import UNTRAINED, Claim, Experiment, strip_seed_suffix

from tunesmith.core.types import Comparison
from tunesmith.evaluate.pairing import pair_measurements
from tunesmith.evaluate.results import (
    EvalResults,
    MetricValues,
    average_measurements,
    compare_measurements,
)
from tunesmith.evaluate.statistics import ALPHA, MIN_ITEMS, adjust_p_values, compute_p_value

Verdict = Literal[
    "holds",
    "does not hold",
    "not decidable at this size",
    "nothing changed",
    "rerun after a change of the product",
    "not run yet",
]
Results = Mapping[str, Mapping[int, ArmRun]]  # arm -> seed -> its run


@dataclass(frozen=True)
class Evidence:
    """The difference of a claim over its items, and of each seed alone.

    p: that of the side on which the estimate lies: the claimed one if `is_as_claimed`."""

    comparison: Comparison
    seed_differences: tuple[float, ...]
    p_value: float
    is_as_claimed: bool
    is_clear: bool  # whether the interval lies on one side, and each seed on the same
    is_unchanged: bool  # whether each item has the same value on both sides


@dataclass(frozen=True)
class ClaimVerdict:
    claim: Claim
    verdict: Verdict
    evidence: Evidence | None = None
    adjusted_p: float = 1.0
    note: str = ""  # why there is no evidence
    num_seeds: int = 1  # that the experiment gives both arms
    rerun: str = ""  # what an arm gave before the product was changed

    @property
    def lacks_seeds(self) -> bool:
        """Whether seeds of the experiment have not run yet."""
        return self.evidence is not None and len(self.evidence.seed_differences) < self.num_seeds

    @property
    def is_in_guess(self) -> bool | None:
        """Whether the measured difference is where the guess put it; None if it tests no guess."""
        if self.evidence is None or self.rerun or self.verdict == "nothing changed":
            return None
        low, high = self.claim.guess
        return low <= self.evidence.comparison.difference <= high


def judge_claims(
    experiments: Sequence[Experiment], results: Mapping[str, Results]
) -> dict[str, list[ClaimVerdict]]:
    """Return the verdicts of each experiment's claims, corrected over all of them."""
    pending: list[tuple[str, ClaimVerdict]] = []
    for experiment in experiments:
        for claim in experiment.claims:
            gathered = _gather(experiment, claim, results.get(experiment.name, {}))
            declared = [
                experiment.arms[strip_seed_suffix(side)].seeds
                for side in (claim.arm, claim.against)
            ]
            num_seeds = len(_list_shared_seeds(experiment, claim, declared))
            pending.append((experiment.name, replace(gathered, num_seeds=num_seeds)))
    p_values = [each.evidence.p_value if each.evidence else 1.0 for _, each in pending]
    verdicts: dict[str, list[ClaimVerdict]] = {experiment.name: [] for experiment in experiments}
    for (name, each), adjusted_p in zip(pending, adjust_p_values(p_values), strict=True):
        verdict = each.verdict
        if each.evidence is not None:
            verdict = _decide(each, each.evidence, adjusted_p)
        verdicts[name].append(replace(each, verdict=verdict, adjusted_p=adjusted_p))
    return verdicts


def _list_shared_seeds(
    experiment: Experiment, claim: Claim, seeds: Sequence[Collection[int]]
) -> list[int]:
    """Return the seeds of the pairs, of those that the arm and the one against it have.

    A side without randomness has every seed of the other."""
    arm, against = seeds
    if not arm or not against:
        return []
    if not experiment.has_randomness(claim.against):
        return sorted(arm)
    if not experiment.has_randomness(claim.arm):
        return sorted(against)
    return sorted(set(arm) & set(against))


def _decide(each: ClaimVerdict, evidence: Evidence, adjusted_p: float) -> Verdict:
    if each.rerun:
        return "rerun after a change of the product"
    if evidence.is_unchanged and each.claim.expect != "equal":
        return "nothing changed"
    if not evidence.is_clear or adjusted_p >= ALPHA:
        return "not decidable at this size"
    return "holds" if evidence.is_as_claimed else "does not hold"


def _gather(experiment: Experiment, claim: Claim, results: Results) -> ClaimVerdict:
    """Return the claim with its evidence, or with the reason why it has none."""
    sides = (claim.arm, claim.against)
    runs = [results.get(strip_seed_suffix(side), {}) for side in sides]
    seeds = _list_shared_seeds(experiment, claim, [each.keys() for each in runs])
    if not seeds:
        return ClaimVerdict(claim, "not run yet")
    pairs: list[tuple[MetricValues, MetricValues]] = []
    for seed in seeds:
        arm, against = (_select_run(side_runs, seed) for side_runs in runs)
        for side, run in zip(sides, (arm, against), strict=True):
            if run.failure:
                note = f"{side} ended early: {run.failure}"
                return ClaimVerdict(claim, "not decidable at this size", note=note)
        first, second = (
            _get_values(claim, claim.against, against),
            _get_values(claim, claim.arm, arm),
        )
        pairs.append(_select_pair(first, second))
    evidence = compute_evidence(claim, pairs)
    return ClaimVerdict(claim, "not run yet", evidence, rerun=experiment.find_reruns(claim))


def _select_run(runs: Mapping[int, ArmRun], seed: int) -> ArmRun:
    """Return the run of a seed; of a side without randomness, any."""
    return runs[seed] if seed in runs else runs[min(runs)]


def _get_values(claim: Claim, side: str, run: ArmRun) -> MetricValues:
    measurements = run.before if side.endswith(UNTRAINED) else run.after
    for values in measurements:
        if (values.task, values.metric) == (claim.task, claim.metric):
            return values
    measured = ", ".join(f"{values.task} {values.metric}" for values in measurements)
    raise ValueError(f"{side} has no {claim.task} {claim.metric}, but {measured}")


def _select_pair(first: MetricValues, second: MetricValues) -> tuple[MetricValues, MetricValues]:
    """Return both on the items that they share, as steps where one run is shorter."""
    pairs, notes = pair_measurements(EvalResults((first,)), EvalResults((second,)))
    if not pairs:
        raise ValueError("; ".join(notes))
    return pairs[0]


def compute_evidence(claim: Claim, pairs: Sequence[tuple[MetricValues, MetricValues]]) -> Evidence:
    """Return the evidence of (against, arm) pairs, one per seed."""
    comparison = _compare(pairs)
    seed_differences = tuple(_compare([pair]).difference for pair in pairs)
    sides = list(_iter_sides(claim, comparison))
    # of an equality both sides must hold, and the weaker one decides
    slack, _, high, p_value = min(sides, key=lambda side: side[0])
    is_as_claimed = slack > 0
    if is_as_claimed:
        p_value = max(side[3] for side in sides)
        is_one_sided = all(side[1] > 0 for side in sides)
    else:
        is_one_sided = high < 0
    signs = {_compute_slack(claim, difference) > 0 for difference in seed_differences}
    is_clear = is_one_sided and signs == {is_as_claimed} and comparison.after.n >= MIN_ITEMS
    is_unchanged = all(
        dict(zip(first.ids, first.values, strict=True))
        == dict(zip(second.ids, second.values, strict=True))
        for first, second in pairs
    )
    return Evidence(comparison, seed_differences, p_value, is_as_claimed, is_clear, is_unchanged)


def _compare(pairs: Sequence[tuple[MetricValues, MetricValues]]) -> Comparison:
    return compare_measurements(
        average_measurements([first for first, _ in pairs]),
        average_measurements([second for _, second in pairs]),
    )


def _compute_slack(claim: Claim, difference: float) -> float:
    """Return by how much a difference is on the claimed side."""
    if claim.expect == "equal":
        return claim.margin - abs(difference)
    return (difference if claim.expect == "higher" else -difference) - claim.margin


def _iter_sides(
    claim: Claim, comparison: Comparison
) -> Iterator[tuple[float, float, float, float]]:
    """Yield (slack, low, high, p) of each inequality that a claim states: one, or two if equal."""
    signs = {"higher": (1,), "lower": (-1,), "equal": (1, -1)}[claim.expect]
    for sign in signs:
        # d > margin; for an equality d > -margin and -d > -margin
        shift = claim.margin if claim.expect == "equal" else -claim.margin
        ends = sorted((sign * comparison.low + shift, sign * comparison.high + shift))
        shifted = replace(
            comparison,
            difference=sign * comparison.difference + shift,
            low=ends[0],
            high=ends[1],
            p_value=None if claim.margin else comparison.p_value,
        )
        yield shifted.difference, ends[0], ends[1], compute_p_value(shifted)
