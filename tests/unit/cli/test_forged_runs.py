"""A value of a file of a run, replaced by one of another type with a seal that fits, is the user's
error in words, or no matter, and no bug."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from damages import FORGED_VALUES, forge
from tiny_runs import make_tiny_recipe, plan_recipe, run_until_saved, train, write_eval_files
from tunesmith.api import read_record
from tunesmith.core.events import CheckResult
from tunesmith.core.run_dir import read_events
from tunesmith.train.run import train as start_training

pytestmark = pytest.mark.promise


Keys = tuple[str | int, ...]
Run = Callable[..., tuple[int, str, str]]
REPORTED: list[tuple[str, Keys]] = [
    ("fingerprint.json", ("base_sha256",)),
    ("fingerprint.json", ("base_sha256", "model.safetensors")),
    ("fingerprint.json", ("tokenizer",)),
    ("fingerprint.json", ("templates",)),
    ("fingerprint.json", ("data",)),
    ("plan.json", ("memory_bytes", "weights")),
    ("plan.json", ("phase_bytes",)),
    ("plan.json", ("recipe",)),
    ("record.json", ("total_seconds",)),
    ("record.json", ("comparisons", 0, "after", "value")),
    ("record.json", ("errors", "broken")),
    ("eval_before.json", ("measurements", 0, "ids")),
    ("eval_after.json", ("measurements", 0, "ids", 0)),
    ("eval_after.json", ("measurements", 0, "values", 0)),
    ("events.jsonl", ("step", "type")),
    ("events.jsonl", ("step", "attempt")),
    ("events.jsonl", ("step", "time")),
    ("events.jsonl", ("step", "step")),
    ("events.jsonl", ("step", "loss")),
    ("events.jsonl", ("step", "peak_bytes")),
    ("adapter/manifest.json", ("files",)),
    ("adapter/manifest.json", ("files", "adapter_model.safetensors")),
    ("adapter/manifest.json", ("files", "adapter_model.safetensors", "sha256")),
]
CHECKPOINT = "checkpoints/step-2"


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forged")
    files = write_eval_files(folder)
    train(make_tiny_recipe(tiny_folder, folder, save_steps=1, metrics=["exact_match"], **files))
    return folder / "run"


def check(outcome: tuple[int, str, str], where: object) -> int:
    code, _, error = outcome
    assert code in (0, 2), (where, error)
    assert (code == 2) == ("error: " in error), (where, error)
    return code


@pytest.mark.parametrize("value", FORGED_VALUES)
def test_a_report_of_forged_values_is_refused_or_made(
    value: str, run: Path, tmp_path: Path, tunesmith: Run
) -> None:
    codes: list[int] = []
    for name, keys in REPORTED:
        copy = shutil.copytree(run, tmp_path / "run")
        forge(copy / name, keys, FORGED_VALUES[value])
        codes.append(check(tunesmith("report", str(copy)), (name, keys)))
        shutil.rmtree(copy)
    assert 2 in codes


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("base_sha256",), []),
        (("config",), None),
        (("renderer",), {}),
        (("base",), [{}]),
        (("files",), None),
        (("files", "state.safetensors", "sha256"), None),
    ],
)
def test_a_checkpoint_with_a_forged_manifest_is_refused(
    keys: Keys, value: object, run: Path, tmp_path: Path, tunesmith: Run
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    forge(copy / CHECKPOINT / "manifest.json", keys, value)
    assert check(tunesmith("eval", str(copy / CHECKPOINT)), keys) == 2


@pytest.mark.parametrize("key", ["model", "metrics", "test_data"])
def test_another_model_is_not_compared_with_a_forged_recipe(
    key: str, run: Path, tiny_folder: Path, tmp_path: Path, tunesmith: Run
) -> None:
    codes: list[int] = []
    for value in FORGED_VALUES.values():
        copy = shutil.copytree(run, tmp_path / "run")
        forge(copy / "plan.json", ("recipe", key), value)
        codes.append(check(tunesmith("compare", str(tiny_folder), str(copy)), (key, value)))
        shutil.rmtree(copy)
    assert 2 in codes


@pytest.mark.parametrize("key", ["updates", "ratios", "step"])
def test_a_run_with_a_forged_position_is_not_resumed(
    key: str, run: Path, tmp_path: Path, tunesmith: Run
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "record.json").unlink()
    forge(copy / CHECKPOINT / "trainer_state.json", (key,), "x")
    code, _, error = tunesmith("resume", str(copy))
    assert (code, "Traceback" in error) == (2, False), error
    assert f"{CHECKPOINT}/trainer_state.json" in error
    assert "fix: restore the checkpoint" in error


def test_a_run_whose_checkpoints_are_all_damaged_starts_anew_and_says_why(
    run: Path, tmp_path: Path, tunesmith: Run
) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "record.json").unlink()
    for manifest in copy.glob("checkpoints/*/manifest.json"):
        manifest.write_text("{}")
    assert tunesmith("resume", str(copy))[0] == 0
    checks = [event for event in read_events(copy) if isinstance(event, CheckResult)]
    told = [check.evidence for check in checks if check.kind == "resume"]
    assert told == ["from the start: there is no intact checkpoint"]


@pytest.mark.parametrize("damage", ["one byte", "no manifest"])
def test_damaged_states_of_the_base_are_computed_again(
    damage: str, tiny_folder: Path, tmp_path: Path, tunesmith: Run
) -> None:
    files = write_eval_files(tmp_path)
    changed = {"method": "full", "lora_r": "auto", "save_steps": 1, **files}
    train(make_tiny_recipe(tiny_folder, tmp_path / "straight", **changed))
    recipe = make_tiny_recipe(tiny_folder, tmp_path / "killed", **changed)
    run_until_saved(start_training(plan_recipe(recipe)), step=1)
    states = tmp_path / "killed" / "run" / "base_states"
    file = next(states.glob("*.safetensors"))
    if damage == "one byte":
        content = bytearray(file.read_bytes())
        content[-1] ^= 64
        file.write_bytes(content)
    else:
        (states / "manifest.json").unlink()
    assert tunesmith("resume", str(states.parent))[0] == 0
    scores = [read_record(tmp_path / name / "run").kl_scores for name in ("straight", "killed")]
    assert scores[0]
    assert scores[0] == scores[1]
