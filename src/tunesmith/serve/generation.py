"""The answers of one request, from the scheduler to a response.

    generation = Generation(engine, model, lease, jobs, answer_format, record)
    generation.submit();  await generation.run(), or: async for event in generation.events(...)

In: jobs that share one outbox, and a formatter of chat or text completions. Out: one JSON body, or
server-sent events. However it ends, jobs are cancelled, the lease is released and the record of
the access log is filled. Left out: what the jobs are (requests.py), their format (formats.py)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from tunesmith.core.types import Json, TokenLogprobs
from tunesmith.serve.access_log import AccessRecord
from tunesmith.serve.errors import RequestError
from tunesmith.serve.formats import AnswerFormat, format_usage
from tunesmith.serve.metrics import ServerMetrics
from tunesmith.serve.registry import Lease, Registry, ServedModel
from tunesmith.serve.scheduler import AnswerJob, AnswerUpdate, Scheduler
from tunesmith.serve.streams import LAST_EVENT, NO_EVENT, encode_event

NOT_FINITE = "model_not_finite"
TIMEOUT = "timeout"
ERROR_STATUS = {NOT_FINITE: 500, "invalid_request": 400}  # others: 503


@dataclass
class Answer:
    """An answer as far as it is made."""

    prompt_tokens: tuple[int, ...]
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str = ""
    cached_tokens: int = 0

    def extend(self, update: AnswerUpdate) -> None:
        self.text += update.text
        self.tokens += update.tokens
        self.logprobs += update.logprobs
        self.prompt_logprobs += update.prompt_logprobs
        self.finish_reason = update.finish_reason
        self.cached_tokens = update.cached_tokens


@dataclass(frozen=True, eq=False)
class AnswerEngine:
    """The parts of a server that make answers."""

    scheduler: Scheduler
    registry: Registry
    metrics: ServerMetrics
    request_seconds: float


class Generation:
    """The answers to one request. `run` and `events` may be used once, and only one of them."""

    def __init__(
        self,
        engine: AnswerEngine,
        model: ServedModel,
        lease: Lease,
        jobs: Sequence[AnswerJob],
        answer_format: AnswerFormat,
        record: AccessRecord,
    ) -> None:
        self.answers = [Answer(job.request.tokens) for job in jobs]
        self._engine = engine
        self.model = model
        self._lease = lease
        self.jobs = jobs
        self._format = answer_format
        self._record = record
        prompts = {id(job.request.tokens): job.prompt_tokens for job in jobs}  # shared by choices
        self._num_prompt_tokens = sum(prompts.values())
        self.failure = ""  # the code of the error that ended it

    def submit(self) -> None:
        """Queue the jobs. Raises RequestError if the queue is full, and releases the lease."""
        try:
            self._engine.scheduler.submit(self.jobs)
        except RequestError:
            self._lease.release()
            raise

    async def run(self) -> Json:
        """Return the body of the response when all answers are complete."""
        try:
            async for update in self._iter_updates():
                self.answers[update.index].extend(update)
        finally:
            self._end()
        # on a worker: with log-probabilities it takes seconds, and other clients wait for the loop
        return await asyncio.to_thread(self._format.format_body, self.answers, self.count_usage())

    async def events(self, *, should_send_usage: bool) -> AsyncGenerator[bytes]:
        """Yield NO_EVENT, then the events of a stream; an error is the last one."""
        self._record.has_disconnected = True  # until the last event is out
        try:
            yield NO_EVENT
            for event in self._format.format_start(self.answers):
                yield encode_event(event)
            async for update in self._iter_updates():
                answer = self.answers[update.index]
                answer.extend(update)
                if update.text or update.tokens or update.finish_reason:
                    yield encode_event(self._format.format_update(answer, update))
            if should_send_usage:
                yield encode_event(self._format.format_last(self.count_usage()))
            self._record.has_disconnected = False
            yield LAST_EVENT
        except RequestError as error:
            self._record.has_disconnected = False
            self._record.status = error.status
            yield encode_event(error.to_body())
        finally:
            self._end()

    def count_usage(self) -> Json:
        answer_tokens = sum(len(answer.tokens) for answer in self.answers)
        cached_tokens = self.answers[0].cached_tokens
        return format_usage(self._num_prompt_tokens, answer_tokens, cached_tokens)

    async def _iter_updates(self) -> AsyncGenerator[AnswerUpdate]:
        """Yield updates until all answers are complete. Raises RequestError for an answer that
        failed, and 504 after the time of a request."""
        outbox = self.jobs[0].outbox
        deadline = time.monotonic() + self._engine.request_seconds
        num_unfinished = len(self.jobs)
        while num_unfinished:
            try:
                update = await asyncio.wait_for(outbox.get(), deadline - time.monotonic())
            except TimeoutError:
                self.failure = TIMEOUT
                message = f"not complete after {self._engine.request_seconds:g} s"
                raise RequestError(504, message, code=TIMEOUT) from None
            if update.finish_reason == "error":
                self._refuse(update)
            self._record.note_first_token()
            if update.finish_reason:
                num_unfinished -= 1
                self._engine.registry.note_answer(self.model, is_finite=True)
            yield update

    def _refuse(self, update: AnswerUpdate) -> None:
        """Raise the error of an answer that failed."""
        self.failure = update.error_code
        if update.error_code == NOT_FINITE:
            self._engine.registry.note_answer(self.model, is_finite=False)
        status = ERROR_STATUS.get(update.error_code, 503)
        raise RequestError(status, update.error, code=update.error_code)

    def _end(self) -> None:
        """Cancel what still runs, give the adapter back, and note what was done."""
        unfinished = 0
        for job, answer in zip(self.jobs, self.answers, strict=True):
            if not answer.finish_reason:
                self._engine.scheduler.cancel(job)
                unfinished += 1
        self._engine.metrics.cut_answers.labels(self.model.name).inc(unfinished)
        self._lease.release()
        record = self._record
        record.prompt_tokens = self._num_prompt_tokens
        record.cached_tokens = self.answers[0].cached_tokens
        record.answer_tokens = sum(len(answer.tokens) for answer in self.answers)
        record.finish_reasons = tuple(answer.finish_reason for answer in self.answers)
        if self.jobs[0].grammar is not None:  # a limit or a stop string cuts valid JSON
            record.is_schema_valid = set(record.finish_reasons) == {"end"}
        self._count()

    def _count(self) -> None:
        record = self._record
        metrics = self._engine.metrics
        metrics.tokens.labels(self.model.name, "prompt").inc(record.prompt_tokens)
        metrics.tokens.labels(self.model.name, "cached").inc(record.cached_tokens)
        metrics.tokens.labels(self.model.name, "answer").inc(record.answer_tokens)
        label = metrics.name_histogram(self.model.name)
        metrics.request_time.labels(label).observe(record.seconds)
        first_seconds = record.first_token_seconds
        if first_seconds is None:
            return
        metrics.first_token.labels(label).observe(first_seconds)
        num_later = record.answer_tokens - len(self.answers)
        if num_later > 0:
            per_answer = num_later / len(self.answers)
            metrics.token_gap.labels(label).observe((record.seconds - first_seconds) / per_answer)
