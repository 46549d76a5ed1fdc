"""Answers as bodies and chunks, in the shapes of OpenAI's chat and text completions.

    ChatFormat(head, ...).format_body(answers, usage) -> Json
    ChatFormat(head, ...).format_update(answer, update) -> Json, one chunk
    return EventStream(events)                              an ASGI response
    await run_until_disconnect(request.receive, coroutine)  None if the client has left

In: answers of the engine. Out: JSON, or server-sent events. Token ids are added only for
`return_token_ids`, under vLLM's names. A token whose bytes are a part of a character has no bytes
of its own. Left out: the request (exchange.py)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, TypeVar

from starlette.types import Message, Receive, Scope, Send

from tunesmith.core.json_io import dump_json
from tunesmith.core.types import Json, TokenLogprobs
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.serve.errors import NO_STORE
from tunesmith.serve.scheduler import AnswerUpdate

FINISH_REASONS = {"end": "stop", "stop": "stop", "length": "length"}
REPLACEMENT_CHAR = "\ufffd"
WRITE_SECONDS = 30.0  # in which a client has to read what is buffered for it
NO_EVENT = b""
LAST_EVENT = b"data: [DONE]\n\n"
T = TypeVar("T")


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


def format_usage(prompt_tokens: int, answer_tokens: int, cached_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": answer_tokens,
        "total_tokens": prompt_tokens + answer_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


@dataclass(frozen=True, eq=False)
class AnswerHead:
    """The fields that all bodies and chunks of a response share."""

    id: str
    model: str  # as the request names it
    fingerprint: str
    renderer: Renderer
    has_logprobs: bool
    has_token_ids: bool
    has_usage: bool  # a stream that ends with usage has a null before
    created: int = field(default_factory=lambda: int(time.time()))
    # token -> text and bytes: `top_logprobs` repeats the same tokens many times
    token_texts: dict[int, tuple[str, list[int] | None]] = field(default_factory=dict)

    def make_body(self, kind: str, choices: list[Json], **more: object) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            **more,
        }

    def make_chunk(self, kind: str, choices: list[Json], **more: object) -> Json:
        usage = {"usage": None} if self.has_usage else {}
        return self.make_body(kind, choices, **{**usage, **more})

    def add_ids(self, choice: Json, tokens: Iterable[int]) -> Json:
        return {**choice, "token_ids": list(tokens)} if self.has_token_ids else choice

    def add_prompt_ids(self, answers: Sequence[Answer]) -> Json:
        """Return the ids of the prompt, where the request wants them."""
        return {"prompt_token_ids": list(answers[0].prompt_tokens)} if self.has_token_ids else {}

    def get_bytes(self, token: int) -> tuple[str, list[int] | None]:
        """Return a token as text and as bytes."""
        if token not in self.token_texts:
            text = self.renderer.decode([token])
            token_bytes = None if REPLACEMENT_CHAR in text else list(text.encode())
            self.token_texts[token] = (text, token_bytes)
        return self.token_texts[token]


class ChatFormat:
    """/v1/chat/completions."""

    def __init__(self, head: AnswerHead) -> None:
        self._head = head

    def format_body(self, answers: Sequence[Answer], usage: Json) -> Json:
        """Return the whole body."""
        choices: list[Json] = []
        for index, answer in enumerate(answers):
            message, finish_reason = self._format_message(answer)
            choice = {
                "index": index,
                "message": message,
                "logprobs": self._format_logprobs(answer.logprobs),
                "finish_reason": finish_reason,
            }
            choices.append(self._head.add_ids(choice, answer.tokens))
        prompt_ids = self._head.add_prompt_ids(answers)
        return self._head.make_body("chat.completion", choices, usage=usage, **prompt_ids)

    def format_start(self, answers: Sequence[Answer]) -> Iterator[Json]:
        """Yield a first chunk with the role for each answer."""
        for index in range(len(answers)):
            delta = {"role": "assistant", "content": ""}
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            prompt_ids = {} if index else self._head.add_prompt_ids(answers)
            yield self._head.make_chunk("chat.completion.chunk", [choice], **prompt_ids)

    def format_update(self, answer: Answer, update: AnswerUpdate) -> Json:
        """Return the chunk of one step."""
        del answer
        delta, finish_reason = self._format_delta(update)
        choice = {
            "index": update.index,
            "delta": delta,
            "logprobs": self._format_logprobs(update.logprobs),
            "finish_reason": finish_reason,
        }
        choice = self._head.add_ids(choice, update.tokens)
        return self._head.make_chunk("chat.completion.chunk", [choice])

    def format_last(self, usage: Json) -> Json:
        return self._head.make_chunk("chat.completion.chunk", [], usage=usage)

    def _format_message(self, answer: Answer) -> tuple[Json, str]:
        """Return an answer as a message, and why it ended."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return message, FINISH_REASONS[answer.finish_reason]

    def _format_delta(self, update: AnswerUpdate) -> tuple[Json, str | None]:
        """Return what an update adds to the message, and why the answer ended, if it did."""
        delta = {"content": update.text} if update.text else {}
        return delta, FINISH_REASONS.get(update.finish_reason)

    def _format_logprobs(self, logprobs: Sequence[TokenLogprobs]) -> Json | None:
        if not self._head.has_logprobs:
            return None
        content: list[Json] = []
        for entry in logprobs:
            top = [self._format_token(token, logprob) for token, logprob in entry.top]
            chosen = self._format_token(entry.token, entry.logprob)
            content.append({**chosen, "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _format_token(self, token: int, logprob: float) -> Json:
        text, token_bytes = self._head.get_bytes(token)
        return {"token": text, "logprob": logprob, "bytes": token_bytes}


class CompletionFormat:
    """/v1/completions. With `echo`, the text starts with the prompt."""

    def __init__(self, head: AnswerHead, *, should_echo: bool) -> None:
        self._head = head
        self._should_echo = should_echo

    def format_body(self, answers: Sequence[Answer], usage: Json) -> Json:
        """Return the whole body."""
        choices: list[Json] = []
        for index, answer in enumerate(answers):
            echo = self._decode_prompt(answer)
            choice = {
                "index": index,
                "text": echo + answer.text,
                "logprobs": self._format_all_logprobs(answer, len(echo)),
                "finish_reason": FINISH_REASONS[answer.finish_reason],
            }
            if self._head.has_token_ids:
                choice["prompt_token_ids"] = list(answer.prompt_tokens)
            choices.append(self._head.add_ids(choice, answer.tokens))
        return self._head.make_body("text_completion", choices, usage=usage)

    def format_start(self, answers: Sequence[Answer]) -> Iterator[Json]:
        """Yield the prompts, if they are to be echoed."""
        for index, answer in enumerate(answers):
            if echo := self._decode_prompt(answer):
                choice = {"index": index, "text": echo, "logprobs": None, "finish_reason": None}
                yield self._head.make_chunk("text_completion", [choice])

    def format_update(self, answer: Answer, update: AnswerUpdate) -> Json:
        """Return the chunk of one step."""
        start = len(answer.text) - len(update.text)
        choice = {
            "index": update.index,
            "text": update.text,
            "logprobs": self._format_logprobs(update.logprobs, start),
            "finish_reason": FINISH_REASONS.get(update.finish_reason),
        }
        return self._head.make_chunk("text_completion", [self._head.add_ids(choice, update.tokens)])

    def format_last(self, usage: Json) -> Json:
        return self._head.make_chunk("text_completion", [], usage=usage)

    def _decode_prompt(self, answer: Answer) -> str:
        return self._head.renderer.decode(answer.prompt_tokens) if self._should_echo else ""

    def _format_all_logprobs(self, answer: Answer, start: int) -> Json | None:
        """Return those of an echoed prompt, too; null for its first token."""
        logprobs = self._format_logprobs(answer.logprobs, start)
        if logprobs is None or not self._should_echo:
            return logprobs
        prompt = self._format_logprobs(answer.prompt_logprobs, 0)
        assert prompt is not None
        first = self._head.get_bytes(answer.prompt_tokens[0])[0]
        offsets = [0, *(len(first) + offset for offset in prompt["text_offset"])]
        return {
            "tokens": [first, *prompt["tokens"], *logprobs["tokens"]],
            "token_logprobs": [None, *prompt["token_logprobs"], *logprobs["token_logprobs"]],
            "top_logprobs": [None, *prompt["top_logprobs"], *logprobs["top_logprobs"]],
            "text_offset": [*offsets, *logprobs["text_offset"]],
        }

    def _format_logprobs(self, logprobs: Sequence[TokenLogprobs], start: int) -> Json | None:
        if not self._head.has_logprobs:
            return None
        texts = [self._head.get_bytes(entry.token)[0] for entry in logprobs]
        offsets: list[int] = []
        tops: list[Json] = []
        for entry, text in zip(logprobs, texts, strict=True):
            offsets.append(start)
            start += len(text)
            tops.append({self._head.get_bytes(token)[0]: logprob for token, logprob in entry.top})
        return {
            "tokens": texts,
            # one of a model whose numbers are not finite is null
            "token_logprobs": [e.logprob if isfinite(e.logprob) else None for e in logprobs],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


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
