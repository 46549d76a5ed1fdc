"""What `train` prints: the plan's warnings, rows that were left out, and time and memory of all
that a run does."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tiny_runs import build_sum_rows, make_chat_row, write_eval_files, write_rows
from tunesmith.cli.app import main
from tunesmith.evaluate.measure import measure_items
from tunesmith.train import run as train_run

pytestmark = pytest.mark.promise


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))


def train(folder: Path, model: Path, **changed: Any) -> Path:
    values = {
        "model": str(model),
        "data": str(write_rows(folder / "train.jsonl", build_sum_rows(1, 6))),
        "output_dir": str(folder / "run"),
        "num_train_epochs": 1,
        "dtype": "fp32",
        "lora_r": 2,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values | changed))
    with pytest.raises(SystemExit) as stop:
        main(["train", str(folder / "recipe.yaml")])
    assert not stop.value.code
    return folder / "run"


def test_the_plans_warnings_are_printed(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path, tiny_folder)
    printed = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    warnings = json.loads((run / "plan.json").read_text())["warnings"]
    assert len(warnings) >= 3
    assert printed[: len(warnings)] == [f"warning: {warning}" for warning in warnings]


def test_warnings_of_stages_name_their_stage(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = str(write_rows(tmp_path / "t.jsonl", [{"text": f"text {n} of many"} for n in range(8)]))
    rows = str(write_rows(tmp_path / "r.jsonl", build_sum_rows(1, 6)))
    stages = [
        {"cpt": {"data": texts, "batch_tokens": 64, "max_length": 32}},
        {"sft": {"data": rows}},
    ]
    train(tmp_path, tiny_folder, stage=stages, batch_size=2)
    err = capsys.readouterr().err
    assert "warning: stage 1, cpt: " in err
    assert "warning: stage 2, sft: no held-out rows" in err


def test_rows_that_a_filter_leaves_out_are_printed(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*build_sum_rows(1, 5), make_chat_row("who", "I am an AI")]
    data = str(write_rows(tmp_path / "rows.jsonl", rows))
    never = [{"match": "an AI", "name": "disclaimer", "mode": "filter"}]
    train(tmp_path, tiny_folder, data=data, never=never)
    err = capsys.readouterr().err
    assert "warning: data: 1 row left out by never: 'disclaimer'; see rejected.jsonl" in err


def test_time_and_memory_cover_evaluation(
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def measure_slowly(*items: Any, **options: Any) -> Any:
        time.sleep(0.5)
        return measure_items(*items, **options)

    monkeypatch.setattr(train_run, "measure_items", measure_slowly)
    run = train(tmp_path, tiny_folder, **write_eval_files(tmp_path))
    out = capsys.readouterr().out
    record = json.loads((run / "record.json").read_text())
    assert record["total_seconds"] - record["train_seconds"] > 0.4
    assert record["train_seconds"] > 0
    assert record["peak_bytes"] >= record["train_peak_bytes"] > 0
    assert "with loading, preflight and evaluation" in out
    assert "peak memory" in out
    assert f"adapter: {run / 'adapter'}" in out.replace("\n", "")


def test_a_full_run_ends_with_its_model(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(tmp_path, tiny_folder, method="full", lora_r="auto")
    assert f"model: {run / 'model'}" in capsys.readouterr().out.replace("\n", "")
