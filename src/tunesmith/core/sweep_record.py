"""What a sweep leaves, `sweep.json` in its folder: trials, configurations, the winner, effects; and
its events.

A configuration is one combination of the swept values; a trial is a run of it with one seed. Left
out: making it (advise/sweep/), and showing it (cli/views/sweep.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.core.errors import InputError
from tunesmith.core.events import Event
from tunesmith.core.json_io import parse_as
from tunesmith.core.sealed_json import read_sealed_json
from tunesmith.core.types import Comparison, Json

SWEEP_FILE = "sweep.json"
WINNER_FILE = "winner.yaml"  # the recipe with the winner's values
SWEEP_FORMAT = 2
TrialState = Literal["complete", "pruned", "failed", "unfinished"]


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
class LevelEffect:
    """A value of a key against the winner's, over the pairs of trials that differ in it alone.
    A value of which no trial reached its end has no pairs and no difference.

    Of a range: the rank correlation of the value with the metric, `level` is "", and `pairs` are
    the configurations that reached the end."""

    key: str
    level: str
    best_level: str
    pairs: int
    difference: float | None
    low: float | None
    high: float | None
    verdict: str


@dataclass(frozen=True)
class SweepRecord:
    """The trials of a sweep and its findings, from the values tried to the test of the winner."""

    version: str
    format: int
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
    effects: tuple[LevelEffect, ...]
    winner: int | None  # configuration
    winner_trial: int | None  # its best seed on eval_data
    test: tuple[Comparison, ...]  # of the winner's trial: before and after, on test_data
    test_reads: int  # winners that were measured on test_data, this one included
    caveats: tuple[str, ...]
    folder: str

    def get_trial(self, number: int) -> TrialRecord:
        return self.trials[number]

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


def name_trial(number: int) -> str:
    """Return the name of a trial, which is that of its folder."""
    return f"trial-{number:03d}"


def read_sweep(folder: Path) -> SweepRecord:
    """Read the record of a finished sweep. Raises InputError for a folder that is no sweep, or one
    of another version."""
    file = folder / SWEEP_FILE
    if not file.is_file():
        message = f"not the folder of a sweep: there is no {SWEEP_FILE}"
        raise InputError(message, where=str(folder), fix="run `tunesmith tune sweep` to its end")
    content = read_sealed_json(file)
    refuse_other_sweep_format(content, file)
    return parse_as(SweepRecord, content, where=str(file))


def refuse_other_sweep_format(content: Json, file: Path) -> None:
    """Raise InputError for a file that another version of tunesmith has written."""
    stored_format = content.get("format")
    if stored_format != SWEEP_FORMAT:
        raise InputError(
            f"sweep format {stored_format!r:.20} is not supported; this version reads format "
            f"{SWEEP_FORMAT}",
            where=str(file),
            fix="use the version that wrote it, or another output_dir",
        )


# ---------------------------------------------------------------- while it runs


@dataclass(frozen=True)
class TrialSpec:
    """A trial that is to run."""

    number: int
    configuration: int
    seed: int
    settings: Json


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

    @property
    def number(self) -> int:
        return self.spec.number


@dataclass(frozen=True)
class TrialEvent:
    """An event of one of several trials that run at once."""

    number: int  # of the trial
    event: Event


@dataclass(frozen=True)
class TrialEnd:
    trial: TrialRecord
    remaining_trials: int  # at most
    remaining_seconds: float | None  # None while no trial has shown how long one takes


SweepEvent = SweepStart | TrialStart | Event | TrialEvent | TrialEnd | SweepRecord
