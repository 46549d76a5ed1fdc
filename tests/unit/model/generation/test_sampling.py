"""Sampling a token: the right probabilities, the right nucleus, and the same token for the same
numbers."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from pairs import list_pairs
from tiny_models import make_tiny_network
from tunesmith.core.types import GenerationRequest
from tunesmith.model.generation.sampling import (
    TOP_P_CANDIDATES,
    compute_probabilities,
    filter_top_p,
    penalize_repetition,
    sample_from_uniform,
    sample_tokens,
)


def column(value: float, rows: int) -> torch.Tensor:
    return torch.full((rows,), value, dtype=torch.float64)


def test_each_token_is_drawn_as_often_as_it_is_likely() -> None:
    p = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64)
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = sample_from_uniform(p.expand(1000, -1), uniform)
    assert drawn.bincount(minlength=4).tolist() == [100, 0, 600, 300]


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-100])
def test_the_smallest_temperatures_take_the_most_likely_token(temperature: float) -> None:
    logits_BV = torch.tensor([[1.0, 3.0, -torch.inf, 2.0], [-90.0, -300.0, -80.0, -torch.inf]])
    requests = [GenerationRequest((0,), temperature=temperature)] * 2
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    assert sample_tokens(logits_BV, requests, generators) == [1, 2]


def test_temperature_sharpens_and_flattens() -> None:
    p = torch.tensor([[0.2, 0.8]], dtype=torch.float64)
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for temperature, share in (
        (0.5, 0.04 / 0.68),
        (1.0, 0.2),
        (2.0, 0.2**0.5 / (0.2**0.5 + 0.8**0.5)),
    ):
        request = GenerationRequest((0,), temperature=temperature)
        drawn = sample_from_uniform(
            compute_probabilities(p.log(), [request]).expand(1000, -1), uniform
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
    p = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    below_1 = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert sample_from_uniform(p, below_1).item() == 1


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
        requests = [GenerationRequest((0,), temperature=1.0, top_p=top_p)] * 400
        first, second = (
            sample_from_uniform(compute_probabilities(x, requests), uniform)
            for x in (logits, logits + noise)
        )
        assert int((first != second).sum()) <= 1


# ---------------------------------------------------------------- transformers' processors


@pytest.fixture(scope="module")
def network() -> PreTrainedModel:
    """Return a network that makes lists of processors; they do not depend on its weights."""
    return make_tiny_network()


def apply_processors(
    network: Any,
    logits_BV: torch.Tensor,
    context: torch.Tensor,
    request: GenerationRequest,
) -> torch.Tensor:
    """Return the probabilities of transformers: `generate` makes the list of its processors."""
    config = GenerationConfig(
        do_sample=True,
        temperature=request.temperature,
        top_k=request.top_k,
        top_p=request.top_p,
        min_p=request.min_p or None,
        repetition_penalty=request.repetition_penalty,
    )
    config._eos_token_tensor = None
    processors = network._get_logits_processor(config, input_ids_seq_length=context.shape[1])
    return torch.softmax(processors(context, logits_BV.clone()), dim=-1)


TEMPERATURES = (0.3, 1.0, 1.7)
TOP_KS = (0, 1, 7, 40, 10**6)
TOP_PS = (1.0, 0.9, 0.35, 1e-6)
MIN_PS = (0.0, 0.05, 0.5, 1.0)
PENALTIES = (1.0, 1.3, 0.7)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p", "penalty"),
    list_pairs(TEMPERATURES, TOP_KS, TOP_PS, MIN_PS, PENALTIES),
)
def test_the_distribution_is_that_of_transformers(
    network: PreTrainedModel,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(4, 97, generator=generator, dtype=torch.float64)
    context = torch.randint(97, (4, 12), generator=generator)
    request = GenerationRequest(
        (0,),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=penalty,
    )
    theirs = apply_processors(network, logits, context, request)
    ours = logits.clone()
    for row in range(4):
        penalize_repetition(ours[row], context[row].tolist(), penalty)
    ours = compute_probabilities(ours, [request] * 4)
    ours = ours / ours.sum(dim=-1, keepdim=True)
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_rows_of_a_batch_have_settings_of_their_own() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(4, 97, generator=generator, dtype=torch.float64)
    requests = [
        GenerationRequest((0,), temperature=0.5, top_k=3),
        GenerationRequest((0,), temperature=1.5, top_p=0.4),
        GenerationRequest((0,), temperature=1.0, min_p=0.3),
        GenerationRequest((0,), temperature=1.0, top_k=-1),
    ]
    together = compute_probabilities(logits, requests)
    for row, request in enumerate(requests):
        alone = compute_probabilities(logits[row : row + 1], [request])[0]
        alone, both = alone / alone.sum(), together[row] / together[row].sum()
        torch.testing.assert_close(both, alone)
    assert (together > 0).sum(dim=1).tolist()[0] == 3
    assert (together[3] > 0).all()
