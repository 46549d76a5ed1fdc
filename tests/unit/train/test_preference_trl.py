"""The same numbers as TRL: its trainer's DPO loss and gradients on the same ids, its ORPO and SimPO
functions."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_preference import compute_step, make_pairs  # type: ignore[import-not-found]
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_runs import save_model_folder
from tunesmith.core.types import Document
from tunesmith.model.adapters import METHODS, get_trainable_parameters
from tunesmith.model.causal_lm import load_network, wrap_model
from tunesmith.train.losses import (
    LossConfig,
    PreferenceLogps,
    dpo_loss,
    orpo_loss,
    simpo_loss,
)

pytestmark = [pytest.mark.promise, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def pad_documents(documents: list[Document]) -> dict[str, Tensor]:
    """As TRL's collator lays them: all chosen sides, then all rejected ones."""
    ordered = documents[::2] + documents[1::2]
    longest = max(map(len, ordered))
    batch = {
        name: torch.zeros(len(ordered), longest, dtype=torch.int64)
        for name in ("input_ids", "attention_mask")
    }
    batch["completion_mask"] = torch.zeros(len(ordered), longest, dtype=torch.int64)
    for i, document in enumerate(ordered):
        batch["input_ids"][i, : len(document)] = torch.from_numpy(document.tokens_L)
        batch["attention_mask"][i, : len(document)] = 1
        batch["completion_mask"][i, : len(document)] = torch.from_numpy(document.weights_L > 0)
    return batch


def make_equal_weights() -> list[Document]:
    return [
        Document(d.id, d.tokens_L, (d.weights_L > 0).astype("float32"), d.side)
        for d in make_pairs()
    ]


@pytest.mark.parametrize("nll", [0.0, 0.2])
def test_dpo_is_that_of_its_trainer(nll: float, tmp_path: Path) -> None:
    """Full fine-tuning away from the reference, weights in fp64: loss and the gradient of every
    weight."""
    from trl import DPOConfig, DPOTrainer

    from datasets import Dataset

    documents, folder = make_equal_weights(), save_model_folder(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder, pad_token="<|text|>")
    rows = Dataset.from_list([{"prompt": "one", "chosen": " two", "rejected": " three"}] * 2)
    kinds: Any = (
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, nll]}
        if nll
        else {"loss_type": ["sigmoid"]}
    )
    config = DPOConfig(
        str(tmp_path / "out"),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        beta=0.3,
        **kinds,
    )
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    trainer = DPOTrainer(model=stock, args=config, train_dataset=rows, processing_class=tokenizer)
    network = load_network(folder, torch.float64)
    METHODS["full"](network, {})
    with torch.no_grad():
        for custom, theirs in zip(network.parameters(), trainer.model.parameters(), strict=True):
            theirs.add_(
                0.02 * torch.sin(torch.arange(theirs.numel(), dtype=torch.float64)).view_as(theirs)
            )
            custom.copy_(theirs)
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        batch = pad_documents(documents)
        logits = (
            reference(batch["input_ids"], attention_mask=batch["attention_mask"])
            .logits[:, :-1]
            .log_softmax(-1)
        )
        logp = (
            logits.gather(2, batch["input_ids"][:, 1:, None])[..., 0]
            * batch["completion_mask"][:, 1:]
        )
        remaining = logp.sum(1).view(2, -1).t().flatten().tolist()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    model = wrap_model(network, torch.float64)
    custom = [
        Document(d.id, d.tokens_L, d.weights_L, d.side, r)
        for d, r in zip(documents, remaining, strict=True)
    ]
    ours, gradients = compute_step(model, custom, LossConfig("dpo", beta=0.3, nll_coefficient=nll))
    assert ours == pytest.approx(float(loss.detach()), rel=1e-6)  # TRL takes the softmax in fp32
    theirs = {name: p.grad for name, p in trainer.model.named_parameters()}
    assert gradients.keys() == get_trainable_parameters(network).keys()
    for (name, gradient), other in zip(gradients.items(), theirs.values(), strict=True):
        assert other is not None
        assert float((gradient - other).norm() / other.norm()) < 1e-5, name


def make_logps() -> PreferenceLogps:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (-20 * torch.rand(8, generator=generator) for _ in range(2))
    tokens = [torch.randint(1, 9, (8,), generator=generator).float() for _ in range(2)]
    return PreferenceLogps(
        chosen.requires_grad_(), rejected.requires_grad_(), *tokens, torch.ones(8)
    )


def assert_equal_loss(ours: Tensor, theirs: Tensor, pairs: PreferenceLogps) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for leaf in (pairs.chosen_logps_P, pairs.rejected_logps_P):
        gradients = [
            torch.autograd.grad(loss.sum(), leaf, retain_graph=True)[0] for loss in (ours, theirs)
        ]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_orpo_is_its_odds_ratio_loss() -> None:
    """The odds-ratio part; its plain loss covers the prompt in TRL, and the answer alone here."""
    from trl.experimental.orpo import ORPOTrainer

    actual = make_logps()
    means = (
        actual.chosen_logps_P / actual.chosen_tokens_P,
        actual.rejected_logps_P / actual.rejected_tokens_P,
    )
    stand_in: Any = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    theirs = -ORPOTrainer.odds_ratio_loss(stand_in, *means)[0]
    ours = orpo_loss(actual, LossConfig("orpo", beta=0.3))
    assert ours.shape == theirs.shape == (8,)
    assert_equal_loss(ours, theirs, actual)


def test_simpo_is_its_loss() -> None:
    from trl.experimental.cpo import CPOTrainer

    actual = make_logps()
    means = (
        actual.chosen_logps_P / actual.chosen_tokens_P,
        actual.rejected_logps_P / actual.rejected_tokens_P,
    )
    settings = {
        "beta": 2.0,
        "simpo_gamma": 0.6,
        "alpha": 0.0,
        "label_smoothing": 0.0,
        "loss_type": "simpo",
    }
    stand_in: Any = SimpleNamespace(**settings, accelerator=SimpleNamespace(device="cpu"))
    theirs = CPOTrainer.cpo_loss(stand_in, *means)[0]
    ours = simpo_loss(actual, LossConfig("simpo", beta=2.0, gamma=0.6))
    assert ours.shape == theirs.shape == (8,)
    assert_equal_loss(ours, theirs, actual)


@pytest.mark.parametrize("kind", ["sigmoid", "simpo"])
def test_label_smoothing_is_its_conservative_loss(kind: str) -> None:
    """TRL's DPOTrainer ignores `label_smoothing` in its sigmoid loss; CPOTrainer has the formula,
    with a reference margin of 0."""
    from trl.experimental.cpo import CPOTrainer

    generator = torch.Generator().manual_seed(0)
    chosen, rejected = (-20 * torch.rand(8, generator=generator) for _ in range(2))
    ones = torch.ones(8)
    pairs = PreferenceLogps(chosen, rejected, ones, ones, ones, torch.zeros(8))
    stand_in: Any = SimpleNamespace(
        beta=0.3,
        simpo_gamma=0.6,
        alpha=0.0,
        label_smoothing=0.15,
        loss_type=kind,
        accelerator=SimpleNamespace(device="cpu"),
    )
    theirs = CPOTrainer.cpo_loss(stand_in, chosen, rejected)[0]
    compute_loss = dpo_loss if kind == "sigmoid" else simpo_loss
    ours = compute_loss(pairs, LossConfig(beta=0.3, gamma=0.6, label_smoothing=0.15))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
