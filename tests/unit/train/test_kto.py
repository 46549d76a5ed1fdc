"""KTO: the paper's loss, the same for every packing; its KL term sees mismatched answers."""

import dataclasses

import numpy as np
import pytest
import torch
from test_preference import compute_token_logps, make_pair  # type: ignore[import-not-found]
from torch import Tensor

from plan_configs import make_config
from tiny_models import compute_max_difference, make_tiny_model
from tunesmith.core.types import Document
from tunesmith.data.collate import collate
from tunesmith.data.packing import pack_step
from tunesmith.data.sampler import build_mismatched
from tunesmith.model.adapters import get_trainable_parameters, scaled_adapter
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.train.kto import measure_kl, split_mismatched
from tunesmith.train.loop import TrainingLoop
from tunesmith.train.losses import LossConfig, LossNormalizer, compute_step_terms

OBJECTIVE = LossConfig("kto", beta=0.3, desirable_weight=1.3, undesirable_weight=0.7)


def make_labelled() -> list[Document]:
    """Prompts and answers of unequal lengths; three are desirable, two are not."""
    documents: list[Document] = []
    for number, lengths in enumerate(((9, 6, 4), (17, 3, 8), (5, 13, 2)), 1):
        prompt, chosen, rejected = lengths
        first, second = make_pair(number, prompt, chosen, rejected)
        documents.append(dataclasses.replace(first, id=f"a:{number}", side="desirable"))
        documents.append(dataclasses.replace(second, id=f"b:{number}", side="undesirable"))
    return documents[:5]


def compute_step(
    model: PackedCausalLM, documents: list[Document], objective: LossConfig, pack_length: int
) -> tuple[float, dict[str, Tensor]]:
    total = 0.0
    normalizer = LossNormalizer.from_documents(documents)
    for pack in pack_step(documents, pack_length):
        terms = compute_step_terms(model, collate(pack), normalizer, objective).values()
        loss = torch.stack([t.coefficient * t.sum / t.count for t in terms]).sum()
        loss.backward()
        total += float(loss.detach())
    parameters = get_trainable_parameters(model.network)
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    model.network.zero_grad(set_to_none=True)
    return total, gradients


def compute_ratio(model: PackedCausalLM, document: Document) -> Tensor:
    logp = compute_token_logps(model, document).sum()
    with scaled_adapter(model.network, 0), torch.no_grad():
        reference = compute_token_logps(model, document).sum()
    return logp - reference


def test_mismatched_documents_have_the_answer_before() -> None:
    documents = make_labelled()
    mismatched = build_mismatched(documents, 10**6)
    for index, (document, other) in enumerate(zip(documents, mismatched, strict=True)):
        before = documents[index - 1]
        prompt = document.tokens_L[document.weights_L == 0]
        answer = before.tokens_L[before.weights_L > 0]
        assert other.tokens_L.tolist() == [*prompt.tolist(), *answer.tolist()]
        assert np.flatnonzero(other.weights_L)[0] == len(prompt)
        assert (other.id, other.side) == (document.id, "mismatched")
    assert max(map(len, build_mismatched(documents, 18))) == 18
    trained, measured = split_mismatched([*documents, *mismatched])
    assert (list(trained), list(measured)) == (documents, mismatched)


def test_the_loss_is_that_of_the_paper_for_every_packing() -> None:
    model = make_tiny_model(dtype=torch.float64)
    documents = make_labelled()
    mismatched = build_mismatched(documents, 10**6)
    ratios = [float(compute_ratio(model, document).detach()) for document in mismatched]
    expected_kl = max(0.0, sum(ratios) / len(ratios))
    kl = measure_kl(model, mismatched, 20)
    assert kl == pytest.approx(expected_kl, abs=1e-9)
    objective = dataclasses.replace(OBJECTIVE, kl=1.7)
    expected = torch.zeros((), dtype=torch.float64)
    for document in documents:
        ratio = compute_ratio(model, document)
        if document.side == "desirable":
            expected = expected + 1.3 * (1 - torch.sigmoid(0.3 * (ratio - 1.7)))
        else:
            expected = expected + 0.7 * (1 - torch.sigmoid(0.3 * (1.7 - ratio)))
    expected = expected / len(documents)
    loss, gradients = compute_step(model, documents, objective, 10**6)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-8)
    other_loss, other_gradients = compute_step(model, documents, objective, 20)
    assert other_loss == pytest.approx(loss, rel=1e-9)
    assert compute_max_difference(gradients, other_gradients) < 1e-6


def test_kl_is_at_least_zero_and_zero_without_documents() -> None:
    model = make_tiny_model(dtype=torch.float64)
    mismatched = build_mismatched(make_labelled(), 10**6)
    assert measure_kl(model, (), 100) == 0
    above = [dataclasses.replace(document, reference_logp=1e3) for document in mismatched]
    below = [dataclasses.replace(document, reference_logp=-1e3) for document in mismatched]
    assert measure_kl(model, above, 100) == 0
    assert measure_kl(model, below, 100) > 100


def test_a_step_measures_its_own_kl() -> None:
    model = make_tiny_model(dtype=torch.float64)
    documents = make_labelled()
    stored = [
        dataclasses.replace(document, reference_logp=-200.0)
        for document in build_mismatched(documents, 10**6)
    ]
    config = make_config(loss="kto", beta=0.3, stage="preference", max_grad_norm=0)
    losses = []
    for mismatched in ([], stored):
        loop = TrainingLoop(model, lambda _, m=mismatched: [*documents, *m], config, steps=1)
        (event, _) = list(loop)
        losses.append(event.loss)
        assert event.tokens == sum(map(len, documents))
    assert losses[0] != losses[1]


def test_the_nll_of_desirable_answers_can_be_added() -> None:
    model = make_tiny_model(dtype=torch.float64)
    documents = make_labelled()
    plain, _ = compute_step(model, documents, OBJECTIVE, 10**6)
    objective = dataclasses.replace(OBJECTIVE, nll_coefficient=0.5)
    with_nll, _ = compute_step(model, documents, objective, 10**6)
    desirable = [document for document in documents if document.side == "desirable"]
    nlls = [-compute_token_logps(model, document).detach() for document in desirable]
    assert with_nll - plain == pytest.approx(0.5 * float(torch.cat(nlls).mean()), rel=1e-9)
