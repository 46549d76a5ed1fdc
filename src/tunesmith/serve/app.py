"""The application: the table of routes, and what is around them.

    app = build_app(server, settings, key_ring)

A route is a line in `ROUTES`: path, method, handler, the scope that a key needs, the class of its
body. The guard, the OpenAPI document and the tests read the same table, so that a route that is not
in it does not exist. schemathesis reads the document: a body that it allows and the server dies of
is a failing test. Left out: starting and stopping (server.py)."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, compile_path
from starlette.types import ASGIApp

from tunesmith.core.types import Json, __version__
from tunesmith.serve import handlers
from tunesmith.serve.bodies import CanaryBody, ChatBody, CompletionBody, FeedbackBody, ModelBody
from tunesmith.serve.errors import NO_STORE, RequestError, make_error_body
from tunesmith.serve.exchange import Server
from tunesmith.serve.keys import KeyRing, Scope
from tunesmith.serve.middleware import AccessMiddleware, AccessRules, list_hosts
from tunesmith.serve.settings import ServeSettings

REF_TEMPLATE = "#/components/schemas/{model}"
ERROR_SCHEMA: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
BODY_ERRORS = (400, 408, 413, 415, 429, 503, 504)
KEY_ERRORS = (401, 403, 404, 421)


@dataclass(frozen=True)
class Endpoint:
    """A route. `scope` None is open to everyone."""

    method: str
    path: str
    handler: Callable[[Request], Awaitable[ASGIApp]]
    scope: Scope | None
    body: type[BaseModel] | None = None
    success: int = 200


def build_openapi(endpoints: Sequence[Endpoint]) -> Json:
    """Return the document."""
    bodies = [endpoint.body for endpoint in endpoints if endpoint.body is not None]
    references, definitions = models_json_schema(
        [(body, "validation") for body in bodies], by_alias=True, ref_template=REF_TEMPLATE
    )
    paths: Json = {}
    for endpoint in endpoints:
        operation = _describe(endpoint)
        if endpoint.body is not None:
            schema = references[(endpoint.body, "validation")]
            content = {"application/json": {"schema": schema}}
            operation["requestBody"] = {"required": True, "content": content}
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "tunesmith serve", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**definitions.get("$defs", {}), "Error": ERROR_SCHEMA},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _describe(endpoint: Endpoint) -> Json:
    summary = (inspect.getdoc(endpoint.handler) or "").split("\n")[0]
    responses: Json = {str(endpoint.success): {"description": "what was asked for"}}
    errors = [*KEY_ERRORS, *(BODY_ERRORS if endpoint.body is not None else ())]
    reference = {"$ref": REF_TEMPLATE.format(model="Error")}
    for status in errors:
        content = {"application/json": {"schema": reference}}
        responses.setdefault(str(status), {"description": "an error", "content": content})
    operation: Json = {"summary": summary, "responses": responses}
    if endpoint.scope is not None:
        operation["security"] = [{"key": []}]
    names = re.findall(r"\{(\w+)\}", endpoint.path)
    operation["parameters"] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in names
    ]
    return operation


async def get_openapi(_request: Request) -> JSONResponse:
    """Return the OpenAPI document of this API."""
    return JSONResponse(build_openapi(ROUTES), headers=NO_STORE)


ROUTES: tuple[Endpoint, ...] = (
    Endpoint("GET", "/health", handlers.get_health, None),
    Endpoint("GET", "/ready", handlers.get_readiness, "metrics"),
    Endpoint("GET", "/metrics", handlers.get_metrics, "metrics"),
    Endpoint("GET", "/openapi.json", get_openapi, "infer"),
    Endpoint("GET", "/v1/models", handlers.list_models, "infer"),
    Endpoint("GET", "/v1/models/{model}", handlers.get_model, "infer"),
    Endpoint("POST", "/v1/chat/completions", handlers.create_chat_completion, "infer", ChatBody),
    Endpoint("POST", "/v1/completions", handlers.create_completion, "infer", CompletionBody),
    Endpoint("POST", "/v1/embeddings", handlers.refuse_embeddings, "infer", success=404),
    Endpoint(
        "POST", "/v1/feedback", handlers.create_feedback, "feedback", FeedbackBody, success=201
    ),
    Endpoint("GET", "/admin/models/{model}", handlers.get_admin_model, "admin"),
    Endpoint("PUT", "/admin/models/{model}", handlers.put_model, "admin", ModelBody),
    Endpoint("DELETE", "/admin/models/{model}", handlers.delete_model, "admin", success=204),
    Endpoint("GET", "/admin/routes", handlers.list_routes, "admin"),
    Endpoint("PUT", "/admin/routes/{route}", handlers.put_route, "admin", CanaryBody),
    Endpoint("POST", "/admin/drain", handlers.start_drain, "admin"),
)
PATH_SCOPES: tuple[tuple[re.Pattern[str], Scope | None], ...] = tuple(
    (compile_path(route.path)[0], route.scope) for route in ROUTES
)
OPEN_METRICS = ("/ready", "/metrics")


def find_scope(path: str) -> Scope | None:
    """Return the scope that a path needs, by the patterns of the router: they also take a path with
    a line break at its end. A path that is not there needs a key all the same."""
    for pattern, scope in PATH_SCOPES:
        if pattern.match(path):
            return scope
    return "infer"


def build_app(server: Server, settings: ServeSettings, keys: KeyRing) -> ASGIApp:
    """Return the guarded application."""
    app = Starlette(
        routes=_list_routes(),
        exception_handlers={
            RequestError: _answer_refusal,
            HTTPException: _answer_http_error,
            500: _answer_bug,
        },
    )
    app.state.server = server
    # a redirect names this server's own scheme: behind TLS, a client would repeat its key without
    app.router.redirect_slashes = False

    def find_needed_scope(path: str) -> Scope | None:
        is_open = settings.open_metrics and path in OPEN_METRICS
        return None if is_open else find_scope(path)

    rules = AccessRules(
        keys=keys,
        hosts=list_hosts(settings.host, settings.port, settings.hosts),
        body_bytes=settings.limits.body,
        find_scope=find_needed_scope,
    )
    return AccessMiddleware(app, rules, server.metrics)


def _list_routes() -> list[Route]:
    """Return Starlette's routes; methods of one path are routes of their own, and 405 names all."""
    routes: list[Route] = []
    for endpoint in ROUTES:
        routes.append(Route(endpoint.path, endpoint.handler, methods=[endpoint.method]))
    return routes


async def _answer_refusal(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error.to_response()


async def _answer_http_error(_request: Request, error: Exception) -> Response:
    """Answer 404 and 405 of the router in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    body = make_error_body(error.status_code, error.detail.lower())
    return JSONResponse(body, error.status_code, {**NO_STORE, **(error.headers or {})})


async def _answer_bug(_request: Request, _error: Exception) -> Response:
    """Answer without the text of the error, which may hold content."""
    body = make_error_body(500, "a bug in the server; its log has the lines to report")
    return JSONResponse(body, 500, NO_STORE)
