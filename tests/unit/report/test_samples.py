"""Word by word: the pieces are the text, and the marked ones are not in the other text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.report.samples import MAX_DIFF_WORDS, WORD_PATTERN, mark_similar

TEXTS = st.text(st.sampled_from("ab ,\n\u202e日"), max_size=40)


@given(TEXTS, TEXTS)
def test_pieces_are_the_text_and_common_words_are_in_both(text: str, other: str) -> None:
    pieces = mark_similar(text, other)
    assert "".join(pieces) == text
    if len(pieces) > 1:
        common = [word for piece in pieces[::2] for word in WORD_PATTERN.findall(piece)]
        others = iter(WORD_PATTERN.findall(other))
        assert all(word in others for word in common)  # in this order


@pytest.mark.parametrize(
    ("text", "other", "pieces"),
    [
        ("the sum is five", "the sum is 5", ["the sum is ", "five"]),
        ('{"a":1}', '{"a":2}', ['{"a":', "1", "}"]),
        ("one two three", "seven eight nine six", ["one two three"]),
        ("", "gone", [""]),
        ("same", "same", ["same"]),
        ("a " * MAX_DIFF_WORDS, "a b", ["a " * MAX_DIFF_WORDS]),
    ],
)
def test_what_differs_is_marked(text: str, other: str, pieces: list[str]) -> None:
    assert mark_similar(text, other) == pieces
