"""What each route does: a function from a request to a response.

In: a request that the guard has let in, with its key and body in the scope. Out: a response in
OpenAI's shape. All of them share one `Server`. A model that is published is the id of a folder
below --models-dir: a path that is absolute, climbs or leads out over a link is refused. A name
changes only after the adapter was opened, checked against the base and loaded; a failure is 409 and
the old one serves on. Left out: the table of routes (app.py), who may call them (middleware.py)."""

from __future__ import annotations

import asyncio
import re
import time
from http import HTTPStatus
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from tunesmith.core.errors import InputError, TunesmithError
from tunesmith.core.types import Json
from tunesmith.serve.bodies import (
    CanaryBody,
    ChatBody,
    CompletionBody,
    FeedbackBody,
    ModelBody,
    read_body,
)
from tunesmith.serve.errors import NO_STORE, RequestError, format_problem, from_tunesmith_error
from tunesmith.serve.exchange import (
    Server,
    get_key,
    get_server,
    render_chat,
    render_completions,
    start_exchange,
)
from tunesmith.serve.formats import ChatFormat, CompletionFormat
from tunesmith.serve.middleware import BODY_FIELD
from tunesmith.serve.registry import ServedModel
from tunesmith.serve.routes import Route
from tunesmith.serve.settings import BASE_NAME, check_name
from tunesmith.serve.sources import open_adapter
from tunesmith.serve.tool_calls import ToolChatFormat, find_tools

# ---------------------------------------------------------------- answers
ID_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
MAX_ID_PARTS = 6


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
            "unproven": source is not None and source.provenance is None,
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


def find_folder(root: Path | None, model_id: str) -> Path:
    """Return the folder of an id below `root`. Raises RequestError for anything that is not a plain
    folder inside it."""
    if root is None:
        message = "this server was started without --models-dir"
        raise RequestError(403, message, code="no_models_dir", param="from")
    parts = model_id.split("/")
    if len(parts) > MAX_ID_PARTS or not all(ID_PART.fullmatch(part) for part in parts):
        message = "not an id: use names of folders below --models-dir, joined by /"
        raise RequestError(400, message, param="from")
    real_root = root.resolve()
    folder = real_root.joinpath(*parts)
    if not folder.is_dir():
        raise RequestError(404, "there is no such folder below --models-dir", param="from")
    if folder.resolve() != folder:
        raise RequestError(400, "links are not followed", param="from")
    return folder


def _get_name(request: Request) -> str:
    """Return the name in the path. Raises RequestError for one that no model can have."""
    name = request.path_params["model"]
    try:
        check_name(name, where="path")
    except InputError as error:
        raise from_tunesmith_error(error, param="model") from None
    return name


async def get_admin_model(request: Request) -> JSONResponse:
    """Return one model with its digest as ETag."""
    model = get_server(request).registry.find(request.path_params["model"], get_key(request))
    headers = {**NO_STORE, "etag": f'"{model.digest}"'}
    return JSONResponse(describe_model(request, model), headers=headers)


async def put_model(request: Request) -> JSONResponse:
    """Publish an adapter under a name, or replace the one that has it."""
    name = _get_name(request)
    body = read_body(request.scope[BODY_FIELD], ModelBody)
    server = get_server(request)
    if server.routes.get(name) is not None:
        message = f"{name} is the name of a route"
        raise RequestError(HTTPStatus.CONFLICT, message, code="name_taken", param="model")
    registry = server.registry
    registry.check_match(name, request.headers.get("if-match"))
    folder = find_folder(server.models_dir, body.source)
    model = await open_model(server, name, folder, body)
    lease = await registry.acquire(model)  # loads it: a name never points to what cannot be loaded
    try:
        registry.check_match(name, request.headers.get("if-match"))
        registry.register(model)
    finally:
        lease.release()
    headers = {**NO_STORE, "etag": f'"{model.digest}"'}
    return JSONResponse(describe_model(request, model), headers=headers)


async def open_model(server: Server, name: str, folder: Path, body: ModelBody) -> ServedModel:
    """Open an adapter folder as a model. Raises RequestError 409 for what the base cannot serve; it
    names the folder as the request does."""
    base = server.registry.base
    try:
        source = await asyncio.to_thread(
            open_adapter, str(folder), base, is_unproven_allowed=body.unproven
        )
        return ServedModel(
            name,
            base,
            source,
            scale=body.scale,
            is_constrained=body.constrain,
            is_pinned=body.pin,
        )
    except (TunesmithError, OSError) as error:
        message = "its files cannot be read"  # they change while they are opened
        if isinstance(error, TunesmithError):
            message = format_problem(error).replace(str(folder), body.source)
        raise RequestError(
            HTTPStatus.CONFLICT, message, code="not_published", param="from"
        ) from None


async def delete_model(request: Request) -> Response:
    """Remove a name; requests that use its adapter end as they began."""
    name = _get_name(request)
    server = get_server(request)
    if routes := server.routes.list_users(name):
        message = f"{name} is used by the routes {', '.join(routes)}"
        raise RequestError(HTTPStatus.CONFLICT, message, code="model_in_use", param="model")
    registry = server.registry
    registry.check_match(name, request.headers.get("if-match"))
    registry.remove(name)
    return Response(status_code=HTTPStatus.NO_CONTENT, headers=NO_STORE)


async def list_routes(request: Request) -> JSONResponse:
    """List the routes with what their canaries have counted."""
    routes = [route.describe() for route in get_server(request).routes]
    return JSONResponse({"object": "list", "data": routes}, headers=NO_STORE)


async def put_route(request: Request) -> JSONResponse:
    """Start or roll back the canary of a route."""
    name = request.path_params["route"]
    table = get_server(request).routes
    route = table.get(name)
    if route is None:
        raise RequestError(404, f"there is no route {name!r:.100}", code="route_not_found")
    body = read_body(request.scope[BODY_FIELD], CanaryBody)
    if route.canary is None:
        message = f"{route.name} has no canary; serve.yaml gives it one"
        raise RequestError(HTTPStatus.CONFLICT, message, code="no_canary", param="route")
    if body.canary == "start":
        table.start_canary(route)
    else:
        table.roll_back(route, f"set by {get_key(request).name}")
    return JSONResponse(route.describe(), headers=NO_STORE)


async def start_drain(request: Request) -> JSONResponse:
    """Take no new requests; those that run go on."""
    scheduler = get_server(request).scheduler
    scheduler.is_draining = True
    return JSONResponse({"active": scheduler.num_active}, headers=NO_STORE)
