"""What changes after a rollback: rehearsal where there is some, else rows, else the rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from plan_configs import make_config
from tiny_models import collate_documents, make_tiny_document, make_tiny_model
from tunesmith.core.events import CheckResult, Rollback
from tunesmith.core.types import Document
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.plan.rehearsal import compute_next_ratio
from tunesmith.train.guard.guarded_loop import build_rollback, find_outliers


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


# ---------------------------------------------------------------- rows of the failed steps


@dataclasses.dataclass(frozen=True)
class StepsSession:
    """A model and the documents of each step, as far as a rollback reads a session."""

    model: PackedCausalLM
    documents: dict[int, list[Document]]
    rehearsal: object = "general text"
    plan: Any = dataclasses.field(default_factory=lambda: SimpleNamespace(config=make_config()))

    def load_documents(self, step: int) -> list[Document]:
        assert self.rehearsal is None, "general text is not suspected"
        return self.documents[step]


@pytest.fixture(scope="module")
def model() -> PackedCausalLM:
    """A model that is sure of its next token."""
    sure = make_tiny_model()
    sure.head.weight.data *= 200
    sure.network.eval()
    return sure


def make_row(model: PackedCausalLM, number: int, *, is_hard: bool, targets: int = 1) -> Document:
    """A row whose last tokens are the likeliest, or the least likely ones of the model."""
    tokens_L = make_tiny_document(12, number).tokens_L.copy()
    weights_L = np.zeros(len(tokens_L), np.float32)
    weights_L[-targets:] = 1
    for position in range(len(tokens_L) - targets, len(tokens_L)):
        weights_L[position] = 1
        batch = collate_documents([Document("r", tokens_L, weights_L)])
        with torch.no_grad():
            logits = model.head.compute_logits(model.compute_hidden(batch))
        row = logits[batch.positions_S.tolist().index(position - 1)]
        tokens_L[position] = int(row.argmin() if is_hard else row.argmax())
    return Document(f"rows:{number}", tokens_L, weights_L)


def make_steps(model: PackedCausalLM, hard: dict[int, int], count: int = 6) -> StepsSession:
    """Make steps 19 to 32 of `count` rows; `hard` is step -> how many of them are wrong."""
    easy = make_row(model, 1, is_hard=False)
    wrong = make_row(model, 2, is_hard=True)
    steps: dict[int, list[Document]] = {}
    for step in range(19, 33):
        rows: list[Document] = []
        for number in range(count):
            kind = wrong if number < hard.get(step, 0) else easy
            rows.append(dataclasses.replace(kind, id=f"{step}:{number}"))
        steps[step] = rows
    return StepsSession(model, steps)


SPIKE = CheckResult("loss spike", "rollback", "loss 9", 30)


def build(session: StepsSession, rollbacks: Sequence[Rollback] = (), **changed: Any) -> Rollback:
    training: Any = SimpleNamespace(step=20, ratio_changes=(), rollbacks=rollbacks)
    any_session: Any = session
    verdict = dataclasses.replace(SPIKE, **changed)
    return build_rollback(any_session, training, verdict, 30)


def test_rows_of_the_failed_steps_that_stand_out_are_skipped(model: PackedCausalLM) -> None:
    session = make_steps(model, {20: 2, 21: 1, 30: 1, 31: 2})
    rollback = build(session)
    assert rollback.rows == ("21:0", "30:0")
    assert rollback.change == "continuing without 2 rows: 21:0, 30:0"
    assert (rollback.lr_factor, rollback.step, rollback.to) == (1.0, 30, 20)
    known = Rollback(25, 10, "loss spike", "", "", rows=("21:0",))
    assert build(session, [known]).change == "continuing without 1 row: 30:0"
    for drift in ("high KL", "repetition", "gibberish"):
        drifted = build(session, kind=drift)
        assert (drifted.rows, drifted.lr_factor) == ((), 0.5), "its rows are not the cause"
    assert build(make_steps(model, {})).rows == ()
    assert build(make_steps(model, {})).lr_factor == 0.5


@pytest.mark.parametrize(("count", "more"), [(5, ""), (6, " and 1 more"), (7, " and 2 more")])
def test_five_rows_are_named(count: int, more: str, model: PackedCausalLM) -> None:
    rollback = build(make_steps(model, {25: count}, count=8))
    names = ", ".join(f"25:{number}" for number in range(5))
    assert rollback.change == f"continuing without {count} rows: {names}{more}"


def test_losses_are_those_of_a_token(model: PackedCausalLM) -> None:
    """A long row has more nats, and is no harder."""
    session = make_steps(model, {})
    mild = dataclasses.replace(make_row(model, 3, is_hard=True, targets=2), id="mild")
    long = dataclasses.replace(make_row(model, 3, is_hard=True, targets=8), id="long")
    for step in range(21, 31):
        session.documents[step] = [dataclasses.replace(mild, id=f"{step}:{n}") for n in range(4)]
    session.documents[25].append(long)
    assert build(session).rows == ()


def test_untrained_and_incorrect_rows_are_not_suspected(model: PackedCausalLM) -> None:
    session = make_steps(model, {25: 2})
    untrained, banned = session.documents[25][:2]
    session.documents[25][0] = dataclasses.replace(untrained, weights_L=untrained.weights_L * 0)
    session.documents[25][1] = dataclasses.replace(banned, side="banned")
    assert build(session).rows == ()


def test_at_most_512_documents_are_judged(model: PackedCausalLM) -> None:
    session = make_steps(model, {}, count=130)  # four steps are 520 documents
    wrong = make_row(model, 2, is_hard=True)
    session.documents[24][121] = dataclasses.replace(wrong, id="512th")
    session.documents[24][122] = dataclasses.replace(wrong, id="513th")
    session.documents[25][0] = dataclasses.replace(wrong, id="521st")
    assert build(session).rows == ("512th",)


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
