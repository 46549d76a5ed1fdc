"""KTO: the paper's loss, the same for every packing; its KL term sees mismatched answers."""

import dataclasses

import numpy as np
import pytest
import torch
from test_preference import compute_token_logps, make_pair  # type: ignore[import-not-found]
from torch import Tensor

from plan_configs import make_config
from tiny_loop import compute_step
from tiny_models import compute_max_difference, make_tiny_model
from tunesmith.core.types import Document
from tunesmith.data.sampler import build_mismatched
from tunesmith.model.adapters import scaled_adapter
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.train.kto import measure_kl, split_mismatched
from tunesmith.train.loop import TrainingLoop
from tunesmith.train.losses import LossConfig

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


def compute_ratio(model: PackedCausalLM, document: Document) -> Tensor:
    logp = compute_token_logps(model, document).sum()
    with scaled_adapter(model.network, 0), torch.no_grad():
        reference = compute_token_logps(model, document).sum()
    return logp - reference


def test_mismatched_documents_have_an_answer_to_another_prompt() -> None:
    documents = make_labelled()
    mismatched = build_mismatched(documents, 10**6)
    for index, (document, other) in enumerate(zip(documents, mismatched, strict=True)):
        before = documents[index - 2]  # two answers to each prompt
        prompt = document.tokens_L[document.weights_L == 0]
        answer = before.tokens_L[before.weights_L > 0]
        assert other.tokens_L.tolist() == [*prompt.tolist(), *answer.tolist()]
        assert np.flatnonzero(other.weights_L)[0] == len(prompt)
        assert (other.id, other.side) == (document.id, "mismatched")
    assert max(map(len, build_mismatched(documents, 18))) == 18
    trained, measured = split_mismatched([*documents, *mismatched])
    assert (list(trained), list(measured)) == (documents, mismatched)


def make_answers(*names: str) -> list[Document]:
    """Documents named by their prompt and label: A+ answers the prompt A."""
    documents: list[Document] = []
    for number, name in enumerate(names):
        prompt_L = np.full(3, ord(name[0]), np.int32)
        answer_L = np.array([100 + number, 100 + number], np.int32)
        documents.append(
            Document(
                f"rows:{number}",
                np.concatenate([prompt_L, answer_L]),
                np.array([0, 0, 0, 1, 1], np.float32),
                side="desirable" if name[1] == "+" else "undesirable",
            )
        )
    return documents


def list_mismatched(*names: str) -> list[str]:
    """Return the prompt of each mismatched document with the name of its answer."""
    documents = build_mismatched(make_answers(*names), 10**6)
    return [f"{chr(d.tokens_L[0])} {names[d.tokens_L[-1] - 100]}" for d in documents]


def test_no_prompt_is_measured_with_an_answer_of_its_pair() -> None:
    pairs = ("A+", "A-", "B+", "B-", "C+", "C-")
    assert list_mismatched(*pairs) == ["A C+", "A C-", "B A+", "B A-", "C B+", "C B-"]
    # rows of a single answer: the row before, and a prompt that comes again later in the step
    assert list_mismatched("A+", "B+", "C-") == ["A C-", "B A+", "C B+"]
    assert list_mismatched("A+", "B+", "A-", "C-") == ["A B+", "A C-", "B A+", "C A-"]
    assert list_mismatched("A+", "B+", "A-") == ["A B+", "B A+"]


def test_every_answer_is_measured_once_where_prompts_allow_it() -> None:
    names = ("A+", "B+", "B-", "C-", "A-", "D+", "B+", "E-")
    measured = list_mismatched(*names)
    assert all(pair[0] != pair[2] for pair in measured)
    assert sorted(pair[2:] for pair in measured) == sorted(names)


@pytest.mark.parametrize("names", [(), ("A+",), ("A+", "A-"), ("A+", "A-", "A+")])
def test_a_step_with_a_single_prompt_measures_nothing(names: tuple[str, ...]) -> None:
    documents = make_answers(*names)
    assert build_mismatched(documents, 10**6) == []
    assert split_mismatched(documents) == (documents, ())


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
