"""Rotary frequencies that depend on the length: every document is rotated as if it were alone."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
)

from rotary_configs import CONFIGS, LIMIT, LONGROPE
from tiny_models import (
    SIZES,
    VOCABULARY,
    collate_documents,
    compute_max_difference,
    compute_step_gradients,
    continue_document,
    make_tiny_document,
)
from tunesmith.core.types import Document, GenerationRequest
from tunesmith.data.collate import collate
from tunesmith.data.packing import pack_step
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.model.causal_lm import PackedCausalLM, compute_stock_logits, wrap_model
from tunesmith.model.generation.engine import generate
from tunesmith.model.lm_head import measure_target_losses
from tunesmith.model.paged_cache import BLOCK_TOKENS

LENGTHS = (5, LIMIT - 1, LIMIT, LIMIT + 1, 90, 17, 70)


def make_network(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A fresh stock network: dynamic scaling keeps the frequencies of earlier forwards."""
    network = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=dtype).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.1 if "norm" in parameter_name else 0.25
        parameter.data = (parameter.data if "norm" in parameter_name else 0) + scale * noise
        parameter.data = parameter.data.to(dtype)
    return network.requires_grad_(False)


@pytest.fixture(params=CONFIGS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def compute_stock_losses(name: str, document: Document) -> torch.Tensor:
    """The losses of a document's targets, from a network that has seen nothing else."""
    tokens = torch.from_numpy(document.tokens_L).long()
    num_input = collate_documents([document]).layout.num_tokens
    logits = compute_stock_logits(make_network(name), tokens[:num_input].tolist(), range(num_input))
    targets = torch.from_numpy(document.weights_L).nonzero()[:, 0]
    return F.cross_entropy(logits[targets - 1], tokens[targets], reduction="none")


def compute_both_losses(
    name: str, model: PackedCausalLM, documents: list[Document], *, share: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the losses of each document in one pack, and those of the stock network."""
    by_id = {document.id: document for document in documents}
    packs = pack_step(documents, 10**6, should_share=share, get_group=model.get_rotation_key)
    assert len(packs) == 1
    assert any(packs[0].prefix_lengths) == share
    batch = collate(packs[0])
    with torch.no_grad():
        losses_S = measure_target_losses(model.compute_hidden(batch), model.head, batch.targets_S)
    ours = [losses_S[batch.document_S == index] for index in range(len(batch.ids))]
    return ours, [compute_stock_losses(name, by_id[id]) for id in batch.ids]


def test_the_configs_tell_short_from_long(name: str) -> None:
    """Otherwise the other tests show nothing."""
    tokens = torch.arange(3, 90)[None]
    short = make_network(name)(input_ids=tokens[:, :20], use_cache=False).logits
    beginning = make_network(name)(input_ids=tokens, use_cache=False).logits[:, :20]
    assert (short - beginning).abs().max() > 0.01


def test_packed_documents_equal_the_stock_model_one_by_one(name: str) -> None:
    documents = [make_tiny_document(length, index) for index, length in enumerate(LENGTHS)]
    model = wrap_model(make_network(name), torch.float32)
    ours, expected = compute_both_losses(name, model, documents, share=False)
    assert len(ours) == len(documents)
    torch.testing.assert_close(ours, expected, rtol=2e-4, atol=2e-4)


def make_sharing_documents() -> list[Document]:
    """Common prefixes within a side, across the limit, and a document that another continues."""
    prompt = make_tiny_document(60, 7)
    documents = [
        continue_document(prompt, 20, 4, 1),
        continue_document(prompt, 20, 8, 2),
        continue_document(prompt, 20, 40, 3),
        continue_document(prompt, 20, 50, 4),
        continue_document(prompt, 20, LIMIT - 20, 5),
        continue_document(prompt, 20, LIMIT - 19, 6),
        prompt,
    ]
    short = Document("beginning", prompt.tokens_L[:27], prompt.weights_L[:27].copy())
    short.weights_L[-1] = 1
    return [*documents, short]


def test_shared_prefixes_stay_on_their_side_of_the_limit(name: str) -> None:
    model = wrap_model(make_network(name), torch.float32)
    documents = make_sharing_documents()
    ours, expected = compute_both_losses(name, model, documents, share=True)
    assert len(ours) == len(documents)
    torch.testing.assert_close(ours, expected, rtol=2e-4, atol=2e-4)


def test_a_mixed_pair_is_exact(name: str) -> None:
    """A short chosen and a long rejected side share the prompt but no frequencies."""
    prompt = make_tiny_document(24, 3)
    sides = (continue_document(prompt, 24, 4, 1), continue_document(prompt, 24, 40, 2))
    pair = [
        dataclasses.replace(document, id="pair", side=side)
        for document, side in zip(sides, ("chosen", "rejected"), strict=True)
    ]
    model = wrap_model(make_network(name), torch.float32)
    (pack,) = pack_step(pair, 10**6, should_share=True, get_group=model.get_rotation_key)
    assert not any(pack.prefix_lengths)


def test_gradients_equal_those_of_documents_alone() -> None:
    documents = [make_tiny_document(length, index) for index, length in enumerate(LENGTHS)]
    for checkpointing in ("none", "full"):
        network = make_network("phi3-128k").requires_grad_(True)
        model = wrap_model(network, torch.float32, gradient_checkpointing=checkpointing)
        network.train()
        loss, gradients = compute_step_gradients(model, documents, 10**6)
        separate_loss, separate = compute_step_gradients(model, documents, 1)
        assert abs(loss - separate_loss) < 1e-5
        assert compute_max_difference(gradients, separate) < 1e-4


def test_likelihoods_equal_the_stock_model(name: str) -> None:
    documents = [*make_sharing_documents(), make_tiny_document(80, 1), make_tiny_document(3, 2)]
    model = wrap_model(make_network(name), torch.float32)
    for share in (False, True):
        for index, nats, _ in compute_nll(model, documents, 400, share=share):
            expected = float(compute_stock_losses(name, documents[index]).sum())
            assert nats == pytest.approx(expected, rel=1e-4)


def generate_without_cache(name: str, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        logits = compute_stock_logits(make_network(name), tokens, [len(tokens) - 1])
        tokens.append(int(logits[0].argmax()))
    return tokens[len(prompt) :]


LONGROPE_NAMES = [name for name in CONFIGS if "dynamic" not in name]


@pytest.mark.parametrize("name", LONGROPE_NAMES)
@pytest.mark.parametrize("batch_size", [None, 2])
def test_generation_equals_a_forward_of_the_whole_sequence(
    name: str, batch_size: int | None
) -> None:
    """Rows that cross the limit in the middle, at their first token, before, and never; with a
    common prefix."""
    begin = make_tiny_document(40, 5).tokens_L[:18].tolist()
    tails = (2, 6, LIMIT - 18 - 1, LIMIT - 18, LIMIT - 18 + 1, 30)
    prompts = [
        begin + make_tiny_document(40, i).tokens_L[:tail].tolist() for i, tail in enumerate(tails)
    ]
    model = wrap_model(make_network(name), torch.float32)
    requests = [GenerationRequest(tuple(prompt), 12) for prompt in prompts]
    outputs = dict(generate(model, requests, decode=str, end_ids=(), batch_size=batch_size))
    for index, prompt in enumerate(prompts):
        assert list(outputs[index].tokens) == generate_without_cache(name, prompt, 12), index


@pytest.mark.parametrize(("tails", "shared"), [((4, 7), True), ((40, 45), True), ((4, 40), False)])
def test_blocks_are_shared_on_one_side_of_the_limit(
    tails: tuple[int, int], shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = make_tiny_document(BLOCK_TOKENS, 5).tokens_L[:BLOCK_TOKENS].tolist()
    prompts = [
        begin + make_tiny_document(50, i).tokens_L[:tail].tolist() for i, tail in enumerate(tails)
    ]
    limit = {"original_max_position_embeddings": BLOCK_TOKENS + 20}
    config = Phi3Config(**SIZES, rope_parameters=LONGROPE | limit, **limit)
    monkeypatch.setitem(CONFIGS, "far limit", config)
    model = wrap_model(make_network("far limit"), torch.float32)
    counts: list[list[int]] = []
    prefill = model.prefill

    def count_tokens(rows: Any, prompts: Any, *args: Any) -> Any:
        counts.append([len(prompt) for prompt in prompts])
        return prefill(rows, prompts, *args)

    monkeypatch.setattr(model, "prefill", count_tokens)
    requests = [GenerationRequest(tuple(prompt), 5) for prompt in prompts]
    outputs = dict(generate(model, requests, decode=str, end_ids=()))
    short, long = (BLOCK_TOKENS + tail for tail in tails)
    assert counts == ([[long], [tails[0]]] if shared else [[long, short]])
    for index, prompt in enumerate(prompts):
        assert list(outputs[index].tokens) == generate_without_cache("far limit", prompt, 5)


def test_earlier_forwards_change_nothing() -> None:
    """transformers keeps the frequencies of the longest sequence so far."""
    model = wrap_model(make_network("llama-dynamic"), torch.float32)
    batch = collate_documents([make_tiny_document(40, 1)])
    before = model.compute_hidden(batch)
    model.compute_hidden(collate_documents([make_tiny_document(90, 2)]))
    assert torch.equal(model.compute_hidden(batch), before)


def test_other_models_stay_stock() -> None:
    model = wrap_model(
        AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), dtype=torch.float32), torch.float32
    )
    assert model.rotary is None
    assert model.get_rotation_key(10) == model.get_rotation_key(10**6)
    assert model.head.weight.shape[0] == VOCABULARY
