"""What a sweep yields: its events, and the record of its trials, configurations and winner.

A configuration is one combination of the swept values; a trial is a run of it with one seed. Left
out: making them (run_sweep.py, summary.py), and showing them (cli/views/sweep.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunesmith.core.events import Score
from tunesmith.core.types import Comparison, Json

TrialState = Literal["complete", "pruned", "failed", "unfinished"]


@dataclass(frozen=True)
class TrialSpec:
    """A trial that is to run."""

    number: int
    configuration: int
    seed: int
    settings: Json

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return f"trial-{self.number:03d}"


@dataclass(frozen=True)
class TrialRecord:
    """One run; `curve` is (percent of the steps, metric on eval_data) at each evaluation."""

    number: int
    configuration: int
    seed: int
    settings: Json
    state: TrialState
    folder: str  # in the folder of the sweep
    value: float | None = None  # of the chosen checkpoint
    curve: tuple[tuple[int, float], ...] = ()
    steps: int = 0
    planned_steps: int = 0
    seconds: float = 0.0  # from its first event to its last, without pauses between attempts
    reason: str = ""  # why it failed or stopped early, or the checkpoint that the value is of


@dataclass(frozen=True)
class ConfigurationRecord:
    """One combination of values; scores are means over its seeds, paired by item."""

    number: int
    settings: Json
    trials: tuple[int, ...]  # the complete ones
    value: float | None = None
    low: float | None = None
    high: float | None = None
    seed_values: tuple[float, ...] = ()
    comparison: Comparison | None = None  # before: the winner, after: this one
    p_value: float | None = None  # Holm-adjusted over all pairs of configurations
    verdict: str = ""


@dataclass(frozen=True)
class SweepRecord:
    """The trials of a sweep and its findings, from the values tried to the test of the winner."""

    model: str
    metric: str
    higher_is_better: bool
    search: str
    pruner: str
    seeds: tuple[int, ...]
    planned_configurations: int
    rows: int  # of eval_data
    base_value: float | None  # before training
    trials: tuple[TrialRecord, ...]
    configurations: tuple[ConfigurationRecord, ...]
    winner: int | None  # configuration
    winner_trial: int | None  # its best seed on eval_data
    test: tuple[Comparison, ...]  # of the winner's trial: before and after, on test_data
    test_reads: int  # winners that were measured on test_data, this one included
    caveats: tuple[str, ...]
    folder: str

    def list_ranked(self) -> list[ConfigurationRecord]:
        """Return the winner, the others from best to worst, then those without complete trials."""
        sign = -1 if self.higher_is_better else 1

        def get_rank(configuration: ConfigurationRecord) -> tuple[bool, bool, float]:
            value = configuration.value
            is_other = configuration.number != self.winner
            return is_other, value is None, 0.0 if value is None else sign * value

        return sorted(self.configurations, key=get_rank)

    def describe_end(self, configuration: ConfigurationRecord) -> str:
        """Return how the first trial of a configuration ended, with the reason."""
        trial = next(t for t in self.trials if t.configuration == configuration.number)
        return f"{trial.state}: {trial.reason}" if trial.reason else trial.state

    def count_trials(self, state: TrialState) -> int:
        return sum(trial.state == state for trial in self.trials)


# ---------------------------------------------------------------- while it runs


@dataclass(frozen=True)
class SweepStart:
    folder: str
    model: str
    metric: str
    configurations: int
    seeds: tuple[int, ...]
    finished_trials: int  # by an earlier process


@dataclass(frozen=True)
class TrialStart:
    spec: TrialSpec
    max_trials: int  # if none stops early


@dataclass(frozen=True)
class TrialScore:
    """An evaluation of a trial on eval_data."""

    spec: TrialSpec
    score: Score


@dataclass(frozen=True)
class TrialEnd:
    trial: TrialRecord


SweepEvent = SweepStart | TrialStart | TrialScore | TrialEnd | SweepRecord
