"""Evaluate a finished run again, and chat with it.

In: a run folder. Out: before/after comparisons, or answers.
Left out: exporting it (export/export.py), comparing other models (compare_models.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from tunesmith.core.ranks import SINGLE_PROCESS, Ranks
from tunesmith.core.sampling import MAX_SEED, SamplingParams, check_sampling
from tunesmith.core.types import GenerationRequest, Json
from tunesmith.evaluate.error_analysis import Evaluation, evaluate_results
from tunesmith.evaluate.items import build_eval_items
from tunesmith.evaluate.measure import measure_items
from tunesmith.model.generation.engine import stream_answer
from tunesmith.session.reopen import load_trained_session, reopen_session, starting_model
from tunesmith.session.session import Session

GREEDY = SamplingParams()


def evaluate_run(
    path: Path, *, allow_code: bool = False, ranks: Ranks = SINGLE_PROCESS
) -> Evaluation:
    """Measure a finished adapter run and its starting model again, on the run's own items."""
    session = reopen_session(path)
    session.model.ranks = ranks
    plan = session.plan
    items = build_eval_items(plan, session.inputs, allow_code=allow_code)
    after = measure_items(session, items, step=plan.steps)
    with starting_model(session, plan):
        before = measure_items(session, items, step=0)
    return evaluate_results(before, after, plan, session.inputs)


def chat(
    path: Path,
    questions: Iterable[str],
    sampling: SamplingParams = GREEDY,
    *,
    system: str | None = None,
) -> Iterator[str]:
    """Yield the trained model's answer to each question of one conversation.

    `system` replaces the system message of the training rows; an empty text means none. Each turn
    has its own random numbers, which follow from the seed. Raises InputError for invalid
    `sampling`."""
    check_sampling(sampling)
    session = load_trained_session(path)
    session.model.network.eval()
    renderer = session.renderer
    messages = _build_first_messages(session, system)
    for turn, question in enumerate(questions):
        messages.append({"role": "user", "content": question})
        options = asdict(replace(sampling, seed=(sampling.seed + turn) % MAX_SEED))
        request = GenerationRequest(renderer.encode_prompt(messages), **options)
        pieces = stream_answer(
            session.model, request, decode=renderer.decode, end_ids=renderer.end_ids
        )
        answer = "".join(pieces)
        messages.append({"role": "assistant", "content": answer})
        yield answer


def _build_first_messages(session: Session, system: str | None) -> list[Json]:
    """Return the system message: `system`, or by default that of the training rows, if any."""
    if system is not None:
        return [{"role": "system", "content": system}] if system else []
    if not len(session.rows):
        return []
    first_messages = session.rows.read_example(0).messages
    return [message for message in first_messages[:1] if message["role"] == "system"]
