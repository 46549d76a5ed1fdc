"""What a run does differently after it went back, and which rows are at fault.

    (detector, where it went back to) -> Rollback

Three ways, the first that fits. What forgets is rehearsed more, if general rows are rehearsed at
all. Rows that the good model finds far less likely than all others were the fault, if there are a
few of them: they are left out, by name. Else the learning rate is halved. Left out: when to go
back, and to where (guarded.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import islice
from statistics import median

from tunesmith.core.events import CheckResult, Rollback
from tunesmith.core.types import Document, Plan
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.evaluate.significance import compute_robust_sd
from tunesmith.plan.rehearsal import compute_next_ratio
from tunesmith.session.session import Session
from tunesmith.train.guard.detectors import DETECTORS
from tunesmith.train.loop import TrainingLoop

LR_FACTOR = 0.5  # times the learning rate
OUTLIER_SDS = 6.0  # robust standard deviations over the median row's loss, and twice that
# nats a token over it: once rows are learnt, the hardest have several times the median and are
# still right
MIN_EXCESS_NATS = 0.5
MAX_ROW_SHARE = 0.4  # of those looked at: more are no exception
MAX_DOCUMENTS = 512  # documents at most
MAX_SHOWN_ROWS = 5


def build_rollback(
    session: Session, training: TrainingLoop, verdict: CheckResult, failed_step: int
) -> Rollback:
    """`training` stands at the good checkpoint, `at` is where it had come to."""
    good_step, plan = training.step, session.plan
    shared_fields = {
        "step": failed_step,
        "to": good_step,
        "kind": verdict.kind,
        "evidence": verdict.evidence,
    }
    is_forgetting = verdict.kind in DETECTORS and DETECTORS[verdict.kind].family == "forgetting"
    if is_forgetting and session.rehearsal is not None:
        ratio = _raise_ratio(plan, training)
        return Rollback(
            **shared_fields, change=f"on with {ratio:.0%} of rehearsal", rehearsal_ratio=ratio
        )
    if not is_forgetting and (rows := _find_suspect_rows(session, training, failed_step)):
        shown = ", ".join(rows[:MAX_SHOWN_ROWS]) + (
            f" and {len(rows) - MAX_SHOWN_ROWS} more" if len(rows) > MAX_SHOWN_ROWS else ""
        )
        return Rollback(
            **shared_fields,
            change=f"on without {len(rows)} row{'s' * (len(rows) > 1)}: {shown}",
            rows=rows,
        )
    return Rollback(
        **shared_fields,
        change=f"on with {LR_FACTOR:g} times the learning rate",
        lr_factor=LR_FACTOR,
    )


def _raise_ratio(plan: Plan, training: TrainingLoop) -> float:
    previous_ratio = (
        training.ratio_changes[-1][1] if training.ratio_changes else plan.config.rehearsal_ratio
    )
    return compute_next_ratio(previous_ratio, 1.0, 0.0)


def _find_suspect_rows(
    session: Session, training: TrainingLoop, failed_step: int
) -> tuple[str, ...]:
    """Rows of the steps that went wrong, whose loss under the good model stands out."""
    steps = range(training.step + 1, failed_step + 1)
    skipped_rows = {row for rollback in training.rollbacks for row in rollback.rows}
    task_session = dataclasses.replace(
        session, rehearsal=None
    )  # general text is unlikely once the data is learnt: no fault of it
    suspects = (
        document
        for step in steps
        for document in task_session.load_documents(step)
        if document.is_correct and document.id not in skipped_rows and document.weights_L.any()
    )
    documents = list(islice(suspects, MAX_DOCUMENTS))
    session.model.network.eval()
    return find_outliers(documents, _compute_losses(session, documents))


def _compute_losses(session: Session, documents: Sequence[Document]) -> list[float]:
    plan = session.plan
    likelihoods = compute_nll(
        session.model, documents, plan.config.pack_length, share=plan.config.share_prefixes
    )
    return [nats / tokens for _, nats, tokens in sorted(likelihoods)]


def find_outliers(documents: Sequence[Document], losses: Sequence[float]) -> tuple[str, ...]:
    """Row ids; none when many stand out, or when there are too few to tell."""
    median_loss = median(losses) if losses else 0.0
    spread = compute_robust_sd(losses) if losses else 0.0
    limit = median_loss + max(OUTLIER_SDS * spread, median_loss, MIN_EXCESS_NATS)
    outlier_flags = [loss > limit for loss in losses]
    rows = tuple(
        dict.fromkeys(
            document.id
            for document, is_outlier in zip(documents, outlier_flags, strict=True)
            if is_outlier
        )
    )
    row_ids = {document.id for document in documents}
    return rows if len(rows) <= MAX_ROW_SHARE * len(row_ids) else ()
