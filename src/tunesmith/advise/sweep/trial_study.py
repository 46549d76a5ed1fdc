"""The trials of a sweep in Optuna's journal, a file: which is next, and which stops early.

    study = TrialStudy.open(folder, sweep, seeds, ...)
    while spec := study.choose_next(): ...          a trial that was interrupted comes first
        study.start(spec)
    study.add_value(number, percent, value)         an evaluation
    study.is_hopeless(number)                       should it stop early?
    study.finish(number, "complete", value)

Every configuration runs with the first seed; those that reach their end run with the other seeds.
Only trials of the first seed are stopped early, so that means over seeds are of the same seeds.

What comes next is a function of the journal alone: a sampler is asked in a fresh study in memory,
seeded by the number of the trial. So a sweep that was killed goes on as an uninterrupted one. Where
trials run at once, another counts with what it has measured by then. Left out: running a trial
(trial_process.py).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from tunesmith.advise.sweep.records import TrialSpec
from tunesmith.core.atomic import disk_errors
from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.recipe.sweep import INTEGER_KEYS, SweepConfig, SweptValues, ValueRange

JOURNAL_FILE = "trials.log"
STUDY_NAME = "sweep"
MAX_PROPOSALS = 20  # for a combination that was not tried yet
# Early stopping: none before a quarter of the steps, nor before four trials have been there.
MIN_PRUNED_PERCENT = 25
MIN_PRUNER_TRIALS = 4
STATES: dict[str, TrialState] = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
optuna.logging.set_verbosity(optuna.logging.WARNING)


class TrialStudy:
    """The journal of one sweep; one process at a time."""

    def __init__(
        self,
        study: optuna.Study,
        sweep: SweepConfig,
        seeds: Sequence[int],
        sampler_seed: int,
        file: Path,
    ) -> None:
        self.sweep = sweep
        self.seeds = tuple(seeds)
        self.sampler_seed = sampler_seed
        self.distributions = {
            key: _make_distribution(key, values) for key, values in sweep.space.items()
        }
        self.grid = list_grid(sweep, sampler_seed) if sweep.search == "grid" else None
        self._study = study
        self._file = file  # the journal

    @classmethod
    def open(
        cls,
        folder: Path,
        sweep: SweepConfig,
        seeds: Sequence[int],
        *,
        higher_is_better: bool,
        sampler_seed: int,
    ) -> TrialStudy:
        """Open or start the journal. The caller has locked the folder.

        Raises InputError for a damaged file."""
        file = folder / JOURNAL_FILE
        file.with_name(f"{JOURNAL_FILE}.lock").unlink(missing_ok=True)  # of a killed process
        if file.exists():
            _cut_torn_line(file)
        # Optuna's default lock is a symbolic link, and a folder that holds one is refused.
        lock = JournalFileOpenLock(str(file))
        try:
            study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(file), lock_obj=lock)),
                study_name=STUDY_NAME,
                direction="maximize" if higher_is_better else "minimize",
                pruner=_make_pruner(sweep.pruner),
                load_if_exists=True,
            )
        except (ValueError, KeyError, TypeError) as error:
            message = f"the journal of the trials is damaged: {error}"
            raise InputError(message, where=str(file), fix="use another output_dir") from error
        return cls(study, sweep, seeds, sampler_seed, file)

    @property
    def higher_is_better(self) -> bool:
        return self._study.direction == optuna.study.StudyDirection.MAXIMIZE

    @property
    def num_configurations(self) -> int:
        if self.grid is not None:
            return len(self.grid)
        assert self.sweep.trials is not None, "checked with the recipe"
        return self.sweep.trials

    def list_trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def count_finished(self) -> int:
        return sum(trial.state.is_finished() for trial in self.list_trials())

    def count_max_trials(self) -> int:
        """Return the trials there will be if none that is to come fails or stops early."""
        ended = (TrialState.PRUNED, TrialState.FAIL)
        first = [t for t in self.list_trials() if make_spec(t).seed == self.seeds[0]]
        num_ended = sum(trial.state in ended for trial in first)
        num_later = (self.num_configurations - num_ended) * (len(self.seeds) - 1)
        return self.num_configurations + num_later

    # ------------------------------------------------------------ next

    def choose_next(self, running: Collection[int] = ()) -> TrialSpec | None:
        """Return a trial that was interrupted, or else a new one; None if all were tried.

        running: the numbers of trials that run now. When they end, there may be more."""
        trials = self.list_trials()
        for trial in trials:
            if trial.state == TrialState.RUNNING and trial.number not in running:
                return make_spec(trial)
        return self._choose_new(trials)

    def start(self, spec: TrialSpec) -> None:
        """Record a new trial; one that was interrupted is recorded already."""
        if spec.number == len(self.list_trials()):
            template = optuna.trial.create_trial(
                state=TrialState.RUNNING,
                params=spec.settings,
                distributions=self.distributions,
                user_attrs={"configuration": spec.configuration, "seed": spec.seed},
            )
            with disk_errors(self._file):
                self._study.add_trial(template)

    def _choose_new(self, trials: Sequence[FrozenTrial]) -> TrialSpec | None:
        first = [trial for trial in trials if make_spec(trial).seed == self.seeds[0]]
        if len(first) < self.num_configurations:
            settings = self._propose(first)
            if settings is not None:
                return TrialSpec(len(trials), len(first), self.seeds[0], settings)
        tried = {(make_spec(trial).configuration, make_spec(trial).seed) for trial in trials}
        for seed in self.seeds[1:]:
            for trial in first:
                configuration = make_spec(trial).configuration
                is_complete = trial.state == TrialState.COMPLETE
                if is_complete and (configuration, seed) not in tried:
                    return TrialSpec(len(trials), configuration, seed, dict(trial.params))
        return None

    def _propose(self, first: Sequence[FrozenTrial]) -> Json | None:
        """Return settings that were not tried; None if none were found."""
        tried = [trial.params for trial in first]
        if self.grid is not None:
            return next((settings for settings in self.grid if settings not in tried), None)
        for attempt in range(MAX_PROPOSALS):
            seed = (self.sampler_seed + MAX_PROPOSALS * len(first) + attempt) % 2**32
            study = optuna.create_study(
                direction=self._study.direction, sampler=self._make_sampler(seed)
            )
            study.add_trials(first)
            settings = study.ask(self.distributions).params
            if settings not in tried:
                return settings
        return None

    def _make_sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        if self.sweep.search == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        num_random = min(10, max(3, self.num_configurations // 3))
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=num_random)

    # ------------------------------------------------------------ results

    def add_value(self, number: int, percent: int, value: float) -> None:
        """Record an evaluation at this percent of the steps; a repeated one changes nothing."""
        trial = self.list_trials()[number]
        if percent not in trial.intermediate_values:
            with disk_errors(self._file):
                self._reopen(trial).report(value, percent)

    def is_hopeless(self, number: int) -> bool:
        """Return whether the pruner stops the trial at its last evaluation."""
        trial = self.list_trials()[number]
        if make_spec(trial).seed != self.seeds[0]:
            return False
        with disk_errors(self._file):
            return self._reopen(trial).should_prune()

    def finish(
        self,
        number: int,
        state: Literal["complete", "pruned", "failed"],
        value: float | None = None,
        reason: str = "",
    ) -> None:
        with disk_errors(self._file):
            self._reopen(self.list_trials()[number]).set_user_attr("reason", reason)
            self._study.tell(number, value, state=STATES[state])

    def _reopen(self, trial: FrozenTrial) -> optuna.Trial:
        """Return the handle of a trial of the journal, which Optuna gives to its first process."""
        return optuna.Trial(self._study, trial._trial_id)


def _make_pruner(name: str) -> optuna.pruners.BasePruner:
    if name == "none":
        return optuna.pruners.NopPruner()
    if name == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=MIN_PRUNED_PERCENT, reduction_factor=2
        )
    return optuna.pruners.MedianPruner(
        n_startup_trials=MIN_PRUNER_TRIALS, n_warmup_steps=MIN_PRUNED_PERCENT - 1
    )


def make_spec(trial: FrozenTrial) -> TrialSpec:
    attributes = trial.user_attrs
    return TrialSpec(
        trial.number, attributes["configuration"], attributes["seed"], dict(trial.params)
    )


def list_grid(sweep: SweepConfig, seed: int) -> list[Json]:
    """Return every combination in an order drawn by the seed.

    Values are often listed from low to high. Tried in that order, each rate is better than those
    before until the best was tried, and none of them stops early."""
    lists: list[tuple[Any, ...]] = []
    for values in sweep.space.values():
        assert isinstance(values, tuple), "a grid has no ranges"
        lists.append(values)
    keys = list(sweep.space)
    grid = [dict(zip(keys, values, strict=True)) for values in itertools.product(*lists)]
    random.Random(seed).shuffle(grid)
    return grid


def _make_distribution(key: str, values: SweptValues) -> BaseDistribution:
    if not isinstance(values, ValueRange):
        return CategoricalDistribution(values)
    if key in INTEGER_KEYS:
        return IntDistribution(int(values.min), int(values.max), log=values.log)
    return FloatDistribution(values.min, values.max, log=values.log)


def _cut_torn_line(file: Path) -> None:
    """Remove the line that a killed process left unfinished."""
    content = file.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with file.open("r+b") as stream:
            stream.truncate(end)
