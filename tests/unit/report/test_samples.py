"""Word by word: the pieces are the text, and the marked ones are not in the other text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from processor_time import check_seconds
from tunesmith.report.samples import MAX_DIFF_WORDS, WORD_PATTERN, mark_differences

TEXTS = st.text(st.sampled_from("ab ,\n\u202e日"), max_size=40)


@given(TEXTS, TEXTS)
def test_pieces_are_the_text_and_common_words_are_in_both(text: str, other: str) -> None:
    pieces = mark_differences(text, other)
    assert "".join(pieces) == text
    common = [word for piece in pieces[::2] for word in WORD_PATTERN.findall(piece)]
    others = iter(WORD_PATTERN.findall(other))
    assert all(word in others for word in common)  # in this order


@pytest.mark.parametrize(
    ("text", "other", "pieces"),
    [
        ("the sum is five", "the sum is 5", ["the sum is ", "five"]),
        ('{"a":1}', '{"a":2}', ['{"a":', "1", "}"]),
        ("new", "", ["", "new"]),
        ("", "gone", [""]),
        ("same", "same", ["same"]),
    ],
)
def test_what_differs_is_marked(text: str, other: str, pieces: list[str]) -> None:
    assert mark_differences(text, other) == pieces


def test_long_texts_take_no_longer_than_their_length() -> None:
    words = [f"w{number}" for number in range(20 * MAX_DIFF_WORDS)]
    text = " ".join(words)
    other = " ".join(["first", *words[:0:-1], "last"])
    check_seconds(lambda: mark_differences(text, other), limit=2)
    assert "".join(mark_differences(text, other)) == text
