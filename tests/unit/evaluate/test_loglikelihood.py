"""Likelihoods in packs equal those of the stock network, document by document."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tunesmith.core.errors import InputError
from tunesmith.core.types import Batch, Document, GenerationRequest, PackLayout, Row
from tunesmith.evaluate.general_text import (
    GeneralText,
    measure_bits_per_byte,
    read_texts,
    sample_texts,
    split_windows,
)
from tunesmith.evaluate.loglikelihood import (
    compute_nll,
    measure_loss,
    measure_loss_and_greedy_match,
)
from tunesmith.evaluate.results import compute_score
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.model.generation.engine import generate

BITS = 1 / np.log(2)


def document(row: str, length: int, trained: float = 0.5) -> Document:
    random = np.random.default_rng(length)
    weights_L = (random.random(length) < trained).astype(np.float32) * 0.5
    weights_L[0] = 0
    return Document(row, random.integers(0, 256, length).astype(np.int32), weights_L)


def alone(model: PackedCausalLM, result: Document) -> tuple[float, int]:
    """Nats and tokens of one document in a forward of its own, by plain cross-entropy."""
    (targets,) = np.nonzero(result.weights_L)
    tokens_T, places = torch.tensor(result.tokens_L, dtype=torch.int64), torch.tensor(targets)
    positions, n = torch.arange(len(result)), len(result)
    batch = Batch(
        tokens_T,
        positions,
        PackLayout((0,), (n,)),
        places - 1,
        tokens_T[places],
        places,
        places,
        ("",),
        n,
    )
    logits = model.head.compute_logits(model.compute_hidden(batch))
    return float(F.cross_entropy(logits.double(), tokens_T[places], reduction="sum")), len(targets)


@pytest.mark.parametrize("pack_length", [8, 40, 1000])
def test_every_document_gets_its_own_likelihood(model: PackedCausalLM, pack_length: int) -> None:
    documents = [document(f"eval:{n}", n) for n in (5, 33, 12, 2, 150, 12)]
    documents[3].weights_L[1] = 1
    documents.append(Document("eval:none", documents[0].tokens_L, np.zeros(5, np.float32)))
    result = {i: (nats, tokens) for i, nats, tokens in compute_nll(model, documents, pack_length)}
    assert sorted(result) == list(range(6)), "the document without a target is left out"
    for i, (nats, tokens) in result.items():
        expected_nats, expected_tokens = alone(model, documents[i])
        assert tokens == expected_tokens
        assert nats == pytest.approx(expected_nats, rel=1e-5)


def test_shared_prefixes_change_no_likelihood(model: PackedCausalLM) -> None:
    documents = [document(f"eval:{n}", n) for n in (60, 90, 70)]
    for item in documents[1:]:
        item.tokens_L[:40] = documents[0].tokens_L[:40]
    for pack_length in (100, 1000):
        result = compute_nll(model, documents, pack_length, share=True)
        for i, nats, tokens in sorted(result):
            expected_nats, expected_tokens = alone(model, documents[i])
            assert tokens == expected_tokens
            assert nats == pytest.approx(expected_nats, rel=1e-5)


def test_the_held_out_loss_is_per_token_and_by_row(model: PackedCausalLM) -> None:
    documents = [document("eval:1", 30), document("eval:1", 17), document("eval:2", 50)]
    result = measure_loss(model, documents, task="eval", pack_length=64)
    sums = [alone(model, d) for d in documents]
    assert result.ids == ("eval:1", "eval:2")
    assert result.weights == (sums[0][1] + sums[1][1], sums[2][1])
    total = sum(nats for nats, _ in sums) / sum(tokens for _, tokens in sums)
    assert compute_score(result).value == pytest.approx(total, rel=1e-5)
    assert not result.higher_is_better


def test_a_row_matches_if_greedy_decoding_gives_all_of_its_answers(model: PackedCausalLM) -> None:
    """Also where an answer lies in two packs, and its prefix is shared."""
    prompt = document("eval:1", 40).tokens_L.tolist()
    request = GenerationRequest(tuple(prompt), 6)
    ((_, output),) = generate(model, [request], decode=str, end_ids=())
    answer = list(output.tokens)
    other = [*answer[:-1], (answer[-1] + 1) % 256]
    answers = {"right": [answer], "wrong": [other], "one of two": [answer, other]}
    documents = [
        Document(row, np.array(prompt + tokens, np.int32), np.array([0.0] * 40 + [1.0] * 6))
        for row, parts in answers.items()
        for tokens in parts
    ]
    for length, share in ((50, False), (200, True)):
        loss, result = measure_loss_and_greedy_match(
            model, documents, task="eval", pack_length=length, share=share
        )
        assert dict(zip(result.ids, result.values, strict=True)) == {
            "right": 1,
            "wrong": 0,
            "one of two": 0,
        }
        plain = measure_loss(model, documents, task="eval", pack_length=length, share=share)
        assert loss == plain


def test_measuring_leaves_no_gradient_and_needs_evaluation_mode(model: PackedCausalLM) -> None:
    weight = model.network.get_output_embeddings().weight.requires_grad_(True)
    measure_loss(
        model, [document("eval:1", 30), document("eval:2", 9, 1.0)], task="eval", pack_length=64
    )
    assert weight.grad is None
    model.network.train()
    with pytest.raises(AssertionError, match="evaluation mode"):
        measure_loss(model, [document("eval:1", 30)], task="eval", pack_length=64)


# ---------------------------------------------------------------- retention


def as_bytes(text: str) -> list[int]:
    return list(text.encode())


def test_bits_per_byte_counts_every_token_but_the_first(model: PackedCausalLM) -> None:
    texts = [
        GeneralText(f"general:{i}", t, "web")
        for i, t in enumerate(("Hello, world", "smörgåsbord €"))
    ]
    result = measure_bits_per_byte(model, texts, as_bytes, window=100)
    for text, value in zip(texts, result.values, strict=True):
        tokens_L = np.array(as_bytes(text.text), np.int32)
        full = Document(text.id, tokens_L, np.array([0] + [1] * (len(tokens_L) - 1), np.float32))
        nats, tokens = alone(model, full)
        assert tokens == len(text.text.encode()) - 1
        assert value == pytest.approx(nats * BITS / len(text.text.encode()), rel=1e-5)


def test_domains_count_alike(model: PackedCausalLM) -> None:
    texts = [GeneralText(str(i), f"text number {i}", "web" if i < 8 else "code") for i in range(10)]
    result = measure_bits_per_byte(model, texts, as_bytes, window=100)
    web, code = np.mean(result.values[:8]), np.mean(result.values[8:])
    assert compute_score(result).value == pytest.approx((web + code) / 2)


def test_a_long_text_is_read_in_windows_and_loses_no_target(model: PackedCausalLM) -> None:
    tokens = list(range(100, 123))
    pieces = split_windows("general:1", tokens, 10)
    targets = [
        t for piece in pieces for t, w in zip(piece.tokens_L, piece.weights_L, strict=True) if w
    ]
    assert targets == tokens[1:]
    assert [len(piece) for piece in pieces] == [9, 9, 7]
    assert pieces[1].tokens_L[0] == pieces[0].tokens_L[-1]
    text = GeneralText("general:1", "a text of some length, " * 4, "web")
    full, split = (
        measure_bits_per_byte(model, [text], as_bytes, window=w).values[0] for w in (1000, 16)
    )
    sums = [alone(model, piece)[0] for piece in split_windows(text.id, as_bytes(text.text), 16)]
    assert split == pytest.approx(sum(sums) * BITS / len(text.text), rel=1e-5)
    assert split != pytest.approx(full)


@pytest.mark.parametrize("count", [0, 1])
def test_a_text_without_a_target_has_no_window(count: int) -> None:
    assert split_windows("general:1", [7] * count, 10) == []


def test_texts_are_read_from_rows() -> None:
    rows = [Row("general:1", {"text": "a", "domain": "web"}), Row("general:2", {"text": "b"})]
    assert [text.domain for text in read_texts(rows)] == ["web", "general"]
    for broken in ({}, {"text": ""}, {"text": 3}, {"text": "a", "domain": 3}):
        with pytest.raises(InputError, match="general:9: a row of general text"):
            read_texts([Row("general:9", broken)])


def test_of_many_general_texts_some_are_chosen_evenly_by_domain() -> None:
    texts = [
        GeneralText(f"g:{n}", "x" * (10 + n % 3), "large" if n % 5 else "small") for n in range(100)
    ]
    chosen = sample_texts(texts, str.encode, 440)
    assert 440 <= sum(len(text.text) for text in chosen) < 440 + 12
    counts = Counter(text.domain for text in chosen)
    assert counts["small"] == 20, "all that a small domain has"
    assert counts["large"] in (19, 20, 21)
    assert list(chosen) == [text for text in texts if text in chosen]
    assert chosen == sample_texts(texts, str.encode, 440)
    assert sample_texts(texts, str.encode, 10_000) == tuple(texts)
    assert Counter(text.domain for text in sample_texts(texts, str.encode, 1)) == {
        "large": 2,
        "small": 2,
    }
