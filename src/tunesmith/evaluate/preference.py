"""Evaluate how a model ranks the two answers of a preference pair, by likelihood.

In: documents with sides, a model. Out: MetricValues per row: whether the chosen answer is more
likely, by how much, and the log-probability of each. DPO compares sums over the answers, ORPO and
SimPO means over their tokens; so does this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tunesmith.core.events import CheckResult
from tunesmith.core.types import Comparison, Document
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.evaluate.results import MetricValues
from tunesmith.model.causal_lm import PackedCausalLM

MAX_CHOSEN_DROP = 0.10  # warn when chosen answers get this much less likely (rules.md 6.3)


def measure_preference(
    model: PackedCausalLM,
    documents: Sequence[Document],
    *,
    task: str,
    pack_length: int,
    should_sum: bool,
    share: bool = False,
) -> tuple[MetricValues, ...]:
    """Return accuracy, margin and log-probabilities. `should_sum`: sum over tokens, else mean."""
    logps: dict[tuple[str, str], float] = {}
    for index, nats, tokens in compute_nll(model, documents, pack_length, share=share):
        document = documents[index]
        logps[document.id, document.side] = -nats if should_sum else -nats / tokens
    rows = tuple(document.id for document in documents if document.side == "chosen")
    chosen = [logps[row, "chosen"] for row in rows]
    rejected = [logps[row, "rejected"] for row in rows]
    margins = [better - worse for better, worse in zip(chosen, rejected, strict=True)]
    return (
        MetricValues(
            task, "preference_accuracy", rows, tuple(float(margin > 0) for margin in margins)
        ),
        MetricValues(task, "margin", rows, tuple(margins)),
        MetricValues(task, "chosen_logp", rows, tuple(chosen)),
        MetricValues(task, "rejected_logp", rows, tuple(rejected), higher_is_better=False),
    )


def check_displacement(comparisons: Sequence[Comparison], step: int) -> Iterator[CheckResult]:
    """Yield a warning when the chosen answers became less likely (likelihood displacement)."""
    for comparison in comparisons:
        before = comparison.before.value
        after = comparison.after.value
        drop = (before - after) / max(abs(before), 1e-9)
        if comparison.metric == "chosen_logp" and drop > MAX_CHOSEN_DROP:
            change = f"log-probability {before:.2f} -> {after:.2f}, {drop:.0%} lower"
            fix = "raise nll_coefficient or beta, or lower learning_rate"
            evidence = f"{comparison.task}: {change}; {fix}"
            yield CheckResult("chosen answers less likely", "warn", evidence, step)
