"""What changes after a rollback: rehearsal where there is some, else rows, else the rate."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from plan_configs import make_config
from tunesmith.core.events import CheckResult, Rollback
from tunesmith.core.types import Document
from tunesmith.plan.rehearsal import compute_next_ratio
from tunesmith.train.guard.rollback import build_rollback, find_outliers


def make_training(*changes: tuple[int, float]) -> Any:
    """A loop that was restored to step 20, as far as a rollback reads it."""
    return SimpleNamespace(step=20, ratio_changes=changes, rollbacks=())


def make_session(ratio: float | None) -> Any:
    rehearsal = None if ratio is None else object()
    plan = SimpleNamespace(config=make_config(rehearsal_ratio=ratio))
    return SimpleNamespace(plan=plan, rehearsal=rehearsal)


@pytest.mark.parametrize(
    ("changes", "before"), [((), 0.1), (((5, 0.2),), 0.2), (((5, 0.2), (9, 0.3)), 0.3)]
)
def test_forgetting_raises_the_latest_rehearsal_ratio(
    changes: tuple[tuple[int, float], ...], before: float
) -> None:
    verdict = CheckResult("forgetting", "rollback", "general text lost 0.05", 30)
    rollback = build_rollback(make_session(0.1), make_training(*changes), verdict, 30)
    ratio = compute_next_ratio(before, 1.0, 0.0)
    assert ratio > before
    assert rollback == Rollback(
        step=30,
        to=20,
        kind="forgetting",
        evidence="general text lost 0.05",
        change=f"continuing with {ratio:.0%} rehearsal",
        rehearsal_ratio=ratio,
    )


def test_forgetting_without_rehearsal_halves_the_rate() -> None:
    verdict = CheckResult("forgetting", "rollback", "general text lost 0.05", 30)
    rollback = build_rollback(make_session(None), make_training(), verdict, 30)
    assert (rollback.lr_factor, rollback.rehearsal_ratio, rollback.rows) == (0.5, None, ())
    assert rollback.change == "continuing with 0.5 times the learning rate"


# ---------------------------------------------------------------- limits of an outlier


def make_documents(*names: str) -> list[Document]:
    tokens_L = np.zeros(3, np.int32)
    return [Document(name, tokens_L, tokens_L.astype(np.float32)) for name in names]


@pytest.mark.parametrize(
    ("usual", "losses", "is_outlier"),
    [
        (1.0, 2.001, True),  # twice the median
        (1.0, 1.999, False),
        (0.2, 0.701, True),  # half a nat more
        (0.2, 0.699, False),
    ],
)
def test_an_outlier_is_twice_the_median_and_half_a_nat_more(
    usual: float, losses: float, is_outlier: bool
) -> None:
    documents = make_documents("a", "b", "c", "d", "e")
    rows = find_outliers(documents, [usual] * 4 + [losses])
    assert rows == (("e",) if is_outlier else ())


@pytest.mark.parametrize(("loss", "is_outlier"), [(4.56, True), (4.55, False)])
def test_an_outlier_is_six_robust_deviations_above_the_median(
    loss: float, is_outlier: bool
) -> None:
    losses = [0.6, 1.4, 0.6, 1.4, 1.0, 1.0, loss]  # of a median deviation of 0.4
    rows = find_outliers(make_documents(*"abcdefg"), losses)
    assert rows == (("g",) if is_outlier else ())


@pytest.mark.parametrize(("count", "is_exception"), [(2, True), (3, False)])
def test_more_than_two_fifths_of_the_rows_are_no_exception(count: int, is_exception: bool) -> None:
    documents = make_documents("a", "b", "c", "d", "e")
    losses = [*[0.1] * (5 - count), *[9.0] * count]
    assert len(find_outliers(documents, losses)) == (count if is_exception else 0)


def test_a_row_of_two_documents_counts_once() -> None:
    documents = make_documents("a", "a", "b", "b", "c", "d", "d")
    assert find_outliers(documents, [9.0, 9.0, 0.1, 0.1, 0.1, 0.1, 0.1]) == ("a",)
    # 2 of 4 rows, though 2 of 7 documents
    assert find_outliers(documents, [9.0, 0.1, 9.0, 0.1, 0.1, 0.1, 0.1]) == ()
