"""What a run does differently after it went back, and which rows are at fault.

    (detector, where it went back to) -> Rollback

Three ways, the first that fits. What forgets is rehearsed more, if general rows are rehearsed at all. Rows that the
good model finds far less likely than all others were the fault, if there are a few of them: they are left out, by name.
Else the learning rate is halved. Left out: when to go back, and to where (guarded.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import islice
from statistics import median

from tunesmith.core.events import Rollback, Verdict
from tunesmith.core.types import Document, Plan
from tunesmith.evaluate.loglikelihood import negative_log_likelihoods
from tunesmith.evaluate.significance import robust_sd
from tunesmith.plan.rehearsal import next_ratio
from tunesmith.session.session import Workbench
from tunesmith.train.guard.detectors import DETECTORS
from tunesmith.train.loop import Training

LOWER = 0.5  # times the learning rate
FAR = 6.0  # robust standard deviations over the median row's loss, and twice that
LEAST = 0.5  # nats a token over it: once rows are learnt, the hardest have several times the median and are still right
MOST_ROWS = 0.4  # of those looked at: more are no exception
LOOKED_AT = 512  # documents at most
SHOWN = 5


def rollback_to(bench: Workbench, training: Training, verdict: Verdict, at: int) -> Rollback:
    """`training` stands at the good checkpoint, `at` is where it had come to."""
    to, plan = training.step, bench.plan
    told = {"step": at, "to": to, "kind": verdict.kind, "evidence": verdict.evidence}
    forgets = verdict.kind in DETECTORS and DETECTORS[verdict.kind].family == "forgetting"
    if forgets and bench.rehearsal is not None:
        ratio = _more(plan, training)
        return Rollback(**told, change=f"on with {ratio:.0%} of rehearsal", ratio=ratio)
    if not forgets and (rows := _at_fault(bench, training, at)):
        shown = ", ".join(rows[:SHOWN]) + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")
        return Rollback(**told, change=f"on without {len(rows)} row{'s' * (len(rows) > 1)}: {shown}", rows=rows)
    return Rollback(**told, change=f"on with {LOWER:g} times the learning rate", factor=LOWER)


def _more(plan: Plan, training: Training) -> float:
    was = training.changes[-1][1] if training.changes else plan["rehearsal_ratio"]
    return next_ratio(was, 1.0, 0.0)


def _at_fault(bench: Workbench, training: Training, at: int) -> tuple[str, ...]:
    """Rows of the steps that went wrong, whose loss under the good model stands out."""
    steps = range(training.step + 1, at + 1)
    left_out = {row for one in training.rollbacks for row in one.rows}
    own = dataclasses.replace(bench, rehearsal=None)  # general text is unlikely once the data is learnt: no fault of it
    suspects = (
        document
        for step in steps
        for document in own.documents_of(step)
        if document.right and document.id not in left_out and document.weights_L.any()
    )
    documents = list(islice(suspects, LOOKED_AT))
    bench.model.network.eval()
    return outliers(documents, _losses(bench, documents))


def _losses(bench: Workbench, documents: Sequence[Document]) -> list[float]:
    plan = bench.plan
    found = negative_log_likelihoods(bench.model, documents, plan["pack_length"], share=plan["share_prefixes"])
    return [nats / tokens for _, nats, tokens in sorted(found)]


def outliers(documents: Sequence[Document], losses: Sequence[float]) -> tuple[str, ...]:
    """Row ids; none when many stand out, or when there are too few to tell."""
    middle = median(losses) if losses else 0.0
    spread = robust_sd(losses) if losses else 0.0
    limit = middle + max(FAR * spread, middle, LEAST)
    far = [loss > limit for loss in losses]
    rows = tuple(dict.fromkeys(document.id for document, out in zip(documents, far, strict=True) if out))
    every = {document.id for document in documents}
    return rows if len(rows) <= MOST_ROWS * len(every) else ()
