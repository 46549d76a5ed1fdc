"""The book of claims: verdicts on made-up results, runs that are not repeated, and the page."""

import dataclasses
import json
import re
import subprocess
import time
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from experiment_modules import import_module
from fake_runs import make_step
from tiny_runs import build_sum_rows, run_until_saved, save_model_folder, write_rows
from tunesmith.api import load_inputs, plan, train
from tunesmith.core.json_io import dump_json
from tunesmith.core.run_dir import read_all_events
from tunesmith.core.types import PlanConfig
from tunesmith.data.readers.sources import open_source
from tunesmith.evaluate.general_text import read_texts
from tunesmith.evaluate.results import MetricValues
from tunesmith.recipe.fields import NO_TEST_DATA
from tunesmith.recipe.load import read_recipe

arms = import_module("experiments.arms")
claims = import_module("experiments.claims")
definitions = import_module("experiments.definitions")
page = import_module("experiments.page")
run = import_module("experiments.run")
short_model = import_module("experiments.short_model")

PLAN = Path(tunesmith.__file__).parent / "plan"
ITEMS = tuple(f"test.jsonl:{n}" for n in range(1, 21))


def make_run(mean: float, *, failure: str = "") -> Any:
    """Return a run whose items have losses around `mean`, not all equal."""
    values = tuple(mean + 0.01 * (n % 5 - 2) * (1 + mean) for n in range(len(ITEMS)))
    measured = MetricValues("test", "loss", ITEMS, values, higher_is_better=False)
    return arms.ArmRun(minutes=1.0, after=(measured,), failure=failure)


def make_claim(**changed: Any) -> Any:
    values = {"text": "b is higher", "arm": "b", "against": "a", "expect": "higher"}
    return definitions.Claim.model_validate(values | {"guess": (0.0, 1.0)} | changed)


def make_experiment(*all_claims: Any, **changed: Any) -> Any:
    values = {
        "name": "tried",
        "title": "Tried",
        "rule": "E0",
        "guide": "b is higher",
        "about": "made up",
        "order": 1,
        "minutes": 1,
        "recipe": {},
        "arms": {"a": {}, "b": {}},
        "claims": all_claims or (make_claim(),),
        "plots": [{"label": "loss"}],
    }
    return definitions.Experiment.model_validate(values | changed)


def judge(claim: Any, results: Any) -> str:
    (verdict,) = claims.judge_claims([make_experiment(claim)], {"tried": results})["tried"]
    return verdict.verdict


@pytest.mark.parametrize(
    ("expect", "margin", "difference", "verdict"),
    [
        ("higher", 0, 0.5, "holds"),
        ("higher", 0, -0.5, "does not hold"),
        ("higher", 0.6, 0.5, "does not hold"),
        ("higher", 0, 0.0, "not decidable at this size"),
        ("lower", 0, -0.5, "holds"),
        ("lower", 0, 0.5, "does not hold"),
        ("equal", 0.1, 0.01, "holds"),
        ("equal", 0.1, 0.5, "does not hold"),
        ("equal", 0.1, -0.5, "does not hold"),
        ("equal", 0.1, 0.1, "not decidable at this size"),
    ],
)
def test_a_claim_is_judged_by_its_side(
    expect: str, margin: float, difference: float, verdict: str
) -> None:
    claim = make_claim(expect=expect, margin=margin)
    results = {"a": {0: make_run(1.0)}, "b": {0: make_run(1.0 + difference)}}
    assert judge(claim, results) == verdict


def test_without_results_a_claim_has_not_run() -> None:
    assert judge(make_claim(), {}) == "not run yet"
    assert judge(make_claim(), {"a": {0: make_run(1.0)}}) == "not run yet"
    # another seed of the other arm is no pair
    assert judge(make_claim(), {"a": {0: make_run(1)}, "b": {1: make_run(2)}}) == "not run yet"


def test_seeds_that_disagree_decide_nothing() -> None:
    high = {"a": {0: make_run(1.0), 1: make_run(1.0)}, "b": {0: make_run(3.0), 1: make_run(0.9)}}
    assert judge(make_claim(), high) == "not decidable at this size"
    high["b"][1] = make_run(1.1)
    assert judge(make_claim(), high) == "holds"


def test_an_arm_that_failed_decides_nothing() -> None:
    results = {"a": {0: make_run(1.0)}, "b": {0: make_run(2.0, failure="loss is not finite")}}
    (verdict,) = claims.judge_claims([make_experiment()], {"tried": results})["tried"]
    assert (verdict.verdict, verdict.evidence) == ("not decidable at this size", None)
    assert "loss is not finite" in verdict.note


def test_claims_are_corrected_together_with_those_that_have_not_run() -> None:
    values = tuple(0.01 + 0.06 * (n % 2) - 0.02 for n in range(20))  # p of about 0.01
    base = MetricValues("test", "loss", ITEMS, (0.0,) * 20)
    results = {
        "a": {0: arms.ArmRun(minutes=1, after=(base,))},
        "b": {0: arms.ArmRun(minutes=1, after=(MetricValues("test", "loss", ITEMS, values),))},
    }
    alone = make_experiment()
    others = [make_claim(arm="c", text=f"claim {n}") for n in range(30)]
    among_others = make_experiment(make_claim(), *others, arms={"a": {}, "b": {}, "c": {}})
    (verdict,) = claims.judge_claims([alone], {"tried": results})["tried"]
    assert verdict.verdict == "holds"
    corrected, *_ = claims.judge_claims([among_others], {"tried": results})["tried"]
    assert corrected.verdict == "not decidable at this size"
    assert corrected.adjusted_p == pytest.approx(min(1, 31 * verdict.adjusted_p))


def measure_differences(values: tuple[float, ...]) -> Any:
    """Return the results of two arms whose items differ by `values`."""
    ids = ITEMS[: len(values)]
    arm_values = {"a": (0.0,) * len(values), "b": values}
    return {
        arm: {0: arms.ArmRun(1.0, after=(MetricValues("test", "loss", ids, numbers),))}
        for arm, numbers in arm_values.items()
    }


def test_another_experiment_that_runs_reopens_no_claim() -> None:
    weak = measure_differences(tuple(0.01 + 0.06 * (n % 2) - 0.02 for n in range(20)))
    strong = measure_differences(tuple(1 + 0.01 * (n % 3) for n in range(20)))
    experiments = [make_experiment(), *(make_experiment(name=f"other {n}") for n in range(3))]
    adjusted: list[float] = []
    results = {"tried": weak}
    for name in ("tried", "other 0", "other 1", "other 2"):
        results[name] = results.get(name, strong)
        adjusted.append(claims.judge_claims(experiments, results)["tried"][0].adjusted_p)
    assert adjusted == pytest.approx([adjusted[-1] * count for count in (4, 3, 2, 1)])


def test_a_verdict_says_how_many_seeds_it_has() -> None:
    twice = {"a": {"seeds": [0, 1]}, "b": {"seeds": [0, 1, 2]}}
    experiment = make_experiment(arms=twice)
    results = {"a": {0: make_run(1.0)}, "b": {0: make_run(2.0), 1: make_run(2.0)}}
    (verdict,) = claims.judge_claims([experiment], {"tried": results})["tried"]
    assert verdict.lacks_seeds
    assert list(page._format_claim(verdict))[-1] == "**holds**, 1 of 2 seeds"
    results["a"][1] = make_run(1.0)
    (verdict,) = claims.judge_claims([experiment], {"tried": results})["tried"]
    assert not verdict.lacks_seeds
    assert list(page._format_claim(verdict))[-1] == "**holds**"


def test_every_experiment_is_complete(tmp_path: Path) -> None:
    """Each has rows for its recipes, a guess for each claim, and a place in the order."""
    experiments = definitions.load_experiments()
    assert {each.rule for each in experiments} == {"own", *(f"E{n}" for n in range(1, 13))}
    assert len({each.order for each in experiments}) == len(experiments)
    assert sum(each.minutes for each in experiments) <= 12 * 60
    settings = {field.name for field in dataclasses.fields(PlanConfig)}
    for experiment in experiments:
        assert set(experiment.settings) <= settings
        if any(arm.answering for arm in experiment.arms.values()):
            # else half of eval_data becomes test_data, which nothing answers
            assert experiment.recipe["test_data"] == NO_TEST_DATA, experiment.name
        for name, arm in experiment.arms.items():
            job = run.make_job(experiment, name, arm, 0, tmp_path)
            recipe = read_recipe(job.recipe)
            assert all(source.path.exists() for source in recipe.data), (experiment.name, name)
            if recipe.retention_data is not None:  # a quick run has other texts
                texts = open_source(recipe.retention_data)
                assert read_texts(texts.read_row(n) for n in range(len(texts))), experiment.name


def test_a_quick_run_measures_few_rows(tmp_path: Path) -> None:
    """Whether a recipe names its rows by a path or by a path with max_examples."""
    texts = short_model.save_general_texts(tmp_path / "general.jsonl")
    domains = Counter(json.loads(line)["domain"] for line in texts.read_text().splitlines())
    assert set(domains.values()) == {short_model.TEXTS_PER_DOMAIN}
    assert texts.stat().st_size < 5000
    num_limited = 0
    for experiment in definitions.load_experiments():
        quick = definitions.shorten_experiment(experiment, tmp_path / "model", texts)
        assert quick.recipe.get("retention_data") in (None, str(texts)), experiment.name
        for name, arm in quick.arms.items():
            recipe = read_recipe(run.make_job(quick, name, arm, 0, tmp_path).recipe)
            test_data = () if recipe.has_no_test else recipe.test_data
            for source in (*recipe.eval_data, *test_data):
                if not source.path.is_relative_to(definitions.RECIPES):
                    assert source.max_examples == definitions.QUICK_ROWS, (experiment.name, name)
                    num_limited += 1
    assert num_limited > len(definitions.load_experiments())


def read_committed(*words: str) -> str:
    """Return the output of git. Skips where there is no history, as in an unpacked archive."""
    command = ["git", "-C", str(definitions.EXPERIMENTS), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no history: {done.stderr[-200:]}")
    return done.stdout


def test_guesses_are_older_than_results() -> None:
    """Claims are those of the commit before the one that added the first result."""
    for experiment in definitions.load_experiments():
        results = f"{experiment.name}/{run.RESULTS_FILE}"
        if not (definitions.EXPERIMENTS / results).exists():
            continue
        added = read_committed("log", "--diff-filter=A", "--format=%H", "--", results).split()
        before = f"{added[0]}~1" if added else "HEAD"
        text = read_committed("show", f"{before}:./{experiment.name}/experiment.toml")
        committed = definitions.Experiment.model_validate(
            {"name": experiment.name, **tomllib.loads(text)}
        )
        assert committed.claims == experiment.claims, experiment.name


def test_rules_cite_decided_experiments() -> None:
    experiments = definitions.load_experiments()
    by_name = {each.name: each for each in experiments}
    collected = run.collect_results(experiments, definitions.EXPERIMENTS)
    results = {name: run.group_runs(stored) for name, stored in collected.items()}
    verdicts = claims.judge_claims(experiments, results)
    cited = set(re.findall(r"experiments/(\w+)", (PLAN / "rules.py").read_text()))
    assert cited
    for name in cited:
        assert by_name[name].settings, name
        assert {each.verdict for each in verdicts[name]} & {"holds", "does not hold"}, name


def test_the_page_is_that_of_the_results(tmp_path: Path) -> None:
    """`python -m experiments.run --page` writes it again."""
    written = tmp_path / run.PAGE.name
    run.update_page(definitions.load_experiments(), definitions.EXPERIMENTS, written)
    assert written.read_text() == run.PAGE.read_text()
    plots = {file.name: file.read_text() for file in (tmp_path / "evidence").iterdir()}
    folder = run.PAGE.parent / "evidence"
    assert plots == {file.name: file.read_text() for file in folder.iterdir()}


# ---------------------------------------------------------------- real runs of a tiny model


@pytest.fixture(scope="module")
def tiny_experiment(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tiny")
    recipe = {
        "model": str(save_model_folder(folder / "model")),
        "data": str(write_rows(folder / "train.jsonl", build_sum_rows(1, 6))),
        "test_data": str(write_rows(folder / "test.jsonl", build_sum_rows(200, 6))),
        "batch_size": 2,
        "num_train_epochs": 1,
        "warmup_ratio": 0,
        "lora_r": 2,
        "dtype": "fp32",
        "attention": "sdpa",
        "save_steps": 1,
        "metrics": "bits_per_byte",
        "guard": "off",
    }
    rates = {"a": 1e-4, "b": 1e-2}
    arms_by_name = {name: {"recipe": {"learning_rate": rate}} for name, rate in rates.items()}
    claim = make_claim(expect="lower")
    return make_experiment(claim, recipe=recipe, arms=arms_by_name)


def test_arms_run_once_and_again_when_their_settings_change(
    tiny_experiment: Any, tmp_path: Path
) -> None:
    far = time.monotonic() + 1000
    paths = (tmp_path / "work", tmp_path / "results")
    assert not list(run.run_experiments([tiny_experiment], *paths, deadline=0.0))
    assert list(run.run_experiments([tiny_experiment], *paths, deadline=far)) == [tiny_experiment]
    file = tmp_path / "results" / "tried" / run.RESULTS_FILE
    stored = {each.arm: each for each in run.load_results(file)}
    assert set(stored) == {"a", "b"}
    assert stored["a"].run.steps == 3
    assert {len(values.ids) for values in stored["a"].run.before} == {6}
    written = file.read_bytes()
    assert not list(run.run_experiments([tiny_experiment], *paths, deadline=far))
    assert file.read_bytes() == written
    other = definitions.Arm(recipe={"learning_rate": 2e-2})
    changed = tiny_experiment.model_copy(update={"arms": {**tiny_experiment.arms, "b": other}})
    assert [name for name, _, _ in run.list_missing(changed, list(stored.values()))] == ["b"]
    # the page has the old result of no other settings
    assert [each.arm for each in run.collect_results([changed], paths[1])["tried"]] == ["a"]
    run.update_page([tiny_experiment], paths[1], tmp_path / "evidence.md")
    text = (tmp_path / "evidence.md").read_text()
    assert "| [E0](#e0-tried) | b is higher | +0 to +1 |" in text
    assert (tmp_path / "evidence" / "tried.svg").read_text().count("<circle") == 3


def test_arms_share_the_measures_before_training(tiny_experiment: Any, tmp_path: Path) -> None:
    """Of the same items and model, with settings that training alone depends on."""
    job = run.make_job(tiny_experiment, "a", tiny_experiment.arms["a"], 0, tmp_path)
    first = arms.run_arm(job)

    def find_base(**changed: Any) -> Any:
        arm = definitions.Arm(recipe={"learning_rate": 3e-3, **changed})
        other = run.make_job(tiny_experiment, "c", arm, 1, tmp_path)
        return arms._find_base_results(other, plan(load_inputs(other.recipe)))

    shared = find_base(lora_r=4, batch_size=3)
    assert tuple(map(arms.round_values, shared.measurements)) == first.before
    rows = str(write_rows(tmp_path / "others.jsonl", build_sum_rows(300, 6)))
    for changed in ({"test_data": rows}, {"pack_length": 256}, {"dtype": "bf16"}):
        assert find_base(**changed) is None, changed
    # and an arm that shares them measures the same as one that does not
    second = run.make_job(tiny_experiment, "b", tiny_experiment.arms["b"], 0, tmp_path)
    alone = run.make_job(tiny_experiment, "b", tiny_experiment.arms["b"], 0, tmp_path / "alone")
    results = [arms.run_arm(each) for each in (second, alone)]
    assert results[0].before == results[1].before
    assert results[0].after[:-1] == results[1].after[:-1]


def test_a_stored_result_is_not_that_of_other_rows(tiny_experiment: Any, tmp_path: Path) -> None:
    """`build.py` is part of the settings: the rows that it makes have the same names."""
    job = run.make_job(tiny_experiment, "a", tiny_experiment.arms["a"], 0, tmp_path)
    stored = dataclasses.replace(make_run(1.0), steps=7)
    job.result_file.parent.mkdir(parents=True)
    job.result_file.write_bytes(dump_json(stored))
    job.settings_file.write_bytes(dump_json(job.settings))
    assert arms.run_arm(job) == stored
    rebuilt = dataclasses.replace(job, settings={**job.settings, "build": "another hash"})
    assert arms.run_arm(rebuilt).steps == 3


def test_shared_rows_have_the_hash_of_the_file_that_builds_them() -> None:
    by_name = {each.name: each for each in definitions.load_experiments()}
    names = ("rehearsal", "continued_pretraining_rate")
    hashes = {run.make_settings(by_name[name], definitions.Arm(), 0)["build"] for name in names}
    assert len(hashes) == 1


def test_a_killed_arm_is_resumed(tiny_experiment: Any, tmp_path: Path) -> None:
    straight = run.make_job(tiny_experiment, "b", tiny_experiment.arms["b"], 0, tmp_path / "one")
    killed = run.make_job(tiny_experiment, "b", tiny_experiment.arms["b"], 0, tmp_path / "two")
    straight.folder.parent.mkdir(parents=True)
    killed.folder.parent.mkdir(parents=True)
    arms.measure_arm(straight)
    inputs = load_inputs(killed.recipe, output_dir=str(killed.folder))
    run_until_saved(train(plan(inputs), inputs), 2)
    arms.measure_arm(killed)
    attempts = {event.attempt for event in read_all_events(killed.folder)}
    assert attempts == {1, 2}
    expected = run.read_json(straight.result_file)
    result = run.read_json(killed.result_file)
    assert result["before"] == expected["before"]
    assert result["after"][:1] == expected["after"][:1]


def test_a_step_without_documents_has_no_speed() -> None:
    step = make_step(1)
    empty = dataclasses.replace(step, step=arms.WARMUP_STEPS + 1, tokens=0)
    timed = dataclasses.replace(step, step=arms.WARMUP_STEPS + 2)
    (values,) = arms.measure_speed([step] * arms.WARMUP_STEPS + [empty, timed])
    assert values.ids == (f"step {timed.step}",)
    assert values.values == pytest.approx((1e6 * 2 / 3000,))
