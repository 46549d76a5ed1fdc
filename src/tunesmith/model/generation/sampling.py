"""From logits to the next token of each row: greedy, or drawn with temperature and top-p.

In: logits [B, V], each row's request and its own random numbers. Out: token ids. A drawn token
depends on the row's logits and seed alone, so an answer is the same whatever else is in the batch,
up to rounding of the logits. Legend: B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.types import GenerationRequest

# top-p usually ends among so many tokens; sorting the whole vocabulary costs far more
TOP_P_CANDIDATES = 256


def sample_tokens(
    logits_BV: Tensor, requests: Sequence[GenerationRequest], generators: Sequence[torch.Generator]
) -> list[int]:
    """One token a row. Rows at temperature 0 take the likeliest token; others advance their
    generator by one number."""
    chosen = logits_BV.argmax(dim=-1)
    rows = [index for index, request in enumerate(requests) if request.temperature > 0]
    if rows:
        uniform = [
            torch.rand((), generator=generators[index], dtype=torch.float64) for index in rows
        ]
        sampled = sample_from_uniform(
            logits_BV[rows].double(),
            torch.tensor([requests[index].temperature for index in rows], dtype=torch.float64).to(
                logits_BV.device
            ),
            torch.tensor([requests[index].top_p for index in rows], dtype=torch.float64).to(
                logits_BV.device
            ),
            torch.stack(uniform).to(logits_BV.device),
        )
        chosen[rows] = sampled
    return chosen.tolist()


def sample_from_uniform(
    logits_BV: Tensor, temperature_B: Tensor, top_p_B: Tensor, uniform_B: Tensor
) -> Tensor:
    """The token where the cumulative probability, in the order of the vocabulary, passes `uniform`
    in [0, 1). In fp64: sums over a large vocabulary must not move the choice."""
    p_BV = torch.softmax(logits_BV / temperature_B[:, None], dim=-1)
    if bool((top_p_B < 1).any()):
        p_BV = filter_top_p(p_BV, top_p_B)
    total_BV = p_BV.cumsum(dim=-1)
    chosen_B1 = torch.searchsorted(total_BV, (uniform_B * total_BV[:, -1])[:, None], right=True)
    return chosen_B1[:, 0].clamp_(max=p_BV.shape[1] - 1)


def filter_top_p(p_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """Zero for all but the likeliest tokens that together reach top-p; tokens as likely as the last
    one stay too."""
    for count in (min(TOP_P_CANDIDATES, p_BV.shape[1]), p_BV.shape[1]):
        top_BK = p_BV.topk(count).values
        cumulative_BK = top_BK.cumsum(dim=-1)
        if bool((cumulative_BK[:, -1] >= top_p_B).all()):
            break
    needed_BK = (
        F.pad(cumulative_BK[:, :-1], (1, 0)) < top_p_B[:, None]
    )  # those before it do not reach top-p
    min_p_B = torch.where(needed_BK, top_BK, torch.inf).amin(dim=-1)
    return torch.where(p_BV >= min_p_B[:, None], p_BV, 0.0)
