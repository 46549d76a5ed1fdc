"""Chat with the trained model of a finished run.

In: a run folder, questions. Out: answers. Left out: serving it (serve/).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from tunesmith.core.sampling import MAX_SEED, SamplingParams, check_sampling
from tunesmith.core.types import GenerationRequest, Json
from tunesmith.model.generation.engine import stream_answer
from tunesmith.session.reopen import load_trained_session
from tunesmith.session.session import Session

GREEDY = SamplingParams()


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
