"""What each route does: a function from a request to a response.

In: a request that the guard has let in, with its key and body in the scope. Out: a response in
OpenAI's shape. All of them share one `Server`. Left out: the table of routes (app.py), changes
of models (admin.py)."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from tunesmith.core.json_io import dump_json
from tunesmith.core.types import Json, __version__
from tunesmith.serve.access_log import RECORD_FIELD, AccessRecord
from tunesmith.serve.bodies import (
    ChatBody,
    CompletionBody,
    FeedbackBody,
    SamplingBody,
    read_body,
)
from tunesmith.serve.errors import NO_STORE, RequestError
from tunesmith.serve.feedback import FeedbackStore, KeptChat, list_messages
from tunesmith.serve.formats import AnswerFormat, AnswerHead, ChatFormat, CompletionFormat
from tunesmith.serve.generation import AnswerEngine, Generation
from tunesmith.serve.grammars import GrammarCache
from tunesmith.serve.keys import ApiKey
from tunesmith.serve.middleware import BODY_FIELD, KEY_FIELD
from tunesmith.serve.registry import Lease, ServedModel
from tunesmith.serve.requests import Prompt, make_jobs, render_chat, render_completions
from tunesmith.serve.route_judge import ChosenModel, RoutedAnswers, RouteJudge
from tunesmith.serve.routes import Route
from tunesmith.serve.settings import BASE_NAME
from tunesmith.serve.shadow import ShadowRequest
from tunesmith.serve.streams import LAST_EVENT, EventStream, run_until_disconnect
from tunesmith.serve.tool_calls import ToolChatFormat
from tunesmith.serve.tool_requests import find_tools

CLIENT_DISCONNECTED = 499  # in the log only: nobody reads the response


@dataclass(eq=False)
class Server:
    """The parts that all handlers use."""

    engine: AnswerEngine
    grammars: GrammarCache
    routes: RouteJudge
    numerics: str  # dtype and kernels, which round differently
    models_dir: Path | None = None
    feedback: FeedbackStore | None = None  # without it, no content is kept


def get_server(request: Request) -> Server:
    return request.app.state.server


def get_key(request: Request) -> ApiKey:
    return request.scope[KEY_FIELD]


def get_record(request: Request) -> AccessRecord:
    return request.scope[RECORD_FIELD]


# ---------------------------------------------------------------- answers


async def create_chat_completion(request: Request) -> ASGIApp:
    """Answer a conversation."""
    body = read_body(request.scope[BODY_FIELD], ChatBody)
    chosen = choose_model(request, body)
    prompt = await asyncio.to_thread(render_chat, body, chosen.model)
    head = make_head(request, body, chosen, "chatcmpl", has_logprobs=bool(body.logprobs))
    answer_format = ChatFormat(head)
    if body.active_tools:
        tools = await asyncio.to_thread(find_tools, body, chosen.model)
        answer_format = ToolChatFormat(head, tools)
    return await answer(request, body, [prompt], chosen, answer_format)


async def create_completion(request: Request) -> ASGIApp:
    """Continue a text or token ids."""
    body = read_body(request.scope[BODY_FIELD], CompletionBody)
    chosen = choose_model(request, body)
    prompts = await asyncio.to_thread(render_completions, body, chosen.model)
    head = make_head(request, body, chosen, "cmpl", has_logprobs=body.logprobs is not None)
    answer_format = CompletionFormat(head, should_echo=bool(body.echo))
    return await answer(request, body, prompts, chosen, answer_format)


def choose_model(request: Request, body: SamplingBody) -> ChosenModel:
    """Return the model that a body names, or that its route chooses, and note it in the access
    log."""
    server = get_server(request)
    key = get_key(request)
    record = get_record(request)
    route = server.routes.table.find(body.model, key)
    if route is None:
        chosen = ChosenModel(server.engine.registry.find(body.model, key))
    else:
        record.route = route.name
        unit = route.name_unit(body.user, key, record.id)
        model = server.routes.choose_model(route, unit)
        chosen = ChosenModel(model, route, unit if route.settings.sticky == "user" else "")
    record.model = chosen.model.name
    record.version = chosen.model.version
    if server.engine.registry.get_witness(chosen.model) == "unproven":
        server.engine.metrics.unproven.labels(chosen.model.name).inc()
    return chosen


def make_head(
    request: Request, body: SamplingBody, chosen: ChosenModel, prefix: str, *, has_logprobs: bool
) -> AnswerHead:
    model = chosen.model
    return AnswerHead(
        id=f"{prefix}-{get_record(request).id.removeprefix('req-')}",
        model=body.model if chosen.route is None else model.name,
        fingerprint=compute_fingerprint(model, get_server(request).numerics),
        renderer=model.renderer,
        has_logprobs=has_logprobs,
        has_token_ids=bool(body.return_token_ids),
        has_usage=body.should_send_usage,
    )


async def answer(
    request: Request,
    body: ChatBody | CompletionBody,
    prompts: Sequence[Prompt],
    chosen: ChosenModel,
    answer_format: AnswerFormat,
) -> ASGIApp:
    """Queue the answers to some prompts and return the response that waits for them."""
    server = get_server(request)
    model = chosen.model
    num_answers = len(prompts) * (body.n or 1)
    key = get_key(request)
    server.engine.scheduler.check_capacity(num_answers, (key.id, model.name))
    jobs = await make_jobs(body, prompts, model, key, server.grammars)
    lease = await acquire(server, chosen)
    record = get_record(request)
    generation = Generation(server.engine, model, lease, jobs, answer_format, record)
    generation.submit()
    headers = {"x-tunesmith-model": name_version(chosen)}
    if body.stream:
        events = generation.events(should_send_usage=body.should_send_usage)
        events = keep_before_end(events, request, body, generation, chosen)
        await anext(events)  # from here on, closing them ends the answers
        return EventStream(events, headers)
    try:
        content = await run_until_disconnect(request.receive, generation.run())
    finally:
        note_answers(request, body, generation, chosen)
    if content is None:
        record.has_disconnected = True
        return Response(status_code=CLIENT_DISCONNECTED)
    keep_chat(request, body, generation, chosen)
    if record.is_schema_valid is not None:
        headers["x-tunesmith-schema"] = "complete" if record.is_schema_valid else "open"
    return JSONResponse(content, headers={**NO_STORE, **headers})


async def acquire(server: Server, chosen: ChosenModel) -> Lease:
    """Return a lease on the model. Raises RequestError if it cannot be loaded; a canary is rolled
    back then."""
    try:
        return await server.engine.registry.acquire(chosen.model)
    except RequestError as error:
        route = chosen.route
        is_lost = error.code == "model_not_loaded"
        if is_lost and route is not None and chosen.model.name != route.stable:
            server.routes.roll_back(route, error.message)
        raise


def name_version(chosen: ChosenModel) -> str:
    """Return what answers: the route, and the version of the model that it has chosen."""
    version = chosen.model.version
    return version if chosen.route is None else f"{chosen.route.name}={version}"


async def keep_before_end(
    events: AsyncGenerator[bytes],
    request: Request,
    body: ChatBody | CompletionBody,
    generation: Generation,
    chosen: ChosenModel,
) -> AsyncGenerator[bytes]:
    """Yield the events of a stream; the chat is kept before the client sees the last of them."""
    try:
        async with aclosing(events):
            async for event in events:
                if event is LAST_EVENT:
                    keep_chat(request, body, generation, chosen)
                yield event
    finally:
        note_answers(request, body, generation, chosen)


def note_answers(
    request: Request, body: ChatBody | CompletionBody, generation: Generation, chosen: ChosenModel
) -> None:
    """Let the route judge what was answered."""
    if chosen.route is None:
        return
    first_job = generation.jobs[0]
    routed = RoutedAnswers(
        id=get_record(request).id,
        chosen=chosen,
        answers=generation.answers,
        has_grammar=first_job.grammar is not None,
        failure=generation.failure,
        request=ShadowRequest(body, get_key(request), first_job.request.seed),
    )
    get_server(request).routes.note_answers(routed)


def keep_chat(
    request: Request, body: SamplingBody, generation: Generation, chosen: ChosenModel
) -> None:
    """Keep a chat with one answer for feedback, if the settings allow it."""
    store = get_server(request).feedback
    if store is None or not isinstance(body, ChatBody) or len(generation.answers) > 1:
        return
    if body.has_tools:  # a row of it would need its tools and calls
        return
    model = generation.model
    chat = KeptChat(
        id=get_record(request).id.removeprefix("req-"),
        key_id=get_key(request).id,
        model=model.name,
        version=model.version,
        digest=model.digest,
        messages=list_messages(body.messages),
        answer=generation.answers[0].text,
        time=time.monotonic(),
        route="" if chosen.route is None else chosen.route.name,
        user=chosen.user,
    )
    store.chats.add(chat)


async def create_feedback(request: Request) -> JSONResponse:
    """Take a verdict on an answer, or a correction of it."""
    body = read_body(request.scope[BODY_FIELD], FeedbackBody)
    server = get_server(request)
    if server.feedback is None:
        message = "this server keeps no content; set keep_content: FOLDER in its serve.yaml"
        raise RequestError(409, message, code="feedback_is_off")
    chat = await server.feedback.add(body, get_key(request), time.monotonic())
    server.engine.metrics.feedback.labels(chat.model, body.verdict).inc()
    server.routes.note_feedback(chat, body.verdict)
    content = {"object": "feedback", "request_id": f"req-{chat.id}", "verdict": body.verdict}
    return JSONResponse(content, 201, NO_STORE)


def compute_fingerprint(model: ServedModel, numerics: str) -> str:
    """Return 12 hex digits of all that decides an answer besides the request."""
    identity = [model.base.sha256, model.digest, f"{model.scale:g}", numerics, __version__]
    identity.append(model.renderer.fingerprint)
    if model.schema is not None:
        identity.append(dump_json(model.schema).decode())
    return f"fp_{hashlib.sha256('|'.join(identity).encode()).hexdigest()[:12]}"


# ---------------------------------------------------------------- models and state


def describe_model(request: Request, model: ServedModel) -> Json:
    """Return a model as /v1/models shows it; no path is part of it."""
    source = model.source
    registry = get_server(request).engine.registry
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "tunesmith",
        "parent": None if source is None else BASE_NAME,
        "root": model.digest,
        "max_model_len": model.base.context_length,
        "tunesmith": {
            "digest": model.digest,
            "scale": model.scale,
            "run": None if source is None else source.label,
            "witness": registry.get_witness(model) or None,
            "resident": registry.is_resident(model),
            "schema": model.schema is not None,
        },
    }


def describe_route(request: Request, route: Route) -> Json:
    """Return a route as /v1/models shows it."""
    return {
        "id": route.name,
        "object": "model",
        "created": route.created,
        "owned_by": "tunesmith",
        "parent": None,
        "root": None,
        "max_model_len": get_server(request).engine.registry.base.context_length,
        "tunesmith": {"arms": route.shares},
    }


async def list_models(request: Request) -> JSONResponse:
    """List the base, the adapters and the routes that the key may use."""
    server = get_server(request)
    key = get_key(request)
    registry = server.engine.registry
    models = [describe_model(request, model) for model in registry.list_models(key)]
    for route in server.routes.table:
        if key.can_use_model(route.name):
            models.append(describe_route(request, route))
    return JSONResponse({"object": "list", "data": models}, headers=NO_STORE)


async def get_model(request: Request) -> JSONResponse:
    """Return one model or route."""
    server = get_server(request)
    name = request.path_params["model"]
    route = server.routes.table.find(name, get_key(request))
    if route is not None:
        return JSONResponse(describe_route(request, route), headers=NO_STORE)
    model = server.engine.registry.find(name, get_key(request))
    return JSONResponse(describe_model(request, model), headers=NO_STORE)


async def get_health(request: Request) -> JSONResponse:
    """Say whether the process works, and nothing else."""
    is_alive = get_server(request).engine.scheduler.is_alive
    return JSONResponse({}, 200 if is_alive else 500, NO_STORE)


async def get_readiness(request: Request) -> JSONResponse:
    """Say whether requests are taken."""
    scheduler = get_server(request).engine.scheduler
    state = "draining" if scheduler.is_draining else "ready"
    if not scheduler.is_alive:
        state = "stopped"
    return JSONResponse({"state": state}, 200 if state == "ready" else 503, NO_STORE)


async def get_metrics(request: Request) -> Response:
    """Return the metrics in Prometheus' text format."""
    content = get_server(request).engine.metrics.render()
    return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")


async def refuse_embeddings(_request: Request) -> Response:
    """Say why there are no embeddings."""
    message = "embeddings are not supported"
    return RequestError(404, message, code="not_supported").to_response()
