"""One request for answers, from its chosen model to its response.

    exchange = start_exchange(request, body);  prompt = render_chat(body, exchange.model)
    response = await exchange.answer([prompt], format)

In: a request that the middleware has let in, a checked body and a formatter. Out: one JSON body, or
server-sent events. A prompt is rendered with the adapter's own chat template, and text of a message
never makes a control token. However it ends, jobs are cancelled, the lease is released, the record
of the access log is filled, and the route has judged the answers. Left out: the queue
(scheduler.py), the format of answers (formats.py)."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from tunesmith.core.errors import InputError
from tunesmith.core.json_io import dump_json
from tunesmith.core.sampling import MAX_SEED
from tunesmith.core.types import GenerationRequest, Json, __version__
from tunesmith.serve.bodies import ChatBody, CompletionBody, SamplingBody
from tunesmith.serve.errors import NO_STORE, RequestError, from_tunesmith_error
from tunesmith.serve.feedback import FeedbackStore, KeptChat, list_messages
from tunesmith.serve.formats import (
    LAST_EVENT,
    NO_EVENT,
    Answer,
    AnswerHead,
    ChatFormat,
    CompletionFormat,
    EventStream,
    encode_event,
    format_usage,
    run_until_disconnect,
)
from tunesmith.serve.grammars import GrammarCache
from tunesmith.serve.keys import ApiKey
from tunesmith.serve.metrics import RECORD_FIELD, AccessRecord, ServerMetrics
from tunesmith.serve.middleware import KEY_FIELD
from tunesmith.serve.registry import Lease, Registry, ServedModel
from tunesmith.serve.routes import CheckedAnswer, Route, RouteTable
from tunesmith.serve.scheduler import AnswerJob, AnswerUpdate, Scheduler
from tunesmith.serve.tool_calls import list_tools, to_template_message

DEFAULT_TEMPERATURE = 1.0  # of OpenAI's API
DEFAULT_CHAT_TOKENS = 1024
ANY_OBJECT: Json = {"type": "object"}
# an answer with thinking that nothing follows: a template that can write thinking does so here
THINKING: tuple[Json, ...] = (
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b", "reasoning_content": "c"},
)
CLIENT_DISCONNECTED = 499  # in the log only: nobody reads the response
NOT_FINITE = "model_not_finite"
TIMEOUT = "timeout"
ERROR_STATUS = {NOT_FINITE: 500, "invalid_request": 400}  # others: 503


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue, and how many tokens the answer may have."""

    tokens: tuple[int, ...]
    max_new_tokens: int


def render_chat(body: ChatBody, model: ServedModel) -> Prompt:
    """Render the messages with the model's template. Slow for long prompts: runs on a worker."""
    messages: list[Json] = []
    for message in body.messages:
        messages.append(to_template_message(message))
    if messages[-1]["role"] == "assistant":
        message = "the last message is the assistant's, so there is nothing to answer"
        raise RequestError(400, message, param="messages")
    tools = list_tools(body)
    try:
        _refuse_unwritten(messages, tools, model)
        tokens = model.renderer.encode_prompt(messages, tools)
    except InputError as error:
        raise from_tunesmith_error(error, param="messages") from None
    return _fit_prompt(tokens, body.answer_tokens, model, param="messages")


def _refuse_unwritten(messages: Sequence[Json], tools: Sequence[Json], model: ServedModel) -> None:
    """Raise RequestError 400 for names that the template does not write, and for thinking if it
    writes none at all; most templates drop the thinking before the last question."""
    for index in model.renderer.find_unused("name", messages, tools):
        message = f"the chat template does not write names of role {messages[index]['role']}"
        raise RequestError(400, message, param=f"messages[{index}].name")
    for index, message in enumerate(messages):
        if "reasoning_content" not in message:
            continue
        if model.renderer.find_unused("reasoning_content", THINKING):
            text = "the chat template does not write the thinking of answers"
            raise RequestError(400, text, param=f"messages[{index}].reasoning_content")
        return


def render_completions(body: CompletionBody, model: ServedModel) -> list[Prompt]:
    """Encode the prompts as plain text, after the token that begins a document, if there is one."""
    prompts: list[Prompt] = []
    tokenizer = model.renderer.tokenizer
    for prompt in body.prompts:
        if isinstance(prompt, str):
            try:
                text_tokens = model.renderer.encode_text(prompt)
            except InputError as error:
                raise from_tunesmith_error(error, param="prompt") from None
            tokens = (*tokenizer.bos_ids, *text_tokens)
        else:
            tokens = tuple(prompt)
            if max(tokens) >= model.base.vocab_size:
                message = f"token {max(tokens)} is not one of the model's {model.base.vocab_size}"
                raise RequestError(400, message, param="prompt")
        if not tokens:
            raise RequestError(400, "the prompt is empty", param="prompt")
        prompts.append(_fit_prompt(tokens, body.answer_tokens, model, param="prompt"))
    return prompts


def _fit_prompt(
    tokens: tuple[int, ...], answer_tokens: int | None, model: ServedModel, *, param: str
) -> Prompt:
    """Raise RequestError 400 with both counts unless prompt and answer fit in the context."""
    context = model.base.context_length
    room = context - len(tokens)
    wanted = answer_tokens or 1
    if wanted > room:
        message = (
            f"the prompt has {len(tokens)} tokens and the answer may have {wanted}, "
            f"together more than the context of {context}"
        )
        raise RequestError(400, message, code="context_length_exceeded", param=param)
    return Prompt(tokens, answer_tokens or min(room, DEFAULT_CHAT_TOKENS))


async def make_jobs(
    body: ChatBody | CompletionBody,
    prompts: Sequence[Prompt],
    model: ServedModel,
    key: ApiKey,
    grammars: GrammarCache,
) -> list[AnswerJob]:
    """Return a job for each answer: `n` for each prompt, with seeds that follow each other."""
    schema = find_schema(body, model)
    grammar = None if schema is None else await grammars.compile(schema, model)
    biases = list_biases(body, model)
    seed = secrets.randbelow(MAX_SEED) if body.seed is None else body.seed % MAX_SEED
    outbox = asyncio.Queue()
    jobs: list[AnswerJob] = []
    for prompt in prompts:
        first_request = _make_request(body, prompt, model, key, biases)
        for choice in range(body.n or 1):
            request = replace(first_request, seed=(seed + choice) % MAX_SEED)
            answer_grammar = None if grammar is None else grammar.start_answer()
            client = (key.id, model.name)
            jobs.append(AnswerJob(request, client, outbox, len(jobs), answer_grammar))
    return jobs


def find_schema(body: SamplingBody, model: ServedModel) -> Json | None:
    """Return the schema that answers have to follow: the request's, else the model's own."""
    wanted = body.response_format
    if wanted is None:
        return model.schema
    if wanted.json_schema is not None:
        return wanted.json_schema.schema_
    return ANY_OBJECT if wanted.type == "json_object" else None


def list_biases(body: SamplingBody, model: ServedModel) -> tuple[tuple[int, float], ...]:
    """Return (token, bias). Raises RequestError for a token that the model does not have."""
    biases = tuple((int(token), bias) for token, bias in (body.logit_bias or {}).items())
    for token, _ in biases:
        if token >= model.base.vocab_size:
            message = f"token {token} is not one of the model's {model.base.vocab_size}"
            raise RequestError(400, message, param="logit_bias")
    return biases


def _make_request(
    body: ChatBody | CompletionBody,
    prompt: Prompt,
    model: ServedModel,
    key: ApiKey,
    biases: tuple[tuple[int, float], ...],
) -> GenerationRequest:
    return GenerationRequest(
        tokens=prompt.tokens,
        max_new_tokens=prompt.max_new_tokens,
        temperature=DEFAULT_TEMPERATURE if body.temperature is None else body.temperature,
        top_p=body.top_p or 1.0,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        stop=body.stops,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=biases,
        num_logprobs=body.num_logprobs,
        num_prompt_logprobs=body.num_prompt_logprobs,
        end_ids=model.renderer.end_ids,
        adapter=model.adapter_key if model.scale else "",
        adapter_scale=model.scale,
        cache_salt=key.id,
    )


@dataclass(eq=False)
class Server:
    """The parts that all handlers use."""

    scheduler: Scheduler
    registry: Registry
    metrics: ServerMetrics
    routes: RouteTable
    numerics: str  # dtype and kernels, which round differently
    request_seconds: float
    grammars: GrammarCache = field(default_factory=GrammarCache)
    models_dir: Path | None = None
    feedback: FeedbackStore | None = None  # without it, no content is kept


def get_server(request: Request) -> Server:
    return request.app.state.server


def get_key(request: Request) -> ApiKey:
    return request.scope[KEY_FIELD]


def start_exchange(request: Request, body: ChatBody | CompletionBody) -> Exchange:
    """Choose the model that a body names, or that its route chooses, and note it in the access
    log."""
    server = get_server(request)
    key = get_key(request)
    record: AccessRecord = request.scope[RECORD_FIELD]
    route = server.routes.find(body.model, key)
    user = ""
    if route is None:
        model = server.registry.find(body.model, key)
    else:
        record.route = route.name
        unit = route.name_unit(body.user, key, record.id)
        model = server.routes.choose_model(route, unit)
        user = unit if route.settings.sticky == "user" else ""
    record.model = model.name
    record.version = model.version
    return Exchange(request, server, key, record, body, model, route, user)


@dataclass(eq=False)
class Exchange:
    """A request and its answers. `route` has chosen the model, and `user` keeps it."""

    request: Request
    server: Server
    key: ApiKey
    record: AccessRecord
    body: ChatBody | CompletionBody
    model: ServedModel
    route: Route | None
    user: str
    answers: Sequence[Answer] = ()
    jobs: Sequence[AnswerJob] = ()
    num_prompt_tokens: int = 0
    failure: str = ""  # the code of the error that ended it

    def make_head(self, prefix: str) -> AnswerHead:
        """Return the fields that all parts of the response share."""
        return AnswerHead(
            id=f"{prefix}-{self.record.id.removeprefix('req-')}",
            model=self.body.model if self.route is None else self.model.name,
            fingerprint=compute_fingerprint(self.model, self.server.numerics),
            renderer=self.model.renderer,
            has_logprobs=self.body.num_logprobs >= 0,
            has_token_ids=bool(self.body.return_token_ids),
            has_usage=self.body.should_send_usage,
        )

    async def answer(
        self, prompts: Sequence[Prompt], answer_format: ChatFormat | CompletionFormat
    ) -> ASGIApp:
        """Queue the answers to some prompts and return the response that waits for them."""
        num_answers = len(prompts) * (self.body.n or 1)
        self.server.scheduler.check_capacity(num_answers, (self.key.id, self.model.name))
        grammars = self.server.grammars
        self.jobs = await make_jobs(self.body, prompts, self.model, self.key, grammars)
        self.answers = [Answer(job.request.tokens) for job in self.jobs]
        by_prompt = {id(job.request.tokens): job.prompt_tokens for job in self.jobs}
        self.num_prompt_tokens = sum(by_prompt.values())  # choices share their prompt
        lease = await self._acquire()
        try:
            self.server.scheduler.submit(self.jobs)
        except RequestError:
            lease.release()
            raise
        version = self.model.version
        headers = {"x-tunesmith-model": version}
        if self.route is not None:
            headers = {"x-tunesmith-model": f"{self.route.name}={version}"}
        if self.body.stream:
            events = self._iter_events(answer_format, lease)
            await anext(events)  # from here on, closing them ends the answers
            return EventStream(events, headers)
        content = await run_until_disconnect(self.request.receive, self._run(answer_format, lease))
        if content is None:
            self.record.has_disconnected = True
            return Response(status_code=CLIENT_DISCONNECTED)
        self._keep()
        if self.record.is_schema_valid is not None:
            headers["x-tunesmith-schema"] = "complete" if self.record.is_schema_valid else "open"
        return JSONResponse(content, headers={**NO_STORE, **headers})

    async def _acquire(self) -> Lease:
        """Return a lease on the model. Raises RequestError if it cannot be loaded; a canary is
        rolled back then."""
        try:
            return await self.server.registry.acquire(self.model)
        except RequestError as error:
            if error.code == "model_not_loaded":
                self._roll_back(error.message)
            raise

    def _roll_back(self, reason: str) -> None:
        """Take the model away if it is a canary that cannot answer."""
        if self.route is not None and self.model.name != self.route.stable:
            self.server.routes.roll_back(self.route, reason)

    async def _run(self, answer_format: ChatFormat | CompletionFormat, lease: Lease) -> Json:
        """Return the body of the response when all answers are complete."""
        try:
            async for update in self._iter_updates():
                self.answers[update.index].extend(update)
        finally:
            self._end(lease)
        # on a worker: with log-probabilities it takes seconds, and other clients wait for the loop
        return await asyncio.to_thread(answer_format.format_body, self.answers, self._count_usage())

    async def _iter_events(
        self, answer_format: ChatFormat | CompletionFormat, lease: Lease
    ) -> AsyncGenerator[bytes]:
        """Yield NO_EVENT, then the events of a stream; an error is the last one."""
        self.record.has_disconnected = True  # until the last event is out
        try:
            yield NO_EVENT
            for event in answer_format.format_start(self.answers):
                yield encode_event(event)
            async for update in self._iter_updates():
                answer = self.answers[update.index]
                answer.extend(update)
                if update.text or update.tokens or update.finish_reason:
                    yield encode_event(answer_format.format_update(answer, update))
            if self.body.should_send_usage:
                yield encode_event(answer_format.format_last(self._count_usage()))
            self.record.has_disconnected = False
            self._keep()  # before the client sees the end, and may give feedback
            yield LAST_EVENT
        except RequestError as error:
            self.record.has_disconnected = False
            self.record.status = error.status
            yield encode_event(error.to_body())
        finally:
            self._end(lease)

    def _count_usage(self) -> Json:
        answer_tokens = sum(len(answer.tokens) for answer in self.answers)
        return format_usage(self.num_prompt_tokens, answer_tokens, self.answers[0].cached_tokens)

    async def _iter_updates(self) -> AsyncGenerator[AnswerUpdate]:
        """Yield updates until all answers are complete. Raises RequestError for an answer that
        failed, and 504 after the time of a request."""
        outbox = self.jobs[0].outbox
        deadline = time.monotonic() + self.server.request_seconds
        num_unfinished = len(self.jobs)
        while num_unfinished:
            try:
                update = await asyncio.wait_for(outbox.get(), deadline - time.monotonic())
            except TimeoutError:
                self.failure = TIMEOUT
                message = f"not complete after {self.server.request_seconds:g} s"
                raise RequestError(504, message, code=TIMEOUT) from None
            if update.finish_reason == "error":
                self.failure = update.error_code
                if update.error_code == NOT_FINITE:
                    self._roll_back(f"{self.model.name} gives NaN or infinite numbers")
                status = ERROR_STATUS.get(update.error_code, 503)
                raise RequestError(status, update.error, code=update.error_code)
            self.record.note_first_token()
            if update.finish_reason:
                num_unfinished -= 1
            yield update

    def _end(self, lease: Lease) -> None:
        """Cancel what still runs, give the adapter back, and note what was done."""
        unfinished = 0
        for job, answer in zip(self.jobs, self.answers, strict=True):
            if not answer.finish_reason:
                self.server.scheduler.cancel(job)
                unfinished += 1
        self.server.metrics.cut_answers.labels(self.model.name).inc(unfinished)
        lease.release()
        record = self.record
        record.prompt_tokens = self.num_prompt_tokens
        record.cached_tokens = self.answers[0].cached_tokens
        record.answer_tokens = sum(len(answer.tokens) for answer in self.answers)
        record.finish_reasons = tuple(answer.finish_reason for answer in self.answers)
        has_grammar = self.jobs[0].grammar is not None
        if has_grammar:  # a limit or a stop string cuts valid JSON
            record.is_schema_valid = set(record.finish_reasons) == {"end"}
        self.server.metrics.count_answers(record, len(self.answers))
        if self.route is None or (unfinished and self.failure not in (NOT_FINITE, TIMEOUT)):
            return  # a client that has left says nothing of the model
        complete = [] if self.failure else self.answers
        checked: list[CheckedAnswer] = []
        for answer in complete:
            checked.append(
                CheckedAnswer(answer.text, answer.tokens, answer.finish_reason, has_grammar)
            )
        self.server.routes.note_answers(self.route, self.model, checked, user=self.user)

    def _keep(self) -> None:
        """Keep a chat with one answer for feedback, if the settings allow it."""
        store = self.server.feedback
        body = self.body
        if store is None or not isinstance(body, ChatBody) or len(self.answers) > 1:
            return
        if body.has_tools:  # a row of it would need its tools and calls
            return
        chat = KeptChat(
            id=self.record.id.removeprefix("req-"),
            key_id=self.key.id,
            model=self.model.name,
            version=self.model.version,
            digest=self.model.digest,
            messages=list_messages(body.messages),
            answer=self.answers[0].text,
            time=time.monotonic(),
        )
        store.chats.add(chat)


def compute_fingerprint(model: ServedModel, numerics: str) -> str:
    """Return 12 hex digits of all that decides an answer besides the request."""
    identity = [model.base.sha256, model.digest, f"{model.scale:g}", numerics, __version__]
    identity.append(model.renderer.fingerprint)
    if model.schema is not None:
        identity.append(dump_json(model.schema).decode())
    return f"fp_{hashlib.sha256('|'.join(identity).encode()).hexdigest()[:12]}"
