"""The engine thread: it owns the batch, and nothing else touches rows, stored keys or the bank.

    scheduler = Scheduler(batch, limits=..., metrics=...);  scheduler.start(loop)
    scheduler.submit(jobs);  update = await jobs[0].outbox.get()

In: jobs from the event loop, by a queue of commands that are run between two steps. Out: after each
step one call into the event loop with what all rows gained. Nothing is locked. A job waits in a
FairQueue until the batch has a row for it; a few further rows are for clients that have none, so
that they do not wait for whole answers of others. If the thread dies, every job gets an error and
`has_died` is set. Left out: HTTP (app.py), which adapters are loaded (registry.py)."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from tunesmith.core.errors import GateError, InputError
from tunesmith.core.types import GenerationRequest, TokenLogprobs
from tunesmith.model.generation.engine import DecodeBatch
from tunesmith.model.generation.running_request import AnswerGrammar, RunningRequest
from tunesmith.serve.errors import RequestError
from tunesmith.serve.metrics import ServerMetrics
from tunesmith.serve.settings import Limits

PROMPT_WEIGHT = 1.0  # of a token of a prompt
ANSWER_WEIGHT = 2.0  # of a token of an answer, which costs a step
RATE_SECONDS = 30.0  # over which the rate of tokens is averaged

Client = tuple[str, str]  # API key, model
T = TypeVar("T")
FIRST_ANSWER_TOKENS = 128.0  # expected of an answer before any has ended
ANSWER_SHARE = 0.05  # of each answer in the mean length of answers


class FairQueue(Generic[T]):
    """Waiting jobs by client."""

    def __init__(self) -> None:
        self._waiting: dict[Client, deque[T]] = {}
        self._running: dict[Client, int] = {}  # admitted jobs that have not ended
        self._counters: dict[Client, float] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    @property
    def counters(self) -> dict[Client, float]:
        """The counters of active clients: those with waiting or running jobs."""
        active = [*self._waiting, *self._running]
        return {client: self._counters[client] for client in active}

    def add(self, client: Client, job: T) -> None:
        """Append a job to those of its client."""
        counters = self.counters
        if client not in counters:
            lowest = min(counters.values(), default=0.0)
            self._counters[client] = max(self._counters.get(client, 0.0), lowest)
        self._waiting.setdefault(client, deque()).append(job)

    def pop(self) -> T:
        """Return the next job: the first of the client with the smallest counter."""
        return self._pop_from(self._waiting)

    def pop_first(self) -> T | None:
        """Return the next job of the clients that have no running one, None if they all have."""
        idle = [client for client in self._waiting if client not in self._running]
        return self._pop_from(idle) if idle else None

    def _pop_from(self, clients: Iterable[Client]) -> T:
        client = min(clients, key=lambda waiting: self._counters[waiting])
        job = self._waiting[client].popleft()
        if not self._waiting[client]:
            del self._waiting[client]
        self._running[client] = self._running.get(client, 0) + 1
        return job

    def remove(self, client: Client, job: T) -> bool:
        """Remove a waiting job; return whether it was there."""
        jobs = self._waiting.get(client, deque())
        if job not in jobs:
            return False
        jobs.remove(job)
        if not jobs:
            del self._waiting[client]
            self._forget(client)
        return True

    def end(self, client: Client) -> None:
        """Note that a job of the client has ended."""
        self._running[client] -= 1
        if not self._running[client]:
            del self._running[client]
            self._forget(client)

    def charge(self, client: Client, *, prompt_tokens: int = 0, answer_tokens: int = 0) -> None:
        weighted = PROMPT_WEIGHT * prompt_tokens + ANSWER_WEIGHT * answer_tokens
        self._counters[client] += weighted

    def _forget(self, client: Client) -> None:
        """Drop the counter of an idle client that no longer says anything: all active ones are
        ahead of it, so it would be lifted anyway."""
        counters = self.counters
        if client not in counters and self._counters[client] <= min(counters.values(), default=0.0):
            del self._counters[client]
        if not counters:
            self._counters.clear()


class Backlog:
    """How fast tokens are served, and how long the waiting ones will take."""

    def __init__(self) -> None:
        self.waiting_tokens = 0
        self._rate = 0.0  # tokens per second

    def note_step(self, num_tokens: int, seconds: float) -> None:
        """Update the rate with the tokens of one step, those of prompts included."""
        share = 1 - math.exp(-seconds / RATE_SECONDS)
        rate = num_tokens / max(seconds, 1e-6)
        self._rate = rate if self._rate == 0 else self._rate + share * (rate - self._rate)

    def estimate_seconds(self) -> float:
        """Return how long the waiting tokens will take; 0 before the first step."""
        return self.waiting_tokens / self._rate if self._rate else 0.0

    def compute_retry_seconds(self) -> int:
        return max(1, math.ceil(self.estimate_seconds()))


@dataclass(frozen=True)
class AnswerUpdate:
    """The gain of an answer in a step. `finish_reason` is end, stop, length or error at its end."""

    index: int
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # with the first token
    finish_reason: str = ""
    error: str = ""
    error_code: str = ""
    cached_tokens: int = 0


@dataclass(eq=False)
class AnswerJob:
    """An answer to make; `index` tells the answers of one request apart."""

    request: GenerationRequest
    client: Client
    outbox: asyncio.Queue[AnswerUpdate]
    index: int = 0
    grammar: AnswerGrammar | None = None
    # of the engine thread
    row: RunningRequest | None = None
    num_sent: int = 0
    is_cancelled: bool = False

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.tokens)


@dataclass(frozen=True)
class StepReport:
    """The results of one step, for the event loop."""

    updates: tuple[tuple[AnswerJob, AnswerUpdate], ...]
    seconds: float
    num_rows: int


@dataclass
class LoopState:
    """The jobs as the event loop knows them; it is never behind what it has submitted."""

    waiting: dict[AnswerJob, float] = field(default_factory=dict)  # expected tokens
    running: set[AnswerJob] = field(default_factory=set)
    backlog: Backlog = field(default_factory=Backlog)
    mean_answer_tokens: float = FIRST_ANSWER_TOKENS


class Scheduler:
    """Jobs in, updates out. Methods are of the event loop unless they say otherwise."""

    def __init__(self, batch: DecodeBatch, *, limits: Limits, metrics: ServerMetrics) -> None:
        self.has_died = asyncio.Event()
        self._has_ended = asyncio.Event()
        self.is_draining = False
        self._batch = batch
        self._slots = limits.rows
        self._limits = limits
        self._metrics = metrics
        self._state = LoopState()
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._queue: FairQueue[AnswerJob] = FairQueue()
        self._rows: dict[RunningRequest, AnswerJob] = {}
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    # ---- of the event loop

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self.has_died.is_set()

    @property
    def num_active(self) -> int:
        return len(self._state.waiting) + len(self._state.running)

    def check_capacity(self, num_jobs: int, client: Client) -> None:
        """Raise RequestError if the server takes no more jobs of the client now."""
        if not self.is_alive:
            raise RequestError(503, "the engine has stopped", code="engine_stopped")
        if self.is_draining:
            message = "the server is shutting down"
            seconds = max(1, round(self._limits.drain))
            raise RequestError(503, message, code="server_shutdown", retry_seconds=seconds)
        capacity = self._slots + self._limits.waiting
        is_first = self._has_reserved_row(num_jobs, client)
        if is_first:
            capacity += self._limits.reserved_rows
        is_full = self.num_active + num_jobs > capacity
        # while rows are free, nobody waits for the answers of others
        has_to_wait = self.num_active + num_jobs > self._slots and not is_first
        is_slow = has_to_wait and self._state.backlog.estimate_seconds() > self._limits.wait
        if self.num_active and (is_full or is_slow):
            seconds = self._state.backlog.compute_retry_seconds()
            message = f"{self.num_active} answers are unfinished; try again in {seconds} s"
            raise RequestError(429, message, code="queue_full", retry_seconds=seconds)

    def _has_reserved_row(self, num_jobs: int, client: Client) -> bool:
        """Return whether a client without jobs gets rows beyond those for all: fewer others wait
        for them than there are."""
        running = {job.client for job in self._state.running}
        if client in running or any(job.client == client for job in self._state.waiting):
            return False
        num_before = sum(job.client not in running for job in self._state.waiting)
        return num_before + num_jobs <= self._limits.reserved_rows

    def submit(self, jobs: Sequence[AnswerJob]) -> None:
        """Queue jobs of one client. Raises RequestError as `check_capacity`."""
        self.check_capacity(len(jobs), jobs[0].client)
        for job in jobs:
            answer_tokens = min(job.request.max_new_tokens, self._state.mean_answer_tokens)
            expected_tokens = job.prompt_tokens + answer_tokens
            self._state.waiting[job] = expected_tokens
            self._state.backlog.waiting_tokens += round(expected_tokens)
            self._commands.put(lambda job=job: self._enqueue(job))
        self._show_counts()

    def cancel(self, job: AnswerJob) -> None:
        """End a job wherever it is; it gets no further update."""
        job.is_cancelled = True
        self._forget(job)
        self._commands.put(lambda: self._drop(job))

    def put_command(self, command: Callable[[], None]) -> None:
        """Run a command on the engine thread between two steps, after those before it."""
        self._commands.put(command)

    async def run_between_steps(self, function: Callable[[], T]) -> T:
        """Run a function on the engine thread and return its result. Raises RequestError if the
        thread ends before."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                value = function()
            except InputError as error:
                loop.call_soon_threadsafe(result.set_exception, error)
            else:
                loop.call_soon_threadsafe(result.set_result, value)

        self._commands.put(run)
        ended = asyncio.ensure_future(self._has_ended.wait())
        try:
            await asyncio.wait({result, ended}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        if not result.done():
            raise RequestError(503, "the engine has stopped", code="engine_stopped")
        return result.result()

    async def stop(self) -> None:
        """End the thread after the step that it is in; unfinished answers get an error."""
        self.is_draining = True
        self._commands.put(self._note_stop)
        await asyncio.to_thread(self._thread.join)

    def _handle_report(self, report: StepReport) -> None:
        num_tokens = 0
        for job, update in report.updates:
            if job in self._state.waiting:
                self._start_running(job)
                num_tokens += job.prompt_tokens - update.cached_tokens
            num_tokens += len(update.tokens)
            if job.is_cancelled:
                continue
            job.outbox.put_nowait(update)
            if update.finish_reason:
                self._forget(job)
                self._note_length(job)
        self._state.backlog.note_step(num_tokens, report.seconds)
        self._metrics.step_time.observe(report.seconds)
        self._metrics.step_rows.observe(report.num_rows)
        self._show_counts()

    def _start_running(self, job: AnswerJob) -> None:
        self._state.backlog.waiting_tokens -= round(self._state.waiting.pop(job))
        if not job.is_cancelled:
            self._state.running.add(job)

    def _forget(self, job: AnswerJob) -> None:
        if job in self._state.waiting:
            self._state.backlog.waiting_tokens -= round(self._state.waiting.pop(job))
        self._state.running.discard(job)
        self._show_counts()

    def _note_length(self, job: AnswerJob) -> None:
        mean = self._state.mean_answer_tokens
        self._state.mean_answer_tokens = mean + ANSWER_SHARE * (job.num_sent - mean)

    def _show_counts(self) -> None:
        self._metrics.waiting.set(len(self._state.waiting))
        self._metrics.running.set(len(self._state.running))

    def _end_all(self) -> None:
        """Tell every job that the engine thread has ended."""
        self._has_ended.set()
        if not self._is_stopping:
            self.has_died.set()
        error = "the engine has stopped"
        code = "engine_stopped"
        if self._is_stopping:
            error = "the server is shutting down"
            code = "server_shutdown"
        for job in [*self._state.waiting, *self._state.running]:
            update = AnswerUpdate(job.index, finish_reason="error", error=error, error_code=code)
            job.outbox.put_nowait(update)
        self._state.waiting.clear()
        self._state.running.clear()

    # ---- of the engine thread

    def _run(self) -> None:
        assert self._loop is not None
        try:
            while not self._is_stopping:
                self._run_commands()
                self._admit()
                if self._rows and not self._is_stopping:
                    self._step()
        finally:
            self._call_loop(self._end_all)

    def _call_loop(self, function: Callable[..., None], *args: Any) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    def _run_commands(self) -> None:
        """Run all commands; wait for one if there is nothing else to do."""
        if not self._rows and not len(self._queue):
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _note_stop(self) -> None:
        self._is_stopping = True

    def _enqueue(self, job: AnswerJob) -> None:
        if not job.is_cancelled:
            self._queue.add(job.client, job)

    def _fail(self, job: AnswerJob, error: str, code: str) -> None:
        update = AnswerUpdate(job.index, finish_reason="error", error=error, error_code=code)
        report = StepReport(((job, update),), 0.0, 0)
        self._call_loop(self._handle_report, report)

    def _drop(self, job: AnswerJob) -> None:
        if job.row is None:
            self._queue.remove(job.client, job)
        elif job.row in self._rows:
            self._batch.cancel(job.row)
            self._end_row(job.row)

    def _admit(self) -> None:
        while (job := self._pop_job()) is not None:
            self._queue.charge(job.client, prompt_tokens=job.prompt_tokens)
            if not self._start_row(job):
                self._queue.end(job.client)

    def _pop_job(self) -> AnswerJob | None:
        """Return the next job that there is a row for: beyond the rows for all, of a client that
        has none."""
        num_rows = len(self._rows)
        if num_rows < self._slots:
            return self._queue.pop() if len(self._queue) else None
        if num_rows < self._slots + self._limits.reserved_rows:
            return self._queue.pop_first()
        return None

    def _start_row(self, job: AnswerJob) -> bool:
        """Put a job into the batch; return whether the batch takes it."""
        try:
            job.row = self._batch.submit(job.request, job.grammar)
        except InputError as error:
            self._fail(job, error.message, "invalid_request")
            return False
        self._rows[job.row] = job
        return True

    def _step(self) -> None:
        started = time.perf_counter()
        num_rows = len(self._rows)
        updates: list[tuple[AnswerJob, AnswerUpdate]] = []
        for row in self._batch.step():
            job = self._rows[row]
            update = _describe_gain(job, row)
            self._queue.charge(job.client, answer_tokens=len(update.tokens))
            updates.append((job, update))
            if row.finish_reason:
                self._end_row(row)
        report = StepReport(tuple(updates), time.perf_counter() - started, num_rows)
        self._call_loop(self._handle_report, report)

    def _end_row(self, row: RunningRequest) -> None:
        job = self._rows.pop(row)
        self._queue.end(job.client)


def _describe_gain(job: AnswerJob, row: RunningRequest) -> AnswerUpdate:
    """Return what a row has gained since the last update of its job."""
    tokens = tuple(row.tokens[job.num_sent :])
    logprobs = tuple(row.logprobs[job.num_sent :])
    prompt_logprobs = () if job.num_sent else tuple(row.prompt_logprobs)
    job.num_sent = len(row.tokens)
    return AnswerUpdate(
        job.index,
        text=row.new_text,
        tokens=tokens,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        finish_reason=row.finish_reason,
        error=row.error.message if row.error is not None else "",
        error_code=_name_error(row),
        cached_tokens=row.cached_tokens,
    )


def _name_error(row: RunningRequest) -> str:
    """Return the code of a row's error: numbers that are not finite, or what the request asks."""
    if row.error is None:
        return ""
    return "model_not_finite" if isinstance(row.error, GateError) else "invalid_request"
