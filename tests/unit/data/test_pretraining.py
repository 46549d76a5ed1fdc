"""Texts as windows: ids are those of the renderer, a token is a target once an epoch, steps have
their tokens."""

from collections import Counter
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_runs import write_rows
from tunesmith.core.types import Document
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.data.checks.run import check_data
from tunesmith.data.dataset import open_dataset
from tunesmith.data.pretraining import (
    DENSE,
    PretrainingCorpus,
    WindowSampler,
    count_windows,
    cut_window,
    find_separator,
    find_window,
    open_corpus,
)
from tunesmith.data.tokenizer import chat_tokenizer as tokenizer_module
from tunesmith.data.tokenizer.pieces import split_text
from tunesmith.recipe.fields import DataSource

NOW = datetime(2026, 1, 1)


@pytest.fixture(scope="module")
def renderer(tiny_folder: Path) -> Renderer:
    return Renderer.from_folder(tiny_folder, now=NOW).replace_text_end(256)  # a token of its own


def corpus_of(
    renderer: Renderer, path: Path, texts: list[str], window: int = 21
) -> PretrainingCorpus:
    rows = open_dataset(
        [DataSource(path=write_rows(path, [{"text": text} for text in texts]))], renderer
    )
    return open_corpus(rows, window)


def windows(corpus: PretrainingCorpus) -> list[Document]:
    return [corpus.read_window(i) for i in range(len(corpus))]


LANGUAGE = st.text(
    st.characters(exclude_categories=["Cs", "Cc"]) | st.just("\n"), min_size=1, max_size=90
).filter(str.strip)
TEXTS = ["short", "a longer text, of some words " * 3, "x", "é" * 30, "<|end|> is text here"]


def test_ids_are_those_of_the_renderer_and_end_in_the_separator(
    renderer: Renderer, tmp_path: Path
) -> None:
    corpus = corpus_of(renderer, tmp_path / "texts.jsonl", TEXTS)
    for row, text in enumerate(TEXTS):
        parts = [corpus.read_window(i) for i in corpus.get_windows(row)]
        document = corpus.dataset.render_documents(row)[0]
        assert parts[0].tokens_L[0] == document.tokens_L[0]
        assert (
            np.concatenate([part.tokens_L[1:] for part in parts]).tolist()
            == document.tokens_L[1:].tolist()
        )
        assert document.tokens_L[-1] == 256
        assert renderer.decode(document.tokens_L[:-1]) == text
        assert {part.id for part in parts} == {document.id}
    assert [len(window) for window in windows(corpus)] == corpus.lengths_W.tolist()
    assert max(corpus.lengths_W) <= 21
    with pytest.raises(IndexError):
        corpus.read_window(len(corpus))


@settings(max_examples=25, deadline=None)
@given(st.lists(LANGUAGE, min_size=1, max_size=6), st.integers(2, 40))
def test_every_token_but_the_first_of_a_text_is_a_target_once(
    renderer: Renderer, tmp_path_factory: pytest.TempPathFactory, texts: list[str], window: int
) -> None:
    corpus = corpus_of(renderer, tmp_path_factory.mktemp("any") / "texts.jsonl", texts, window)
    for row in range(len(texts)):
        document = corpus.dataset.render_documents(row)[0].tokens_L
        parts = [corpus.read_window(i) for i in corpus.get_windows(row)]
        targets = [token for part in parts for token in part.tokens_L[part.weights_L > 0].tolist()]
        assert targets == document[1:].tolist()
        assert all(2 <= len(part) <= window and part.weights_L[0] == 0 for part in parts)


def test_an_epoch_takes_every_window_once_and_steps_have_their_tokens(
    renderer: Renderer, tmp_path: Path
) -> None:
    corpus = corpus_of(
        renderer, tmp_path / "texts.jsonl", [f"text {n} " * (n % 7 + 1) for n in range(60)]
    )
    total = int(corpus.lengths_W.sum())
    stream = WindowSampler.from_corpus(corpus, step_tokens=200, epochs=2, seed=3)
    steps = [stream.read_documents(step) for step in range(1, -(-2 * total // 200) + 1)]
    taken = Counter((d.id, d.tokens_L.tobytes()) for step in steps for d in step)
    assert taken == Counter((d.id, d.tokens_L.tobytes()) for _ in range(2) for d in windows(corpus))
    for done in range(1, len(steps)):
        tokens = sum(len(d) for step in steps[:done] for d in step)
        assert abs(tokens - 200 * done) <= 11
    assert stream.read_documents(len(steps) + 1) == []
    again = WindowSampler.from_corpus(corpus, step_tokens=200, epochs=2, seed=3).read_documents(4)
    assert [d.id for d in again] == [d.id for d in steps[3]]
    other = WindowSampler.from_corpus(corpus, step_tokens=200, epochs=2, seed=4).read_documents(4)
    assert [d.id for d in other] != [d.id for d in steps[3]]


def test_a_long_text_is_encoded_in_pieces(
    renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "some words, and more of them\n" * 20
    corpus = corpus_of(renderer, tmp_path / "a.jsonl", [text], 1000)
    monkeypatch.setattr(tokenizer_module, "MAX_PIECE_CHARS", 100)
    parts = list(renderer.iter_text_ids(text))
    assert len(parts) > 5
    assert [token for part in parts for token in part] == corpus.read_window(0).tokens_L.tolist()


@given(st.text(alphabet="ab \n.é", max_size=200), st.integers(2, 30))
def test_pieces_join_to_the_text_and_break_words_only_without_spaces(text: str, most: int) -> None:
    pieces = list(split_text(text, most))
    assert "".join(pieces) == text
    assert all(len(piece) <= most for piece in pieces)
    for before, after in pairwise(pieces):
        half = before[most // 2 :]
        assert after[0] in " \n" or not set(half) & set(" \n")


def test_what_is_hardly_text_is_told(renderer: Renderer, tmp_path: Path) -> None:
    texts = ["ordinary text", "QUJD" * 2600, "日本語" * 5000, "a <|end|> b"]
    corpus = corpus_of(renderer, tmp_path / "texts.jsonl", texts, 300)
    assert corpus.flagged[DENSE] == ["texts.jsonl:2"]
    report = check_data({"data": corpus.dataset}, corpus=corpus)["data"]
    findings = {finding.check: finding for finding in report.findings}
    assert findings["dense"].rows == ("texts.jsonl:2",)
    assert findings["render"].rows == ("texts.jsonl:4",)
    assert (report.rows, report.documents, report.tokens) == (
        4,
        len(corpus),
        corpus.lengths_W.sum(),
    )
    assert report.supervised_tokens == sum(int(d.weights_L.sum()) for d in windows(corpus))


def test_the_separator_is_the_usual_name_or_else_the_eos_token(renderer: Renderer) -> None:
    separator = find_separator(renderer.tokenizer)
    assert (separator.id, separator.text) == (258, "<|text|>")
    assert "the EOS token" in separator.reason


def text(tokens: int) -> Document:
    weights_L = np.ones(tokens, np.float32)
    weights_L[0] = 0
    return Document("a:1", np.arange(tokens, dtype=np.int32), weights_L)


@given(st.integers(2, 300), st.integers(1, 80))
def test_every_token_but_the_first_is_a_target_once(tokens: int, targets: int) -> None:
    document, seen, last = text(tokens), list[int](), 0
    for number in range(int(count_windows(tokens, targets))):
        window = cut_window(document, targets, number)
        assert (window.weights_L[0], window.tokens_L[0]) == (0, last), (
            "it begins with the last token of the one before"
        )
        assert 2 <= len(window) <= targets + 1
        seen += window.tokens_L[window.weights_L > 0].tolist()
        last = int(window.tokens_L[-1])
    assert seen == list(range(1, tokens))
    assert document.weights_L.sum() == tokens - 1, "the text itself is as it was"


def test_windows_are_even() -> None:
    assert [find_window(1026, 1024, number) for number in range(2)] == [(0, 514), (513, 1026)]
    assert [find_window(1025, 1024, 0), find_window(2, 1024, 0)] == [(0, 1025), (0, 2)]


def test_many_texts_are_counted_at_once() -> None:
    tokens_N = np.array([2, 1025, 1026, 5000])
    assert (
        count_windows(tokens_N, 1024).tolist()
        == [int(count_windows(int(n), 1024)) for n in tokens_N]
        == [1, 1, 2, 5]
    )
