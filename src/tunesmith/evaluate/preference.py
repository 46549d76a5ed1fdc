"""How a model ranks the two answers of a pair: by their likelihood, nothing is generated.

In: documents with sides, a LanguageModel. Out: Measurements by row: is the chosen answer the likelier one, by how much,
and how likely is each. DPO compares whole answers, ORPO and SimPO the mean of their tokens; so do these. Also here: the
log-probabilities before training that DPO compares with, kept in the run folder when no switch brings them back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from tunesmith.core.events import Verdict
from tunesmith.core.json_io import read_json
from tunesmith.core.run_dir import RunFolder
from tunesmith.core.types import Comparison, Document
from tunesmith.data.sampler import Schedule
from tunesmith.evaluate.loglikelihood import negative_log_likelihoods
from tunesmith.evaluate.results import Measurement
from tunesmith.model.causal_lm import LanguageModel
from tunesmith.session.session import Workbench
from tunesmith.train.losses import REFERENCED

REFERENCE = "reference.json"  # row -> log-probabilities of its documents before training
ROWS_AT_ONCE = 64
DISPLACED = 0.10  # rules.md 6.3: an alarm when chosen answers get this much less likely


def preference(
    model: LanguageModel,
    documents: Sequence[Document],
    *,
    task: str,
    pack_length: int,
    whole: bool,
    share: bool = False,
) -> tuple[Measurement, ...]:
    """`whole`: compare sums over the answers, else means over their tokens. Items are rows."""
    logp: dict[tuple[str, str], float] = {}
    for i, nats, tokens in negative_log_likelihoods(model, documents, pack_length, share=share):
        logp[documents[i].id, documents[i].side] = -nats / (1 if whole else tokens)
    rows = [document.id for document in documents if document.side == "chosen"]
    chosen, rejected = ([logp[row, side] for row in rows] for side in ("chosen", "rejected"))
    margins = [better - worse for better, worse in zip(chosen, rejected, strict=True)]
    values = {
        "preference_accuracy": [float(margin > 0) for margin in margins],
        "margin": margins,
        "chosen_logp": chosen,
        "rejected_logp": rejected,
    }
    return tuple(
        Measurement(task, metric, tuple(rows), tuple(found), higher_is_better=metric != "rejected_logp")
        for metric, found in values.items()
    )


def displaced(comparisons: Sequence[Comparison], step: int) -> Iterator[Verdict]:
    """A warning when the chosen answers became less likely: both sides sink, and something else takes the room."""
    for one in comparisons:
        fall = (one.before.value - one.after.value) / max(abs(one.before.value), 1e-9)
        if one.metric == "chosen_logp" and fall > DISPLACED:
            evidence = f"{one.task}: log-probability {one.before.value:.2f} -> {one.after.value:.2f}, {fall:.0%} lower"
            fix = "raise nll_coefficient or beta, or lower learning_rate"
            yield Verdict("chosen answers less likely", "warn", f"{evidence}; {fix}", step)


# ---------------------------------------------------------------- before training


def with_references(bench: Workbench, folder: RunFolder) -> Workbench:
    """The bench with what DPO compares with, computed once and read back by every later attempt. A fresh adapter needs
    none: switched off, it leaves the base. Call it before any weight has changed."""
    plan = bench.plan
    fresh = plan["method"] != "full" and "adapter_from" not in plan.choices
    if fresh or "loss" not in plan.choices or plan["loss"] not in REFERENCED:
        return bench
    if not (folder.path / REFERENCE).exists():
        folder.write_json(REFERENCE, _references(bench))
    kept = read_json(folder.path / REFERENCE)
    return dataclasses.replace(bench, references={int(row): values for row, values in kept.items()})


def _references(bench: Workbench) -> dict[int, list[float]]:
    bench.model.network.eval()
    schedule = bench.schedule
    assert isinstance(schedule, Schedule), "pairs are rows"
    rows = sorted({row for step in range(1, bench.plan.steps + 1) for row in schedule.rows_of(step)})
    found: dict[int, list[float]] = {}
    for start in range(0, len(rows), ROWS_AT_ONCE):
        at_once = rows[start : start + ROWS_AT_ONCE]
        owned = [(row, document) for row in at_once for document in bench.rows.documents(row)]
        documents = [document for _, document in owned]
        plan = bench.plan
        found_here = negative_log_likelihoods(bench.model, documents, plan["pack_length"], share=plan["share_prefixes"])
        for i, nats, _ in sorted(found_here):
            found.setdefault(owned[i][0], []).append(-nats)
    return found
