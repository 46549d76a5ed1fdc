"""Answers while the client may leave: server-sent events, and waiting for a whole answer.

    return EventStream(events)                              an ASGI response
    await run_until_disconnect(request.receive, coroutine)  None if the client has left

In: an async iterator of bytes, or a coroutine. Out: a response that ends as soon as the client is
gone or does not read for WRITE_SECONDS; the iterator is closed then, and its `finally` cancels what
it waits for. An iterator that has not begun has no `finally` to run: its first event is NO_EVENT,
taken before there is a response. Left out: what the events say (formats.py)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Mapping
from typing import Any, TypeVar

from starlette.types import Message, Receive, Scope, Send

from tunesmith.core.json_io import dump_json
from tunesmith.serve.errors import NO_STORE

WRITE_SECONDS = 30.0  # in which a client has to read what is buffered for it
NO_EVENT = b""
LAST_EVENT = b"data: [DONE]\n\n"

T = TypeVar("T")


def encode_event(content: Any) -> bytes:
    """Return one event with JSON as its data."""
    return b"data: " + dump_json(content) + b"\n"


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has left; the body was read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Return the result of `work`; cancel it and return None if the client leaves first."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        await _cancel(task)
        await _cancel(watcher)


async def _cancel(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait for its end, whatever it is; its result was used before."""
    task.cancel()
    await asyncio.wait({task})


class EventStream:
    """An ASGI response of server-sent events."""

    def __init__(self, events: AsyncGenerator[bytes], headers: Mapping[str, str]) -> None:
        self.events = events
        all_headers = {"content-type": "text/event-stream; charset=utf-8", **NO_STORE, **headers}
        self.headers = [(name.encode(), text.encode()) for name, text in all_headers.items()]

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await run_until_disconnect(receive, self._write(send))
        finally:
            await self.events.aclose()

    async def _write(self, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            await asyncio.wait_for(send(message), WRITE_SECONDS)

        body = {"type": "http.response.body"}
        try:
            # waits for an earlier response on this connection, too, that is not read
            head = {"type": "http.response.start", "status": 200, "headers": self.headers}
            await send_in_time(head)
            async for event in self.events:
                await send_in_time({**body, "body": event, "more_body": True})
            await send_in_time({**body, "body": b"", "more_body": False})
        except TimeoutError:  # a client that does not read
            return
