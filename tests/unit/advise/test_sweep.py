"""Sweeps: trials are ordinary runs, selected on eval_data, and a killed sweep ends the same."""

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tiny_runs import (
    build_sum_rows,
    make_tiny_recipe,
    read_adapter_bytes,
    train,
    write_eval_files,
    write_rows,
)
from tiny_sweeps import make_sweep_recipe, sweep
from tunesmith.advise.sweep import run_trial
from tunesmith.advise.sweep.run_sweep import run_sweep
from tunesmith.advise.sweep.run_trial import TrialRunner, has_same_start, list_eval_tasks
from tunesmith.core.errors import DiskError, GateError, InputError
from tunesmith.core.events import CheckResult, Event, Score, TrainStep
from tunesmith.core.json_io import read_json
from tunesmith.core.run_dir import (
    EVAL_BEFORE_FILE,
    PREFLIGHT_FILE,
    read_events,
    read_run_plan,
    read_run_record,
)
from tunesmith.core.sealed_json import read_sealed_json
from tunesmith.core.sweep_record import SweepRecord, SweepStart, TrialEnd, TrialSpec, read_sweep
from tunesmith.evaluate import measure
from tunesmith.recipe.load import dump_recipe, load_recipe
from tunesmith.recipe.schema import Recipe
from tunesmith.session import fingerprint, inputs
from tunesmith.session.session import Session
from tunesmith.train import run
from tunesmith.train.preflight import run_preflight

SEED_FAILED_FIRST = 2  # of the order of a grid of two methods and two ranks


def build_table(record: SweepRecord) -> str:
    """Return the record without times."""
    trials = tuple(dataclasses.replace(trial, seconds=0.0) for trial in record.trials)
    record = dataclasses.replace(record, trials=trials, folder="")
    return json.dumps(dataclasses.asdict(record), sort_keys=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> SweepRecord:
    folder = tmp_path_factory.mktemp("finished")
    return sweep(make_sweep_recipe(tiny_folder, folder), folder / "sweep")


# ---------------------------------------------------------------- trials


def test_a_trial_is_the_run_that_its_settings_describe(
    finished: SweepRecord, tiny_folder: Path, tmp_path: Path
) -> None:
    """The same bytes as `train` with these values: what is shared changes nothing."""
    trial = next(t for t in finished.trials if t.settings["learning_rate"] == 0.01 and t.seed == 1)
    plain = make_sweep_recipe(tiny_folder, tmp_path, learning_rate=0.01, seed=1)
    plain = plain.model_copy(update={"sweep": None})
    train(plain)
    adapter = Path(finished.folder) / trial.folder / "adapter" / "adapter_model.safetensors"
    assert adapter.read_bytes() == read_adapter_bytes(plain)
    plan = read_run_plan(Path(finished.folder) / trial.folder)
    assert "test_data" not in plan.data, "no trial reads it"
    assert plan.recipe["test_data"][0]["path"] == "none"
    events = read_events(Path(finished.folder) / trial.folder)
    assert not [event for event in events if isinstance(event, Score) and event.task == "test"]


def test_each_configuration_has_every_seed_and_the_winner_the_lowest_loss(
    finished: SweepRecord,
) -> None:
    assert (finished.metric, finished.higher_is_better, finished.rows) == ("loss", False, 6)
    rates = [configuration.settings["learning_rate"] for configuration in finished.configurations]
    assert rates == [0.0001, 0.01]
    assert [(trial.configuration, trial.seed) for trial in finished.trials] == [
        *((0, 0), (1, 0)),
        *((0, 1), (1, 1)),
    ]
    values = [configuration.value for configuration in finished.configurations]
    assert None not in values
    assert finished.winner == values.index(min(values))  # type: ignore[type-var]
    best = finished.trials[finished.winner_trial or 0]
    seeds = [trial for trial in finished.trials if trial.configuration == finished.winner]
    assert best.value == min(trial.value for trial in seeds)  # type: ignore[type-var]
    for configuration in finished.configurations:
        trials = [finished.trials[number].value for number in configuration.trials]
        assert configuration.value == pytest.approx(sum(trials) / 2)  # type: ignore[arg-type]
    assert finished.base_value is not None
    assert finished.base_value > min(values)  # type: ignore[type-var]


def test_the_others_are_compared_with_the_winner_and_corrected_together(
    finished: SweepRecord,
) -> None:
    winner = finished.configurations[finished.winner or 0]
    others = [each for each in finished.configurations if each.number != finished.winner]
    assert winner.comparison is None
    for other in others:
        assert other.comparison is not None
        assert other.comparison.difference == pytest.approx(other.value - winner.value)  # type: ignore[operator]
        assert other.p_value is not None
    slow = next(each for each in others if each.settings["learning_rate"] == 0.0001)
    assert slow.verdict == "worse"
    (effect, *_) = [each for each in finished.effects if each.level == "0.0001"]
    assert (effect.key, effect.pairs, effect.verdict) == ("learning_rate", 2, "worse")
    assert effect.low > 0


def test_the_winner_alone_is_measured_on_test_data(finished: SweepRecord) -> None:
    tests = {comparison.metric: comparison for comparison in finished.test}
    assert tests["loss"].task == "test"
    assert tests["loss"].after.n == 6
    assert tests["loss"].difference < 0
    assert finished.test_reads == 1
    stored = read_json(Path(finished.folder) / "test.json")
    assert [measurement["trial"] for measurement in stored] == [finished.winner_trial]
    assert read_sweep(Path(finished.folder)) == finished


def test_the_recipe_of_the_winner_trains_the_winner(finished: SweepRecord, tmp_path: Path) -> None:
    recipe = load_recipe(
        Path(finished.folder) / "winner.yaml", {"output_dir": str(tmp_path / "again")}
    )
    assert isinstance(recipe, Recipe)
    assert recipe.sweep is None
    trial = finished.trials[finished.winner_trial or 0]
    assert (recipe.learning_rate, recipe.seed) == (trial.settings["learning_rate"], trial.seed)
    events = train(recipe)
    again = {(e.task, e.metric): e for e in events if isinstance(e, Score) and e.step}
    tests = {comparison.metric: comparison for comparison in finished.test}
    assert again["test", "loss"].value == pytest.approx(tests["loss"].after.value, rel=1e-6)
    adapter = Path(finished.folder) / trial.folder / "adapter" / "adapter_model.safetensors"
    assert adapter.read_bytes() == read_adapter_bytes(recipe)


def test_measures_before_training_are_taken_once(tiny_folder: Path, tmp_path: Path) -> None:
    """A mark in those of the first trial comes back in the second, which shares them."""
    recipe = make_sweep_recipe(tiny_folder, tmp_path, {"lora_r": [2, 4]}, max_steps=2)
    events = run_sweep(inputs.load_inputs(recipe), tmp_path / "sweep")
    while not isinstance(next(events), TrialEnd):
        pass
    file = tmp_path / "sweep" / "trial-000" / EVAL_BEFORE_FILE
    unsealed = json.dumps(read_sealed_json(file))
    marked = unsealed.replace('eval.jsonl:1"', 'marked"')
    file.write_text(marked)
    next(events)
    next(events)
    assert 'marked"' in marked
    shared = tmp_path / "sweep" / "trial-001" / EVAL_BEFORE_FILE
    assert read_sealed_json(shared) == json.loads(marked)
    events.close()  # type: ignore[attr-defined]


def test_trials_that_differ_in_the_schedule_share_preflight(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two ranks with two rates each, the checks run once for each rank."""
    checked: list[Any] = []

    def check(*arguments: Any) -> list[CheckResult]:
        checked.append(arguments)
        return run_preflight(*arguments)

    monkeypatch.setattr(run, "run_preflight", check)
    space = {"lora_r": [2, 4], "learning_rate": [0.001, 0.002]}
    recipe = make_sweep_recipe(tiny_folder, tmp_path, space, max_steps=2)
    record = sweep(recipe, tmp_path / "sweep")
    assert len(checked) == 2
    sources: dict[int, str] = {}
    for trial in record.trials:
        events = read_events(tmp_path / "sweep" / trial.folder)
        results = [event for event in events if isinstance(event, CheckResult)]
        assert any(result.kind == "negative controls" for result in results)
        shared = [result.evidence for result in results if result.kind == "preflight"]
        if shared:
            sources[trial.number] = shared[0].split()[-5].rstrip(",")
    assert len(sources) == 2
    for number, source in sources.items():
        first = record.trials[int(source.removeprefix("trial-"))]
        assert first.number < number
        assert first.settings["lora_r"] == record.trials[number].settings["lora_r"]


def test_preflight_of_a_trial_that_stopped_early_is_shared(
    tiny_folder: Path, tmp_path: Path
) -> None:
    space = {"learning_rate": [0.01, 0.00001], "lora_r": [2, 4], "pruner": "halving"}
    recipe = make_sweep_recipe(tiny_folder, tmp_path, space, seed=2)
    record = sweep(recipe, tmp_path / "sweep")
    first, last = record.trials[1], record.trials[3]
    assert first.settings["lora_r"] == last.settings["lora_r"] == 2
    assert first.state == "pruned"
    checks = read_sealed_json(tmp_path / "sweep" / last.folder / PREFLIGHT_FILE)["checks"]
    assert f"are those of {first.folder}" in checks[0]["evidence"]
    assert "negative controls" in {check["kind"] for check in checks}


@pytest.mark.parametrize(("settings", "machine", "is_same"), [
    ({"learning_rate": 0.5, "warmup_ratio": 0.5}, {}, True),
    ({"lora_r": 7}, {}, False),
    ({"seed": 7}, {}, False),
    ({}, {"available_bytes": 7}, True),
    ({}, {"versions": {"torch": "1.0"}}, False),
    ({}, {"compiler": "another"}, False),
])  # fmt: skip
def test_what_computes_the_same_at_the_first_step(
    settings: dict[str, Any], machine: dict[str, Any], is_same: bool, finished: SweepRecord
) -> None:
    plan = read_run_plan(Path(finished.folder) / finished.trials[0].folder)
    other = dataclasses.replace(
        plan,
        config=dataclasses.replace(plan.config, **settings),
        machine=dataclasses.replace(plan.machine, **machine),
    )
    assert has_same_start(plan, other) == is_same


def test_a_finished_sweep_runs_nothing(finished: SweepRecord, tiny_folder: Path) -> None:
    folder = Path(finished.folder)
    recipe = make_sweep_recipe(tiny_folder, folder.parent)
    start, record = run_sweep(inputs.load_inputs(recipe), folder)
    assert isinstance(start, SweepStart)
    assert start.finished_trials == 4
    assert record == finished


# ---------------------------------------------------------------- stopping early


def test_a_hopeless_trial_stops_early_and_a_winner_does_not(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering: set[str] = set()
    generate_answers = measure.generate_answers

    def record_trial(session: Session, *args: Any, **settings: Any) -> Any:
        answering.add(Path(session.plan.config.output_dir).name)
        return generate_answers(session, *args, **settings)

    monkeypatch.setattr(measure, "generate_answers", record_trial)
    rates = [0.01, 0.02, 0.015, 0.00001, 0.03]  # tried in the order 2, 1, 0, 4, 3
    recipe = make_sweep_recipe(tiny_folder, tmp_path, {"learning_rate": rates})
    record = sweep(recipe, tmp_path / "sweep")
    hopeless = record.trials[4]
    assert hopeless.settings["learning_rate"] == 0.00001
    assert hopeless.state == "pruned"
    assert 0 < hopeless.steps < hopeless.planned_steps
    assert "median pruner, at" in hopeless.reason
    assert hopeless.folder not in answering, "it stops at the loss, before answers are generated"
    assert answering == {trial.folder for trial in record.trials} - {hopeless.folder}
    assert record.winner != 4
    assert any("stopped early" in caveat for caveat in record.caveats)
    assert any("one seed" in caveat for caveat in record.caveats)


def test_a_value_of_an_earlier_checkpoint_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    values = {"learning_rate": [0.001, 1.0]}
    recipe = make_sweep_recipe(tiny_folder, tmp_path, values, eval_steps=1, lora_alpha=512)
    record = sweep(recipe, tmp_path / "sweep")
    reasons: dict[float, str] = {}
    for trial in record.trials:
        run_record = read_run_record(tmp_path / "sweep" / trial.folder)
        expected = f"checkpoint of step {run_record.selected_step}"
        assert trial.reason == (expected if run_record.selected_step != run_record.steps else "")
        reasons[trial.settings["learning_rate"]] = trial.reason
    assert reasons[1.0], "the rate is far too high: the last step is not the best"
    assert not reasons[0.001]


# ---------------------------------------------------------------- search


def test_a_search_draws_from_a_range_and_takes_more_trials(
    tiny_folder: Path, tmp_path: Path
) -> None:
    values = {"learning_rate": {"min": 0.0001, "max": 0.05, "log": True}, "search": "random"}
    records = [
        sweep(
            make_sweep_recipe(tiny_folder, tmp_path, {**values, "trials": trials}), tmp_path / "s"
        )
        for trials in (1, 2)
    ]
    rates = [[trial.settings["learning_rate"] for trial in record.trials] for record in records]
    assert rates[1][:1] == rates[0]
    assert all(0.0001 <= rate <= 0.05 for rate in rates[1])
    correlated = records[1].effects[0]
    assert (correlated.pairs, correlated.verdict) == (2, "too few items to tell")
    assert records[1].test_reads == 1 + (records[1].winner == 1)
    has_caveat = any("no longer unseen" in caveat for caveat in records[1].caveats)
    assert has_caveat == (records[1].test_reads > 1)


# ---------------------------------------------------------------- faults


def test_a_trial_that_fails_is_told_and_the_others_go_on(tiny_folder: Path, tmp_path: Path) -> None:
    values = {"method": ["full", "lora"], "lora_r": [2], "pruner": "none"}
    recipe = make_sweep_recipe(tiny_folder, tmp_path, values, lora_r="auto")
    record = sweep(recipe, tmp_path / "sweep")
    assert [trial.state for trial in record.trials] == ["failed", "complete"]
    assert "no effect with method: full" in record.trials[0].reason
    assert record.winner == 1
    assert any("1 trial failed" in caveat for caveat in record.caveats)


def test_a_sweep_of_failures_is_no_result(tiny_folder: Path, tmp_path: Path) -> None:
    values = {"method": ["full"], "lora_r": [2, 4]}
    recipe = make_sweep_recipe(tiny_folder, tmp_path, values, lora_r="auto")
    with pytest.raises(GateError, match=r"every trial failed; the first: .*method: full"):
        sweep(recipe, tmp_path / "sweep")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"eval_data": ()}, "trials are compared on eval_data"),
        ({"test_data": ()}, "the winner is measured on test_data"),
        ({"test_data": "none"}, "the winner is measured on test_data"),
        ({"sweep": {"lora_r": [2], "metric": "rouge"}}, "'rouge' is not measured"),
        ({"eval_data": (), "eval_split": 0.5}, "other rows with each seed"),
    ],
)
def test_a_sweep_needs(
    changed: dict[str, Any], message: str, tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = make_sweep_recipe(tiny_folder, tmp_path, **changed)
    with pytest.raises(InputError, match=message):
        sweep(recipe, tmp_path / "sweep")


def test_rows_that_no_trial_could_use_are_refused_before_the_first(
    tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = make_sweep_recipe(tiny_folder, tmp_path, max_length=2)
    with pytest.raises(InputError, match="longer than max_length"):
        sweep(recipe, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_recipe_without_a_sweep_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = make_tiny_recipe(tiny_folder, tmp_path, **write_eval_files(tmp_path))
    with pytest.raises(InputError, match="the recipe has no sweep"):
        sweep(recipe, tmp_path / "sweep")


def test_minutes_for_less_than_a_trial_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    recipe = make_sweep_recipe(tiny_folder, tmp_path, {"lora_r": [2]})
    with pytest.raises(InputError, match="too few for one trial") as refusal:
        sweep(recipe, tmp_path / "sweep", minutes=1e-6)
    assert "allow at least" in refusal.value.fix
    record = sweep(recipe, tmp_path / "sweep", minutes=60)
    assert record.count_trials("complete") == 1, "it went on"


def test_another_recipe_and_another_version_are_refused(
    finished: SweepRecord, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    identity = Path(finished.folder) / "settings.json"
    (folder / "settings.json").write_bytes(identity.read_bytes())
    recipe = make_sweep_recipe(tiny_folder, Path(finished.folder).parent, weight_decay=0.5)
    with pytest.raises(InputError, match=r"with other settings: recipe.weight_decay: none -> 0.5"):
        sweep(recipe, folder)
    settings = {**read_json(identity), "format": 99}
    (folder / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="sweep format 99 is not supported"):
        sweep(recipe, folder)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not empty and is not a sweep: notes\.txt"):
        sweep(recipe, other)


@pytest.mark.parametrize("changed", ["metric", "general text", "version"])
def test_trials_of_other_files_or_another_version_do_not_compare(
    changed: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a trial is measured by, or with, is as much a part of a sweep as its recipe."""
    metric = tmp_path / "m.py"
    metric.write_text("def score(prediction, reference, row):\n    return 1.0\n")
    general = write_rows(tmp_path / "general.jsonl", [{"text": "a b c"}] * 6)
    recipe = make_sweep_recipe(
        tiny_folder, tmp_path, metrics=[f"{metric}:score"], retention_data=str(general)
    )
    events = run_sweep(inputs.load_inputs(recipe), tmp_path / "sweep", allow_code=True)
    assert isinstance(next(events), SweepStart)
    events.close()  # type: ignore[attr-defined]
    if changed == "metric":
        metric.write_text(metric.read_text().replace("1.0", "0.0"))
        expected = r"data\.metrics\.m\.py: sha256"
    elif changed == "general text":
        write_rows(general, [{"text": "d e f"}] * 6)
        expected = r"data\.retention_data: sha256"
    else:
        monkeypatch.setattr(fingerprint, "__version__", "99.0")
        expected = r"tunesmith: .* -> 99\.0"
    with pytest.raises(InputError, match=f"a sweep with other settings: {expected}"):
        sweep(recipe, tmp_path / "sweep", allow_code=True)


@pytest.mark.parametrize("content", ["[1]", "{", '{"recipe": {}}', '{"format": 2}'])
def test_a_damaged_record_of_the_settings_is_refused(
    content: str, tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "settings.json").write_text(content)
    with pytest.raises(InputError):
        sweep(make_sweep_recipe(tiny_folder, tmp_path), tmp_path / "sweep")


def test_a_sweep_of_a_dated_template_goes_on_after_midnight(
    tiny_folder: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    template = model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %B %Y') }}" + template.read_text())
    recipe = make_sweep_recipe(model, tmp_path, {"lora_r": [2, 4]})
    evening = datetime(2026, 5, 1, 23, 50)
    events = run_sweep(inputs.load_inputs(recipe, now=evening), tmp_path / "sweep")
    for event in events:
        if isinstance(event, TrialEnd):
            break
    events.close()  # type: ignore[attr-defined]
    morning = inputs.load_inputs(recipe, now=datetime(2026, 5, 2, 8))
    *_, record = run_sweep(morning, tmp_path / "sweep")
    assert isinstance(record, SweepRecord)
    assert record.count_trials("complete") == 2
    second = read_run_plan(tmp_path / "sweep" / "trial-001")
    assert second.config.now.startswith("2026-05-01"), "all trials saw the same prompts"


def test_a_full_disk_ends_the_sweep_and_fails_no_trial(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_sweep_recipe(tiny_folder, tmp_path, {"lora_r": [2, 4]})
    with monkeypatch.context() as patched:
        patched.setattr(run_trial, "read_free_disk", lambda _: 10)
        with pytest.raises(DiskError, match="the run folder needs up to") as refusal:
            sweep(recipe, tmp_path / "sweep")
        assert refusal.value.fix.endswith("another disk, then continue with the same command")
    record = sweep(recipe, tmp_path / "sweep")
    assert record.count_trials("complete") == 2


def test_a_continued_first_trial_is_judged_by_the_steps_to_come(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 6 s a step, two minutes are too few for 40 steps, and enough for the last ten."""
    start_trial = TrialRunner.start_trial

    def report_slow_steps(runner: TrialRunner, spec: TrialSpec) -> Iterator[Event]:
        for event in start_trial(runner, spec):
            is_step = isinstance(event, TrainStep)
            yield dataclasses.replace(event, seconds=6.0) if is_step else event

    recipe = make_sweep_recipe(tiny_folder, tmp_path, {"lora_r": [2]}, max_steps=40, save_steps=10)
    events = run_sweep(inputs.load_inputs(recipe), tmp_path / "sweep")
    for event in events:
        if isinstance(event, TrainStep) and event.step == 31:
            break
    events.close()  # type: ignore[attr-defined]
    monkeypatch.setattr(TrialRunner, "start_trial", report_slow_steps)
    with pytest.raises(InputError, match=r"takes about [3-9]\.\d minutes"):
        sweep(recipe, tmp_path / "other", minutes=2)
    record = sweep(recipe, tmp_path / "sweep", minutes=2)
    assert record.count_trials("complete") == 1


def test_the_rest_is_predicted_within_the_minutes(tiny_folder: Path, tmp_path: Path) -> None:
    """And not at all by a trial that failed at once."""
    values = {"method": ["full", "lora"], "lora_r": [2, 4]}
    recipe = make_sweep_recipe(tiny_folder, tmp_path, values, lora_r="auto", seed=SEED_FAILED_FIRST)
    events = run_sweep(inputs.load_inputs(recipe), tmp_path / "sweep", minutes=10)
    ends = [event for event in events if isinstance(event, TrialEnd)]
    first = [end.trial.state for end in ends].index("complete")
    assert first > 0
    assert all(end.remaining_seconds is None for end in ends[:first])
    assert all(0 <= (end.remaining_seconds or 0) <= 600 for end in ends[first:])


# ---------------------------------------------------------------- killed

SWEEP_PROGRAM = """\
import sys
from tunesmith import api
for event in api.tune_sweep(sys.argv[1]):
    print(type(event).__name__, flush=True)
"""


def test_a_sweep_that_is_interrupted_ends_with_the_same_table(
    finished: SweepRecord, tiny_folder: Path, tmp_path: Path
) -> None:
    """A generator that is dropped leaves what a killed process leaves: files, and no more."""
    folder = Path(finished.folder).parent
    recipe = make_sweep_recipe(tiny_folder, folder)
    for num_events in (1, 12, 30, 3):
        events = run_sweep(inputs.load_inputs(recipe), tmp_path)
        for _ in range(num_events):
            next(events)
        events.close()  # type: ignore[attr-defined]
    assert build_table(sweep(recipe, tmp_path)) == build_table(finished)


@pytest.mark.slow
def test_a_sweep_killed_at_random_times_ends_with_the_same_table(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Up to ten times by SIGKILL, some events after its start and a moment later."""
    rates = [0.01, 0.02, 0.015, 0.00001, 0.03]  # tried in the order 2, 1, 0, 4, 3
    recipe = make_sweep_recipe(tiny_folder, tmp_path, {"learning_rate": rates, "seeds": 2})
    straight = sweep(recipe, tmp_path / "straight")
    assert straight.count_trials("pruned") == 1
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe.model_copy(update={"output_dir": tmp_path / "killed"})))
    generator = random.Random(0)
    command = [sys.executable, "-c", SWEEP_PROGRAM, str(file)]
    codes: list[int] = []
    while len(codes) < 10 and 0 not in codes:
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(generator.randint(1, 12)):
                process.stdout.readline()
            time.sleep(generator.uniform(0, 0.1))
            process.kill()
        codes.append(process.returncode)
    assert set(codes) <= {0, -signal.SIGKILL}
    assert codes.count(-signal.SIGKILL) >= 5, "a fast machine ends it before the tenth"
    record = sweep(recipe, tmp_path / "killed")
    assert build_table(record) == build_table(straight)


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
