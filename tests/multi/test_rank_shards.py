"""Weights that several ranks hold together: the bits, or the steps, of ranks with all weights."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rank_processes import call_on_rank, run_in_turn, run_processes
from rank_runs import (
    Job,
    check_resumed,
    read_weights,
    resume_copies,
    train_alone,
    train_jobs_on_ranks,
    train_on_ranks,
)
from rank_shards import (
    FULL_STEPS,
    STEPS,
    Case,
    FullOutcome,
    Outcome,
    count_read_bytes,
    fail_on_rank_1,
    measure_where_the_last_rank_fails,
    record_gathers,
    run_out_of_memory_together,
    save_wide_experts,
    train_all_weights,
    train_all_weights_with_little_memory,
    train_cases,
    train_sharded,
    train_with_little_memory,
)
from tiny_runs import build_sum_rows, save_model_folder, write_eval_files, write_rows
from tunesmith.core.events import CheckResult, Score
from tunesmith.core.ranks import SINGLE_PROCESS
from tunesmith.core.run_dir import read_events

pytestmark = pytest.mark.multi


ALL_EXPERTS = {"targets": ["attention", "experts"]}
ALONE = {"context_parallel_size": 1}
CASES = {
    "plain": Case(2, 2),
    "4 bits": Case(2, 2, "accumulated", how={"method": "qlora"}),
    "DoRA": Case(2, 2, how={"use_dora": True}),
    "experts, their adapters": Case(2, 2, base="gpt_oss", how=ALL_EXPERTS),
    "experts in 4 bits": Case(2, 2, base="qwen3_moe", how=ALL_EXPERTS | {"method": "qlora"}),
    "a document for both": Case(2, 2, how={"context_parallel_size": 2}),
    "packs that differ in number": Case(3, 3, "accumulated", how={"policy": "full"}),
    "DoRA in 4 bits": Case(3, 3, "accumulated", how={"use_dora": True, "method": "qlora"}),
    "experts": Case(3, 3, "accumulated", "qwen3_moe", {"policy": "full"}),
    "two groups": Case(4, 2, "pairs", how={"policy": "selective"}),
    "a document for each two of a group": Case(
        4, 4, "accumulated", how={"context_parallel_size": 2}
    ),
}
FULL = {"method": "full"}
TOGETHER = {"dp_shard_size": 2}
HOW = ("complete", "sharded")
FULL_CASES = {
    "full": Case(2, 2, how=FULL | {"policy": "selective"}),
    "full, a document for both": Case(2, 2, how=FULL | {"context_parallel_size": 2}),
    "full, packs that differ in number": Case(3, 3, "accumulated", how=FULL | {"policy": "full"}),
    "full, two groups": Case(4, 2, how=FULL),
}
# (ranks, function) of what else is done in the processes of the cases; what fails comes last
OTHERS = {
    "little memory": (2, train_with_little_memory),
    "full, little memory": (2, train_all_weights_with_little_memory),
    "reading": (2, count_read_bytes),
    "gathers": (2, record_gathers),
    "a rank fails": (2, fail_on_rank_1),
    "ranks fail together": (3, measure_where_the_last_rank_fails),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the folder of a base of each family."""
    parent = tmp_path_factory.mktemp("shards")
    saved = {"llama": str(save_model_folder(parent / "llama", num_kv_heads=2, num_layers=3))}
    for family in ("gpt_oss", "qwen3_moe"):
        saved[family] = str(parent / family)
        save_wide_experts(family, parent / family)
    return saved


@pytest.fixture(scope="module")
def folder(folders: dict[str, str]) -> str:
    return folders["llama"]


@pytest.fixture(scope="module")
def outcomes(folders: dict[str, str]) -> dict[str, list[Any]]:
    """Return what each rank has trained, by case, and what it returned of the others."""
    cases = CASES | FULL_CASES
    by_name: dict[str, list[Any]] = {}
    for world in (2, 3, 4):
        names = [name for name, case in cases.items() if case.world == world]
        others = [name for name, (size, _) in OTHERS.items() if size == world]
        works: list[tuple[Any, ...]] = [(train_cases, folders, [cases[name] for name in names])]
        works += [(OTHERS[name][1], folders["llama"]) for name in others]
        of_cases, *of_others = run_in_turn(works, world)
        for name, by_rank in zip(names, zip(*of_cases, strict=True), strict=True):
            by_name[name] = list(by_rank)
        by_name |= dict(zip(others, of_others, strict=True))
    return by_name


@pytest.mark.parametrize("name", CASES)
def test_sharded_steps_are_those_of_complete_weights_and_of_one_process(
    folders: dict[str, str], name: str, outcomes: dict[str, list[tuple[Outcome, Outcome]]]
) -> None:
    torch.set_num_threads(1)
    case = CASES[name]
    alone = train_sharded(SINGLE_PROCESS, folders[case.base], 1, case.kind, case.how | ALONE)
    assert len(alone.losses) == STEPS
    weights = np.frombuffer(alone.weights, np.float32)
    for complete, sharded in outcomes[name]:
        assert (sharded.losses, sharded.weights) == (complete.losses, complete.weights)
        assert sharded.weights == outcomes[name][0][1].weights, "replicas are equal in bits"
        assert sharded.frozen_bytes <= (1 / case.size + 0.02) * complete.frozen_bytes
        np.testing.assert_allclose(sharded.losses, alone.losses, rtol=1e-6)
        ours = np.frombuffer(sharded.weights, np.float32)
        np.testing.assert_allclose(ours, weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FULL_CASES)
def test_ranks_that_train_all_weights_together_make_the_steps_of_one(
    folder: str, name: str, outcomes: dict[str, list[FullOutcome]]
) -> None:
    torch.set_num_threads(1)
    case = FULL_CASES[name]
    alone = train_all_weights(SINGLE_PROCESS, folder, 1, case.kind, **(case.how | ALONE))
    assert len(alone.losses) == FULL_STEPS
    for rank, ours in enumerate(outcomes[name]):
        np.testing.assert_allclose(ours.losses, alone.losses, rtol=1e-6)
        if rank < case.size:
            np.testing.assert_allclose(ours.weights, alone.weights, rtol=0, atol=1e-5)
        assert ours.state_bytes <= (1 / case.size + 0.02) * alone.state_bytes
        assert ours.update_ratios == pytest.approx(alone.update_ratios, rel=1e-3)


def test_ranks_that_train_all_weights_repeat_a_step_for_which_one_has_no_memory(
    outcomes: dict[str, list[list[FullOutcome]]],
) -> None:
    complete, sharded = outcomes["full, little memory"][0]
    np.testing.assert_allclose(sharded.losses, complete.losses, rtol=1e-6)
    np.testing.assert_allclose(sharded.weights, complete.weights, rtol=0, atol=1e-5)


def test_a_rank_reads_its_rows_of_the_weights(outcomes: dict[str, list[Any]]) -> None:
    for complete, part, layer_bytes in outcomes["reading"]:
        assert complete - part >= 0.48 * layer_bytes


def test_a_layer_is_gathered_while_the_one_before_computes(
    outcomes: dict[str, list[list[str]]],
) -> None:
    """In the backward pass, the last layer is there, and the one before it finds nobody ahead."""
    forward = ["ahead", "layer 0", "ahead", "layer 1", "layer 2"]
    assert outcomes["gathers"] == [[*forward, "ahead"]] * 2


def test_a_rank_without_memory_lets_all_repeat_the_step(outcomes: dict[str, list[Any]]) -> None:
    for complete, sharded in outcomes["little memory"]:
        assert sharded == complete
        assert any("out of memory" in verdict for verdict in sharded[0])


def test_a_rank_without_memory_for_a_shared_document_ends_all(folder: str) -> None:
    """The others wait for it inside of a layer, where no round reaches them."""
    heard, failed = run_processes(call_on_rank, 2, run_out_of_memory_together, folder)
    assert "out of memory" in failed
    assert heard is None or heard.startswith("another rank has ended"), "its process has ended"


def test_a_rank_that_fails_in_a_step_ends_the_others(outcomes: dict[str, list[str]]) -> None:
    assert outcomes["a rank fails"] == ["failed: another rank cannot go on", "no disk"]


def test_of_ranks_that_fail_together_the_one_with_the_cause_is_heard(
    outcomes: dict[str, list[str]],
) -> None:
    for message in outcomes["ranks fail together"]:
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


RESUMED = ("sharded", "sharded experts", "full")


@pytest.fixture(scope="module")
def jobs(
    folders: dict[str, str], changes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Job]:
    """Return runs of two ranks that have ended, by name. Their processes start once."""
    parent = tmp_path_factory.mktemp("jobs")
    full = changes | {"method": "full", "lora_r": "auto", "learning_rate": 1e-3}
    short = {key: changes[key] for key in ("data", "batch_size", "save_steps")}
    recipes = {
        "complete": changes,
        "sharded": changes | TOGETHER,
        "sharing documents": changes | TOGETHER | {"context_parallel_size": 2},
        "complete in 4 bits": short | {"method": "qlora"},
        "sharded in 4 bits": short | {"method": "qlora"} | TOGETHER,
        "complete experts": short | {"use_dora": True},
        "sharded experts": short | {"use_dora": True} | TOGETHER,
        "full": full | TOGETHER,
    }
    jobs: dict[str, Job] = {}
    for name, recipe in recipes.items():
        base = folders["qwen3_moe" if "experts" in name else "llama"]
        jobs[name] = Job(base, parent / name, recipe, has_copy=name in RESUMED)
    train_jobs_on_ranks(jobs)
    return jobs


@pytest.fixture(scope="module")
def resumed(
    jobs: dict[str, Job], tmp_path_factory: pytest.TempPathFactory
) -> dict[Path, dict[int, Path]]:
    """Return the folders of runs that went on from their first checkpoint, by number of ranks."""
    copies = [jobs[name].copy for name in RESUMED]
    return resume_copies(copies, tmp_path_factory.mktemp("resumed"))


def read_scores(folder: Path) -> list[float]:
    return [event.value for event in read_events(folder / "run") if isinstance(event, Score)]


def test_a_sharded_run_is_that_of_complete_weights(jobs: dict[str, Job]) -> None:
    """Its proof, evaluations and probes, which rank 0 runs alone or with the others, too."""
    complete = jobs["complete"].folder
    sharded = jobs["sharded"].folder
    assert read_weights(sharded).tobytes() == read_weights(complete).tobytes()
    assert read_scores(sharded) == read_scores(complete)
    events = [event for event in read_events(sharded / "run") if isinstance(event, CheckResult)]
    (ranks,) = (event.evidence for event in events if event.kind == "ranks")
    assert "2 of them hold the weights once" in ranks


def test_a_sharded_run_whose_ranks_share_documents_is_that_of_complete_weights(
    jobs: dict[str, Job],
) -> None:
    ours = read_weights(jobs["sharing documents"].folder)
    np.testing.assert_allclose(ours, read_weights(jobs["complete"].folder), rtol=0, atol=1e-5)


@pytest.mark.parametrize("what", ["in 4 bits", "experts"])
def test_sharded_runs_of_other_kinds_are_those_of_complete_weights(
    jobs: dict[str, Job], what: str
) -> None:
    """Experts with DoRA on attention."""
    complete, sharded = (read_weights(jobs[f"{how} {what}"].folder) for how in HOW)
    assert sharded.tobytes() == complete.tobytes()


@pytest.mark.parametrize("name", ["sharded", "sharded experts"])
def test_a_checkpoint_of_sharded_ranks_goes_on_with_any_number(
    jobs: dict[str, Job], resumed: dict[Path, dict[int, Path]], name: str
) -> None:
    check_resumed(resumed[jobs[name].copy], read_weights(jobs[name].folder))


def test_a_run_that_trains_all_weights_together_is_that_of_one_process(
    jobs: dict[str, Job], resumed: dict[Path, dict[int, Path]], tmp_path: Path
) -> None:
    """Its proof, evaluations, probes, checkpoints and model, too; resumed on 1, 2 and 3 ranks."""
    job = jobs["full"]
    recipe = {key: value for key, value in job.changes.items() if key != "dp_shard_size"}
    alone = train_alone(dataclasses.replace(job, changes=recipe), tmp_path / "alone")
    sharded = read_weights(job.folder)
    np.testing.assert_allclose(sharded, read_weights(alone), rtol=0, atol=1e-5)
    expected = read_scores(alone)
    np.testing.assert_allclose(read_scores(job.folder), expected, rtol=1e-4, atol=1e-5)
    check_resumed(resumed[job.copy], sharded)


def test_too_few_processes_are_refused_before_anything_is_loaded(
    folder: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    (outcome,) = train_on_ranks(1, folder, tmp_path / "alone", changes | {"dp_shard_size": 2})
    assert outcome[0] == 2
    assert "dp_shard_size is 2, but the number of processes (1) is not a" in outcome[1]
