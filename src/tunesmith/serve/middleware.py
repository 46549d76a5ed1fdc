"""The one middleware: who may send what, decided before routing. Everything is denied by default.

In: any HTTP or WebSocket request. Out: a refusal, or the application with the key and the whole
body in the scope. Checked in this order: Host (a page that has rebound its name), Origin and
Sec-Fetch-Site (a page of another site), key, scope of the route, content type, size and time of the
body. Left out: what a key may do with a model (registry.py), fields of the body (bodies.py)."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.core.errors import InputError
from tunesmith.serve.errors import RequestError
from tunesmith.serve.keys import ApiKey, KeyRing
from tunesmith.serve.keys import Scope as KeyScope
from tunesmith.serve.metrics import RECORD_FIELD, AccessRecord, ServerMetrics, write_record

BODY_SECONDS = 30  # for the whole body
SAFE_METHODS = ("GET", "HEAD")
SAME_SITE = ("same-origin", "none")
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
KEY_FIELD = "tunesmith.key"
BODY_FIELD = "tunesmith.body"

logger = logging.getLogger("tunesmith.serve")


@dataclass(frozen=True)
class AccessRules:
    """The settings of the middleware. `find_scope` returns what a path needs: None if it is open,
    "infer" if there is no such path, so that an unknown path says nothing to a stranger."""

    keys: KeyRing
    hosts: Collection[str]
    body_bytes: int
    find_scope: Callable[[str], KeyScope | None]


class AccessMiddleware:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, rules: AccessRules, metrics: ServerMetrics) -> None:
        self.app = app
        self.rules = rules
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] != "http":  # there is no WebSocket route
            await send({"type": "websocket.close", "code": 1008})
        else:
            request_id = f"req-{secrets.token_hex(12)}"
            record = AccessRecord(request_id, scope["method"], scope["path"])
            scope[RECORD_FIELD] = record
            try:
                await self._answer(scope, receive, _note_status(send, record))
            finally:
                self.metrics.requests.labels(record.model, str(record.status)).inc()
                write_record(record)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            self._check_sender(scope, headers)
            key = self._check_key(scope["path"], headers)
            scope[KEY_FIELD] = key
            scope[RECORD_FIELD].key = key.name if key is not None else ""
            scope[BODY_FIELD] = await self._read_body(scope, headers, receive)
        except RequestError as error:
            self.metrics.refused.labels(error.code or str(error.status)).inc()
            await error.to_response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check_sender(self, scope: Scope, headers: Headers) -> None:
        if "content-length" in headers and "transfer-encoding" in headers:
            # a proxy that goes by the other one would take a part of the body for a request
            message = "send either content-length or transfer-encoding"
            raise RequestError(400, message, code="two_lengths", closes=True)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self.rules.hosts:
            message = "host not allowed; add it to `hosts` in serve.yaml"
            raise RequestError(421, message, code="wrong_host")
        if scope["method"] in SAFE_METHODS:
            return
        origin = headers.get("origin")
        if origin is not None and origin != f"{scope['scheme']}://{hosts[0]}":
            raise RequestError(403, "requests of other origins are refused", code="wrong_origin")
        if headers.get("sec-fetch-site", "none") not in SAME_SITE:
            raise RequestError(403, "requests of other sites are refused", code="wrong_origin")

    def _check_key(self, path: str, headers: Headers) -> ApiKey | None:
        needed = self.rules.find_scope(path)
        if needed is None:
            return None
        try:
            key = self.rules.keys.find(headers.get("authorization", ""))
        except InputError as error:
            logger.error("no key is accepted: %s", error)
            message = "the server cannot read its API keys; its log says why"
            raise RequestError(503, message, code="keys_unreadable") from None
        if key is None:
            message = "send an API key: Authorization: Bearer tsk_..."
            raise RequestError(401, message, code="invalid_api_key")
        if not key.has_scope(needed):
            message = f"this key lacks the scope {needed}"
            raise RequestError(403, message, code="missing_scope")
        return key

    async def _read_body(self, scope: Scope, headers: Headers, receive: Receive) -> bytes:
        """Return the whole body; a safe method has none."""
        if scope["method"] in SAFE_METHODS:
            return b""
        limit = self.rules.body_bytes
        declared = headers.get("content-length", "0")
        if not declared.isascii() or not declared.isdecimal() or len(declared) > 18:
            raise RequestError(400, "content-length is not a number")
        if int(declared) > limit:
            raise _make_too_large_error(limit)
        content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] != "DELETE" and content_type != "application/json":
            raise RequestError(415, "send application/json", code="wrong_content_type")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                return await _receive_body(receive, limit)
        except TimeoutError:
            raise RequestError(408, "the body took too long", code="timeout") from None


async def _receive_body(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError(400, "the body is incomplete")
        parts.append(message.get("body", b""))
        num_bytes += len(parts[-1])
        if num_bytes > limit:
            raise _make_too_large_error(limit)
        if not message.get("more_body", False):
            return b"".join(parts)


def _make_too_large_error(limit: int) -> RequestError:
    return RequestError(413, f"the body has more than {limit:,} bytes", code="body_too_large")


def _note_status(send: Send, record: AccessRecord) -> Send:
    """Return a `send` that notes the status, and names the request in the headers."""

    async def send_with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.status = message["status"]
            headers = [*message.get("headers", []), (b"x-request-id", record.id.encode())]
            message = {**message, "headers": headers}
        await send(message)

    return send_with_id


def list_hosts(host: str, port: int, more: Collection[str] = ()) -> frozenset[str]:
    """Return the Host headers that a server on `host` answers to, with and without its port."""
    names = {*LOOPBACK_HOSTS, *more}
    if host not in ("0.0.0.0", "::"):
        names.add(f"[{host}]" if ":" in host else host)
    lowered = {name.lower() for name in names}
    return frozenset(lowered | {f"{name}:{port}" for name in lowered})
