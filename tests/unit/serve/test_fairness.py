"""The next job is of the client that was served least; idle time is no credit."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tiny_server import LiveServer, make_settings, serving, wait_for
from tunesmith.core.types import GenerationRequest
from tunesmith.serve.errors import RequestError
from tunesmith.serve.scheduler import ANSWER_WEIGHT, AnswerJob, AnswerUpdate, Backlog, FairQueue

FLOOD = ("flood", "json")
QUIET = ("quiet", "json")
THIRD = ("third", "base")
NO_END = ((257, -100.0), (258, -100.0))


def test_a_flood_does_not_delay_another_client() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(200):
        queue.add(FLOOD, f"flood {number}")
    first = queue.pop()
    queue.charge(FLOOD, prompt_tokens=100)
    queue.add(QUIET, "quiet")
    queue.pop()  # both counters were equal when the quiet client came
    queue.charge(FLOOD, prompt_tokens=100)
    assert first == "flood 0"
    assert queue.pop() == "quiet"
    assert len(queue) == 198


def test_jobs_of_one_client_keep_their_order() -> None:
    queue: FairQueue[int] = FairQueue()
    for number in range(5):
        queue.add(FLOOD, number)
    assert [queue.pop() for _ in range(5)] == [0, 1, 2, 3, 4]


def test_a_client_that_returns_has_no_credit() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add(FLOOD, "a")
    queue.pop()
    queue.charge(FLOOD, prompt_tokens=1000)
    queue.add(QUIET, "b")
    assert queue.counters[QUIET] == 1000


def test_leaving_does_not_reset_a_counter() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add(QUIET, "quiet")
    queue.add(FLOOD, "flood")
    assert {queue.pop(), queue.pop()} == {"quiet", "flood"}
    queue.charge(FLOOD, answer_tokens=500)
    queue.end(FLOOD)
    queue.add(FLOOD, "again")
    assert queue.counters[FLOOD] == ANSWER_WEIGHT * 500


def test_a_removed_job_is_not_served() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add(QUIET, "a")
    queue.add(QUIET, "b")
    assert queue.remove(QUIET, "a")
    assert not queue.remove(QUIET, "a")
    assert not queue.remove(THIRD, "b")
    assert queue.pop() == "b"
    queue.end(QUIET)
    assert queue.counters == {}


@pytest.mark.parametrize("seed", range(2))
def test_backlogged_clients_differ_by_one_job_at_most(seed: int) -> None:
    """The bound of the paper: counters of clients with waiting jobs differ by no more than the
    largest job that was charged at once, here with one row at a time."""
    generator = random.Random(seed)
    queue: FairQueue[tuple[str, str]] = FairQueue()
    for client in (FLOOD, QUIET, THIRD):
        for _ in range(100):
            queue.add(client, client)
    largest = 0.0
    for _ in range(200):
        client = queue.pop()
        prompt = generator.randint(1, 300)
        answer = generator.randint(1, 200)
        queue.charge(client, prompt_tokens=prompt, answer_tokens=answer)
        queue.end(client)
        largest = max(largest, prompt + ANSWER_WEIGHT * answer)
        counters = queue.counters.values()
        assert max(counters) - min(counters) <= largest


def test_the_backlog_is_in_seconds() -> None:
    backlog = Backlog()
    backlog.waiting_tokens = 500
    assert backlog.estimate_seconds() == 0
    assert backlog.compute_retry_seconds() == 1
    for _ in range(100):
        backlog.note_step(50, 0.5)
    assert backlog.estimate_seconds() == pytest.approx(5)
    assert backlog.compute_retry_seconds() == 5
    for _ in range(1000):
        backlog.note_step(200, 0.5)
    assert backlog.estimate_seconds() == pytest.approx(500 / 400, rel=0.01)


def test_beyond_the_rows_for_all_a_client_without_any_is_next() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(3):
        queue.add(FLOOD, f"flood {number}")
    assert queue.pop() == "flood 0"
    assert queue.pop_first() is None
    queue.add(QUIET, "quiet 0")
    queue.add(QUIET, "quiet 1")
    queue.add(THIRD, "third")
    queue.charge(QUIET, prompt_tokens=5)
    assert queue.pop_first() == "third"
    assert queue.pop_first() == "quiet 0"
    assert queue.pop_first() is None
    queue.end(QUIET)
    assert queue.pop_first() == "quiet 1"
    assert len(queue) == 2


# ---------------------------------------------------------------- rows for who has none


class EndOrder:
    """An outbox that notes when its job ends."""

    def __init__(self, name: str, ended: list[str]) -> None:
        self.name = name
        self.ended = ended

    def put_nowait(self, update: AnswerUpdate) -> None:
        if update.finish_reason:
            self.ended.append(self.name)


def make_job(client: tuple[str, str], num_tokens: int, ended: list[str]) -> AnswerJob:
    request = GenerationRequest((1, 2, 3), num_tokens, logit_bias=NO_END)
    return AnswerJob(request, client, EndOrder(client[0], ended))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def narrow(writer: Path) -> Iterator[LiveServer]:
    """A server with eight rows, one more for who has none, and a queue of six."""
    limits = {"rows": 8, "waiting": 6}
    with serving(make_settings({}, base=str(writer), limits=limits)) as live:
        yield live


@contextmanager
def holding(live: LiveServer) -> Iterator[None]:
    """Let the engine wait between two steps; inside, all rows are of answers that have begun."""
    go_on = threading.Event()
    live.server.scheduler.put_command(go_on.wait)
    try:
        yield
    finally:
        go_on.set()


def fill_rows(live: LiveServer, num_tokens: int, ended: list[str]) -> None:
    """Let one client have all rows, and wait until each has given a token."""
    scheduler = live.server.scheduler
    for _ in range(8):
        live.call(scheduler.submit, [make_job(FLOOD, num_tokens, ended)])
    wait_for(lambda: len(scheduler._state.running) == 8)


@pytest.mark.promise
def test_a_client_without_rows_does_not_wait_for_an_answer_of_others(narrow: LiveServer) -> None:
    """Its three tokens end before the 100 tokens of any of 14 long answers."""
    scheduler = narrow.server.scheduler
    ended: list[str] = []
    with holding(narrow):
        for _ in range(14):
            narrow.call(scheduler.submit, [make_job(FLOOD, 100, ended)])
        narrow.call(scheduler._enqueue, make_job(QUIET, 3, ended))
        narrow.call(scheduler._enqueue, make_job(THIRD, 3, ended))
    wait_for(lambda: len(ended) == 16)
    assert ended == ["quiet", "third", *["flood"] * 14]


@pytest.mark.promise
def test_a_full_queue_of_one_client_refuses_that_client_alone(narrow: LiveServer) -> None:
    scheduler = narrow.server.scheduler
    ended: list[str] = []
    fill_rows(narrow, 400, ended)
    with holding(narrow):
        for _ in range(6):
            narrow.call(scheduler.submit, [make_job(FLOOD, 3, ended)])
        for client, num_jobs in ((FLOOD, 1), (QUIET, 2)):
            with pytest.raises(RequestError, match="14 answers are unfinished"):
                narrow.call(scheduler.check_capacity, num_jobs, client)
        narrow.call(scheduler.submit, [make_job(QUIET, 3, ended)])
        with pytest.raises(RequestError, match="15 answers are unfinished"):
            narrow.call(scheduler.check_capacity, 1, THIRD)
    wait_for(lambda: len(ended) == 15)


@pytest.mark.promise
def test_a_slow_queue_of_others_refuses_no_client_that_has_a_reserved_row(
    narrow: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who come after it wait for it, and are refused."""
    monkeypatch.setattr(Backlog, "estimate_seconds", lambda _self: 3600.0)
    scheduler = narrow.server.scheduler
    ended: list[str] = []
    fill_rows(narrow, 400, ended)
    with holding(narrow):
        with pytest.raises(RequestError, match="8 answers are unfinished"):
            narrow.call(scheduler.check_capacity, 1, FLOOD)
        narrow.call(scheduler.submit, [make_job(QUIET, 3, ended)])
        with pytest.raises(RequestError, match="9 answers are unfinished"):
            narrow.call(scheduler.check_capacity, 1, THIRD)
    wait_for(lambda: len(ended) == 9)
