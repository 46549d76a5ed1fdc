"""A second model answers a request again, after the client has its answer.

    shadow = Shadow(engine, grammars);  copy = await shadow.answer(request, model)

In: a request that was answered. Out: the other model's answer, or None if there was no time for it.
Its job runs only while no client's does, is interrupted by the next one, and begins again, for at
most SHADOW_SECONDS; an adapter is never loaded for it. So it delays nobody by more than the step
that runs when a client's request comes. Left out: what is compared (route_judge.py)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from tunesmith.serve.bodies import ChatBody, CompletionBody
from tunesmith.serve.errors import RequestError
from tunesmith.serve.generation import NOT_FINITE, Answer, AnswerEngine
from tunesmith.serve.grammars import GrammarCache
from tunesmith.serve.keys import ApiKey
from tunesmith.serve.registry import ServedModel
from tunesmith.serve.requests import make_jobs, render_chat, render_completions
from tunesmith.serve.scheduler import INTERRUPTED, AnswerJob

MAX_SHADOWS = 64  # that run or wait; further ones are dropped
SHADOW_SECONDS = 60.0


@dataclass(frozen=True)
class ShadowRequest:
    """A request that a client has an answer to, with the seed of that answer."""

    body: ChatBody | CompletionBody
    key: ApiKey
    seed: int


class ShadowFailure(Exception):
    """The model gave NaN or infinite numbers."""


class Shadow:
    """The shadows of one server."""

    def __init__(self, engine: AnswerEngine, grammars: GrammarCache) -> None:
        self._engine = engine
        self._grammars = grammars
        self._num_active = 0

    async def answer(
        self, request: ShadowRequest, model: ServedModel
    ) -> tuple[Answer, AnswerJob] | None:
        """Return a model's answer and its job, None if it was dropped. Raises ShadowFailure."""
        if self._num_active >= MAX_SHADOWS:
            return None
        self._num_active += 1
        try:
            async with asyncio.timeout(SHADOW_SECONDS):
                return await self._answer_between(request, model)
        except TimeoutError:
            return None
        except RequestError as error:
            if error.code == NOT_FINITE:
                raise ShadowFailure from None
            return None  # this model cannot take the request, or the server is stopping
        finally:
            self._num_active -= 1

    async def _answer_between(
        self, request: ShadowRequest, model: ServedModel
    ) -> tuple[Answer, AnswerJob] | None:
        """Answer while nobody else asks; begin again whenever somebody has."""
        changes = {"n": None, "seed": request.seed, "stream": None, "stream_options": None}
        body = request.body.model_copy(update=changes)
        if isinstance(body, ChatBody):
            prompts = [await asyncio.to_thread(render_chat, body, model)]
        else:
            prompts = await asyncio.to_thread(render_completions, body, model)
        if not self._engine.registry.is_resident(model):
            return None
        lease = await self._engine.registry.acquire(model)
        try:
            while True:
                jobs = await make_jobs(body, prompts, model, request.key, self._grammars)
                answer = await self._run(jobs[0])
                if answer is not None:
                    return answer, jobs[0]
        finally:
            lease.release()

    async def _run(self, job: AnswerJob) -> Answer | None:
        """Return the answer of a job, None if it was interrupted."""
        answer = Answer(job.request.tokens)
        self._engine.scheduler.submit_background(job)
        try:
            while not answer.finish_reason:
                update = await job.outbox.get()
                if update.error_code == INTERRUPTED:
                    return None
                if update.finish_reason == "error":
                    raise RequestError(503, update.error, code=update.error_code)
                answer.extend(update)
        finally:
            if not answer.finish_reason:
                self._engine.scheduler.cancel(job)
        return answer
