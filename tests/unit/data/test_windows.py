"""Every token of a text but its first is a target once, in windows of which each goes on from the
one before."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.types import Document
from tunesmith.data.pretraining import count_windows, cut_window, find_window


def text(tokens: int) -> Document:
    weights_L = np.ones(tokens, np.float32)
    weights_L[0] = 0
    return Document("a:1", np.arange(tokens, dtype=np.int32), weights_L)


@given(st.integers(2, 300), st.integers(1, 80))
def test_every_token_but_the_first_is_a_target_once(tokens: int, targets: int) -> None:
    whole, seen, last = text(tokens), list[int](), 0
    for number in range(int(count_windows(tokens, targets))):
        one = cut_window(whole, targets, number)
        assert (one.weights_L[0], one.tokens_L[0]) == (0, last), (
            "it begins with the last token of the one before"
        )
        assert 2 <= len(one) <= targets + 1
        seen += one.tokens_L[one.weights_L > 0].tolist()
        last = int(one.tokens_L[-1])
    assert seen == list(range(1, tokens))
    assert whole.weights_L.sum() == tokens - 1, "the text itself is as it was"


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
