"""Sampling a token: the right probabilities, the right nucleus, and the same token for the same
numbers."""

import torch

from tunesmith.core.types import GenerationRequest
from tunesmith.model.generation.sampling import (
    TOP_P_CANDIDATES,
    filter_top_p,
    sample_from_uniform,
    sample_tokens,
)


def column(value: float, rows: int) -> torch.Tensor:
    return torch.full((rows,), value, dtype=torch.float64)


def test_each_token_is_drawn_as_often_as_it_is_likely() -> None:
    p = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64)
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = sample_from_uniform(
        p.log().expand(1000, -1), column(1.0, 1000), column(1.0, 1000), uniform
    )
    assert drawn.bincount(minlength=4).tolist() == [100, 0, 600, 300]


def test_temperature_sharpens_and_flattens() -> None:
    p = torch.tensor([[0.2, 0.8]], dtype=torch.float64)
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for temperature, share in (
        (0.5, 0.04 / 0.68),
        (1.0, 0.2),
        (2.0, 0.2**0.5 / (0.2**0.5 + 0.8**0.5)),
    ):
        drawn = sample_from_uniform(
            p.log().expand(1000, -1), column(temperature, 1000), column(1.0, 1000), uniform
        )
        assert abs(float((drawn == 0).double().mean()) - share) < 2e-3


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    p = torch.tensor([[0.1, 0.2, 0.4, 0.3]], dtype=torch.float64)
    for top_p, expected_tokens in (
        (0.05, [2]),
        (0.4, [2]),
        (0.41, [2, 3]),
        (0.75, [1, 2, 3]),
        (0.95, [0, 1, 2, 3]),
    ):
        assert filter_top_p(p, column(top_p, 1))[0].nonzero().flatten().tolist() == expected_tokens


def test_a_wide_nucleus_uses_the_full_vocabulary() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(2, 8 * TOP_P_CANDIDATES, generator=generator, dtype=torch.float64)
    p /= p.sum(dim=-1, keepdim=True)
    in_nucleus = filter_top_p(p, torch.tensor([0.01, 0.9], dtype=torch.float64)) > 0
    for row, top_p in ((0, 0.01), (1, 0.9)):
        inside, likely = p[row][in_nucleus[row]], p[row].sort(descending=True).values
        assert inside.sum() >= top_p > inside.sum() - inside.min()
        assert torch.equal(inside.sort(descending=True).values, likely[: len(inside)])


def test_equal_tokens_stay_in_the_nucleus_together() -> None:
    p = torch.tensor([[0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    assert int((filter_top_p(p, column(0.3, 1)) > 0).sum()) == 4


def test_the_largest_random_number_draws_a_possible_token() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]], dtype=torch.float64)
    below_1 = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert sample_from_uniform(logits, column(1.0, 1), column(1.0, 1), below_1).item() == 1


def test_greedy_rows_take_no_random_number() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    before = [generator.get_state() for generator in generators]
    requests = [
        GenerationRequest((1,)),
        GenerationRequest((1,), temperature=1.0),
        GenerationRequest((1,)),
    ]
    chosen = sample_tokens(logits, requests, generators)
    assert [chosen[0], chosen[2]] == [int(logits[0].argmax()), int(logits[2].argmax())]
    changed = [not torch.equal(g.get_state(), b) for g, b in zip(generators, before, strict=True)]
    assert changed == [False, True, False]


def test_a_small_error_in_the_logits_seldom_changes_the_token() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 5000, generator=generator, dtype=torch.float64)
    noise = 1e-6 * torch.randn(400, 5000, generator=generator, dtype=torch.float64)
    uniform = torch.rand(400, generator=generator, dtype=torch.float64)
    for top_p in (1.0, 0.9):
        first, second = (
            sample_from_uniform(x, column(1.0, 400), column(top_p, 400), uniform)
            for x in (logits, logits + noise)
        )
        assert int((first != second).sum()) <= 1
