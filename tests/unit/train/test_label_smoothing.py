"""Label smoothing: that of torch and of transformers in SFT, cDPO with pairs."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from test_preference import compute_step, make_pairs  # type: ignore[import-not-found]
from transformers.trainer_pt_utils import LabelSmoother

from tiny_models import collate_documents, make_tiny_document, make_tiny_model
from tunesmith.model.lm_head import LMHead, compute_supervised_loss
from tunesmith.train.losses import (
    LossConfig,
    LossNormalizer,
    compute_step_terms,
)

EPSILON = 0.15


@pytest.mark.parametrize(("scale", "cap"), [(1.0, 0.0), (0.7, 3.0)])
def test_it_is_that_of_torch_with_its_gradients(scale: float, cap: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(300, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(19, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 19, (300,))
    weights = torch.rand(300, dtype=torch.float64)
    head = LMHead(weight, None, scale, cap)
    total, losses = compute_supervised_loss(hidden, head, targets, weights, EPSILON)
    logits = head.compute_logits(hidden)
    expected = F.cross_entropy(logits, targets, reduction="none", label_smoothing=EPSILON)
    torch.testing.assert_close(losses, expected.detach())
    ours = torch.autograd.grad(total, (hidden, weight))
    theirs = torch.autograd.grad((expected * weights).sum(), (hidden, weight))
    torch.testing.assert_close(ours, theirs)


def test_a_step_is_that_of_transformers() -> None:
    documents = [
        dataclasses.replace(document, weights_L=(document.weights_L > 0).astype("float32"))
        for document in map(make_tiny_document, (5, 17, 9))
    ]
    model = make_tiny_model(dtype=torch.float64)
    batch = collate_documents(documents)
    normalizer = LossNormalizer.from_documents(documents)
    terms = compute_step_terms(model, batch, normalizer, LossConfig(label_smoothing=EPSILON))
    loss = (terms["answer"].sum / terms["answer"].count).detach()
    logits = model.head.compute_logits(model.compute_hidden(batch))
    theirs = LabelSmoother(EPSILON)({"logits": logits}, batch.targets_S)
    assert float(loss) == pytest.approx(float(theirs.detach()), rel=1e-6)  # its sum is in fp32
    plain = compute_step_terms(model, batch, normalizer, LossConfig())
    assert not torch.equal(plain["answer"].sum, terms["answer"].sum)


def test_pairs_are_smoothed_in_a_step() -> None:
    """The formula is compared with TRL's in test_preference_trl.py."""
    model = make_tiny_model(dtype=torch.float64)
    plain, _ = compute_step(model, make_pairs(), LossConfig("dpo", beta=0.3))
    smoothed, _ = compute_step(
        model, make_pairs(), LossConfig("dpo", beta=0.3, label_smoothing=EPSILON)
    )
    assert plain != smoothed
