"""Test whether lost general ability returns with in-context text of the same domain.

    python experiments/relearning/relearning.py RUN

A model that has lost a domain also predicts badly in the middle of such text. A model that has only
learned to expect something else recognises the domain from a few texts, and predicts the next one
as well as before training. Each text of `retention_data` is evaluated alone and after NUM_SHOTS
others of its domain, by the starting model and by the trained one. Nothing is trained.

Out: per domain, two comparisons of bits per byte (alone, after others), and the share recovered.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tunesmith.core.errors import InputError
from tunesmith.core.events import GENERAL_TASK
from tunesmith.core.types import Comparison, Document
from tunesmith.evaluate.general_text import GeneralText, TokenizeFn
from tunesmith.evaluate.items import load_general_texts
from tunesmith.evaluate.loglikelihood import compute_nll
from tunesmith.evaluate.measure import compute_text_window
from tunesmith.evaluate.metrics import BITS_PER_BYTE
from tunesmith.evaluate.results import (
    EvalResults,
    MetricValues,
    compare_results,
    format_comparison,
)
from tunesmith.evaluate.statistics import judge_comparison
from tunesmith.model.adapters import scaled_adapter
from tunesmith.model.causal_lm import PackedCausalLM
from tunesmith.session.reopen import load_trained_session
from tunesmith.session.session import Session

NUM_SHOTS = 2


def compare_relearning(run_dir: Path) -> tuple[Comparison, ...]:
    """Return two comparisons per domain: its texts alone, and after others.

    Raises InputError for a run without general text.
    """
    session = load_trained_session(run_dir)
    texts = load_general_texts(session.inputs)
    if not texts:
        message = "relearning needs general text, and this run has none"
        fix = "add `retention_data` to the recipe and train again"
        raise InputError(message, where=str(run_dir), fix=fix)
    after = _measure_domains(session, texts)
    with scaled_adapter(session.model.network, 0):  # the base
        before = _measure_domains(session, texts)
    return compare_results(before, after, step=session.plan.steps)


def format_relearning(comparisons: Sequence[Comparison]) -> list[str]:
    """Return a line for each domain that got worse: how much of the loss recovers with shots."""
    lines: list[str] = []
    for alone, after_shots in zip(comparisons[::2], comparisons[1::2], strict=True):
        if judge_comparison(alone) == "worse":
            recovered = max(0.0, 1 - after_shots.difference / alone.difference)
            changes = f"{alone.difference:+.3f} alone, {after_shots.difference:+.3f} after others"
            lines.append(f"{alone.task}: {changes}: {recovered:.0%} of the loss recovered")
    return lines or ["no domain of general text got significantly worse: nothing to recover"]


def _measure_domains(session: Session, texts: Sequence[GeneralText]) -> EvalResults:
    session.model.network.eval()
    measurements: list[MetricValues] = []
    for domain in dict.fromkeys(text.domain for text in texts):
        domain_texts = [text for text in texts if text.domain == domain]
        for shots in (0, NUM_SHOTS):
            suffix = f", after {shots} other texts" if shots else ""
            measurements.append(
                measure_after_shots(
                    session.model,
                    domain_texts,
                    session.renderer.encode_text,
                    shots=shots,
                    window=compute_text_window(session),
                    task=f"{GENERAL_TASK}: {domain}{suffix}",
                )
            )
    return EvalResults(tuple(measurements))


def measure_after_shots(
    model: PackedCausalLM,
    texts: Sequence[GeneralText],
    tokenize: TokenizeFn,
    *,
    shots: int,
    window: int,
    task: str,
) -> MetricValues:
    """Return bits per byte of each text after the next `shots` texts of the list.

    The targets do not depend on `shots`. What exceeds `window` tokens is dropped: the start of the
    shots, the end of the text.
    """
    tokens = [list(tokenize(text.text))[:window] for text in texts]
    documents: list[Document] = []
    for index, target_tokens in enumerate(tokens):
        context: list[int] = []
        for shot in range(1, shots + 1):
            context += tokens[(index + shot) % len(texts)]
        context = context[max(0, len(context) + len(target_tokens) - window) :]
        weights_L = np.zeros(len(context) + len(target_tokens), np.float32)
        weights_L[len(context) + 1 :] = 1
        tokens_L = np.array([*context, *target_tokens], np.int32)
        documents.append(Document(texts[index].id, tokens_L, weights_L))
    ids: list[str] = []
    values: list[float] = []
    for index, nats, _ in sorted(compute_nll(model, documents, window)):
        ids.append(texts[index].id)
        values.append(nats / math.log(2) / len(texts[index].text.encode()))
    return MetricValues(task, BITS_PER_BYTE, tuple(ids), tuple(values), higher_is_better=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, help="Folder of a finished run with retention_data.")
    comparisons = compare_relearning(parser.parse_args().run)
    for comparison in comparisons:
        print(format_comparison(comparison))
    print(*format_relearning(comparisons), sep="\n")


if __name__ == "__main__":
    main()
