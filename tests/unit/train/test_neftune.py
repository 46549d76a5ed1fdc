"""NEFTune: the noise of transformers' hook, drawn per document, the same after any packing or
resume, and only in training."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_preference import make_pairs  # type: ignore[import-not-found]
from torch import Tensor
from transformers.integrations.neftune import neftune_post_forward_hook

from plan_configs import make_config
from tiny_loop import (
    SETTINGS,
    STEPS,
    are_equal,
    copy_weights,
    make_step_documents,
    run_straight_and_resumed,
    select_steps,
)
from tiny_models import make_tiny_document, make_tiny_model, make_tiny_network
from tunesmith.core.types import Batch, Document, PlanConfig
from tunesmith.data.collate import collate
from tunesmith.data.packing import pack_step
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.model.adapters import scaled_adapter
from tunesmith.train.loop import TrainingLoop
from tunesmith.train.losses import LossConfig, LossNormalizer, compute_step_terms
from tunesmith.train.neftune import add_embedding_noise

ALPHA = 5.0
NOISY = dataclasses.replace(SETTINGS, neftune_noise_alpha=ALPHA)
LENGTHS = (5, 90, 17)


def make_noisy_batch(documents: list[Document], step: int = 0, seed: int = 0) -> Batch:
    (pack,) = pack_step(documents, 10**6)
    config = make_config(neftune_noise_alpha=ALPHA, seed=seed)
    hidden_size = make_tiny_model().embedding_size
    return add_embedding_noise(collate(pack), pack, hidden_size, config, step)


def split_noise(batch: Batch) -> list[Tensor]:
    assert batch.embedding_noise_TH is not None
    return list(batch.embedding_noise_TH.split(batch.layout.lengths))


def test_the_scale_is_that_of_transformers_for_each_document() -> None:
    documents = [make_tiny_document(length, length) for length in LENGTHS]
    batch = make_noisy_batch(documents)
    hidden_size = make_tiny_model().embedding_size
    lengths = {document.id: len(document) for document in documents}
    torch.manual_seed(0)  # of theirs
    for row_id, noise_LH in zip(batch.ids, split_noise(batch), strict=True):
        module = SimpleNamespace(training=True, neftune_noise_alpha=ALPHA)
        zeros = torch.zeros(1, lengths[row_id], hidden_size)
        theirs = neftune_post_forward_hook(module, None, zeros)[0]
        limit = ALPHA / math.sqrt(lengths[row_id] * hidden_size)
        for noise in (noise_LH, theirs):
            assert 0.9 * limit < float(noise.abs().max()) <= limit
            assert float(noise.std()) == pytest.approx(limit / math.sqrt(3), rel=0.1)
            assert abs(float(noise.mean())) < limit / 5


def test_the_forward_is_that_of_the_stock_model_with_noisy_embeddings() -> None:
    document = make_tiny_document(17, 3)
    batch = make_noisy_batch([document])
    model = make_tiny_model(method=None)
    network = make_tiny_network()
    embeddings = network.get_input_embeddings()(batch.tokens_T) + batch.embedding_noise_TH
    expected = network(inputs_embeds=embeddings[None]).logits[0][batch.positions_S]
    ours = model.head.compute_logits(model.compute_hidden(batch))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    plain = dataclasses.replace(batch, embedding_noise_TH=None)
    assert not torch.allclose(model.head.compute_logits(model.compute_hidden(plain)), ours)


def test_noise_follows_the_seed_the_step_and_the_document_alone() -> None:
    documents = [make_tiny_document(length, length) for length in LENGTHS]
    together = dict(
        zip(make_noisy_batch(documents).ids, split_noise(make_noisy_batch(documents)), strict=True)
    )
    for document in documents:
        (alone,) = split_noise(make_noisy_batch([document]))
        assert torch.equal(alone, together[document.id])
        for changed in ({"step": 1}, {"seed": 1}):
            assert not torch.equal(alone, split_noise(make_noisy_batch([document], **changed))[0])
    other = dataclasses.replace(documents[0], id="another row")
    assert not torch.equal(split_noise(make_noisy_batch([other]))[0], together[documents[0].id])


def make_loop(config: PlanConfig = NOISY) -> TrainingLoop:
    return TrainingLoop(make_tiny_model(), make_step_documents, config, steps=STEPS)


def test_a_resumed_run_draws_the_same_noise(tmp_path: Path) -> None:
    straight, second = run_straight_and_resumed(make_loop, tmp_path)
    assert are_equal(copy_weights(straight.model), copy_weights(second.model))
    plain = make_loop(SETTINGS)
    list(plain)
    assert not are_equal(copy_weights(straight.model), copy_weights(plain.model))


def test_the_size_of_packs_does_not_change_the_noise() -> None:
    losses: list[list[float]] = []
    for pack_length in (20, 60, 500):
        config = dataclasses.replace(NOISY, pack_length=pack_length)
        losses.append([step.loss for step in select_steps(list(make_loop(config)))])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)


def test_the_reference_of_dpo_sees_no_noise() -> None:
    """The loss is that with log-probabilities of the base model that were computed before."""
    documents = make_pairs()
    model = make_tiny_model(dtype=torch.float64)
    model.network.eval()
    with scaled_adapter(model.network, 0):
        nlls = sorted(compute_nll(model, documents, 10**6))
    stored = [
        dataclasses.replace(document, reference_logp=-nats)
        for document, (_, nats, _) in zip(documents, nlls, strict=True)
    ]
    losses: list[Tensor] = []
    for pair_documents in (documents, stored):
        (pack,) = pack_step(pair_documents, 10**6)
        config = make_config(neftune_noise_alpha=ALPHA)
        batch = add_embedding_noise(collate(pack), pack, model.embedding_size, config, 0)
        normalizer = LossNormalizer.from_documents(pair_documents)
        terms = compute_step_terms(model, batch, normalizer, LossConfig("dpo"))
        losses.append(terms["preference"].sum.detach())
    torch.testing.assert_close(losses[0], losses[1])
