"""Measure on several ranks: each computes its share of the items, and all get every result.

    for index, result in score_packs(model, packs, scorer, num_documents): ...
    for index, output in generate_shared(model, requests, ...): ...

In a run rank 0 measures alone, and tells the others what to compute (train/follow_measuring.py);
`eval` on several ranks runs the same code on each (lockstep), where they compare what they compute.
The most expensive item goes first, to the rank with the least to do. Packs are those of one
process, so scores have the same bits for any number of ranks. Answers are computed in other
batches: greedy ones can differ only where two tokens are as likely up to rounding, and sampled ones
have the seeds of their requests.

In: a model, whose `ranks` hold the same weights. Out: every result, on each rank. Left out: which
items there are (items.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from tunesmith.core.errors import GateError, InputError, MachineError
from tunesmith.core.hardware import release_memory
from tunesmith.core.json_io import dump_json, parse_as
from tunesmith.core.progress_log import log_progress
from tunesmith.core.ranks import Ranks
from tunesmith.core.types import (
    Batch,
    Document,
    GenerationOutput,
    GenerationRequest,
    Json,
    Pack,
)
from tunesmith.data.collate import collate
from tunesmith.data.packing import assign_items, count_computed_tokens
from tunesmith.model.adapters import get_adapter_scales
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.generation.engine import DecodeFn, generate
from tunesmith.model.generation.grammar import Grammar
from tunesmith.model.machine_errors import OutOfMemory, machine_errors
from tunesmith.model.weight_shards import join_ranks
from tunesmith.session.identity import hash_source

T = TypeVar("T")
S = TypeVar("S", bound="tuple[Any, ...]")
# What rank 0 tells the others to compute.
SCORE = "score"
GENERATE = "generate"


class IndexedPack(NamedTuple):
    """A pack, and the index of each of its documents."""

    pack: Pack
    indices: Sequence[int]


@dataclass(frozen=True)
class Scorer(Generic[S]):
    """A computation on packs that every rank knows by its name: a row of numbers per document, of
    which the second is a count."""

    name: str
    result_type: Callable[..., S]
    compute: Callable[[PackedCausalLM, Batch, Sequence[int]], Sequence[S]]
    num_values: int


def compute_packs(
    model: PackedCausalLM,
    packs: Sequence[IndexedPack],
    compute: Callable[[PackedCausalLM, Batch, Sequence[int]], Sequence[T]],
) -> Iterator[tuple[int, T]]:
    """Yield (document index, result) pack by pack, on this rank; a pack that does not fit in memory
    is halved."""
    pending = list(reversed(packs))
    while pending:
        pack, indices = pending.pop()
        try:
            with machine_errors():
                results = compute(model, collate(pack, model.device), indices)
        except OutOfMemory:
            if len(pack.documents) == 1:
                raise
        else:
            yield from zip(indices, results, strict=True)
            continue
        # outside the except block, where the traceback no longer holds the tensors
        release_memory()
        half = len(pack.documents) // 2
        # The first document of the second half has nothing before it to share.
        second_shared = pack.prefix_lengths and (0, *pack.prefix_lengths[half + 1 :])
        pending += [
            IndexedPack(Pack(pack.documents[half:], second_shared), indices[half:]),
            IndexedPack(Pack(pack.documents[:half], pack.prefix_lengths[:half]), indices[:half]),
        ]


# ---------------------------------------------------------------- scores


def score_packs(
    model: PackedCausalLM, packs: Sequence[IndexedPack], scorer: Scorer[S], num_documents: int
) -> Iterator[tuple[int, S]]:
    """Yield (document index, result): those of this rank as they are computed, then the others."""
    ranks = model.ranks
    if ranks.world == 1 or (len(packs) < 2 and not ranks.is_lockstep):
        yield from compute_packs(model, packs, scorer.compute)
        return
    ranks.send(
        SCORE,
        scorer=scorer.name,
        packs=[_pack_to_json(pack) for pack in packs],
        num_documents=num_documents,
        scales=get_adapter_scales(model.network),
    )
    yield from score_share(model, packs, scorer, num_documents)


def score_share(
    model: PackedCausalLM, packs: Sequence[IndexedPack], scorer: Scorer[S], num_documents: int
) -> Iterator[tuple[int, S]]:
    """Do the part of this rank in what rank 0 has sent, and yield all results."""
    ranks = model.ranks
    costs = [float(count_computed_tokens(pack.pack)) for pack in packs]
    assigned, remaining = _assign(packs, costs, ranks)
    values_NC = torch.zeros(num_documents, scorer.num_values, dtype=torch.float64)
    problem = None
    try:
        with join_ranks(model.shards):
            for index, result in compute_packs(model, assigned, scorer.compute):
                values_NC[index] = torch.tensor(result, dtype=torch.float64)
                yield index, result
    except (InputError, MachineError, GateError) as error:
        problem = error
    items = [_pack_to_json(pack) for pack in packs] if ranks.is_lockstep else []
    _gather_results(ranks, scorer.name, items, None, problem)
    ranks.sum_(values_NC)  # each row has been written by one rank, so no bit changes
    for pack in remaining:
        for index in pack.indices:
            first, count, *rest = values_NC[index].tolist()
            yield index, scorer.result_type(first, int(count), *rest)


def _pack_to_json(indexed: IndexedPack) -> Json:
    documents: list[Json] = []
    for document in indexed.pack.documents:
        documents.append(
            {
                "id": document.id,
                "tokens": document.tokens_L.tolist(),
                "weights": document.weights_L.tolist(),
                "side": document.side,
            }
        )
    prefix_lengths = list(indexed.pack.prefix_lengths)
    return {
        "documents": documents,
        "prefix_lengths": prefix_lengths,
        "indices": list(indexed.indices),
    }


def parse_pack(value: Json) -> IndexedPack:
    """Return the pack that rank 0 has sent."""
    documents: list[Document] = []
    for document in value["documents"]:
        tokens_L = np.array(document["tokens"], dtype=np.int32)
        weights_L = np.array(document["weights"], dtype=np.float32)
        documents.append(Document(document["id"], tokens_L, weights_L, document["side"]))
    pack = Pack(tuple(documents), tuple(value["prefix_lengths"]))
    return IndexedPack(pack, value["indices"])


# ---------------------------------------------------------------- answers


def generate_shared(
    model: PackedCausalLM,
    requests: Sequence[GenerationRequest],
    *,
    decode: DecodeFn,
    end_ids: Collection[int],
    grammar: Grammar | None = None,
) -> Iterator[tuple[int, GenerationOutput]]:
    """Yield (index of the request, its output), as `generate` does: those of this rank as they
    finish, then the others. A single request, and those of a grammar, are not shared out."""
    ranks = model.ranks
    is_single = len(requests) < 2 and not ranks.is_lockstep
    if ranks.world == 1 or is_single or grammar is not None:
        yield from generate(model, requests, decode=decode, end_ids=end_ids, grammar=grammar)
        return
    scales = get_adapter_scales(model.network)
    ranks.send(GENERATE, requests=list(requests), end_ids=sorted(end_ids), scales=scales)
    yield from generate_share(model, requests, decode=decode, end_ids=end_ids)


def generate_all(
    model: PackedCausalLM,
    requests: Sequence[GenerationRequest],
    *,
    decode: DecodeFn,
    end_ids: Collection[int],
) -> list[GenerationOutput]:
    """Return the output of each request, in their order, and log the progress."""
    answers = generate_shared(model, requests, decode=decode, end_ids=end_ids)
    outputs = dict(log_progress(answers, len(requests), "answers"))
    return [outputs[index] for index in range(len(requests))]


def generate_share(
    model: PackedCausalLM,
    requests: Sequence[GenerationRequest],
    *,
    decode: DecodeFn,
    end_ids: Collection[int],
) -> Iterator[tuple[int, GenerationOutput]]:
    """Do the part of this rank in what rank 0 has sent, and yield all answers."""
    ranks = model.ranks
    costs = [float(len(request.tokens) + request.max_new_tokens) for request in requests]
    assigned, _ = _assign(range(len(requests)), costs, ranks)
    assigned_requests = [requests[index] for index in assigned]
    outputs: dict[int, GenerationOutput] = {}
    problem = None
    try:
        with join_ranks(model.shards):
            answers = generate(model, assigned_requests, decode=decode, end_ids=end_ids)
            for number, output in answers if assigned else ():
                outputs[assigned[number]] = output
                yield assigned[number], output
    except (InputError, MachineError, GateError) as error:
        problem = error
    answers_by_rank = _gather_results(ranks, GENERATE, list(requests), outputs, problem)
    for rank, answers in enumerate(answers_by_rank):
        if rank != ranks.rank:
            for index, output in answers.items():
                yield int(index), parse_as(GenerationOutput, output)


# ---------------------------------------------------------------- the ranks of a computation


def _assign(items: Sequence[T], costs: Sequence[float], ranks: Ranks) -> tuple[list[T], list[T]]:
    """Return the items of this rank, and those of the others."""
    priced = [(cost, [index]) for index, cost in enumerate(costs)]
    assigned = set(assign_items(priced, ranks.world)[ranks.rank])
    remaining = [item for index, item in enumerate(items) if index not in assigned]
    return [items[index] for index in sorted(assigned)], remaining


def _gather_results(
    ranks: Ranks,
    name: str,
    items: Sequence[Any],
    value: Any,
    problem: InputError | MachineError | GateError | None,
) -> list[Any]:
    """Return the values of all ranks; raise the first problem of one. In lockstep, raise InputError
    for ranks with other items or versions; `items` are read there only."""
    if not ranks.is_lockstep:
        return ranks.gather_answers(value, problem)
    content = dump_json([name, items, hash_source(), torch.__version__])
    digest = hashlib.sha256(content).hexdigest()
    return ranks.gather_in_lockstep(digest, value, problem)
