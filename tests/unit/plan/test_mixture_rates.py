"""Rates of mixed tasks: the published rule, to the row."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.core.types import DataReport
from tunesmith.plan.mixture import allocate_rows, decide_mixture, scale_report
from tunesmith.recipe.fields import MixtureConfig

ROWS = {"small": 10, "middle": 90, "large": 900}
REPORT = DataReport(
    "a.jsonl",
    "messages",
    "",
    rows=1000,
    documents=1000,
    tokens=19_000,
    supervised_tokens=1900,
    task_rows=ROWS,
    task_tokens={"small": 100, "middle": 900, "large": 18_000},
)


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({}, ROWS),
        ({"limit": 90}, {"small": 10, "middle": 90, "large": 90}),
        # the roots of 10, 90 and 90 are as 1 : 3 : 3, over 190 places
        ({"limit": 90, "temperature": 2}, {"small": 27, "middle": 82, "large": 81}),
        ({"temperature": 1e20}, {"small": 334, "middle": 333, "large": 333}),
        ({"temperature": 0.01}, {"small": 1, "middle": 1, "large": 1000}),
        ({"limit": 1}, {"small": 1, "middle": 1, "large": 1}),
    ],
    ids=["proportional", "limit", "both", "alike", "cold", "one"],
)
def test_rates_follow_the_rule(wish: dict[str, float], expected: dict[str, int]) -> None:
    assert allocate_rows(MixtureConfig.model_validate(wish), ROWS) == expected


@given(
    st.lists(st.integers(1, 500), min_size=1, max_size=6),
    st.floats(0.5, 50),
    st.one_of(st.none(), st.integers(1, 600)),
)
def test_shares_are_within_a_row_of_the_rates(
    sizes: list[int], temperature: float, limit: int | None
) -> None:
    rows = {str(i): size for i, size in enumerate(sizes)}
    allocated = allocate_rows(MixtureConfig(temperature=temperature, limit=limit), rows)
    capped = [min(size, limit or size) for size in sizes]
    rates = [size ** (1 / temperature) for size in capped]
    exact = [sum(capped) * rate / sum(rates) for rate in rates]
    assert all(
        count == 1 or abs(count - share) <= 1
        for count, share in zip(allocated.values(), exact, strict=True)
    )
    assert 0 <= sum(allocated.values()) - sum(capped) < len(sizes)


def test_the_plan_goes_by_what_an_epoch_holds() -> None:
    choice = decide_mixture(MixtureConfig(limit=100), REPORT)
    assert choice.value == {"small": 10, "middle": 90, "large": 100}
    assert "large 50% of the rows and 67% of the tokens" in choice.reason
    allocated = scale_report(REPORT, choice)
    assert (allocated.rows, allocated.documents, allocated.tokens, allocated.supervised_tokens) == (
        200,
        200,
        3000,
        300,
    )
    assert scale_report(REPORT, None) is REPORT
    everything = decide_mixture(MixtureConfig(), REPORT)
    assert dataclasses.replace(scale_report(REPORT, everything), findings=()) == REPORT
