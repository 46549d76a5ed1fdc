"""What goes wrong on one rank of several reaches all of them in the same step."""

import numpy as np
import pytest

from rank_lab import run_ranks
from rank_loops import drift, train_with_little_memory, train_with_nan
from tunesmith.core.ranks import SINGLE_PROCESS

pytestmark = pytest.mark.multi


def test_a_loss_that_is_not_finite_on_one_rank_is_refused_by_all() -> None:
    verdicts, weights = train_with_nan(SINGLE_PROCESS)
    results = run_ranks(train_with_nan, 2)
    assert [verdict.split(",")[0] for verdict in verdicts] == ["3 non-finite: step 3: loss nan"]
    for rank_verdicts, rank_weights in results:
        assert rank_verdicts == verdicts
        assert rank_weights == results[0][1]
        difference = np.frombuffer(rank_weights, np.float32) - np.frombuffer(weights, np.float32)
        assert np.abs(difference).max() < 1e-5


def test_all_ranks_halve_their_packs_when_one_is_out_of_memory() -> None:
    results = run_ranks(train_with_little_memory, 2)
    messages = [verdicts[0] for verdicts, _ in results]
    assert messages[0].startswith("1 memory: rank 1 is out of memory; packs of ")
    assert messages[1].startswith("1 memory: out of memory: CUDA out of memory; packs of ")
    assert messages[0].partition(";")[2] == messages[1].partition(";")[2], "the same packs"
    assert results[0][1] == results[1][1]


def test_weights_that_differ_in_one_bit_are_noticed_by_all() -> None:
    for message in run_ranks(drift, 2):
        assert message.startswith("the weights of rank 1 differ from those of rank 0")
