"""The journal of trials: what is next and what stops follows from it alone, wherever it was cut."""

import errno
import math
import random
from pathlib import Path
from typing import Any

import pytest
from optuna.storages.journal import JournalFileBackend

from tunesmith.advise.sweep.sweep_folder import lock_folder
from tunesmith.advise.sweep.trial_study import JOURNAL_FILE, TrialStudy, make_spec
from tunesmith.core.errors import DiskError, InputError
from tunesmith.recipe.sweep import SweepConfig

RATES = [3e-4, 1e-3, 3e-3, 1e-2, 1e-5, 3e-5]
GRID = {"learning_rate": RATES, "lora_r": [8, 64], "seeds": 2}
RANGE = {"min": 1e-5, "max": 1e-1, "log": True}


class Killed(Exception):
    pass


def open_study(folder: Path, values: dict[str, Any]) -> TrialStudy:
    sweep = SweepConfig.model_validate(values)
    return TrialStudy.open(
        folder, sweep, sweep.list_seeds(0), higher_is_better=False, sampler_seed=0
    )


def compute_loss(settings: dict[str, Any], seed: int, percent: int) -> float:
    """Return a loss that is lowest at a rate of 2e-3, and falls with the steps."""
    distance = abs(math.log10(settings["learning_rate"]) - math.log10(2e-3))
    return 1 + distance + 0.01 * seed + 0.1 * settings.get("lora_r", 8) / 64 - percent / 200


def run_all(study: TrialStudy, *, actions: float = math.inf) -> None:
    """Run trials with four evaluations each; stop dead after so many writes to the journal."""

    def act() -> None:
        nonlocal actions
        actions -= 1
        if actions < 0:
            raise Killed

    while spec := study.choose_next():
        study.start(spec)
        act()
        for percent in (25, 50, 75, 100):
            study.add_value(spec.number, percent, compute_loss(spec.settings, spec.seed, percent))
            act()
            if percent < 100 and study.is_hopeless(spec.number):
                study.finish(spec.number, "pruned", reason=f"at {percent}%")
                break
        else:
            loss = compute_loss(spec.settings, spec.seed, 100)
            study.finish(spec.number, "complete", loss)
        act()


def read_table(study: TrialStudy) -> list[tuple[Any, ...]]:
    return [
        (make_spec(trial), trial.state.name, trial.value, trial.intermediate_values)
        for trial in study.list_trials()
    ]


def test_a_grid_has_every_combination_and_its_best_ones_every_seed(tmp_path: Path) -> None:
    study = open_study(tmp_path, {**GRID, "pruner": "none"})
    run_all(study)
    specs = [make_spec(trial) for trial in study.list_trials()]
    assert len(specs) == 24
    assert [spec.seed for spec in specs] == [0] * 12 + [1] * 12
    combinations = {(spec.settings["learning_rate"], spec.settings["lora_r"]) for spec in specs}
    assert len(combinations) == 12
    assert [spec.configuration for spec in specs] == [*range(12), *range(12)]


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_hopeless_trials_stop_and_the_best_does_not(pruner: str, tmp_path: Path) -> None:
    study = open_study(tmp_path, {**GRID, "pruner": pruner})
    run_all(study)
    trials = study.list_trials()
    pruned = [trial for trial in trials if trial.state.name == "PRUNED"]
    assert len(pruned) >= 4
    assert {trial.params["learning_rate"] for trial in pruned} & {1e-5, 3e-5}
    assert all(min(trial.intermediate_values) == 25 for trial in pruned)
    assert all(max(trial.intermediate_values) < 100 for trial in pruned)
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    best = min(complete, key=lambda trial: trial.value or 0.0)
    combinations = [{"learning_rate": rate, "lora_r": rank} for rate in RATES for rank in (8, 64)]
    assert best.params == min(combinations, key=lambda each: compute_loss(each, 0, 100))
    for trial in pruned:
        assert make_spec(trial).seed == 0, "only the first seed is stopped early"
    later = {make_spec(t).configuration for t in trials if make_spec(t).seed == 1}
    assert later == {make_spec(t).configuration for t in complete if make_spec(t).seed == 0}


def test_values_listed_from_bad_to_good_are_stopped_early_too(tmp_path: Path) -> None:
    """In the order of the list, each of them would be the best so far."""
    rates = [1e-5 * 1.2**step for step in range(12)]
    losses = [compute_loss({"learning_rate": rate, "lora_r": 8}, 0, 25) for rate in rates]
    assert losses == sorted(losses, reverse=True)
    study = open_study(tmp_path, {"learning_rate": rates})
    run_all(study)
    states = [trial.state.name for trial in study.list_trials()]
    assert states.count("PRUNED") >= 4
    best = min(study.list_trials(), key=lambda trial: trial.value or math.inf)
    assert best.params == {"learning_rate": rates[-1]}


@pytest.mark.parametrize("values", [
    GRID,
    {**GRID, "pruner": "halving"},
    {"learning_rate": RANGE, "lora_r": [8, 64], "search": "tpe", "trials": 9, "seeds": 2},
    {"learning_rate": RANGE, "search": "random", "trials": 6},
], ids=["grid", "halving", "tpe", "random"])  # fmt: skip
def test_a_study_killed_at_any_write_ends_as_a_straight_one(
    values: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "straight").mkdir()
    straight = open_study(tmp_path / "straight", values)
    run_all(straight)
    generator = random.Random(0)
    (tmp_path / "killed").mkdir()
    for _ in range(12):
        study = open_study(tmp_path / "killed", values)
        with pytest.raises(Killed):
            run_all(study, actions=generator.randrange(4))
        journal = tmp_path / "killed" / JOURNAL_FILE
        with journal.open("ab") as stream:
            stream.write(b'{"op_code": 4, "torn')
        journal.with_name(f"{JOURNAL_FILE}.lock").symlink_to(journal)
    study = open_study(tmp_path / "killed", values)
    run_all(study)
    assert read_table(study) == read_table(straight)


@pytest.mark.parametrize(("search", "follows"), [("tpe", True), ("random", False)])
def test_tpe_follows_the_values_and_random_search_does_not(
    search: str, follows: bool, tmp_path: Path
) -> None:
    values = {"learning_rate": RANGE, "search": search, "trials": 9, "pruner": "none"}
    rates: list[list[float]] = []
    for name, sign in (("low", 1), ("high", -1)):
        (tmp_path / name).mkdir()
        study = open_study(tmp_path / name, values)
        while spec := study.choose_next():
            study.start(spec)
            study.finish(spec.number, "complete", sign * spec.settings["learning_rate"])
        rates.append([trial.params["learning_rate"] for trial in study.list_trials()])
    assert rates[0][:3] == rates[1][:3], "the first are random"
    assert (rates[0] != rates[1]) == follows


def test_a_search_ends_when_every_combination_was_tried(tmp_path: Path) -> None:
    study = open_study(tmp_path, {"learning_rate": [1e-4, 1e-3], "search": "random", "trials": 9})
    run_all(study)
    rates = [trial.params["learning_rate"] for trial in study.list_trials()]
    assert sorted(rates) == [1e-4, 1e-3]


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    study = open_study(tmp_path, {"lora_r": [8]})
    spec = study.choose_next()
    assert spec is not None
    study.start(spec)
    journal = tmp_path / JOURNAL_FILE
    lines = journal.read_bytes().split(b"\n")
    journal.write_bytes(b"\n".join([lines[0], b"{not json}", *lines[1:]]))
    with pytest.raises(InputError, match="the journal of the trials is damaged"):
        open_study(tmp_path, {"lora_r": [8]})


@pytest.mark.parametrize("action", ["start", "add_value", "finish"])
def test_a_journal_on_a_full_disk_is_no_bug(
    action: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study(tmp_path, {"lora_r": [8, 16]})
    spec = study.choose_next()
    assert spec is not None
    if action != "start":
        study.start(spec)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JournalFileBackend, "append_logs", refuse)
    arguments = {"start": (spec,), "add_value": (0, 25, 1.0), "finish": (0, "failed")}[action]
    with pytest.raises(DiskError, match="no space left"):
        getattr(study, action)(*arguments)


def test_a_process_killed_while_it_wrote_does_not_lock_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal's lock stays in the folder then."""
    study = open_study(tmp_path, {"lora_r": [8, 16]})
    spec = study.choose_next()
    assert spec is not None
    monkeypatch.setattr("os.unlink", lambda *_: (_ for _ in ()).throw(Killed()))
    monkeypatch.setattr("os.rename", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        study.start(spec)
    monkeypatch.undo()
    assert (tmp_path / f"{JOURNAL_FILE}.lock").exists()
    with lock_folder(tmp_path):
        assert open_study(tmp_path, {"lora_r": [8, 16]}).choose_next() == spec


@pytest.mark.parametrize("pruner", ["none", "median", "halving"])
def test_trials_at_once_are_all_combinations_with_every_seed(pruner: str, tmp_path: Path) -> None:
    """Three at once, each with one evaluation in turn; a killed study goes on with those three."""
    study = open_study(tmp_path, {**GRID, "pruner": pruner})
    running: dict[int, list[int]] = {}  # number -> percents to come
    for turn in range(1000):
        while len(running) < 3 and (spec := study.choose_next(running)):
            study.start(spec)
            assert spec.number not in running
            running[spec.number] = [25, 50, 75, 100]
        if not running:
            break
        number = sorted(running)[turn % len(running)]
        spec = make_spec(study.list_trials()[number])
        percent = running[number].pop(0)
        study.add_value(number, percent, compute_loss(spec.settings, spec.seed, percent))
        if percent == 100:
            study.finish(number, "complete", compute_loss(spec.settings, spec.seed, 100))
        elif study.is_hopeless(number):
            study.finish(number, "pruned")
        else:
            continue
        del running[number]
    assert study.choose_next() is None
    specs = [make_spec(trial) for trial in study.list_trials()]
    assert sorted(spec.configuration for spec in specs if spec.seed == 0) == list(range(12))
    complete = {
        (make_spec(trial).configuration, make_spec(trial).seed)
        for trial in study.list_trials()
        if trial.state.name == "COMPLETE"
    }
    first = {configuration for configuration, seed in complete if seed == 0}
    assert {configuration for configuration, seed in complete if seed == 1} == first
    assert (len(first) == 12) == (pruner == "none")
