"""Whether two ranks have the same weights: see tests/multi for the ranks themselves."""

import pytest
import torch
from torch import Tensor, nn

from tunesmith.train import all_reduce


def test_every_bit_counts_and_so_does_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_reduce, "CHECKSUM_NUMEL", 4)

    def compute_digest(values: Tensor) -> str:
        return all_reduce.hash_weights({"weight": nn.Parameter(values)})

    weights = torch.arange(10.0)
    others = [weights.roll(1), weights.roll(4)]  # the second moves whole parts
    for index in range(len(weights)):
        changed = weights.clone()
        changed.view(torch.int32)[index] ^= 1
        others.append(changed)
    digests = {compute_digest(values) for values in (weights, *others)}
    assert len(digests) == 13
    assert compute_digest(weights.clone()) == compute_digest(weights)
