"""Choose the next token of each row: greedy, or sampled with temperature and top-p.

In: logits [B, V], each row's request and generator. Out: token ids. A sampled token depends on the
row's logits and seed alone, so an answer does not depend on the rest of the batch, up to rounding
of the logits. Legend: B rows, V vocabulary, K candidates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.types import GenerationRequest

# top-p usually needs fewer tokens than this; sorting the vocabulary is far slower
TOP_P_CANDIDATES = 256


def sample_tokens(
    logits_BV: Tensor, requests: Sequence[GenerationRequest], generators: Sequence[torch.Generator]
) -> list[int]:
    """Return one token per row. Rows with temperature 0 take the most likely token; the others
    advance their generator by one number."""
    tokens = logits_BV.argmax(dim=-1)
    rows: list[int] = []
    parameters: list[tuple[float, float, float]] = []
    for row, (request, generator) in enumerate(zip(requests, generators, strict=True)):
        if request.temperature > 0:
            uniform = torch.rand((), generator=generator, dtype=torch.float64).item()
            rows.append(row)
            parameters.append((request.temperature, request.top_p, uniform))
    if rows:
        parameters_3B = torch.tensor(parameters, dtype=torch.float64).t().to(logits_BV.device)
        temperature_B, top_p_B, uniform_B = parameters_3B
        tokens[rows] = sample_from_uniform(
            logits_BV[rows].double(), temperature_B, top_p_B, uniform_B
        )
    return tokens.tolist()


def sample_from_uniform(
    logits_BV: Tensor, temperature_B: Tensor, top_p_B: Tensor, uniform_B: Tensor
) -> Tensor:
    """Return the first token whose cumulative probability, in vocabulary order, exceeds `uniform_B`
    in [0, 1). In fp64, since rounding of sums over a large vocabulary must not change the token."""
    p_BV = torch.softmax(logits_BV / temperature_B[:, None], dim=-1)
    if bool((top_p_B < 1).any()):
        p_BV = filter_top_p(p_BV, top_p_B)
    total_BV = p_BV.cumsum(dim=-1)
    threshold_B1 = (uniform_B * total_BV[:, -1])[:, None]
    tokens_B1 = torch.searchsorted(total_BV, threshold_B1, right=True)
    return tokens_B1[:, 0].clamp_(max=p_BV.shape[1] - 1)


def filter_top_p(p_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """Set all but the most likely tokens that together reach top-p to 0; ties with the last of them
    stay."""
    vocab_size = p_BV.shape[1]
    for count in (min(TOP_P_CANDIDATES, vocab_size), vocab_size):
        top_BK = p_BV.topk(count).values
        cumulative_BK = top_BK.cumsum(dim=-1)
        if bool((cumulative_BK[:, -1] >= top_p_B).all()):
            break
    # a token is needed if those before it do not reach top-p
    needed_BK = F.pad(cumulative_BK[:, :-1], (1, 0)) < top_p_B[:, None]
    min_p_B = torch.where(needed_BK, top_BK, torch.inf).amin(dim=-1)
    return torch.where(p_BV >= min_p_B[:, None], p_BV, 0.0)
