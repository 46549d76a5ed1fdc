"""Terms of the loss at their edges: pairs behind plain documents, certain answers, defaults."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from tiny_models import collate_documents, make_tiny_document, make_tiny_model
from tunesmith.core.types import Document, Pack
from tunesmith.data.collate import collate
from tunesmith.train.losses import (
    PREFERENCE_LOSSES,
    LossConfig,
    LossNormalizer,
    PreferenceLogps,
    compute_step_terms,
    sft_loss,
)


def make_pair(number: int) -> list[Document]:
    sides: list[Document] = []
    for side, seed in (("chosen", number), ("rejected", 100 + number)):
        tokens_L = make_tiny_document(12, seed).tokens_L
        weights_L = np.zeros(len(tokens_L), np.float32)
        weights_L[5:] = 1
        sides.append(Document(f"pairs:{number}", tokens_L, weights_L, side))  # type: ignore[arg-type]
    return sides


@pytest.mark.parametrize("name", ["dpo", "orpo", "simpo"])
def test_a_pair_has_its_loss_wherever_it_stands_in_a_pack(name: str) -> None:
    model = make_tiny_model(dtype=torch.float64)
    config = LossConfig(name, beta=0.3)
    pairs = [*make_pair(1), *make_pair(2)]
    counts = LossNormalizer.from_documents(pairs)
    expected = compute_step_terms(model, collate(Pack(tuple(pairs))), counts, config)
    plain = make_tiny_document(9, 7)
    for documents in ((plain, *pairs), (*pairs[:2], plain, *pairs[2:]), (plain, plain, *pairs)):
        terms = compute_step_terms(model, collate(Pack(documents)), counts, config)
        assert float(terms["preference"].sum.detach()) == pytest.approx(
            float(expected["preference"].sum.detach()), rel=1e-12
        )


@pytest.mark.parametrize("certain", [0.0, -1e-15])
def test_odds_of_a_certain_answer_are_finite(certain: float) -> None:
    ones = torch.ones(1, dtype=torch.float64)
    for chosen, rejected in ((certain, -2.0), (-2.0, certain)):
        chosen_logps = (ones * chosen).requires_grad_()
        pairs = PreferenceLogps(chosen_logps, ones * rejected, ones, ones, ones)
        loss = PREFERENCE_LOSSES["orpo"](pairs, LossConfig("orpo"))
        loss.sum().backward()
        assert loss.isfinite().all()
        assert chosen_logps.grad is not None
        assert chosen_logps.grad.isfinite().all()


def test_answers_are_trained_without_label_smoothing_by_default() -> None:
    model = make_tiny_model(dtype=torch.float64)
    batch = collate_documents([make_tiny_document(13, 1), make_tiny_document(8, 2)])
    plain = sft_loss(model, batch, 3.0)["answer"]
    assert torch.equal(plain.sum, sft_loss(model, batch, 3.0, 0.0)["answer"].sum)
    assert not torch.equal(plain.sum, sft_loss(model, batch, 3.0, 0.1)["answer"].sum)
    assert (plain.count, plain.coefficient) == (3.0, 1.0)
    assert LossConfig() == dataclasses.replace(LossConfig(), label_smoothing=0.0)


def test_smoothed_labels_mix_both_orders_of_a_pair() -> None:
    ones = torch.ones(2, dtype=torch.float64)
    margins = torch.tensor([0.7, -2.0], dtype=torch.float64)
    pairs = PreferenceLogps(margins, ones * 0, ones, ones, ones, reference_margin_P=ones * 0.5)
    logits = 0.3 * (margins - 0.5)
    right, wrong = torch.nn.functional.softplus(-logits), torch.nn.functional.softplus(logits)
    loss = PREFERENCE_LOSSES["dpo"](pairs, LossConfig("dpo", beta=0.3, label_smoothing=0.2))
    torch.testing.assert_close(loss, 0.8 * right + 0.2 * wrong, rtol=1e-12, atol=0)


def test_simpo_has_no_margin_by_default() -> None:
    ones = torch.ones(1, dtype=torch.float64)
    pairs = PreferenceLogps(ones * -1.0, ones * -1.0, ones, ones, ones)
    loss = PREFERENCE_LOSSES["simpo"](pairs, LossConfig("simpo"))
    assert float(loss) == pytest.approx(np.log(2))
