"""Short runs on the selected rows and on the baselines: one start, one order per seed."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tiny_runs import build_sum_rows, make_tiny_recipe, write_eval_files, write_rows
from tunesmith.advise import data_ablation
from tunesmith.advise.data_ablation import AblationResult, SubsetRun, summarize_ablation
from tunesmith.cli.views.curate import format_conclusion
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import parse_as, read_json, to_jsonable
from tunesmith.core.types import Plan
from tunesmith.evaluate.results import MetricValues
from tunesmith.session import inputs


def make_inputs(tiny_folder: Path, tmp_path: Path, **changed: Any) -> inputs.RunInputs:
    rows = write_rows(tmp_path / "many.jsonl", build_sum_rows(1, 30))
    files = write_eval_files(tmp_path / "held out")
    values = {
        "data": str(rows),
        "batch_size": 2,
        "eval_data": files["eval_data"],
        "test_data": files["test_data"],
    }
    return inputs.load_inputs(make_tiny_recipe(tiny_folder, tmp_path, **(values | changed)))


@pytest.fixture
def run_inputs(tiny_folder: Path, tmp_path: Path) -> inputs.RunInputs:
    return make_inputs(tiny_folder, tmp_path)


def write_curated(folder: Path) -> Path:
    """Write what `data curate` writes, in short."""
    folder.mkdir()
    lines = []
    for row in range(1, 31):
        files = [
            name
            for name, rows in {
                "selected": range(1, 7),
                "random": range(4, 10),
                "longest": (30,),
            }.items()
            if row in rows
        ]
        lines.append(
            {"id": f"many.jsonl:{row}", "files": files, "perplexity": None if row == 29 else 2.0}
        )
    (folder / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.promise
def test_every_subset_starts_from_the_same_weights_and_is_trained_on_its_rows(
    run_inputs: inputs.RunInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_curated(tmp_path / "golden")
    monkeypatch.setattr(
        data_ablation,
        "read_manifest",
        lambda _: {"source": run_inputs.datasets["data"].fingerprint},
    )
    *runs, result = tunesmith.data_ablate(run_inputs, folder=folder, steps=5, seeds=2)
    assert isinstance(result, AblationResult)
    assert [(run.name, run.seed, run.rows) for run in runs if isinstance(run, SubsetRun)] == [
        ("", 0, 0),
        *(
            (name, seed, rows)
            for seed in (0, 1)
            for name, rows in (("selected", 6), ("random", 6), ("longest", 1), ("all", 29))
        ),
    ]
    assert (
        parse_as(AblationResult, read_json(folder / "ablation.json"))
        == result
        == parse_as(AblationResult, to_jsonable(result))
    )
    repeated = list(tunesmith.data_ablate(run_inputs, folder=folder, steps=5))
    held_out = [run.held_out for run in repeated if isinstance(run, SubsetRun)]
    assert held_out == [run.held_out for run in runs[:5] if isinstance(run, SubsetRun)]
    assert len({measurement.values for measurement in held_out}) == 5


def test_it_needs_held_out_rows_and_the_same_data(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = make_inputs(tiny_folder, tmp_path, eval_data=(), test_data=())
    with pytest.raises(InputError, match="no held-out rows") as refusal:
        next(tunesmith.data_ablate(without, folder=tmp_path))
    assert "--eval-split" in refusal.value.fix
    run_inputs = make_inputs(tiny_folder, tmp_path)
    monkeypatch.setattr(data_ablation, "read_manifest", lambda _: {"source": "other rows"})
    with pytest.raises(InputError, match="made from other rows"):
        next(tunesmith.data_ablate(run_inputs, folder=write_curated(tmp_path / "golden")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("5", "not a _ScoreLine"),
        ('{"id": "many.jsonl:1"', "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"id": 5, "files": [], "perplexity": null}', "id: "),
        ('{"id": "many.jsonl:1", "files": ["others"], "perplexity": null}', "files.0: "),
        ('{"id": "many.jsonl:1", "files": []}', "perplexity: "),
        ('{"id": "many.jsonl:99", "files": [], "perplexity": 2}', "many.jsonl:99 is not in"),
        ("\udcff", "is not UTF-8"),
    ],
)
def test_a_damaged_line_of_scores_is_refused(
    line: str,
    message: str,
    run_inputs: inputs.RunInputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_curated(tmp_path / "golden")
    file = folder / "scores.jsonl"
    file.write_bytes(file.read_bytes() + line.encode(errors="surrogateescape") + b"\n")
    source = run_inputs.datasets["data"].fingerprint
    monkeypatch.setattr(data_ablation, "read_manifest", lambda _: {"source": source})
    with pytest.raises(InputError, match=re.escape(message)) as refusal:
        data_ablation.read_subsets(run_inputs, folder)
    assert refusal.value.where == f"{file}:31"


def make_run(name: str, seed: int, *values: float) -> SubsetRun:
    ids = tuple("abcdef"[: len(values)])
    held_out = MetricValues("eval", "loss", ids, values, higher_is_better=False)
    return SubsetRun(name, seed, 3, 10, held_out)


@pytest.fixture
def plan(run_inputs: inputs.RunInputs) -> Plan:
    return inputs.make_plan(run_inputs)


def test_the_conclusion_names_wins_losses_and_ties(plan: Plan) -> None:
    base = make_run("", 0, 3, 3, 3, 3, 3)
    runs = [
        make_run("selected", 0, 1.0, 1.1, 1.2, 1.3, 1.2),
        make_run("random", 0, 2.0, 2.1, 2.3, 2.3, 2.3),
        make_run("longest", 0, 0.5, 0.7, 0.7, 0.8, 0.7),
        make_run("all", 0, 1.4, 0.7, 1.1, 1.4, 1.2),
    ]
    result = summarize_ablation(plan, [base, *runs], 5)
    assert [arm.verdict for arm in result.arms] == ["", "better", "worse", "no difference shown"]
    assert (
        format_conclusion(result)
        == "random: worse than the selection, longest: better than the selection, "
        "all: no difference shown"
    )
    assert result.arms[1].comparison is not None
    assert result.arms[1].comparison.difference == pytest.approx(-1.04)


def test_seeds_are_averaged_by_item_and_their_disagreement_is_reported(plan: Plan) -> None:
    runs = [
        make_run("selected", 0, 1, 1, 1, 1.1),
        make_run("random", 0, 2, 2, 2, 2.2),
        make_run("selected", 1, 3, 3, 3, 3),
        make_run("random", 1, 2.5, 2.5, 2.5, 2.5),
    ]
    result = summarize_ablation(plan, [make_run("", 0, 3, 3, 3, 3), *runs], 5)
    random = result.arms[1]
    assert (result.seeds, random.loss) == (2, pytest.approx(2.275))
    assert random.seed_differences == (pytest.approx(-1.025), pytest.approx(0.5))
    assert format_conclusion(result).endswith("seeds disagree on random")
    assert "seeds" not in format_conclusion(dataclasses.replace(result, arms=result.arms[:1]))
