"""The next job is of the client that was served least; idle time is no credit."""

from __future__ import annotations

import random

import pytest

from tunesmith.serve.fairness import ANSWER_WEIGHT, Backlog, FairQueue

FLOOD = ("flood", "json")
QUIET = ("quiet", "json")
THIRD = ("third", "base")


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


@pytest.mark.parametrize("seed", range(5))
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
