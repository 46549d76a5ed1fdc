"""The steps of several ranks are those of one process: losses, weights, and equal replicas."""

import numpy as np
import pytest
import torch

from rank_loops import KINDS, STEPS, Training, train_loop, train_loops
from rank_processes import run_ranks
from tunesmith.core.ranks import SINGLE_PROCESS

pytestmark = pytest.mark.multi


@pytest.fixture(scope="module")
def trainings() -> list[list[dict[str, Training]]]:
    """Return what each of two ranks has trained, and each of three, by kind."""
    return [run_ranks(train_loops, world, KINDS) for world in (2, 3)]


@pytest.mark.parametrize("kind", KINDS)
def test_one_two_and_three_ranks_make_the_same_steps(
    kind: str, trainings: list[list[dict[str, Training]]]
) -> None:
    torch.set_num_threads(1)
    losses, counts, weights = train_loop(SINGLE_PROCESS, kind)
    assert len(losses) == STEPS
    for by_rank in trainings:
        results = [by_kind[kind] for by_kind in by_rank]
        for rank_losses, rank_counts, rank_weights in results:
            assert rank_counts == counts
            np.testing.assert_allclose(rank_losses, losses, rtol=1e-6)
            np.testing.assert_allclose(rank_weights, weights, rtol=0, atol=1e-5)
            assert rank_weights.tobytes() == results[0][2].tobytes(), "replicas are equal in bits"
