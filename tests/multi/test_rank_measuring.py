"""What several ranks measure is what one process measures, and each computes a part of it."""

from pathlib import Path

import pytest
import torch

from rank_measuring import (
    count_packs,
    make_requests,
    make_trained_model,
    measure,
    measure_on_ranks,
    measure_trained,
)
from rank_processes import run_processes, run_ranks
from rank_runs import advise_on_rank
from tiny_runs import build_sum_rows, save_writer_folder, write_rows

pytestmark = pytest.mark.multi


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_items_out_and_measure_what_one_process_does(world: int) -> None:
    torch.set_num_threads(1)
    model = make_trained_model()
    expected = measure(model)
    expected_again = measure_trained(model)
    results = run_ranks(measure_on_ranks, world)
    _, kls, answers = expected
    assert min(result.kl for _, result in kls) > 1e-3, "the adapter changes the model"
    assert len({output.tokens for _, output in answers}) > 4
    assert results[0][0] == (expected, expected_again), "with ranks that follow, bit by bit"
    shares: list[dict[str, int]] = []
    for _, lockstep, counts, other_items, problem in results:
        assert lockstep == expected, "in lockstep, bit by bit"
        shares.append(counts)
        assert other_items.startswith("rank 1 measures other items than rank 0")
        assert problem.startswith("rank 1 on ")
        assert "empty" in problem
    assert min(counts["compute_packs"] for counts in shares) > 1, "each rank has packs"
    assert min(counts["generate"] for counts in shares) > 1, "each rank has requests"
    assert sum(counts["generate"] for counts in shares) == len(make_requests())
    num_packs = sum(counts["compute_packs"] for counts in shares)
    assert num_packs == count_packs(model), "none is computed twice"


def test_an_advice_is_measured_on_two_ranks_as_on_one(tmp_path: Path) -> None:
    model = save_writer_folder(tmp_path / "writer")
    changes = {
        "data": str(write_rows(tmp_path / "rows.jsonl", build_sum_rows(1, 30))),
        "eval_data": str(write_rows(tmp_path / "eval.jsonl", build_sum_rows(100, 22))),
        "metrics": ["exact_match"],
        "batch_size": 8,
    }
    args = (str(model), str(tmp_path), changes)
    (_, alone), (main, answers), (other, _) = [
        *run_processes(advise_on_rank, 1, *args),
        *run_processes(advise_on_rank, 2, *args),
    ]
    assert len(alone) >= 10
    assert answers == alone
    assert min(sum(main), sum(other)) >= 5, "each rank has a share"
