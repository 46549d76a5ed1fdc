"""Durations and values as people read them."""

from __future__ import annotations

from tunesmith.core.formatting import format_duration, format_value


def test_values_read_as_in_a_recipe() -> None:
    values = [format_value(value) for value in (None, True, 1e-4, 16, ("q_proj", "v_proj"), ())]
    assert values == ["-", "true", "0.0001", "16", "q_proj, v_proj", "-"]


def test_durations_have_a_unit() -> None:
    assert [format_duration(seconds) for seconds in (3, 200, 3599.6, 3600)] == [
        "3 s",
        "3:20 min",
        "60:00 min",
        "1:00 h",
    ]
