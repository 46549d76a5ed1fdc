"""Weights that several ranks hold together: the bits, or the steps, of ranks with all weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rank_lab import run_ranks
from rank_runs import check_resuming, read_weights, train_on_ranks
from rank_shards import (
    FULL_STEPS,
    STEPS,
    Outcome,
    count_read_bytes,
    fail_on_rank_1,
    measure_where_the_last_rank_fails,
    train_all_weights,
    train_sharded,
    train_with_little_memory,
)
from tiny_runs import build_sum_rows, save_model_folder, write_eval_files, write_rows
from tunesmith.core.events import CheckResult, Score
from tunesmith.core.ranks import SINGLE_PROCESS
from tunesmith.core.run_dir import read_events

pytestmark = pytest.mark.multi


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model_folder(tmp_path_factory.mktemp("shards") / "model"))


def train_on(world: int, *args: Any) -> list[Outcome]:
    return run_ranks(train_sharded, world, *args)


@pytest.mark.parametrize(
    ("world", "size", "kind", "how"),
    [
        (2, 2, "rows", {}),
        (3, 3, "accumulated", {"policy": "full"}),  # packs differ in number
        (4, 2, "pairs", {"policy": "selective"}),  # two groups
        (2, 2, "accumulated", {"method": "qlora"}),
    ],
)
def test_sharded_steps_are_those_of_complete_weights(
    folder: str, world: int, size: int, kind: str, how: dict[str, str]
) -> None:
    complete = train_on(world, folder, 1, kind, how)
    sharded = train_on(world, folder, size, kind, how)
    assert len(complete[0].losses) == STEPS
    for ours, theirs in zip(sharded, complete, strict=True):
        assert (ours.losses, ours.weights) == (theirs.losses, theirs.weights)
        assert ours.frozen_bytes <= (1 / size + 0.02) * theirs.frozen_bytes
    assert len({outcome.weights for outcome in sharded}) == 1, "replicas are equal in bits"


@pytest.mark.parametrize(
    ("world", "size", "how"),
    [
        (2, 2, {"kind": "rows", "policy": "selective"}),
        (3, 3, {"kind": "accumulated", "policy": "full"}),  # packs differ in number
        (4, 2, {"kind": "rows", "policy": "none"}),  # two groups
    ],
)
def test_ranks_that_train_all_weights_together_make_the_steps_of_one(
    folder: str, world: int, size: int, how: dict[str, str]
) -> None:
    alone = train_all_weights(SINGLE_PROCESS, folder, 1, how)
    assert len(alone.losses) == FULL_STEPS
    for rank, ours in enumerate(run_ranks(train_all_weights, world, folder, size, how)):
        np.testing.assert_allclose(ours.losses, alone.losses, rtol=1e-6)
        if rank < size:
            np.testing.assert_allclose(ours.weights, alone.weights, rtol=0, atol=1e-5)
        assert ours.state_bytes <= (1 / size + 0.02) * alone.state_bytes
        assert ours.update_ratios == pytest.approx(alone.update_ratios, rel=1e-3)


def test_ranks_that_train_all_weights_repeat_a_step_for_which_one_has_no_memory(
    folder: str,
) -> None:
    complete, sharded = (
        run_ranks(train_all_weights, 2, folder, size, None, False)[0] for size in (1, 2)
    )
    np.testing.assert_allclose(sharded.losses, complete.losses, rtol=1e-6)
    np.testing.assert_allclose(sharded.weights, complete.weights, rtol=0, atol=1e-5)


def test_a_rank_reads_its_rows_of_the_weights(folder: str) -> None:
    for complete, part, layer_bytes in run_ranks(count_read_bytes, 2, folder):
        assert complete - part >= 0.48 * layer_bytes


def test_a_rank_without_memory_lets_all_repeat_the_step(folder: str) -> None:
    complete = run_ranks(train_with_little_memory, 2, folder, 1)
    sharded = run_ranks(train_with_little_memory, 2, folder, 2)
    assert sharded == complete
    assert any("out of memory" in verdict for verdict in sharded[0][0])


def test_a_rank_that_fails_in_a_step_ends_the_others(folder: str) -> None:
    assert run_ranks(fail_on_rank_1, 2, folder) == ["failed: another rank cannot go on", "no disk"]


def test_of_ranks_that_fail_together_the_one_with_the_cause_is_heard(folder: str) -> None:
    for message in run_ranks(measure_where_the_last_rank_fails, 3, folder):
        assert message.startswith("rank 2 on ")
        assert message.endswith("no disk")


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def changes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return a recipe of four steps with an evaluation, probes and a checkpoint."""
    data = tmp_path_factory.mktemp("data")
    rows = write_rows(data / "rows.jsonl", build_sum_rows(1, 16))
    how = {"data": str(rows), "batch_size": 4, "save_steps": 2, "eval_steps": 2}
    return how | write_eval_files(data)


def read_scores(folder: Path) -> list[float]:
    return [event.value for event in read_events(folder / "run") if isinstance(event, Score)]


@pytest.fixture(scope="module")
def sharded(folder: str, changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of two ranks that hold the weights together."""
    run_folder = tmp_path_factory.mktemp("sharded") / "lora"
    outcomes = train_on_ranks(2, folder, run_folder, changes | {"shard": 2})
    assert outcomes == [(0, "step 4"), (0, "followed")]
    return run_folder


def test_a_sharded_run_is_that_of_complete_weights(
    folder: str, changes: dict[str, Any], sharded: Path, tmp_path: Path
) -> None:
    """Its proof, evaluations and probes, which rank 0 runs alone or with the others, too."""
    complete = tmp_path / "complete"
    train_on_ranks(2, folder, complete, changes)
    assert read_weights(sharded).tobytes() == read_weights(complete).tobytes()
    assert read_scores(sharded) == read_scores(complete)
    events = [event for event in read_events(sharded / "run") if isinstance(event, CheckResult)]
    (ranks,) = (event.evidence for event in events if event.kind == "ranks")
    assert "2 of them hold the weights once" in ranks


def test_a_sharded_run_in_4_bits_is_that_of_complete_weights(
    folder: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    folders = [tmp_path / "complete", tmp_path / "sharded"]
    short = {key: changes[key] for key in ("data", "batch_size")} | {"method": "qlora"}
    for run_folder, how in zip(folders, ({}, {"shard": 2}), strict=True):
        outcomes = train_on_ranks(2, folder, run_folder, short | how)
        assert outcomes == [(0, "step 4"), (0, "followed")]
    complete, sharded = (read_weights(run_folder) for run_folder in folders)
    assert sharded.tobytes() == complete.tobytes()


def test_a_checkpoint_of_sharded_ranks_goes_on_with_any_number(
    folder: str, changes: dict[str, Any], sharded: Path, tmp_path: Path
) -> None:
    first = tmp_path / "first"
    train_on_ranks(2, folder, first, changes | {"shard": 2}, saved=2)
    check_resuming(first, tmp_path, read_weights(sharded))


def test_a_run_that_trains_all_weights_together_is_that_of_one_process(
    folder: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Its proof, evaluations, probes, checkpoints and model, too; resumed on 1, 2 and 3 ranks."""
    how = changes | {"method": "full", "lora_r": "auto", "learning_rate": 1e-3}
    folders = {world: tmp_path / f"{world}-ranks" for world in (1, 2)}
    train_on_ranks(1, folder, folders[1], how)
    outcomes = train_on_ranks(2, folder, folders[2], how | {"shard": 2})
    assert outcomes == [(0, "step 4"), (0, "followed")]
    complete, sharded = (read_weights(run_folder) for run_folder in folders.values())
    np.testing.assert_allclose(sharded, complete, rtol=0, atol=1e-5)
    scores, expected = (read_scores(run_folder) for run_folder in (folders[2], folders[1]))
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    first = tmp_path / "first"
    train_on_ranks(2, folder, first, how | {"shard": 2}, saved=2)
    check_resuming(first, tmp_path, sharded)


def test_too_few_processes_are_refused_before_anything_is_loaded(
    folder: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    (outcome,) = train_on_ranks(1, folder, tmp_path / "alone", changes | {"shard": 2})
    assert outcome[0] == 2
    assert "2 processes hold the weights together, and there are 1" in outcome[1]
