"""Ranks that share each document make the steps of one process, and save a part of its bytes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rank_loops import (
    LONG_DOCUMENT,
    STEPS,
    Training,
    make_documents,
    measure_gradients,
    run_out_of_memory,
    train_loop,
    train_with_shared_documents,
)
from rank_processes import call_on_rank, run_processes, run_ranks
from rank_runs import train_on_ranks
from tiny_runs import build_sum_rows, save_model_folder, write_eval_files, write_rows
from tunesmith.core.events import CheckResult, TrainStep
from tunesmith.core.ranks import SINGLE_PROCESS
from tunesmith.core.run_dir import read_events
from tunesmith.data.packing import count_input_tokens

pytestmark = pytest.mark.multi


CASES = (
    ("long", "llama"),
    ("prefixes", "qwen2"),  # windows, and documents with common prefixes
    ("full", "gemma2"),  # soft caps
    ("prompt", "qwen3"),  # rank 0 predicts no target
    ("alone", "gpt_oss"),  # many packs, one with fewer tokens than ranks; sinks, experts
)


@pytest.fixture(scope="module")
def trainings() -> list[list[Training]]:
    """Return what each of two ranks that share documents has trained, by case."""
    return run_ranks(train_with_shared_documents, 2, CASES)


def assert_same_steps(results: list[Training], expected: Training) -> None:
    losses, counts, weights = expected
    assert len(losses) == STEPS
    for rank_losses, rank_counts, rank_weights in results:
        assert rank_counts == counts
        np.testing.assert_allclose(rank_losses, losses, rtol=1e-6)
        np.testing.assert_allclose(rank_weights, weights, rtol=0, atol=1e-5)
        assert rank_weights.tobytes() == results[0][2].tobytes(), "replicas are equal in bits"


def test_a_long_document_is_cut_between_the_ranks() -> None:
    lengths = [count_input_tokens(document) for document in make_documents("long", 1)]
    assert LONG_DOCUMENT in lengths
    assert sum(lengths) < 2 * LONG_DOCUMENT


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_two_ranks_that_share_documents_make_the_steps_of_one(
    kind: str, family: str, trainings: list[list[Training]]
) -> None:
    torch.set_num_threads(1)
    case = CASES.index((kind, family))
    expected = train_loop(SINGLE_PROCESS, kind, family=family)
    assert_same_steps([by_case[case] for by_case in trainings], expected)


def test_two_groups_of_two_ranks_make_the_steps_of_one() -> None:
    torch.set_num_threads(1)
    expected = train_loop(SINGLE_PROCESS, "long")
    assert_same_steps(run_ranks(train_loop, 4, "long", 2), expected)


def test_gradients_are_those_of_one_process_from_half_of_the_saved_bytes() -> None:
    torch.set_num_threads(1)
    policies = ("none", "full")
    alone = measure_gradients(SINGLE_PROCESS, 1, "qwen3", policies)
    for measured in run_ranks(measure_gradients, 2, 2, "qwen3", policies):
        for (rank_gradients, rank_bytes), (gradients, saved_bytes) in zip(
            measured, alone, strict=True
        ):
            assert rank_gradients.keys() == gradients.keys()
            for name, gradient in gradients.items():
                difference = np.linalg.norm(rank_gradients[name] - gradient)
                assert difference <= 2e-6 * np.linalg.norm(gradient), name
            assert rank_bytes < 0.55 * saved_bytes, "activations of half of the tokens"


def test_a_rank_without_memory_ends_all() -> None:
    """The others wait for it inside of a layer, so that the step cannot be repeated."""
    heard, failed = run_processes(call_on_rank, 2, run_out_of_memory)
    assert "out of memory" in failed
    assert "or raise context_parallel_size" in failed
    assert heard is None or heard.startswith("another rank has ended"), "its process has ended"


def test_a_run_whose_ranks_share_documents_is_that_of_one_process(tmp_path: Path) -> None:
    model = save_model_folder(tmp_path / "model", num_kv_heads=2)
    rows = write_rows(tmp_path / "rows.jsonl", build_sum_rows(1, 12))
    changes = {"data": str(rows), "batch_size": 4, **write_eval_files(tmp_path)}
    shared = changes | {"context_parallel_size": 2}
    ((code, message),) = train_on_ranks(1, model, tmp_path / "refused", shared)
    assert code == 2
    assert "context_parallel_size is 2, but the number of processes (1) is not a" in message
    assert [code for code, _ in train_on_ranks(3, model, tmp_path / "three", shared)] == [2, 2, 2]
    assert train_on_ranks(1, model, tmp_path / "one", changes) == [(0, "step 3")]
    assert train_on_ranks(2, model, tmp_path / "two", shared) == [(0, "step 3"), (0, "followed")]
    losses: list[list[float]] = []
    for name in ("one", "two"):
        events = read_events(tmp_path / name / "run")
        losses.append([event.loss for event in events if isinstance(event, TrainStep)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    checks = [event for event in events if isinstance(event, CheckResult)]
    evidence = {check.kind: check.evidence for check in checks}["ranks"]
    assert "2 of them share each document" in evidence
