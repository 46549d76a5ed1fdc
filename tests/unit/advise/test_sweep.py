"""Sweeps: trials are ordinary runs, selected on eval_data, and a killed sweep ends the same."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from tiny_runs import build_sum_rows, read_adapter_bytes, train, write_rows
from tiny_sweeps import make_sweep_recipe, sweep
from tunesmith.advise.sweep import run_sweep as sweep_module
from tunesmith.advise.sweep import trial_process
from tunesmith.advise.sweep.records import SweepRecord, SweepStart
from tunesmith.advise.sweep.run_sweep import list_eval_tasks, run_sweep
from tunesmith.advise.sweep.trial_process import Share
from tunesmith.cli.views.sweep import format_trial_end, render_sweep
from tunesmith.core import ranks
from tunesmith.core.errors import DiskError, GateError, InputError
from tunesmith.core.events import Score
from tunesmith.core.hardware import count_cores
from tunesmith.core.json_io import read_json
from tunesmith.core.run_dir import read_events, read_run_plan
from tunesmith.recipe.load import dump_recipe, load_recipe
from tunesmith.recipe.schema import Recipe
from tunesmith.session import inputs

pytestmark = pytest.mark.promise


# Tried in the order of the list with seed 0; the second is hopeless at once.
SWEEP = {"learning_rate": [0.01, 0.00001], "seeds": [1], "pruner": "halving"}
AT_ONCE = {"learning_rate": [0.01, 0.0001], "pruner": "none"}
needs_two_cores = pytest.mark.skipif(count_cores() < 2, reason="one core")


SWEEP_PROGRAM = """\
import sys
from tunesmith import api
from tunesmith.core.errors import TunesmithError
try:
    for event in api.tune_sweep(sys.argv[1], gpus=2):
        print(type(event).__name__, flush=True)
except TunesmithError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def stop_and_resume(folder: Path, model: Path, number: signal.Signals) -> SweepRecord:
    """Stop a sweep at its first evaluation, see that no process is left, and run it again."""
    recipe = make_sweep_recipe(model, folder, AT_ONCE)
    file = folder / "recipe.yaml"
    file.write_text(dump_recipe(recipe.model_copy(update={"output_dir": folder / "sweep"})))
    command = [sys.executable, "-c", SWEEP_PROGRAM, str(file)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert any(line == "TrialScore\n" for line in process.stdout)
        trials = psutil.Process(process.pid).children()
        assert trials
        process.send_signal(number)
        process.stdout.read()
        errors = process.stderr.read()
    _, alive = psutil.wait_procs(trials, timeout=60)
    assert not alive
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + number
        assert "fix: continue with the same command" in errors
    return sweep(recipe, folder / "sweep", gpus=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> SweepRecord:
    """A sweep whose second trial stops early."""
    folder = tmp_path_factory.mktemp("finished")
    return sweep(make_sweep_recipe(tiny_folder, folder, SWEEP), folder / "sweep")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> SweepRecord:
    """A sweep of two trials at once that was killed at the first evaluation, and run again."""
    return stop_and_resume(tmp_path_factory.mktemp("resumed"), tiny_folder, signal.SIGKILL)


def read_adapter(record: SweepRecord, number: int) -> bytes:
    folder = Path(record.folder) / record.trials[number].folder
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def read_results(record: SweepRecord) -> dict[float, tuple[Any, ...]]:
    """Return what each trial measured and the bytes of its adapter, by rate."""
    results: dict[float, tuple[Any, ...]] = {}
    for trial in record.trials:
        adapter = read_adapter(record, trial.number)
        results[trial.settings["learning_rate"]] = (trial.value, trial.curve, adapter)
    return results


# ---------------------------------------------------------------- trials


def test_trials_have_the_states_that_the_pruner_gives_them(finished: SweepRecord) -> None:
    states = [(trial.configuration, trial.seed, trial.state) for trial in finished.trials]
    assert states == [(0, 1, "complete"), (1, 1, "pruned")]
    best, hopeless = finished.trials
    assert hopeless.reason == "halving pruner, at 50% of the steps"
    assert hopeless.value is None
    assert [percent for percent, _ in hopeless.curve] == [50]
    assert [percent for percent, _ in best.curve] == [50, 100]
    assert finished.winner == 0
    assert finished.configurations[0].seed_values == (best.value,)
    assert any("stopped early" in caveat for caveat in finished.caveats)


def test_a_trial_is_the_run_that_its_settings_describe(
    finished: SweepRecord, tiny_folder: Path, tmp_path: Path
) -> None:
    """The same bytes as `train` with these values, and no look at test_data."""
    plain = make_sweep_recipe(tiny_folder, tmp_path, learning_rate=0.01, seed=1)
    plain = plain.model_copy(update={"sweep": None})
    train(plain)
    assert read_adapter(finished, 0) == read_adapter_bytes(plain)
    folder = Path(finished.folder) / "trial-000"
    assert "test_data" not in read_run_plan(folder).data
    scores = [event for event in read_events(folder) if isinstance(event, Score)]
    assert "test" not in {score.task for score in scores}


def test_the_winner_alone_is_measured_on_test_data_and_its_recipe_trains_it(
    finished: SweepRecord, tmp_path: Path
) -> None:
    tests = {comparison.metric: comparison for comparison in finished.test}
    assert tests["loss"].after.n == 6
    assert tests["loss"].difference < 0
    assert finished.test_reads == 1
    stored = read_json(Path(finished.folder) / "test.json")
    assert [measurement["trial"] for measurement in stored] == [finished.winner_trial]
    file = Path(finished.folder) / "winner.yaml"
    recipe = load_recipe(file, {"output_dir": str(tmp_path / "again")})
    assert isinstance(recipe, Recipe)
    assert recipe.sweep is None
    scores = {(e.task, e.metric): e for e in train(recipe) if isinstance(e, Score) and e.step}
    assert scores["test", "loss"].value == pytest.approx(tests["loss"].after.value, rel=1e-6)
    assert read_adapter(finished, finished.winner_trial or 0) == read_adapter_bytes(recipe)


def test_a_finished_sweep_runs_nothing(finished: SweepRecord, tiny_folder: Path) -> None:
    folder = Path(finished.folder)
    recipe = make_sweep_recipe(tiny_folder, folder.parent, SWEEP)
    start, record = run_sweep(inputs.load_inputs(recipe), folder)
    assert isinstance(start, SweepStart)
    assert start.finished_trials == 2
    assert record == finished


@needs_two_cores
def test_trials_at_once_that_were_killed_are_the_same_runs_compared_by_row(
    resumed: SweepRecord, tiny_folder: Path, tmp_path: Path
) -> None:
    winner = resumed.configurations[resumed.winner or 0]
    (other,) = [each for each in resumed.configurations if each.number != resumed.winner]
    assert (winner.settings["learning_rate"], other.verdict) == (0.01, "seed noise unknown")
    assert other.comparison is not None
    assert other.value is not None
    assert winner.value is not None
    assert other.comparison.difference == pytest.approx(other.value - winner.value)
    assert resumed.base_value is not None
    assert resumed.base_value > winner.value
    plain = make_sweep_recipe(tiny_folder, tmp_path, learning_rate=0.01)
    train(plain.model_copy(update={"sweep": None}))
    assert read_adapter(resumed, resumed.winner_trial or 0) == read_adapter_bytes(plain)


@needs_two_cores
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_interrupted_ends_with_the_same_results(
    number: signal.Signals, resumed: SweepRecord, tiny_folder: Path, tmp_path: Path
) -> None:
    assert read_results(stop_and_resume(tmp_path, tiny_folder, number)) == read_results(resumed)


def test_the_table_has_the_best_first(finished: SweepRecord) -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(render_sweep(finished))
    text = console.export_text()
    lines = text.splitlines()
    header = next(index for index, line in enumerate(lines) if line.lstrip().startswith("no."))
    assert lines[header + 1].split()[:3] == ["0", "0.01", "1"]
    assert "winner" in lines[header + 1]
    assert "pruned: halving pruner, at 50% of the steps" in lines[header + 2]
    assert "on test_data, once" in text
    assert "of 4 steps" in format_trial_end(finished.trials[1])


# ---------------------------------------------------------------- faults


def test_a_sweep_of_failures_is_no_result(tiny_folder: Path, tmp_path: Path) -> None:
    """Trials that contradict the recipe are recorded without a process."""
    values = {"method": ["full"], "lora_r": [2, 4]}
    recipe = make_sweep_recipe(tiny_folder, tmp_path, values, lora_r="auto")
    with pytest.raises(GateError, match=r"every trial failed; the first: .*method: full"):
        sweep(recipe, tmp_path / "sweep")


def test_a_trial_that_cannot_run_has_the_reason_of_its_process(
    tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = make_sweep_recipe(tiny_folder, tmp_path, {"lora_target_modules": ["no_such_module"]})
    with pytest.raises(GateError, match=r"every trial failed; the first: .*no_such_module"):
        sweep(recipe, tmp_path / "sweep")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"eval_data": ()}, "trials are compared on eval_data"),
        ({"test_data": ()}, "the winner is measured on test_data"),
        ({"test_data": "none"}, "the winner is measured on test_data"),
        ({"sweep": {"lora_r": [2], "metric": "rouge"}}, "'rouge' is not measured"),
        ({"eval_data": (), "eval_split": 0.5}, "other rows with each seed"),
        ({"max_length": 2}, "longer than max_length"),
    ],
)
def test_a_sweep_needs(
    changed: dict[str, Any], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = make_sweep_recipe(tiny_folder, tmp_path, **changed)
    with pytest.raises(InputError, match=message):
        sweep(recipe, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_recipe_without_a_sweep_and_too_few_minutes_are_refused(
    tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = make_sweep_recipe(tiny_folder, tmp_path)
    with pytest.raises(InputError, match="the recipe has no sweep"):
        sweep(recipe.model_copy(update={"sweep": None}), tmp_path / "sweep")
    with pytest.raises(InputError, match="too few for one trial") as refusal:
        sweep(recipe, tmp_path / "sweep", minutes=1e-6)
    assert refusal.value.fix.endswith("continue with the same command")


def test_another_recipe_other_files_and_another_version_are_refused(
    finished: SweepRecord, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    identity = Path(finished.folder) / "settings.json"
    (folder / "settings.json").write_bytes(identity.read_bytes())
    recipe = make_sweep_recipe(tiny_folder, Path(finished.folder).parent, SWEEP, weight_decay=0.5)
    with pytest.raises(InputError, match=r"with other settings: recipe.weight_decay: none -> 0.5"):
        sweep(recipe, folder)
    other_rows = make_sweep_recipe(tiny_folder, tmp_path, SWEEP)
    write_rows(tmp_path / "eval.jsonl", build_sum_rows(300, 6))
    with pytest.raises(InputError, match=r"data\.eval_data: sha256"):
        sweep(other_rows, folder)
    for content in (json.dumps({**read_json(identity), "format": 2}), "[1]", "{"):
        (folder / "settings.json").write_text(content)
        with pytest.raises(InputError):
            sweep(recipe, folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not empty and is not a sweep: notes\.txt"):
        sweep(recipe, other)


def test_a_full_disk_ends_the_sweep_and_fails_no_trial(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_sweep_recipe(tiny_folder, tmp_path, {"lora_r": [2, 4]})
    monkeypatch.setattr(sweep_module, "read_free_disk", lambda _: 10)
    with pytest.raises(DiskError, match="the run folder needs up to") as refusal:
        sweep(recipe, tmp_path / "sweep")
    assert refusal.value.fix.endswith("another disk, then continue with the same command")
    assert not list((tmp_path / "sweep").glob("trial-*"))


# ---------------------------------------------------------------- devices


def test_a_trial_has_a_gpu_of_its_own_or_its_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(trial_process, "count_gpus", lambda: 4)
    monkeypatch.setattr(trial_process, "count_cores", lambda: 16)
    share = Share(2, 4)
    assert share.list_variables() == {"CUDA_VISIBLE_DEVICES": "2", "OMP_NUM_THREADS": "4"}
    assert share.list_cores() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3,5,7")
    assert share.list_variables()["CUDA_VISIBLE_DEVICES"] == "5"
    monkeypatch.setattr(trial_process, "count_gpus", lambda: 0)
    assert Share(1, 3).list_variables() == {"OMP_NUM_THREADS": "5"}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert Share(1, 2).list_cores() == [1, 3]
    assert (Share().list_cores(), Share().list_variables()) == ([], {})


def test_more_trials_than_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = make_sweep_recipe(tiny_folder, tmp_path)
    monkeypatch.setattr(ranks, "count_gpus", lambda: 2)
    with pytest.raises(InputError, match="3 GPUs requested, but this machine has 2 GPUs"):
        sweep(recipe, tmp_path / "sweep", gpus=3)


@pytest.mark.parametrize(
    ("names", "task"),
    [
        (("sums",), "eval: sums"),
        (("sums", "others"), "eval: sums"),
        (("others",), "eval: others (held out)"),
        (("others", "more"), "eval: mean of held-out tasks"),
    ],
)
def test_named_tasks_are_selected_by_their_mean(
    names: tuple[str, ...], task: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """Of the trained ones, or of all if none of them is trained."""
    data = str(write_rows(tmp_path / "rows.jsonl", build_sum_rows(1, 8)))
    eval_data = []
    for index, name in enumerate(names):
        file = write_rows(tmp_path / f"{name}.jsonl", build_sum_rows(100 + 10 * index, 2))
        eval_data.append({"path": str(file), "name": name})
    recipe = make_sweep_recipe(
        tiny_folder, tmp_path, data=[{"path": data, "name": "sums"}], eval_data=eval_data
    )
    assert list_eval_tasks(inputs.load_inputs(recipe)) == (task,)
