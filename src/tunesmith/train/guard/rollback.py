"""What changes after a rollback, and which rows to skip.

    build_rollback(session, training at the good checkpoint, verdict, failed step) -> Rollback

The first of three changes that applies: 1. Forgetting, with rehearsal data: raise the rehearsal
ratio. 2. A few rows of the failed steps with a loss far above the others', under the good model:
skip them. 3. Otherwise: halve the learning rate.

Left out: when to roll back, and to which checkpoint (guarded_loop.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import median

from tunesmith.core.events import CheckResult, Rollback
from tunesmith.core.types import Document
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.evaluate.statistics import compute_robust_sd
from tunesmith.plan.rehearsal import compute_next_ratio
from tunesmith.session.session import Session
from tunesmith.train.guard.detectors import DETECTORS
from tunesmith.train.loop import TrainingLoop

LR_FACTOR = 0.5
# A suspect row's loss exceeds the median by so many robust standard deviations, and is twice it.
OUTLIER_SDS = 6.0
# And by so many nats per token: once rows are learned, the hardest correct ones have several times
# the median.
MIN_EXCESS_NATS = 0.5
MAX_ROW_SHARE = 0.4  # more suspects than this share of the rows are no exception
MAX_DOCUMENTS = 512
MAX_SHOWN_ROWS = 5


def build_rollback(
    session: Session, training: TrainingLoop, verdict: CheckResult, failed_step: int
) -> Rollback:
    """Return the rollback from `failed_step` to the step that `training` was restored to."""
    rollback = Rollback(
        step=failed_step, to=training.step, kind=verdict.kind, evidence=verdict.evidence, change=""
    )
    is_forgetting = verdict.kind in DETECTORS and DETECTORS[verdict.kind].family == "forgetting"
    if is_forgetting and session.rehearsal is not None:
        ratio = session.plan.config.rehearsal_ratio
        if training.ratio_changes:
            ratio = training.ratio_changes[-1][1]
        assert ratio is not None, "rehearsal data comes with a ratio"
        ratio = compute_next_ratio(ratio, 1.0, 0.0)
        change = f"continuing with {ratio:.0%} rehearsal"
        return dataclasses.replace(rollback, change=change, rehearsal_ratio=ratio)
    rows = () if is_forgetting else _find_suspect_rows(session, training, failed_step)
    if rows:
        noun = "row" if len(rows) == 1 else "rows"
        change = f"continuing without {len(rows)} {noun}: {', '.join(rows[:MAX_SHOWN_ROWS])}"
        if len(rows) > MAX_SHOWN_ROWS:
            change += f" and {len(rows) - MAX_SHOWN_ROWS} more"
        return dataclasses.replace(rollback, change=change, rows=rows)
    change = f"continuing with {LR_FACTOR:g} times the learning rate"
    return dataclasses.replace(rollback, change=change, lr_factor=LR_FACTOR)


def _find_suspect_rows(
    session: Session, training: TrainingLoop, failed_step: int
) -> tuple[str, ...]:
    """Return rows of the failed steps with an outlying loss under the good model."""
    skipped_rows = {row for rollback in training.rollbacks for row in rollback.rows}
    # General text is unlikely once the data is learned, which is no fault of it.
    task_session = dataclasses.replace(session, rehearsal=None)
    documents: list[Document] = []
    for step in range(training.step + 1, failed_step + 1):
        if len(documents) == MAX_DOCUMENTS:
            break
        for document in task_session.load_documents(step):
            is_trained = document.is_correct and document.weights_L.any()
            if is_trained and document.id not in skipped_rows and len(documents) < MAX_DOCUMENTS:
                documents.append(document)
    session.model.network.eval()
    config = session.plan.config
    likelihoods = compute_nll(
        session.model, documents, config.pack_length, share=config.share_prefixes
    )
    losses = [nats / tokens for _, nats, tokens in sorted(likelihoods)]
    return find_outliers(documents, losses)


def find_outliers(documents: Sequence[Document], losses: Sequence[float]) -> tuple[str, ...]:
    """Return the ids of rows with an outlying loss; none if there are many, or too few rows."""
    if not losses:
        return ()
    median_loss = median(losses)
    excess = max(OUTLIER_SDS * compute_robust_sd(losses), median_loss, MIN_EXCESS_NATS)
    rows: dict[str, None] = {}  # an ordered set
    for document, loss in zip(documents, losses, strict=True):
        if loss > median_loss + excess:
            rows[document.id] = None
    num_rows = len({document.id for document in documents})
    return tuple(rows) if len(rows) <= MAX_ROW_SHARE * num_rows else ()
