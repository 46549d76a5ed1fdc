"""KL and agreement with the base equal those of whole logits in fp64, whatever the packs, however the base is had."""

from pathlib import Path

import pytest
import torch

from tiny import branching_documents, one_batch, tiny_documents, tiny_model
from tunesmith.core.types import Document
from tunesmith.evaluate import kl_divergence
from tunesmith.evaluate.kl_divergence import Base, Kept, Switched, keep, moved
from tunesmith.evaluate.loglikelihood import negative_log_likelihoods
from tunesmith.model.adapters import adapter_scaled, trainable
from tunesmith.model.causal_lm import LanguageModel


def whole_logits(model: LanguageModel, document: Document) -> torch.Tensor:
    batch = one_batch([document])
    return model.head.logits(model.hidden(batch)).double()


@torch.no_grad()
def expected(model: LanguageModel, document: Document) -> tuple[float, float]:
    """KL and the number of same likeliest tokens, from a [tokens, vocabulary] tensor of one document."""
    with adapter_scaled(model.network, 0):
        p_SV = whole_logits(model, document).log_softmax(-1)
    q_SV = whole_logits(model, document).log_softmax(-1)
    kl = float((p_SV.exp() * (p_SV - q_SV)).sum())
    return kl, float((p_SV.argmax(-1) == q_SV.argmax(-1)).sum())


@pytest.mark.parametrize("pack_length", [40, 1000])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_divergence_is_that_of_whole_logits(family: str, pack_length: int) -> None:
    model = tiny_model(family, torch.float64)
    documents = tiny_documents()
    found = dict(moved(model, documents, pack_length, Switched()))
    nats = {place: nat for place, nat, _ in negative_log_likelihoods(model, documents, pack_length)}
    assert sorted(found) == sorted(nats)
    for place, one in found.items():
        kl, same = expected(model, documents[place])
        assert one.kl == pytest.approx(kl, rel=1e-9)
        assert one.kl > 0.01, "the adapter must matter"
        assert (one.same, one.nats) == (same, pytest.approx(nats[place], rel=1e-12))
    assert 0 < sum(one.same for one in found.values()) < sum(one.tokens for one in found.values())


def test_chunks_of_a_long_pack_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, documents = tiny_model("llama", torch.float64), tiny_documents()
    whole = dict(moved(model, documents, 1000, Switched()))
    monkeypatch.setattr(kl_divergence, "CHUNK_TARGETS", 3)
    for place, one in moved(model, documents, 1000, Switched()):
        assert one == pytest.approx(whole[place], rel=1e-12)


def test_with_shared_prefixes_it_is_the_same() -> None:
    model, documents = tiny_model("llama", torch.float64), branching_documents()
    plain = dict(moved(model, documents, 60, Switched()))
    for place, one in moved(model, documents, 1000, Switched(), share=True):
        assert one == pytest.approx(plain[place], rel=1e-9)


def test_nothing_has_moved_where_nothing_was_trained() -> None:
    model = tiny_model("llama", method="full")
    documents = tiny_documents()
    for _, one in moved(model, documents, 60, keep(model, documents, 1000)):
        assert (one.kl, one.same) == (pytest.approx(0, abs=1e-6), one.tokens)


def test_the_kept_head_is_the_one_that_computes(tmp_path: Path) -> None:
    """The narrow copy of a wide master, in one file for all lists of documents."""
    model, documents = tiny_model("llama", torch.bfloat16, method="full"), tiny_documents()
    assert model.head.weight.dtype == torch.float32
    kept = keep(model, documents, 1000)
    for name in ("one", "two"):
        kept.write(tmp_path, name)
    assert {file.name for file in tmp_path.iterdir()} == {"one.safetensors", "two.safetensors", "head.safetensors"}
    one, two = Kept.read(tmp_path, ["one", "two"], model.device)
    assert one.head is two.head
    assert one.head is not None
    assert one.head.dtype == torch.bfloat16
    for _, found in moved(model, documents, 1000, one):
        assert (found.kl, found.same) == (pytest.approx(0, abs=1e-6), found.tokens)


def test_a_kept_base_is_the_base_after_all_weights_have_changed(tmp_path: Path) -> None:
    """Kept in other packs than it is compared in, written and read back, the head included."""
    model, documents = tiny_model("llama-tied", torch.float64, method="full"), branching_documents()
    before = [whole_logits(model, document).detach().log_softmax(-1) for document in documents]
    keep(model, documents, 60).write(tmp_path, "answers")
    generator = torch.Generator().manual_seed(5)
    for parameter in trainable(model.network).values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    (base,) = Kept.read(tmp_path, ["answers"], model.device)
    for place, one in moved(model, documents, 1000, base, share=True):
        after = whole_logits(model, documents[place]).detach().log_softmax(-1)
        kl = float((before[place].exp() * (before[place] - after)).sum())
        assert one.kl == pytest.approx(kl, rel=1e-9)
        assert one.kl > 0.01


@pytest.mark.parametrize("base", [Switched(), None])
def test_an_adapter_is_measured_alike_from_kept_states(base: Base | None) -> None:
    model, documents = tiny_model("qwen3", torch.float64), tiny_documents()
    with adapter_scaled(model.network, 0):
        kept = keep(model, documents, 1000)
    assert kept.head is None, "a frozen head is not copied"
    found = dict(moved(model, documents, 1000, base or kept))
    assert found[0].kl == pytest.approx(expected(model, documents[0])[0], rel=1e-9)
