"""Who is admitted next, and how long the queue is.

    queue.add(client, job);  queue.pop() -> job;  queue.charge(client, tokens)

Virtual token counters (Sheng et al. 2024, "Fairness in Serving Large Language Models"): a client is
an API key with a model, and has a counter of the tokens it was served; the waiting client with the
smallest counter is next. A client that returns starts at the smallest counter of the active ones,
so idle time is no credit. `Backlog` turns waiting tokens into seconds. Left out: the rows
themselves (scheduler.py)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

PROMPT_WEIGHT = 1.0  # of a token of a prompt
ANSWER_WEIGHT = 2.0  # of a token of an answer, which costs a step
RATE_SECONDS = 30.0  # over which the rate of tokens is averaged

Client = tuple[str, str]  # API key, model
T = TypeVar("T")


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
