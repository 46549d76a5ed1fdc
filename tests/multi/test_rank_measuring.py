"""What several ranks measure is what one process measures, and each computes a part of it."""

import pytest
import torch

from rank_lab import run_ranks
from rank_measuring import (
    count_packs,
    make_requests,
    make_trained_model,
    measure,
    measure_on_ranks,
    measure_trained,
)

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
