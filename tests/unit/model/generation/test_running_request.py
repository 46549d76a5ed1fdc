"""The text of a growing answer: what is settled never changes, and its cost does not grow."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel

from tunesmith.core.types import GenerationRequest
from tunesmith.model.generation.running_request import WINDOW_TOKENS, RunningRequest


def decode_bytes(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def run(tokens: Sequence[int], stop: tuple[str, ...] = ()) -> tuple[RunningRequest, list[str]]:
    row = RunningRequest(
        GenerationRequest((1,), stop=stop), decode_bytes, (), max_tokens=len(tokens)
    )
    pieces: list[str] = []
    for token in tokens:
        row.add_token(token)
        pieces.append(row.new_text)
        if row.finish_reason:
            break
    return row, pieces


@settings(deadline=None)
@given(some.text(min_size=1, max_size=60))
def test_pieces_join_to_the_text_and_hold_no_half_character(text: str) -> None:
    row, pieces = run(text.encode())
    assert "".join(pieces) == row.text == text
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@pytest.mark.promise
@settings(deadline=None)
@given(some.text("ab ", min_size=1, max_size=80), some.lists(some.text("ab ", min_size=1)))
def test_the_first_stop_string_ends_the_text_wherever_it_is(text: str, stops: list[str]) -> None:
    row, pieces = run(text.encode(), tuple(stops))
    for end in range(1, len(text) + 1):  # a stop string ends the answer as soon as it is complete
        starts = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if starts:
            assert (row.finish_reason, row.text) == ("stop", text[: min(starts)])
            assert len(row.tokens) == end
            break
    else:
        assert (row.finish_reason, row.text) == ("length", text)
    assert "".join(pieces) == row.text


def test_a_cut_character_is_shown_only_at_the_end() -> None:
    row, pieces = run("ab\N{HAMMER}".encode()[:-1])
    assert pieces == ["a", "b", "", "", "\ufffd"]
    assert row.text == "ab\ufffd"


def test_a_token_costs_the_same_at_any_length() -> None:
    longest = 0

    def decode(tokens: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode_bytes(tokens)

    row = RunningRequest(GenerationRequest((1,)), decode, (300,), max_tokens=2000)
    for token in [*(b"abc " * 300), 300]:
        row.add_token(token)
    assert (row.finish_reason, row.text) == ("end", "abc " * 300)
    assert longest <= 2 * WINDOW_TOKENS + 1


def make_sentencepiece() -> Tokenizer:
    """Words with a mark for their blank, and bytes: the first blank of a text is not decoded, and
    bytes are replaced up to the next word while they make no character."""
    pieces = ["\u2581a", "b", "\u2581", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="b"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


@settings(deadline=None, max_examples=50)
@given(some.lists(some.sampled_from(["a", "b", " ", "\N{HAMMER}", "\u00e9"]), max_size=120))
def test_blanks_and_bytes_of_sentencepiece_are_settled_like_the_whole(parts: list[str]) -> None:
    tokenizer = make_sentencepiece()
    tokens: list[int] = []
    for part in parts:
        pieces = {"a": ["\u2581a"], "b": ["b"], " ": ["\u2581"]}.get(part)
        pieces = pieces or [f"<0x{byte:02X}>" for byte in part.encode()]
        tokens += [tokenizer.token_to_id(piece) for piece in pieces]
    row = RunningRequest(GenerationRequest((1,)), tokenizer.decode, (999,), max_tokens=1000)
    pieces = []
    for token in [*tokens, 999]:
        row.add_token(token)
        pieces.append(row.new_text)
    assert "".join(pieces) == row.text == tokenizer.decode(tokens)
    assert "\ufffd" not in row.text
