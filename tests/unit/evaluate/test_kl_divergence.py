"""KL and agreement with the base equal those of whole logits in fp64, whatever the packs, however
the base is had."""

from pathlib import Path

import pytest
import torch

from tiny_models import (
    collate_documents,
    make_branching_documents,
    make_tiny_documents,
    make_tiny_model,
)
from tunesmith.core.types import Document
from tunesmith.evaluate import kl_divergence
from tunesmith.evaluate.kl_divergence import (
    AdapterDisabled,
    BaseReference,
    CachedStates,
    cache_states,
    compute_kl,
)
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.model.adapters import get_trainable_parameters, scaled_adapter
from tunesmith.model.causal_lm import PackedCausalLM


def full_logits(model: PackedCausalLM, document: Document) -> torch.Tensor:
    batch = collate_documents([document])
    return model.head.compute_logits(model.compute_hidden(batch)).double()


@torch.no_grad()
def expected(model: PackedCausalLM, document: Document) -> tuple[float, float]:
    """KL and the number of same likeliest tokens, from a [tokens, vocabulary] tensor of one
    document."""
    with scaled_adapter(model.network, 0):
        p_SV = full_logits(model, document).log_softmax(-1)
    q_SV = full_logits(model, document).log_softmax(-1)
    kl = float((p_SV.exp() * (p_SV - q_SV)).sum())
    return kl, float((p_SV.argmax(-1) == q_SV.argmax(-1)).sum())


@pytest.mark.parametrize("pack_length", [40, 1000])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_divergence_is_that_of_whole_logits(family: str, pack_length: int) -> None:
    model = make_tiny_model(family, torch.float64)
    documents = make_tiny_documents()
    result = dict(compute_kl(model, documents, pack_length, AdapterDisabled()))
    nats = {path: nat for path, nat, _ in compute_nll(model, documents, pack_length)}
    assert sorted(result) == sorted(nats)
    for path, item in result.items():
        kl, same = expected(model, documents[path])
        assert item.kl == pytest.approx(kl, rel=1e-9)
        assert item.kl > 0.01, "the adapter must matter"
        assert (item.top1_matches, item.nats) == (same, pytest.approx(nats[path], rel=1e-12))
    assert (
        0
        < sum(item.top1_matches for item in result.values())
        < sum(item.tokens for item in result.values())
    )


def test_chunks_of_a_long_pack_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, documents = make_tiny_model("llama", torch.float64), make_tiny_documents()
    full = dict(compute_kl(model, documents, 1000, AdapterDisabled()))
    monkeypatch.setattr(kl_divergence, "CHUNK_TARGETS", 3)
    for path, item in compute_kl(model, documents, 1000, AdapterDisabled()):
        assert item == pytest.approx(full[path], rel=1e-12)


def test_with_shared_prefixes_it_is_the_same() -> None:
    model, documents = make_tiny_model("llama", torch.float64), make_branching_documents()
    plain = dict(compute_kl(model, documents, 60, AdapterDisabled()))
    for path, item in compute_kl(model, documents, 1000, AdapterDisabled(), share=True):
        assert item == pytest.approx(plain[path], rel=1e-9)


def test_nothing_has_moved_where_nothing_was_trained() -> None:
    model = make_tiny_model("llama", method="full")
    documents = make_tiny_documents()
    for _, item in compute_kl(model, documents, 60, cache_states(model, documents, 1000)):
        assert (item.kl, item.top1_matches) == (pytest.approx(0, abs=1e-6), item.tokens)


def test_the_kept_head_is_the_one_that_computes(tmp_path: Path) -> None:
    """The narrow copy of a wide master, in one file for all lists of documents."""
    model, documents = (
        make_tiny_model("llama", torch.bfloat16, method="full"),
        make_tiny_documents(),
    )
    assert model.head.weight.dtype == torch.float32
    stored = cache_states(model, documents, 1000)
    for name in ("one", "two"):
        stored.save_files(tmp_path, name)
    assert {file.name for file in tmp_path.iterdir()} == {
        "one.safetensors",
        "two.safetensors",
        "head.safetensors",
    }
    item, two = CachedStates.load_files(tmp_path, ["one", "two"], model.device)
    assert item.head is two.head
    assert item.head is not None
    assert item.head.dtype == torch.bfloat16
    for _, result in compute_kl(model, documents, 1000, item):
        assert (result.kl, result.top1_matches) == (pytest.approx(0, abs=1e-6), result.tokens)


def test_a_kept_base_is_the_base_after_all_weights_have_changed(tmp_path: Path) -> None:
    """Kept in other packs than it is compared in, written and read back, the head included."""
    model, documents = (
        make_tiny_model("llama-tied", torch.float64, method="full"),
        make_branching_documents(),
    )
    before = [full_logits(model, document).detach().log_softmax(-1) for document in documents]
    cache_states(model, documents, 60).save_files(tmp_path, "answers")
    generator = torch.Generator().manual_seed(5)
    for parameter in get_trainable_parameters(model.network).values():
        parameter.data += 0.02 * torch.randn(
            parameter.shape, generator=generator, dtype=torch.float64
        )
    (base,) = CachedStates.load_files(tmp_path, ["answers"], model.device)
    for path, item in compute_kl(model, documents, 1000, base, share=True):
        after = full_logits(model, documents[path]).detach().log_softmax(-1)
        kl = float((before[path].exp() * (before[path] - after)).sum())
        assert item.kl == pytest.approx(kl, rel=1e-9)
        assert item.kl > 0.01


@pytest.mark.parametrize("base", [AdapterDisabled(), None])
def test_an_adapter_is_measured_alike_from_kept_states(base: BaseReference | None) -> None:
    model, documents = make_tiny_model("qwen3", torch.float64), make_tiny_documents()
    with scaled_adapter(model.network, 0):
        stored = cache_states(model, documents, 1000)
    assert stored.head is None, "a frozen head is not copied"
    result = dict(compute_kl(model, documents, 1000, base or stored))
    assert result[0].kl == pytest.approx(expected(model, documents[0])[0], rel=1e-9)
