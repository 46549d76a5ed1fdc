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
from tunesmith.core.json_io import dump_json, parse_as
from tunesmith.core.run_dir import read_all_events
from tunesmith.core.types import PlanConfig
from tunesmith.data.readers.sources import open_source
from tunesmith.evaluate.general_text import read_texts
from tunesmith.evaluate.results import MetricValues
from tunesmith.recipe.fields import NO_DATA
from tunesmith.recipe.load import read_recipe

pytestmark = pytest.mark.promise


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
        ("higher", 0, 0.0, "nothing changed"),
        ("lower", 0, 0.0, "nothing changed"),
        ("equal", 0.1, 0.0, "holds"),
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


def test_a_result_that_changed_nothing_is_no_hit() -> None:
    """Two runs with the same bits are inside a guess that reaches 0, and tell nothing about it."""
    same = {"a": {0: make_run(1.0)}, "b": {0: make_run(1.0)}}
    (verdict,) = claims.judge_claims([make_experiment()], {"tried": same})["tried"]
    assert verdict.is_in_guess is None
    cells = list(page._format_claim(verdict))
    assert "guess" not in cells[1]
    assert cells[-1] == "**nothing changed**"
    # of an equality, no difference is what was guessed
    equal = make_experiment(make_claim(expect="equal", margin=0.1))
    (verdict,) = claims.judge_claims([equal], {"tried": same})["tried"]
    assert verdict.is_in_guess
    # and a mean of 0 over items that differ decides nothing
    (verdict,) = claims.judge_claims(
        [make_experiment()], {"tried": measure_differences((0.5, -0.5) * 10)}
    )["tried"]
    assert (verdict.verdict, verdict.is_in_guess) == ("not decidable at this size", True)


def test_a_rerun_after_a_change_of_the_product_counts_for_nothing() -> None:
    """Neither as a claim that holds nor as a guess that hit."""
    rerun = {"a": {}, "b": {"rerun": "at first, b was as low as a"}}
    experiment = make_experiment(make_claim(guess=(0.0, 2.0)), arms=rerun)
    results = {"tried": {"a": {0: make_run(1.0)}, "b": {0: make_run(2.0)}}}
    verdicts = claims.judge_claims([experiment], results)
    (verdict,) = verdicts["tried"]
    assert (verdict.verdict, verdict.is_in_guess) == ("rerun after a change of the product", None)
    assert verdict.evidence is not None
    summary = "\n".join(page._format_summary([experiment], verdicts))
    assert "holds" not in summary
    assert "guess hit" not in summary
    assert "Guesses: 0 hit, 0 missed." in summary
    assert "**rerun after a change of the product**: at first, b was as low as a" in summary
    # without a result, nothing was rerun
    (verdict,) = claims.judge_claims([experiment], {})["tried"]
    assert verdict.verdict == "not run yet"


@pytest.mark.parametrize("answering", [{}, {"passages": 1}, {"is_constrained": True}])
def test_an_untrained_side_without_randomness_meets_every_seed(answering: Any) -> None:
    fixed = {"a": {"answering": answering}, "b": {"seeds": [0, 1, 2]}}
    results = {"a": {0: make_run(1.0)}, "b": {n: make_run(2.0 + n) for n in range(3)}}
    for claim in (make_claim(), make_claim(arm="a", against="b", expect="lower")):
        experiment = make_experiment(claim, arms=fixed)
        (verdict,) = claims.judge_claims([experiment], {"tried": results})["tried"]
        assert (verdict.num_seeds, verdict.lacks_seeds) == (3, False)
        assert [abs(each) for each in verdict.evidence.seed_differences] == pytest.approx([1, 2, 3])


@pytest.mark.parametrize("answering", [{"shots": 4}, {"examples": 10}, None])
def test_other_arms_meet_the_seeds_that_they_have(answering: Any) -> None:
    drawn = {"a": {"answering": answering}, "b": {"seeds": [0, 1, 2]}}
    results = {"a": {0: make_run(1.0)}, "b": {n: make_run(2.0 + n) for n in range(3)}}
    (verdict,) = claims.judge_claims([make_experiment(arms=drawn)], {"tried": results})["tried"]
    assert verdict.evidence.seed_differences == pytest.approx((1.0,))


def train_from(before: float, after: float) -> Any:
    return dataclasses.replace(make_run(after), steps=3, before=make_run(before).after)


def test_the_model_before_training_meets_every_seed() -> None:
    claim = make_claim(arm="b", against="a before")
    results = {"a": {0: train_from(1.0, 5.0)}, "b": {n: train_from(3.0, 2.0 + n) for n in range(3)}}
    experiment = make_experiment(claim, arms={"a": {}, "b": {"seeds": [0, 1, 2]}})
    (verdict,) = claims.judge_claims([experiment], {"tried": results})["tried"]
    assert verdict.evidence.seed_differences == pytest.approx((1, 2, 3))


def stamp(arm: str, seed: int, measured: Any) -> Any:
    return run.StoredRun(arm, seed, {}, "0.1.0", "2026-12-01", "a processor", measured)


def test_tables_have_the_values_that_claims_read() -> None:
    """An arm that claims read before training alone is shown before training, in the plot too."""
    claim = make_claim(arm="b", against="a before")
    experiment = make_experiment(claim, arms={"a": {}, "b": {}, "c": {}})
    stored = [stamp("b", 0, train_from(3.0, 2.0)), stamp("a", 0, train_from(1.0, 5.0))]
    head, _, *rows = page._format_arms(experiment, stored)
    assert [re.findall(r"[^|\[\]]+", row)[:3] for row in rows[:-1]] == [
        [" before training ", "  ", " 3.000 "],
        [" a before ", "  ", " 1.000 "],
        [" b ", " 1 ", " 2.000 "],
    ]
    labels = [label for label, _ in page.list_points(experiment, stored, experiment.plots[0])]
    assert labels == ["before training", "a before", "b"]
    # the clock of a busy machine is no result
    assert "tokens/s" not in head


def test_the_page_names_arms_without_a_result(tmp_path: Path) -> None:
    experiment = make_experiment(arms={"a": {}, "b": {}, "c": {}, "d": {}})
    stored = {"tried": [stamp("a", 0, make_run(1.0)), stamp("b", 0, make_run(2.0))]}
    results = {"tried": run.group_runs(stored["tried"])}
    verdicts = claims.judge_claims([experiment], results)
    page.write_page(tmp_path / "evidence.md", [experiment], stored, verdicts)
    text = (tmp_path / "evidence.md").read_text()
    assert "Without a result so far: `c`, `d`." in text
    assert "| 1 | **holds** |" in text  # the seeds beside the verdict


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
            assert experiment.recipe["test_data"] == NO_DATA, experiment.name
        for name, arm in experiment.arms.items():
            job = run.make_job(experiment, name, arm, 0, tmp_path)
            recipe = read_recipe(job.recipe)
            assert all(source.path.exists() for source in recipe.data), (experiment.name, name)
            if recipe.retention_data != NO_DATA:  # a quick run has other texts
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


def read_first_definition(name: str) -> Any:
    """Return the experiment of the commit before the one that first added a result; None if it has
    none. A results file that was deleted has been added more than once."""
    added = read_committed(
        "log", "--diff-filter=A", "--format=%H", "--", f"{name}/{run.RESULTS_FILE}"
    ).split()
    if not added and not (definitions.EXPERIMENTS / name / run.RESULTS_FILE).exists():
        return None
    before = f"{added[-1]}~1" if added else "HEAD"
    text = read_committed("show", f"{before}:./{name}/{definitions.DEFINITION_FILE}")
    return definitions.Experiment.model_validate({"name": name, **tomllib.loads(text)})


def test_guesses_are_older_than_results() -> None:
    """Claims are those of the commit before the one that added the first result."""
    for experiment in definitions.load_experiments():
        if committed := read_first_definition(experiment.name):
            assert committed.claims == experiment.claims, experiment.name


def test_changes_after_the_first_result_are_told() -> None:
    """A recipe, an arm or a seed that was changed after a result was seen."""
    changed: list[str] = []
    for experiment in definitions.load_experiments():
        committed = read_first_definition(experiment.name)
        if committed is None:
            continue
        arms_now = {
            name: arm.model_copy(update={"rerun": ""}) for name, arm in experiment.arms.items()
        }
        if (committed.recipe, committed.arms) != (experiment.recipe, arms_now):
            changed.append(experiment.name)
            assert experiment.later, experiment.name
    assert changed == ["learning_rate", "constrained_decoding"]


def test_replaced_results_are_told() -> None:
    """An arm of the same recipe with another result: the product has changed in between."""
    for experiment in definitions.load_experiments():
        file = f"{experiment.name}/{run.RESULTS_FILE}"
        current = collect_values(run.load_results(definitions.EXPERIMENTS / file))
        commits = read_committed("log", "--diff-filter=AM", "--format=%H", "--", file).split()
        for commit in commits[1:]:
            text = read_committed("show", f"{commit}:./{file}")
            stored = parse_as(list[run.StoredRun], json.loads(text), where=commit)
            for key, values in collect_values(stored).items():
                name = key[0]
                if current.get(key, values) != values:
                    assert experiment.arms[name].rerun, (experiment.name, name)


def collect_values(stored: Any) -> dict[tuple[str, str], Any]:
    """Return the values of each arm and settings, without those of the clock."""
    return {
        (each.arm, json.dumps(each.settings, sort_keys=True)): [
            (values.task, values.metric, values.ids, values.values)
            for values in each.run.after
            if values.task != arms.RUN_TASK
        ]
        for each in stored
    }


def test_rules_cite_decided_experiments() -> None:
    experiments = definitions.load_experiments()
    by_name = {each.name: each for each in experiments}
    collected = run.collect_results(experiments, definitions.EXPERIMENTS)
    results = {name: run.group_runs(stored) for name, stored in collected.items()}
    verdicts = claims.judge_claims(experiments, results)
    decided = {"holds", "does not hold", "rerun after a change of the product"}
    files = [*PLAN.glob("*.py"), PLAN.parent / "advise" / "rules" / "rubric.py"]
    cited = set(re.findall(r"experiments/(\w+)", "\n".join(file.read_text() for file in files)))
    assert cited >= {"distinct_facts", "guard_collapse", "rank"}
    for name in cited:
        assert by_name[name].settings or name == "distinct_facts", name
        # of distinct facts the counts are cited, which no claim decides at this size
        assert name == "distinct_facts" or {each.verdict for each in verdicts[name]} & decided, name


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


def test_an_arm_that_fails_is_told_and_the_others_run(
    tiny_experiment: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as one whose recipe names rows that do not exist; it has no result and may run again."""
    wrong = definitions.Arm(recipe={"data": str(tmp_path / "no-such-rows.jsonl")})
    arms_by_name = {"wrong": wrong, "b": tiny_experiment.arms["b"]}
    experiment = tiny_experiment.model_copy(update={"arms": arms_by_name})
    other = experiment.model_copy(update={"name": "other"})
    running = run.run_experiments(
        [experiment, other], tmp_path / "work", tmp_path, deadline=time.monotonic() + 1000
    )
    assert [next(running).name, next(running).name] == ["tried", "other"]
    with pytest.raises(arms.ArmError, match="2 arms failed: tried: wrong, seed 0; other: wrong"):
        next(running)
    assert [each.arm for each in run.load_results(tmp_path / "tried" / run.RESULTS_FILE)] == ["b"]
    assert "its process ended with 1" in capsys.readouterr().out


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
