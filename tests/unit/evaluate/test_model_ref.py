"""Two models side by side: runs by their files alone, answers of a file, and what must be
loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import tunesmith
from tiny_runs import build_sum_rows, make_tiny_recipe, train, write_eval_files, write_rows
from tunesmith.cli import app
from tunesmith.cli.views.results import render_model_comparison
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import parse_as, read_json
from tunesmith.core.sealed_json import read_sealed_json, seal_json
from tunesmith.core.types import RunRecord
from tunesmith.evaluate.compare_models import EvalSpec, evaluate_before_after
from tunesmith.evaluate.model_ref import ModelRef, parse_model_ref
from tunesmith.evaluate.pairing import pair_measurements
from tunesmith.evaluate.regression_gate import build_gates
from tunesmith.evaluate.results import EvalResults, MetricValues
from view_samples import render_text


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two finished runs on the same held-out rows, the second with another seed. Not to be
    changed."""
    folder = tmp_path_factory.mktemp("two")
    files = write_eval_files(folder / "rows")
    for name, seed in (("one", 0), ("two", 1)):
        wish = {"metrics": ["chrf", "json_valid"], "save_steps": 2, "seed": seed}
        train(make_tiny_recipe(tiny_folder, folder / name, **files, **wish))
    return folder / "one" / "run", folder / "two" / "run"


def measures(compared: tunesmith.Comparison | object) -> dict[tuple[str, str], float]:
    return {(entry.task, entry.metric): entry.difference for entry in compared.comparisons}  # type: ignore[attr-defined]


@pytest.mark.promise
def test_finished_runs_are_compared_by_their_files_in_a_moment(runs: tuple[Path, Path]) -> None:
    program = (
        "import sys, time, tunesmith\nbegan = time.perf_counter()\n"
        f"result = tunesmith.compare({str(runs[0])!r}, {str(runs[1])!r})\n"
        "seconds = time.perf_counter() - began\n"
        "print(len(result.comparisons), seconds, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    count, _, torch = done.stdout.split()
    assert (int(count) >= 4, torch) == (True, "False")


def test_the_change_is_that_of_the_items(runs: tuple[Path, Path]) -> None:
    result = tunesmith.compare(*runs)
    assert [note.partition(":")[0] for note in result.notes] == [
        "intervals are for other seeds, too"
    ]
    first, second = (parse_as(EvalResults, read_json(run / "eval_after.json")) for run in runs)
    for entry, other in zip(first.measurements, second.measurements, strict=True):
        if not (entry.weights or entry.strata):
            change = sum(other.values) / len(other.values) - sum(entry.values) / len(entry.values)
            assert measures(result)[entry.task, entry.metric] == pytest.approx(change)
    stored = read_json(runs[0] / "record.json")["comparisons"]
    assert {(c["task"], c["metric"]): c["difference"] for c in stored}.items() <= measures(
        tunesmith.compare("base", runs[0])
    ).items()
    assert measures(tunesmith.compare(f"{runs[0]}@0", f"{runs[0]}@1")) == measures(
        tunesmith.compare("base", runs[0])
    )


def change_settings(run: Path, **changed: object) -> None:
    record = parse_as(RunRecord, read_sealed_json(run / "record.json"))
    recipe = {**record.plan.recipe, **changed}
    record = replace(record, plan=replace(record.plan, recipe=recipe))
    (run / "record.json").write_bytes(seal_json(record))


def test_runs_side_by_side_that_differ_in_the_seed_measure_its_noise(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = (shutil.copytree(run, tmp_path / run.parent.name) for run in runs)
    result = tunesmith.compare(a, b)
    assert result.notes == (
        "intervals are for other seeds, too: by 2 runs here that differ in the seed",
    )
    assert {entry.seed_degrees for entry in result.comparisons} == {1}
    same = tunesmith.compare(f"{a}@0.5", a)
    assert {entry.seed_low for entry in same.comparisons} == {None}
    change_settings(b, lora_r=7)
    alone = tunesmith.compare(a, b)
    assert {entry.seed_degrees for entry in alone.comparisons} == {None}
    assert "one seed each" in alone.notes[-1]
    assert "one seed each" in render_text(render_model_comparison(alone))


@pytest.mark.promise
def test_sides_that_no_file_holds_are_measured(
    runs: tuple[Path, Path], tiny_folder: Path, tmp_path: Path
) -> None:
    run = runs[0]
    base = measures(tunesmith.compare("base", run))
    again = measures(tunesmith.compare(tiny_folder, run))
    assert again == pytest.approx({name: base[name] for name in again}, abs=1e-6), (
        "the base by its folder"
    )
    assert measures(tunesmith.compare("base", run / "adapter")) == base
    alone = shutil.copytree(run / "adapter", tmp_path / "alone")
    adapter = measures(tunesmith.compare(f"{run}@0", alone))
    assert adapter == pytest.approx({name: base[name] for name in adapter}, abs=1e-5)
    half = measures(tunesmith.compare("base", f"{run}@0.5"))["test", "loss"]
    early = measures(tunesmith.compare("base", run / "checkpoints" / "step-2"))["test", "loss"]
    assert base["test", "loss"] < half < 0
    assert base["test", "loss"] < early < 0


def test_answers_of_a_file_are_graded_on_the_items_of_the_run(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    after = parse_as(EvalResults, read_json(runs[0] / "eval_after.json"))
    entries = [{"id": sample.id, "answer": sample.expected} for sample in after.samples[:2]]
    result = tunesmith.compare(write_rows(tmp_path / "answers.jsonl", entries), runs[0])
    assert {c.metric: (c.before.value, c.after.n) for c in result.comparisons} == {
        "chrf": (1.0, 2),
        "json_valid": (1.0, 2),
    }
    assert "test chrf: 2 and 3 items, compared on the 2 that both have" in result.notes
    (alone,) = [note for note in result.notes if note.startswith("only the second model has ")]
    assert "test loss" in alone
    for row, message in (
        (
            {"id": "test.jsonl:9", "answer": ""},
            r"answers\.jsonl:3: the run has no item",
        ),
        ({"id": entries[0]["id"], "answer": "x"}, r"answers\.jsonl:3: duplicate id"),
        ({"id": entries[0]["id"]}, r"answers\.jsonl:3: the row needs an `id` and an `answer`"),
    ):
        with pytest.raises(InputError, match=message):
            tunesmith.compare(write_rows(tmp_path / "answers.jsonl", [*entries, row]), runs[0])


def test_runs_that_cannot_be_compared_say_why(runs: tuple[Path, Path], tmp_path: Path) -> None:
    broken = shutil.copytree(runs[0], tmp_path / "run")
    for damage, message in (
        (
            lambda: (broken / "eval_after.json").write_text('{"measurements": [{"task": 1}]}'),
            r"after\.json: not a EvalResults",
        ),
        (
            lambda: (broken / "eval_after.json").write_text("{"),
            r"after\.json:1:\d+: not valid JSON",
        ),
        (
            (broken / "eval_after.json").unlink,
            "there is no eval_after.json: the run is of another version, or",
        ),
        ((broken / "record.json").unlink, "this run is not finished[\\s\\S]*tunesmith resume"),
    ):
        damage()
        with pytest.raises(InputError, match=message):
            tunesmith.compare(broken, runs[1])
    for a, b, message in (
        ("base", "base", "base can only be compared with a run"),
        (f"{runs[0]}@x", runs[0], "invalid scale x"),
        (runs[0] / "checkpoints" / "step-9", runs[0], "no such checkpoint[\\s\\S]*step-2"),
    ):
        with pytest.raises(InputError, match=message):
            tunesmith.compare(a, b)


@pytest.fixture
def at_work(runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where a run is at runs/demo-1."""
    shutil.copytree(runs[0], tmp_path / "runs" / "demo-1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["runs/demo-2", "runs/demo@0.5", "./nothing/here", "smollm2-135m"])
@pytest.mark.parametrize(
    "words", [("eval", "NAME"), ("compare", "NAME", "base"), ("compare", "runs/demo-1", "NAME")]
)
def test_a_name_of_nothing_is_refused(
    words: tuple[str, ...], name: str, at_work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert at_work.is_dir()
    with pytest.raises(SystemExit) as ended:
        app.main([name if word == "NAME" else word for word in words])
    assert ended.value.code == 2
    output = capsys.readouterr().err
    assert f"error: {name}: no such run folder, model folder or built-in model\n" in output
    assert "fix: name a run folder: `tunesmith runs` lists them; built-in models: " in output


def test_an_id_on_the_hub_is_left_to_the_hub(at_work: Path) -> None:
    assert at_work.is_dir()
    assert parse_model_ref("somebody/model").run_dir is None
    with pytest.raises(InputError, match="invalid path: File name too long"):
        parse_model_ref("x" * 300)


# ---------------------------------------------------------------- pairs


def measured(ids: str, contents: str = "", **changed) -> EvalResults:
    values = tuple(float(ord(item)) for item in ids)
    entry = MetricValues("test", "chrf", tuple(ids), values, **changed)
    output = {"test_data": dict(zip(ids, contents, strict=True))} if contents else {}
    return EvalResults((entry,), digests=output)


def test_items_are_known_by_what_they_say_not_by_their_line() -> None:
    ((entry, other),), notes = pair_measurements(measured("abcd", "wxyz"), measured("abc", "xzw"))
    assert (entry.ids, entry.values) == (("a", "b", "d"), (97.0, 98.0, 100.0))
    assert other.values == (99.0, 97.0, 98.0)
    assert notes == ["test chrf: 4 and 3 items, compared on the 3 that both have"]
    ((_, same),), _ = pair_measurements(measured("abc", "xxy"), measured("abc", "yxx"))
    assert same.values == (98.0, 99.0, 97.0), "rows that say the same are taken in turn"


def test_what_cannot_be_paired_is_said() -> None:
    pairs, notes = pair_measurements(measured("abc", "uvw"), measured("abc", "xyz"))
    assert pairs == []
    assert notes[1] == "test chrf: not compared, fewer than two items are common"
    _, notes = pair_measurements(
        measured("ab", weights=(1.0, 2.0)), measured("ab", weights=(1.0, 3.0))
    )
    assert notes == [
        "test chrf: not compared, the tokenizers differ, so the items have other weights: "
        "compare bits_per_byte"
    ]


# ---------------------------------------------------------------- eval and gates


@pytest.mark.promise
def test_eval_measures_other_rows_and_other_models(
    runs: tuple[Path, Path], tiny_folder: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "more.jsonl", build_sum_rows(300, 4))
    result = tunesmith.evaluate(runs[0], data=rows, metrics="numeric: 0.5, token_f1").comparisons
    assert {(c.metric, c.after.n) for c in result if c.task == "test"} == {
        *(("numeric: 0.5", 4), ("token_f1", 4), ("loss", 4)),
    }
    scores = tunesmith.evaluate(tiny_folder, data=rows, metrics=["chrf"]).scores
    assert {score.metric for score in scores} == {"chrf", "loss", "bits_per_byte"}
    alone = shutil.copytree(
        runs[0] / "adapter", tmp_path / "alone"
    )  # in bf16: no run says otherwise
    comparisons = tunesmith.evaluate(alone, data=rows, metrics=["chrf"]).comparisons
    loss = next(each for each in comparisons if each.metric == "loss")
    base = next(score for score in scores if score.metric == "loss")
    assert (loss.before.value, loss.before.low) == pytest.approx((base.value, base.low), rel=1e-5)
    assert loss.difference == pytest.approx(
        next(c.difference for c in result if c.metric == "loss"), abs=0.02
    )
    bad = write_rows(
        tmp_path / "bad.jsonl",
        [*build_sum_rows(1, 2), {"messages": [{"role": "user", "content": "x"}]}],
    )
    with pytest.raises(InputError, match=r"bad\.jsonl:3: the last turn is `user`"):
        tunesmith.evaluate(runs[0], data=bad)
    with pytest.raises(InputError, match="there are no items to evaluate it on"):
        tunesmith.evaluate(tiny_folder)


@pytest.mark.promise
def test_a_run_that_trained_all_weights_is_measured_again_and_asked(
    tiny_folder: Path, tmp_path: Path
) -> None:
    wish = {"method": "full", "lora_r": "auto", "metrics": ["chrf"], "learning_rate": 1e-3}
    train(make_tiny_recipe(tiny_folder, tmp_path, **write_eval_files(tmp_path / "rows"), **wish))
    path = tmp_path / "run"
    first = {
        (entry["task"], entry["metric"]): entry["difference"]
        for entry in read_json(path / "record.json")["comparisons"]
    }
    again = measures(tunesmith.evaluate(path))
    assert again.keys() == first.keys()
    assert again == pytest.approx(first, abs=1e-6)
    assert any(abs(difference) > 1e-4 for difference in again.values())
    assert len(list(tunesmith.chat(path, ["one?", "two?"]))) == 2


def test_a_gate_lets_pass_what_is_not_worse_and_has_not_forgotten_much(
    runs: tuple[Path, Path],
) -> None:
    few = tunesmith.compare("base", runs[0]).comparisons
    assert not any(gate.passed for gate in build_gates(few, 10.0) if gate.name == "test loss")
    comparisons = [replace(c, after=replace(c.after, n=30)) for c in few]
    (high,) = (c.high for c in comparisons if c.task == "general text")
    for margin, is_passed in ((high + 1e-6, True), (high - 1e-6, False)):
        by_name = {gate.name: gate for gate in build_gates(comparisons, margin)}
        assert by_name["test loss"].passed
        forgot = by_name["general text bits_per_byte"]
        assert (forgot.passed, forgot.margin, forgot.bound) == (is_passed, margin, high)
    backwards = {
        gate.name: gate
        for gate in build_gates(tunesmith.compare(runs[0], "base").comparisons, 10.0)
    }
    assert not backwards["test loss"].passed
    with pytest.raises(InputError, match="no metric to gate"):
        build_gates((), 0.02)


def test_a_failing_gate_exits_with_4(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = read_sealed_json(runs[1] / "plan.json")
    plan["settings"]["forgetting_margin"]["value"] = -5.0
    copy = shutil.copytree(runs[1], runs[1].parent / "gated")
    (copy / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(SystemExit) as ended:
        app.main(["eval", str(copy), "--gate", "--json"])
    assert ended.value.code == 4
    out, err = capsys.readouterr()
    judged = {
        gate["name"]: gate["passed"] for gate in json.JSONDecoder().raw_decode(out)[0]["gates"]
    }
    assert judged["general text bits_per_byte"] is False
    assert judged["test loss"] is False, "three rows are too few"
    assert "failed: " in err
    assert "general text bits_per_byte" in err


@pytest.mark.parametrize("config", ["[]", "5", "{}", '{"base_model_name_or_path": 5}', "{"])
def test_an_adapter_of_another_kind_is_refused(config: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(config)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"not a JSON object|does not name its base|not valid"):
        evaluate_before_after(ModelRef(str(tmp_path)), EvalSpec(tmp_path / "rows.jsonl"))
