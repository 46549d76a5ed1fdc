"""Values as people read them."""

from __future__ import annotations

from tunesmith.core.formatting import (
    format_bytes,
    format_count,
    format_duration,
    format_value,
    suggest_name,
)


def test_values_read_as_in_a_recipe() -> None:
    values = [format_value(value) for value in (None, True, 1e-4, 16, ("q_proj", "v_proj"), ())]
    assert values == ["-", "true", "0.0001", "16", "q_proj, v_proj", "-"]


def test_durations_have_a_unit() -> None:
    assert [format_duration(seconds) for seconds in (3, 59.7, 200, 3599.6, 3600)] == [
        "3 s",
        "1 min 0 s",
        "3 min 20 s",
        "1 h 0 min",
        "1 h 0 min",
    ]


def test_bytes_have_a_unit() -> None:
    texts = [format_bytes(number) for number in (999, 1000, 2_500_000, 1_900_000_000)]
    assert texts == ["999 bytes", "1.0 kB", "2.5 MB", "1.9 GB"]


def test_nouns_agree_with_their_number() -> None:
    texts = [format_count(number, "row") for number in (0, 1, 2000)]
    assert texts == ["0 rows", "1 row", "2,000 rows"]


def test_the_closest_name_is_suggested() -> None:
    assert suggest_name("exactmatch", ["rouge_l", "exact_match"]) == "did you mean exact_match?"
    assert suggest_name("x", ["rouge_l"], default="use rouge_l") == "use rouge_l"
