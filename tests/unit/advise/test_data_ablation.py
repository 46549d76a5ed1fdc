"""Short trainings on a choice and on what it has to beat: one start, the same rows by seed, and
what is concluded."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tiny_runs import measured_files, recipe, sums, write_rows
from tunesmith.advise import data_ablation
from tunesmith.advise.data_ablation import AblationResult, SubsetRun, summarize_ablation
from tunesmith.cli.views.curate import format_conclusion
from tunesmith.core.errors import InputError
from tunesmith.core.json_io import parse_as, read_json, to_jsonable
from tunesmith.core.types import Plan
from tunesmith.evaluate.results import MetricValues
from tunesmith.session import inputs


def gathered(tiny_folder: Path, tmp_path: Path, **changed: Any) -> inputs.RunInputs:
    rows = write_rows(tmp_path / "many.jsonl", sums(1, 30))
    files = measured_files(tmp_path / "held out")
    values = {
        "data": str(rows),
        "batch_size": 2,
        "eval_data": files["eval_data"],
        "test_data": files["test_data"],
    }
    return inputs.load_inputs(recipe(tiny_folder, tmp_path, **(values | changed)))


@pytest.fixture
def known(tiny_folder: Path, tmp_path: Path) -> inputs.RunInputs:
    return gathered(tiny_folder, tmp_path)


def chosen(folder: Path) -> Path:
    """What `data curate` writes, in short."""
    folder.mkdir()
    lines = []
    for row in range(1, 31):
        files = [
            name
            for name, rows in {
                "kept": range(1, 7),
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


def test_every_subset_starts_from_the_same_weights_and_is_trained_on_its_rows(
    known: inputs.RunInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = chosen(tmp_path / "golden")
    monkeypatch.setattr(
        data_ablation,
        "read_manifest",
        lambda _: {"source": known.datasets["data"].fingerprint},
    )
    *trained, proof = tunesmith.data_prove(known, folder=folder, steps=5, seeds=2)
    assert isinstance(proof, AblationResult)
    assert [(one.name, one.seed, one.rows) for one in trained if isinstance(one, SubsetRun)] == [
        ("", 0, 0),
        *(
            (name, seed, rows)
            for seed in (0, 1)
            for name, rows in (("kept", 6), ("random", 6), ("longest", 1), ("whole", 29))
        ),
    ]
    assert (
        parse_as(AblationResult, read_json(folder / "proof.json"))
        == proof
        == parse_as(AblationResult, to_jsonable(proof))
    )
    again = list(tunesmith.data_prove(known, folder=folder, steps=5))
    alone = [one.held_out for one in again if isinstance(one, SubsetRun)]
    assert alone == [one.held_out for one in trained[:5] if isinstance(one, SubsetRun)]
    assert len({one.values for one in alone}) == 5


def test_it_needs_held_out_rows_and_the_rows_that_were_chosen_from(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = gathered(tiny_folder, tmp_path, eval_data=(), test_data=())
    with pytest.raises(InputError, match="no held-out rows") as refusal:
        next(tunesmith.data_prove(without, folder=tmp_path))
    assert "--eval-split" in refusal.value.fix
    known = gathered(tiny_folder, tmp_path)
    monkeypatch.setattr(data_ablation, "read_manifest", lambda _: {"source": "of other rows"})
    with pytest.raises(InputError, match="made of other rows"):
        next(tunesmith.data_prove(known, folder=chosen(tmp_path / "golden")))


def run(name: str, seed: int, *values: float) -> SubsetRun:
    measured = MetricValues("eval", "loss", ("a", "b", "c", "d"), values, higher_is_better=False)
    return SubsetRun(name, seed, 3, 10, measured)


@pytest.fixture
def plan(known: inputs.RunInputs) -> Plan:
    return inputs.make_plan(known)


def test_what_wins_what_loses_and_what_cannot_be_told_are_said(plan: Plan) -> None:
    base = run("", 0, 3, 3, 3, 3)
    runs = [run("kept", 0, 1.0, 1.1, 1.2, 1.3), run("random", 0, 2.0, 2.1, 2.3, 2.3)]
    runs += [run("longest", 0, 0.5, 0.7, 0.7, 0.8), run("whole", 0, 1.4, 0.7, 1.1, 1.4)]
    proof = summarize_ablation(plan, [base, *runs], 5)
    assert [arm.verdict for arm in proof.arms] == ["", "better", "worse", "no difference shown"]
    assert (
        format_conclusion(proof)
        == "kept beside random: is beaten by it, longest: trains better, whole: no difference shown"
    )
    assert proof.arms[1].comparison is not None
    assert proof.arms[1].comparison.difference == pytest.approx(-1.025)


def test_seeds_are_averaged_by_item_and_a_quarrel_between_them_is_said(plan: Plan) -> None:
    runs = [
        run("kept", 0, 1, 1, 1, 1.1),
        run("random", 0, 2, 2, 2, 2.2),
        run("kept", 1, 3, 3, 3, 3),
        run("random", 1, 2.5, 2.5, 2.5, 2.5),
    ]
    proof = summarize_ablation(plan, [run("", 0, 3, 3, 3, 3), *runs], 5)
    random = proof.arms[1]
    assert (proof.seeds, random.loss) == (2, pytest.approx(2.275))
    assert random.seed_differences == (pytest.approx(-1.025), pytest.approx(0.5))
    assert format_conclusion(proof).endswith("seeds disagree on random")
    assert "seeds" not in format_conclusion(dataclasses.replace(proof, arms=proof.arms[:1]))
