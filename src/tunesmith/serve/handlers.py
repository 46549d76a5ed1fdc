"""What each route does: a function from a request to a response.

In: a request that the guard has let in, with its key and body in the scope. Out: a response in
OpenAI's shape. All of them share one `Server`. Left out: the table of routes (app.py), changes
of models (admin.py)."""

from __future__ import annotations

import asyncio
import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from tunesmith.core.types import Json
from tunesmith.serve.bodies import ChatBody, CompletionBody, FeedbackBody, read_body
from tunesmith.serve.errors import NO_STORE, RequestError
from tunesmith.serve.exchange import get_key, get_server, start_exchange
from tunesmith.serve.formats import ChatFormat, CompletionFormat
from tunesmith.serve.middleware import BODY_FIELD
from tunesmith.serve.registry import ServedModel
from tunesmith.serve.requests import render_chat, render_completions
from tunesmith.serve.routes import Route
from tunesmith.serve.settings import BASE_NAME
from tunesmith.serve.tool_calls import ToolChatFormat
from tunesmith.serve.tool_requests import find_tools

# ---------------------------------------------------------------- answers


async def create_chat_completion(request: Request) -> ASGIApp:
    """Answer a conversation."""
    body = read_body(request.scope[BODY_FIELD], ChatBody)
    exchange = start_exchange(request, body)
    prompt = await asyncio.to_thread(render_chat, body, exchange.model)
    answer_format = ChatFormat(exchange.make_head("chatcmpl"))
    if body.active_tools:
        tools = await asyncio.to_thread(find_tools, body, exchange.model)
        answer_format = ToolChatFormat(exchange.make_head("chatcmpl"), tools)
    return await exchange.answer([prompt], answer_format)


async def create_completion(request: Request) -> ASGIApp:
    """Continue a text or token ids."""
    body = read_body(request.scope[BODY_FIELD], CompletionBody)
    exchange = start_exchange(request, body)
    prompts = await asyncio.to_thread(render_completions, body, exchange.model)
    head = exchange.make_head("cmpl")
    return await exchange.answer(prompts, CompletionFormat(head, should_echo=bool(body.echo)))


async def create_feedback(request: Request) -> JSONResponse:
    """Take a verdict on an answer, or a correction of it."""
    body = read_body(request.scope[BODY_FIELD], FeedbackBody)
    server = get_server(request)
    if server.feedback is None:
        message = "this server keeps no content; set keep_content: FOLDER in its serve.yaml"
        raise RequestError(409, message, code="feedback_is_off")
    chat = await server.feedback.add(body, get_key(request), time.monotonic())
    server.metrics.feedback.labels(chat.model, body.verdict).inc()
    content = {"object": "feedback", "request_id": f"req-{chat.id}", "verdict": body.verdict}
    return JSONResponse(content, 201, NO_STORE)


# ---------------------------------------------------------------- models and state


def describe_model(request: Request, model: ServedModel) -> Json:
    """Return a model as /v1/models shows it; no path is part of it."""
    source = model.source
    registry = get_server(request).registry
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
        "max_model_len": get_server(request).registry.base.context_length,
        "tunesmith": {"arms": route.shares},
    }


async def list_models(request: Request) -> JSONResponse:
    """List the base, the adapters and the routes that the key may use."""
    server = get_server(request)
    key = get_key(request)
    registry = server.registry
    models = [describe_model(request, model) for model in registry.list_models(key)]
    for route in server.routes:
        if key.can_use_model(route.name):
            models.append(describe_route(request, route))
    return JSONResponse({"object": "list", "data": models}, headers=NO_STORE)


async def get_model(request: Request) -> JSONResponse:
    """Return one model or route."""
    server = get_server(request)
    name = request.path_params["model"]
    route = server.routes.find(name, get_key(request))
    if route is not None:
        return JSONResponse(describe_route(request, route), headers=NO_STORE)
    model = server.registry.find(name, get_key(request))
    return JSONResponse(describe_model(request, model), headers=NO_STORE)


async def get_health(request: Request) -> JSONResponse:
    """Say whether the process works, and nothing else."""
    is_alive = get_server(request).scheduler.is_alive
    return JSONResponse({}, 200 if is_alive else 500, NO_STORE)


async def get_readiness(request: Request) -> JSONResponse:
    """Say whether requests are taken."""
    scheduler = get_server(request).scheduler
    state = "draining" if scheduler.is_draining else "ready"
    if not scheduler.is_alive:
        state = "stopped"
    return JSONResponse({"state": state}, 200 if state == "ready" else 503, NO_STORE)


async def get_metrics(request: Request) -> Response:
    """Return the metrics in Prometheus' text format."""
    content = get_server(request).metrics.render()
    return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")


async def refuse_embeddings(_request: Request) -> Response:
    """Say why there are no embeddings."""
    message = "embeddings are not supported"
    return RequestError(404, message, code="not_supported").to_response()
