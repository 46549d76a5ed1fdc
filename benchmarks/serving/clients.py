"""Clients of a server: streamed chats with their times, all at once, one after another, or arriving
by a Poisson process.

    python -m benchmarks.serving.clients URL MODEL TOKENS END_ID... [--flood N]

The second form asks 16 chats from a process of its own, for lines that count the processor time of
the server alone. With --flood, N clients ask again and again until the standard input ends."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import httpx

CLIENTS = 16
TIMEOUT_SECONDS = 1200
QUESTION = "Which city lies on the river, and when was it founded? Answer with name and year."


@dataclass(frozen=True)
class Chat:
    """A question to a model. `number` makes questions differ, `end_ids` stay out of the answer."""

    model: str
    num_tokens: int
    end_ids: tuple[int, ...]
    number: int = 0
    has_ids: bool = False

    def to_body(self) -> dict[str, object]:
        text = f"{QUESTION} ({self.number})"
        ids = {"return_token_ids": True} if self.has_ids else {}
        return {
            **ids,
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": self.num_tokens,
            "temperature": 0,
            "logit_bias": {str(end): -100 for end in self.end_ids},
            "stream": True,
            "stream_options": {"include_usage": True},
        }


@dataclass
class Timing:
    """An answer and its times in seconds; `status` is not 200 for one that failed."""

    status: int
    version: str = ""
    text: str = ""
    num_tokens: int = 0
    first: float = 0.0
    total: float = 0.0
    gaps: tuple[float, ...] = ()
    prompt_ids: tuple[int, ...] = ()  # of chats with `has_ids`
    token_ids: tuple[int, ...] = ()


def ask(client: httpx.Client, chat: Chat) -> Timing:
    """Stream one answer."""
    started = time.perf_counter()
    times: list[float] = []
    text = ""
    num_tokens = 0
    prompt_ids: list[int] = []
    token_ids: list[int] = []
    with client.stream("POST", "/v1/chat/completions", json=chat.to_body()) as response:
        if response.status_code != 200:
            response.read()
            return Timing(response.status_code)
        version = response.headers["x-tunesmith-model"]
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                return Timing(500, version)
            prompt_ids += chunk.get("prompt_token_ids", ())
            for choice in chunk["choices"]:
                token_ids += choice.get("token_ids", ())
                if "content" in choice["delta"] and choice["delta"]["content"]:
                    times.append(time.perf_counter())
                    text += choice["delta"]["content"]
            if chunk.get("usage"):
                num_tokens = chunk["usage"]["completion_tokens"]
    ended = time.perf_counter()
    gaps = tuple(b - a for a, b in itertools.pairwise(times))
    first = (times[0] if times else ended) - started
    ids = (tuple(prompt_ids), tuple(token_ids))
    return Timing(200, version, text, num_tokens, first, ended - started, gaps, *ids)


def ask_together(url: str, chats: Sequence[Chat]) -> list[Timing]:
    """Ask with CLIENTS connections, each the next chat as soon as it has an answer."""
    with (
        httpx.Client(base_url=url, timeout=TIMEOUT_SECONDS) as client,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        return list(pool.map(lambda chat: ask(client, chat), chats))


def ask_in_turn(url: str, chats: Sequence[Chat]) -> list[Timing]:
    with httpx.Client(base_url=url, timeout=TIMEOUT_SECONDS) as client:
        return [ask(client, chat) for chat in chats]


def ask_at_rate(
    url: str, chats: Sequence[Chat], per_second: float, *, seed: int = 1
) -> list[Timing]:
    """Ask at times of a Poisson process, whether or not earlier answers are there."""
    draw = random.Random(seed)
    limits = httpx.Limits(max_connections=1000)
    futures: list[Future[Timing]] = []
    with (
        httpx.Client(base_url=url, timeout=TIMEOUT_SECONDS, limits=limits) as client,
        ThreadPoolExecutor(256) as pool,
    ):
        for chat in chats:
            time.sleep(draw.expovariate(per_second))
            futures.append(pool.submit(ask, client, chat))
        return [future.result() for future in futures]


class Load:
    """Clients that ask again and again until the block ends."""

    def __init__(self, url: str, chats: Sequence[Chat]) -> None:
        self.timings: list[Timing] = []
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._repeat, args=(chat,)) for chat in chats]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, chat: Chat) -> None:
        with httpx.Client(base_url=self._url, timeout=TIMEOUT_SECONDS) as client:
            while not self._stop.is_set():
                self.timings.append(ask(client, chat))


def compute_quantile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("tokens", type=int)
    parser.add_argument("end_ids", type=int, nargs="*")
    parser.add_argument("--flood", type=int, default=0, metavar="N")
    args = parser.parse_args()
    count = args.flood or CLIENTS
    chats = [Chat(args.model, args.tokens, tuple(args.end_ids), number) for number in range(count)]
    if not args.flood:
        print(sum(timing.num_tokens for timing in ask_together(args.url, chats)))
        return
    for chat in chats:
        threading.Thread(target=flood, args=(args.url, chat), daemon=True).start()
    sys.stdin.read()


def flood(url: str, chat: Chat) -> None:
    """Ask again and again, and read answers without looking at them."""
    with httpx.Client(base_url=url, timeout=TIMEOUT_SECONDS) as client:
        while True:
            client.post("/v1/chat/completions", json=chat.to_body())


if __name__ == "__main__":
    main()
