"""Choose the next token of each row: greedy, or sampled with temperature, top-k, top-p and min-p.

In: logits [B, V], each row's request and generator. Out: token ids. The distribution is that of
transformers' logits processors, in their order. A sampled token depends on the row's logits and
seed alone, so an answer does not depend on the rest of the batch, up to rounding of the logits.
Legend: B rows, V vocabulary, K candidates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core.types import GenerationRequest, TokenLogprobs
from tunesmith.model.kernels import ops

# top-p usually needs fewer tokens than this; sorting the vocabulary is far slower
TOP_P_CANDIDATES = 256
MIN_TEMPERATURE = 1e-300  # logits divided by less are infinite


def sample_tokens(
    logits_BV: Tensor, requests: Sequence[GenerationRequest], generators: Sequence[torch.Generator]
) -> list[int]:
    """Return one token per row. Rows with temperature 0 take the most likely token; the others
    advance their generator by one number."""
    tokens = logits_BV.argmax(dim=-1)
    rows: list[int] = []
    uniforms: list[float] = []
    for row, (request, generator) in enumerate(zip(requests, generators, strict=True)):
        if request.temperature > 0:
            uniform = torch.rand((), generator=generator, dtype=torch.float64).item()
            rows.append(row)
            uniforms.append(uniform)
    if rows:
        p_BV = compute_probabilities(logits_BV[rows], [requests[row] for row in rows])
        tokens[rows] = sample_from_uniform(p_BV, p_BV.new_tensor(uniforms))
    return tokens.tolist()


def penalize_repetition(logits_V: Tensor, tokens: Sequence[int], penalty: float) -> None:
    """Make the tokens of a context less likely, in place (Keskar 2019): positive logits are divided
    by the penalty, negative ones are multiplied."""
    ids = torch.tensor(sorted(set(tokens)), device=logits_V.device)
    seen = logits_V[ids]
    logits_V[ids] = torch.where(seen < 0, seen * penalty, seen / penalty)


def penalize_answer_tokens(
    logits_V: Tensor, tokens: Sequence[int], request: GenerationRequest
) -> None:
    """Make the tokens of an answer less likely, in place: by presence_penalty once, and by
    frequency_penalty each time that they occur."""
    counts = Counter(tokens)
    ids = torch.tensor(list(counts), dtype=torch.int64, device=logits_V.device)
    times = torch.tensor(list(counts.values()), dtype=logits_V.dtype, device=logits_V.device)
    logits_V[ids] -= request.presence_penalty + request.frequency_penalty * times


def measure_logprobs(
    logits_BV: Tensor, tokens: Sequence[int], counts: Sequence[int]
) -> list[TokenLogprobs]:
    """Return the log-probabilities of a token per row, and of its `counts` most likely tokens."""
    vocab_size = logits_BV.shape[1]
    logprobs_BV = logits_BV.double().log_softmax(dim=-1)
    top_BK, top_ids_BK = logprobs_BV.topk(min(max(counts), vocab_size), dim=-1)
    results: list[TokenLogprobs] = []
    for row, (token, count) in enumerate(zip(tokens, counts, strict=True)):
        top = zip(top_ids_BK[row, :count].tolist(), top_BK[row, :count].tolist(), strict=True)
        results.append(TokenLogprobs(token, float(logprobs_BV[row, token]), tuple(top)))
    return results


def compute_probabilities(logits_BV: Tensor, requests: Sequence[GenerationRequest]) -> Tensor:
    """Return what the next token of each request is drawn from, up to a factor, in fp64: rounding
    of sums over a large vocabulary must not change a token."""

    def collect(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits_BV.device)

    temperature_B = collect([max(request.temperature, MIN_TEMPERATURE) for request in requests])
    p_BV = torch.softmax(logits_BV.double() / temperature_B[:, None], dim=-1)
    top_ks = [request.top_k for request in requests]
    if any(top_k > 0 for top_k in top_ks):
        p_BV = filter_top_k(p_BV, top_ks)
    top_p_B = collect([request.top_p for request in requests])
    if bool((top_p_B < 1).any()):
        p_BV = filter_top_p(p_BV, top_p_B)
    min_p_B = collect([request.min_p for request in requests])
    if bool((min_p_B > 0).any()):
        threshold_B1 = (min_p_B * p_BV.amax(dim=-1))[:, None]
        p_BV = torch.where(p_BV >= threshold_B1, p_BV, 0.0)
    return p_BV


def sample_from_uniform(p_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Return the first token whose cumulative probability, in vocabulary order, exceeds `uniform_B`
    in [0, 1)."""
    total_BV = ops.cumsum(p_BV)
    threshold_B1 = (uniform_B * total_BV[:, -1])[:, None]
    tokens_B1 = torch.searchsorted(total_BV, threshold_B1, right=True)
    return tokens_B1[:, 0].clamp_(max=p_BV.shape[1] - 1)


def filter_top_k(p_BV: Tensor, top_ks: Sequence[int]) -> Tensor:
    """Set all but the k most likely tokens of each row to 0, and scale the rest to a sum of 1. Ties
    with the last of them stay; 0 or less means all."""
    vocab_size = p_BV.shape[1]
    counts = [min(top_k, vocab_size) if top_k > 0 else vocab_size for top_k in top_ks]
    top_BK = p_BV.topk(max(counts)).values
    last_B1 = top_BK.gather(1, torch.tensor(counts, device=p_BV.device)[:, None] - 1)
    filtered_BV = torch.where(p_BV >= last_B1, p_BV, 0.0)
    return filtered_BV / filtered_BV.sum(dim=-1, keepdim=True)


def filter_top_p(p_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """Set all but the most likely tokens that together reach top-p to 0; ties with the last of them
    stay."""
    vocab_size = p_BV.shape[1]
    for count in (min(TOP_P_CANDIDATES, vocab_size), vocab_size):
        top_BK = p_BV.topk(count).values
        cumulative_BK = ops.cumsum(top_BK)
        if bool((cumulative_BK[:, -1] >= top_p_B).all()):
            break
    # a token is needed if those before it do not reach top-p
    needed_BK = F.pad(cumulative_BK[:, :-1], (1, 0)) < top_p_B[:, None]
    min_p_B = torch.where(needed_BK, top_BK, torch.inf).amin(dim=-1)
    return torch.where(p_BV >= min_p_B[:, None], p_BV, 0.0)
