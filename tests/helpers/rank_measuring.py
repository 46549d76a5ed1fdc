"""Measurements that several ranks share out, for processes of `rank_processes`."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rank_loops import make_documents
from tiny_models import END, make_tiny_model
from tunesmith.core.errors import InputError, TunesmithError
from tunesmith.core.ranks import END as END_COMMAND
from tunesmith.core.ranks import Ranks
from tunesmith.core.types import GenerationOutput, GenerationRequest
from tunesmith.evaluate import shared_items
from tunesmith.evaluate.kl_divergence import AdapterDisabled, KLResult, compute_kl
from tunesmith.evaluate.loglikelihood import compute_nll, pack_documents
from tunesmith.evaluate.shared_items import generate_shared
from tunesmith.model.adapters import get_trainable_parameters, scaled_adapter
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.train.follow_measuring import MeasuringFollower, send_weights

PACK_LENGTH = 40
Measured = tuple[
    list[tuple[int, float, int]], list[tuple[int, KLResult]], list[tuple[int, GenerationOutput]]
]


def make_trained_model() -> PackedCausalLM:
    model = make_tiny_model()
    generator = torch.Generator().manual_seed(3)
    for parameter in get_trainable_parameters(model.network).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 4
    model.network.eval()
    return model


def decode(tokens: Sequence[int]) -> str:
    return " ".join(map(str, tokens))


def make_requests() -> list[GenerationRequest]:
    requests: list[GenerationRequest] = []
    for number in range(8):
        prompt = tuple(range(5, 10 + 3 * number))
        requests.append(GenerationRequest(prompt, 12))
        requests.append(GenerationRequest(prompt, 12, temperature=1.0, top_p=0.9, seed=number))
    return requests


def measure(model: PackedCausalLM) -> Measured:
    documents = make_documents("rows", 1) + make_documents("rows", 2)
    nlls = sorted(compute_nll(model, documents, PACK_LENGTH, share=True))
    with scaled_adapter(model.network, 0.5):
        kls = sorted(compute_kl(model, documents, PACK_LENGTH, AdapterDisabled()))
    answers = generate_shared(model, make_requests(), decode=decode, end_ids=[END])
    return nlls, kls, sorted(answers, key=lambda answer: answer[0])


def count_packs(model: PackedCausalLM) -> int:
    """Return the packs that `measure` computes."""
    documents = make_documents("rows", 1) + make_documents("rows", 2)
    shared = pack_documents(model, documents, PACK_LENGTH, share=True)
    return len(shared) + len(pack_documents(model, documents, PACK_LENGTH))


def measure_trained(model: PackedCausalLM) -> list[tuple[int, float, int]]:
    """Measure once more, after the weights of this process have changed."""
    for parameter in get_trainable_parameters(model.network).values():
        parameter.data *= 1.5
    send_weights(model)
    return sorted(compute_nll(model, make_documents("rows", 1), PACK_LENGTH))


def follow_measuring(ranks: Ranks) -> None:
    follower = MeasuringFollower(ranks)
    follower.use_model(make_trained_model(), decode)
    while (command := ranks.receive())["do"] != END_COMMAND:
        arguments = {key: value for key, value in command.items() if key != "do"}
        follower.commands[command["do"]](**arguments)


def count_items(
    function: Callable[..., Any], name: str, computed: Counter[str]
) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        computed[name] += len(args[1])
        return function(*args, **kwargs)

    return counted


def measure_on_ranks(ranks: Ranks) -> tuple[Any, ...]:
    """Return what rank 0 measures with others that follow it, what each rank measures in lockstep,
    how many packs and requests this one computed for that, and what is said of other items."""
    first = None
    if ranks.is_main:
        model = make_trained_model()
        model.ranks = ranks
        first = (measure(model), measure_trained(model))
        ranks.send(END_COMMAND)
    else:
        follow_measuring(ranks)
    ranks.is_lockstep = True
    model = make_trained_model()
    model.ranks = ranks
    computed: Counter[str] = Counter()
    for name in ("compute_packs", "generate"):
        setattr(shared_items, name, count_items(getattr(shared_items, name), name, computed))
    lockstep = measure(model)
    counts = dict(computed)
    return first, lockstep, counts, measure_other_items(model), measure_with_a_problem(model)


def measure_other_items(model: PackedCausalLM) -> str:
    """Measure other documents on rank 1; return what this rank says."""
    documents = make_documents("rows", 1 + model.ranks.rank)
    try:
        list(compute_nll(model, documents, 20))
    except InputError as error:
        return error.message
    return ""


def measure_with_a_problem(model: PackedCausalLM) -> str:
    """Let rank 1 have a request that its model cannot answer; return what this rank says."""
    requests = make_requests()
    if model.ranks.rank == 1:
        requests = [GenerationRequest((), 12) for _ in requests]
    try:
        list(generate_shared(model, requests, decode=decode, end_ids=[END]))
    except TunesmithError as error:
        return str(error)
    return ""
