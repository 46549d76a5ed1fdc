"""Pairs: each loss is the published formula, no split of a step changes it, and the reference is
the model before."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plan_configs import make_config
from tiny_loop import collect_gradients, compute_step
from tiny_models import (
    VOCABULARY,
    collate_documents,
    compute_max_difference,
    make_tiny_document,
    make_tiny_model,
)
from tunesmith.core.errors import MachineError
from tunesmith.core.events import TrainStep
from tunesmith.core.types import Document
from tunesmith.data.collate import collate
from tunesmith.data.packing import group_units, pack_step
from tunesmith.model.adapters import get_trainable_parameters, scaled_adapter
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.lm_head import compute_target_losses
from tunesmith.train.loop import TrainingLoop
from tunesmith.train.losses import PREFERENCE_LOSSES, LossConfig

OBJECTIVES = {
    "dpo": LossConfig("dpo", beta=0.3, nll_coefficient=0.2),
    "orpo": LossConfig("orpo", beta=0.4, nll_coefficient=1.0),
    "simpo": LossConfig("simpo", beta=2.0, gamma=0.7),
}


def make_pair(
    number: int, prompt: int, chosen: int, rejected: int, weight: float = 1.0
) -> tuple[Document, Document]:
    """Two answers of these lengths to one prompt; every answer token is a target of the same
    weight."""
    start = make_tiny_document(prompt, number).tokens_L[:-1]
    sides: list[Document] = []
    for side, length in (("chosen", chosen), ("rejected", rejected)):
        tokens_L = np.concatenate([start, make_tiny_document(length, 50 + number).tokens_L[1:]])
        if side == "rejected":
            tokens_L[prompt:-1] = (tokens_L[prompt:-1] + 7) % (VOCABULARY - 3) + 3
        weights_L = np.zeros(len(tokens_L), np.float32)
        weights_L[prompt:] = weight
        sides.append(Document(f"pairs:{number}", tokens_L, weights_L, side))  # type: ignore[arg-type]
    return sides[0], sides[1]


def make_pairs() -> list[Document]:
    """Unequal lengths, a row of another weight, an answer of one token."""
    shapes = ((1, 9, 6, 11), (2, 17, 1, 4), (3, 5, 13, 2))
    return [
        side for shape in shapes for side in make_pair(*shape, weight=2.5 if shape[0] == 3 else 1.0)
    ]


def compute_token_logps(model: PackedCausalLM, document: Document) -> Tensor:
    """The document alone, its head in plain torch."""
    batch = collate_documents([dataclasses.replace(document, side="")])
    logits = model.head.compute_logits(model.compute_hidden(batch))
    return torch.log_softmax(logits, -1).gather(1, batch.targets_S[:, None])[:, 0]


def compute_reference_loss(
    model: PackedCausalLM, documents: Sequence[Document], o: LossConfig
) -> Tensor:
    """The papers' formulas, pair by pair, weighted means over pairs and over chosen tokens."""
    total = nll = torch.zeros((), dtype=torch.float64)
    weight = tokens = 0.0
    for chosen, rejected in zip(documents[::2], documents[1::2], strict=True):
        w = float(chosen.weights_L.max())
        c, r = compute_token_logps(model, chosen), compute_token_logps(model, rejected)
        with scaled_adapter(model.network, 0), torch.no_grad():
            before = (
                compute_token_logps(model, chosen).sum()
                - compute_token_logps(model, rejected).sum()
            )
        if o.loss == "dpo":
            loss = -F.logsigmoid(o.beta * (c.sum() - r.sum() - before))
        elif o.loss == "orpo":
            odds = [torch.exp(x.mean()) / (1 - torch.exp(x.mean())) for x in (c, r)]
            loss = -o.beta * F.logsigmoid(torch.log(odds[0] / odds[1]))
        else:
            loss = -F.logsigmoid(o.beta * (c.mean() - r.mean()) - o.gamma)
        total, weight = total + w * loss, weight + w
        nll, tokens = nll - w * c.sum(), tokens + w * len(c)
    return total / weight + o.nll_coefficient * nll / tokens


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_loss_and_gradients_are_the_formula(name: str, method: str) -> None:
    """Full fine-tuning trains the head too; DPO then needs the kept log-probabilities, here 0 for
    both sides."""
    if (name, method) == ("dpo", "full"):
        pytest.skip("without an adapter the reference is kept: see below")
    model, objective = make_tiny_model("llama-tied", torch.float64, method=method), OBJECTIVES[name]
    ours, gradients = compute_step(model, make_pairs(), objective)
    expected = compute_reference_loss(model, make_pairs(), objective)
    expected.backward()
    theirs = collect_gradients(model)
    assert ours == pytest.approx(float(expected.detach()), rel=1e-12)
    assert compute_max_difference(gradients, theirs) < 1e-10


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_no_split_into_packs_changes_a_step(name: str) -> None:
    """Plain documents and pairs in any packs, fp64."""
    documents = [
        make_tiny_document(13, 1),
        *make_pairs()[:4],
        make_tiny_document(8, 2),
        *make_pairs()[4:],
    ]
    model = make_tiny_model(dtype=torch.float64)
    together, gradients = compute_step(model, documents, OBJECTIVES[name])
    for pack_length in (1, 30, 45):
        loss, split = compute_step(model, documents, OBJECTIVES[name], pack_length)
        assert loss == pytest.approx(together, rel=1e-12)
        assert compute_max_difference(split, gradients) < 1e-10


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_sharing_what_pairs_begin_with_changes_nothing(name: str) -> None:
    """Long prompts, two rows with the same one, answers that begin alike: each pair whole in any
    pack."""
    documents = [
        *make_pair(1, 40, 30, 25),
        *make_pair(2, 33, 9, 20, weight=2),
        *make_pair(1, 40, 22, 31),
        make_tiny_document(30, 4),
    ]
    documents[3] = dataclasses.replace(documents[3], tokens_L=documents[3].tokens_L.copy())
    documents[3].tokens_L[:37] = documents[2].tokens_L[:37]  # four tokens of the answer too
    model = make_tiny_model(dtype=torch.float64)
    plain, gradients = compute_step(model, documents, OBJECTIVES[name])
    for pack_length in (1, 150, 10**6):
        packs = pack_step(documents, pack_length, should_share=True)
        assert sorted(d.side for pack in packs for d in pack.documents) == sorted(
            d.side for d in documents
        )
        loss, shared = compute_step(model, documents, OBJECTIVES[name], pack_length, share=True)
        assert loss == pytest.approx(plain, rel=1e-12)
        assert compute_max_difference(shared, gradients) < 1e-9
    assert any(sum(pack.prefix_lengths) >= 37 for pack in packs)


def test_dpo_begins_at_log_two_and_kept_references_change_nothing() -> None:
    """An adapter that does nothing yet is its own reference, whatever shares its pack."""
    fresh = make_tiny_model(dtype=torch.float64)
    for name, parameter in get_trainable_parameters(fresh.network).items():
        if name.endswith("lora_B"):
            parameter.data.zero_()
    assert compute_step(fresh, make_pairs(), LossConfig("dpo", beta=0.3))[0] == pytest.approx(
        np.log(2), rel=1e-12
    )
    model = make_tiny_model(dtype=torch.float64)
    with scaled_adapter(model.network, 0), torch.no_grad():
        remaining = [
            dataclasses.replace(d, reference_logp=float(compute_token_logps(model, d).sum()))
            for d in make_pairs()
        ]
    switched, item = compute_step(model, make_pairs(), OBJECTIVES["dpo"])
    cached, other = compute_step(model, remaining, OBJECTIVES["dpo"])
    assert cached == pytest.approx(switched, rel=1e-12)
    assert compute_max_difference(item, other) < 1e-10
    shifted = [
        dataclasses.replace(d, reference_logp=(d.reference_logp or 0) + (d.side == "chosen"))
        for d in remaining
    ]
    assert compute_step(model, shifted, OBJECTIVES["dpo"])[0] > cached


def test_pairs_see_nothing_of_each_other() -> None:
    """Other tokens in one pair leave the other pairs' losses bitwise as they were."""
    model, documents = make_tiny_model(), make_pairs()
    changed = [
        dataclasses.replace(d, tokens_L=(d.tokens_L + 1) % VOCABULARY) for d in documents[:2]
    ] + documents[2:]
    losses = []
    for those in (documents, changed):
        (pack,) = pack_step(those, 10**6)
        batch = collate(pack)
        custom = torch.tensor([name != "pairs:1" for name in batch.ids])[batch.document_S]
        losses.append(
            compute_target_losses(model.compute_hidden(batch), model.head, batch.targets_S)[custom]
        )
    assert torch.equal(*losses)


def test_a_pair_is_never_split() -> None:
    documents = [make_tiny_document(13, 1), *make_pairs(), make_tiny_document(8, 2)]
    assert [len(unit) for unit in group_units(documents)] == [1, 2, 2, 2, 1]
    for pack_length in (1, 20, 40, 10**6):
        packs = pack_step(documents, pack_length)
        assert sorted(len(d) for pack in packs for d in pack.documents) == sorted(
            map(len, documents)
        )
        for pack in packs:
            sides = [d.side for d in pack.documents if d.side]
            assert sides == ["chosen", "rejected"] * (len(sides) // 2)


SETTINGS = make_config(
    pack_length=10**6, learning_rate=1e-2, lr_scheduler_type="constant", loss="dpo", beta=0.5
)


def test_training_on_pairs_tells_them_apart() -> None:
    events = list(TrainingLoop(make_tiny_model(), lambda _: make_pairs(), SETTINGS, steps=12))
    losses = [event.loss for event in events if isinstance(event, TrainStep)]
    assert losses[-1] < 0.3 < losses[0]
    assert events[0].supervised_tokens == sum(np.count_nonzero(d.weights_L) for d in make_pairs())  # type: ignore[union-attr]


def test_a_lack_of_memory_halves_packs_but_no_pair() -> None:
    training = TrainingLoop(make_tiny_model(), lambda _: make_pairs(), SETTINGS, steps=3)
    verdict = training._shrink_packs(make_pairs(), "no memory")
    assert verdict.kind == "memory"
    training.pack_length = 1
    with pytest.raises(MachineError, match="each pack holds one pair, the longest has 37 tokens"):
        training._shrink_packs(make_pairs(), "no memory")
