"""Add, replace and remove models of a running server; show its routes and set their canaries.

    PUT /admin/models/json {"from": "demo-2", "scale": 0.75}     If-Match: "<digest>"

In: the id of a folder below --models-dir; a path that is absolute, climbs or leads out over a link
is refused. Out: the published model. A name changes only after the adapter was opened, checked
against the base and loaded; a failure is 409 and the old one serves on. Left out: who may do this
(middleware.py)."""

from __future__ import annotations

import asyncio
import re
from http import HTTPStatus
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tunesmith.core.errors import InputError, TunesmithError
from tunesmith.serve.bodies import CanaryBody, ModelBody, read_body
from tunesmith.serve.errors import NO_STORE, RequestError, format_problem, from_tunesmith_error
from tunesmith.serve.exchange import Server, get_key, get_server
from tunesmith.serve.handlers import describe_model
from tunesmith.serve.middleware import BODY_FIELD
from tunesmith.serve.registry import ServedModel
from tunesmith.serve.settings import check_name
from tunesmith.serve.sources import open_adapter

ID_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
MAX_ID_PARTS = 6


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
            can_scale=body.scales,
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
