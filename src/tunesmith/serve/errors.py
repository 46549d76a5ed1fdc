"""Errors of the API, in OpenAI's shape.

    raise RequestError(404, "there is no model x", code="model_not_found", param="model")

In: a status with a message, or a TunesmithError. Out: `{"error": {message, type, param, code}}`,
which the openai clients turn into their exceptions. No path and no content of a request is in a
message: it may be logged by a client. Left out: which request fails (middleware.py, bodies.py)."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse

from tunesmith.core.errors import InputError, MachineError, TunesmithError
from tunesmith.core.types import Json

NO_STORE = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class RequestError(Exception):
    """A request that is refused or fails. `code` is for programs, `param` the field of the body;
    `closes` ends the connection."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str = "",
        param: str = "",
        retry_seconds: int | None = None,
        closes: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_seconds = retry_seconds
        self.closes = closes

    def to_body(self) -> Json:
        """Return the JSON body."""
        return make_error_body(self.status, self.message, code=self.code, param=self.param)

    def to_response(self) -> JSONResponse:
        headers = dict(NO_STORE)
        if self.retry_seconds is not None:
            headers["retry-after"] = str(self.retry_seconds)
        if self.closes:
            headers["connection"] = "close"
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.to_body(), self.status, headers)


def make_error_body(status: int, message: str, *, code: str = "", param: str = "") -> Json:
    kind = ERROR_TYPES.get(status) or ("server_error" if status >= 500 else ERROR_TYPES[400])
    error: Mapping[str, Any] = {
        "message": message,
        "type": kind,
        "param": param or None,
        "code": code or None,
    }
    return {"error": error}


def format_problem(error: TunesmithError) -> str:
    """Return what is wrong and what to do, without the place."""
    return error.message if not error.fix else f"{error.message}; {error.fix}"


def from_tunesmith_error(error: TunesmithError, *, param: str = "") -> RequestError:
    """Convert an error of the package: the user's input is 400, the machine 503, a gate 500."""
    message = format_problem(error)
    if isinstance(error, InputError):
        return RequestError(400, message, param=param)
    if isinstance(error, MachineError):
        return RequestError(503, message, code="machine_error", param=param)
    return RequestError(500, message, code="model_error", param=param)
