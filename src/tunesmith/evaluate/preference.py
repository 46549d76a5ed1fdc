"""How a model ranks the two answers of a pair: by their likelihood, nothing is generated.

In: documents with sides, a LanguageModel. Out: Measurements by row: is the chosen answer the
likelier one, by how much, and how likely is each. DPO compares whole answers, ORPO and SimPO the
mean of their tokens; so do these. Also here: the log-probabilities before training that DPO
compares with, kept in the run folder when no switch brings them back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tunesmith.core.events import CheckResult
from tunesmith.core.types import Comparison, Document
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.evaluate.results import MetricValues
from tunesmith.model.causal_lm import PackedCausalLM

MAX_CHOSEN_DROP = 0.10  # rules.md 6.3: an alarm when chosen answers get this much less likely


def measure_preference(
    model: PackedCausalLM,
    documents: Sequence[Document],
    *,
    task: str,
    pack_length: int,
    should_sum: bool,
    share: bool = False,
) -> tuple[MetricValues, ...]:
    """`whole`: compare sums over the answers, else means over their tokens. Items are rows."""
    logp: dict[tuple[str, str], float] = {}
    for i, nats, tokens in compute_nll(model, documents, pack_length, share=share):
        logp[documents[i].id, documents[i].side] = -nats / (1 if should_sum else tokens)
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
        MetricValues(
            task, metric, tuple(rows), tuple(row_values), higher_is_better=metric != "rejected_logp"
        )
        for metric, row_values in values.items()
    )


def check_displacement(comparisons: Sequence[Comparison], step: int) -> Iterator[CheckResult]:
    """A warning when the chosen answers became less likely: both sides sink, and something else
    takes the room."""
    for comparison in comparisons:
        drop = (comparison.before.value - comparison.after.value) / max(
            abs(comparison.before.value), 1e-9
        )
        if comparison.metric == "chosen_logp" and drop > MAX_CHOSEN_DROP:
            evidence = f"{comparison.task}: log-probability {comparison.before.value:.2f} -> {comparison.after.value:.2f}, {drop:.0%} lower"
            fix = "raise nll_coefficient or beta, or lower learning_rate"
            yield CheckResult("chosen answers less likely", "warn", f"{evidence}; {fix}", step)
