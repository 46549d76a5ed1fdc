"""Bans: the term is the published formula, its gradient is bounded and exact, no split of a step
changes it."""

import dataclasses

import pytest
import torch

from plan_configs import make_config
from tiny_loop import collect_gradients, compute_step
from tiny_models import (
    collate_documents,
    compute_max_difference,
    make_tiny_document,
    make_tiny_documents,
    make_tiny_model,
)
from tunesmith.core.types import Document
from tunesmith.data.collate import collate
from tunesmith.data.packing import pack_step
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.train.loop import TrainingLoop
from tunesmith.train.losses import LossConfig, LossNormalizer, compute_step_terms, unlikelihood_loss

OBJECTIVE = LossConfig(ban_coefficient=0.7)


def make_documents() -> list[Document]:
    """Plain ones, and some with bad places only."""
    bad = [make_tiny_document(n, 5, first_target=n // 2) for n in (9, 14, 30)]
    return [
        *make_tiny_documents(),
        *(dataclasses.replace(document, side="banned") for document in bad),
    ]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_loss_and_gradients_are_the_formula(method: str) -> None:
    model = make_tiny_model("llama-tied", torch.float64, method=method)
    ours, gradients = compute_step(model, make_documents(), OBJECTIVE)
    sums, weights = {"": torch.zeros(()), "banned": torch.zeros(())}, {"": 0.0, "banned": 0.0}
    for document in make_documents():
        batch = collate_documents([dataclasses.replace(document, side="")])
        logits = model.head.compute_logits(model.compute_hidden(batch))
        p_S = torch.softmax(logits, -1).gather(1, batch.targets_S[:, None])[:, 0]
        losses_S = -torch.log(1 - p_S) if document.side else -torch.log(p_S)
        sums[document.side] = sums[document.side] + (losses_S * batch.weights_S).sum()
        weights[document.side] += float(batch.weights_S.sum())
    expected = (
        sums[""] / weights[""] + OBJECTIVE.ban_coefficient * sums["banned"] / weights["banned"]
    )
    expected.backward()
    theirs = collect_gradients(model)
    assert ours == pytest.approx(float(expected.detach()), rel=1e-12)
    assert compute_max_difference(gradients, theirs) < 1e-10


def test_no_split_of_a_step_changes_it() -> None:
    model = make_tiny_model("llama", torch.float64)
    (full, item), (parts, many) = (
        compute_step(model, make_documents(), OBJECTIVE),
        compute_step(model, make_documents(), OBJECTIVE, 31),
    )
    assert parts == pytest.approx(full, rel=1e-12)
    assert compute_max_difference(many, item) < 1e-10


def test_a_step_of_bad_answers_alone_is_trained_without_cross_entropy() -> None:
    bad = [document for document in make_documents() if document.side]
    counts = LossNormalizer.from_documents(bad)
    assert bool(counts)
    assert (counts.answer, counts.banned) == (0, sum(float(d.weights_L.sum()) for d in bad))
    (pack,) = pack_step(bad, 10**6)
    assert compute_step_terms(make_tiny_model(), collate(pack), counts, OBJECTIVE).keys() == {
        "banned"
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_exact_and_bounded_from_certain_to_impossible(dtype: torch.dtype) -> None:
    """In the logit of the token it is p: at most 1, for a certain token too."""
    margins = torch.tensor([-80, -20, -3, 0, 1, 3, 10, 14, 30, 200], dtype=dtype)
    logits = torch.stack([margins, torch.zeros_like(margins)], -1).requires_grad_()
    values = unlikelihood_loss(-torch.log_softmax(logits, -1)[:, 0])
    values.sum().backward()
    wide = margins.double()
    assert logits.grad is not None
    exact = torch.sigmoid(wide)[:7]
    assert torch.allclose(
        logits.grad[:7, 0].double(), exact, rtol=2e-3 if dtype == torch.float32 else 1e-9, atol=0
    )
    assert torch.allclose(
        values[:7].double(), torch.nn.functional.softplus(wide)[:7], rtol=1e-3, atol=1e-30
    )
    assert values.isfinite().all()
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().max() <= 2


def test_training_makes_bad_tokens_unlikely_and_keeps_the_good_ones() -> None:
    model, data = make_tiny_model("llama"), make_documents()
    data = [dataclasses.replace(d, weights_L=(d.weights_L > 0).astype("float32")) for d in data]

    def compute_nats(side: str) -> float:
        model.network.eval()
        custom = [d for d in data if d.side == side]
        return sum(nat for _, nat, _ in compute_nll(model, custom, 10**6))

    before = {side: compute_nats(side) for side in ("", "banned")}
    settings = make_config(
        pack_length=10**6, learning_rate=0.02, lr_scheduler_type="constant", ban_coefficient=1.0
    )
    list(TrainingLoop(model, lambda _: data, settings, steps=20, warmup_steps=1))
    assert compute_nats("") < before[""]
    assert compute_nats("banned") > before["banned"]
