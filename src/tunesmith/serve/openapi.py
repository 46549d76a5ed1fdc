"""The OpenAPI document, from the table of routes and the classes of bodies.

    build_openapi(ROUTES) -> Json

In: endpoints. Out: OpenAPI 3.1 with every path and body, and the errors that routes share. It is
what schemathesis reads, so a body that the document allows and the server dies of is a failing
test. Left out: examples."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from typing import Any, Protocol

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from tunesmith.core.types import Json, __version__

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


class DocumentedEndpoint(Protocol):
    """A route, as far as the document describes it."""

    @property
    def method(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def handler(self) -> Any: ...
    @property
    def scope(self) -> str | None: ...
    @property
    def body(self) -> type[BaseModel] | None: ...
    @property
    def success(self) -> int: ...


def build_openapi(endpoints: Sequence[DocumentedEndpoint]) -> Json:
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


def _describe(endpoint: DocumentedEndpoint) -> Json:
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
