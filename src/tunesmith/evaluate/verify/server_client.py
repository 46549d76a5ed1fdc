"""Ask an OpenAI-compatible server: requests over HTTP, and its replies checked.

    client = LiveClient("http://localhost:8000/v1", key)
    client.list_models()                              names, None where it does not list them
    client.request_json("/chat/completions", {...})           a JSON object

Nothing that a server sends is trusted: replies have a limit in bytes and seconds, redirects are
refused, proxies are not used, and every field that is read is validated. The key is sent and
appears nowhere else. HTTP is httpx's, of the extra `verify`. Left out: what is asked, and what the
answers mean (verification.py)."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import httpx

from tunesmith.core.errors import InputError, MachineError, TunesmithError
from tunesmith.core.json_io import dump_json, parse_as
from tunesmith.core.types import Json, __version__

REQUEST_SECONDS = 120.0  # for one reply, all of it
MAX_REPLY_BYTES = 64 * 2**20  # log-probabilities of a long prompt take a few
MAX_RETRIES = 8  # of a request that a busy server puts off
MAX_WAIT_SECONDS = 60.0
BUSY_STATUSES = (429, 503)
MAX_QUOTED_CHARS = 300
MAX_LISTED_MODELS = 5
OPENAI_FIX = "name the address that ends in /v1 of an OpenAI-compatible server"
LOG_FIX = "see the log of the server, and whether it is overloaded"


@contextmanager
def open_request_pool(num_threads: int) -> Iterator[ThreadPoolExecutor]:
    """Yield threads for requests. Whoever leaves the block early waits for no reply: Ctrl-C is
    obeyed also where a server does not answer."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="request")
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class RefusedRequest(InputError):
    """The server answered 400, 404, 405, 415, 422 or 501: it does not know what was asked."""


@dataclass(frozen=True)
class _Model:
    id: str


@dataclass(frozen=True)
class _ModelList:
    data: tuple[_Model, ...]


class LiveClient:
    """One server. May be used by several threads: each request has a connection of its own."""

    def __init__(self, url: str, key: str = "", *, timeout_seconds: float = REQUEST_SECONDS):
        """Raises InputError for a URL or key that cannot be one."""
        self._base = _parse_url(url)
        self.url = url.rstrip("/")
        self._key = _check_key(key)
        self._timeout_seconds = timeout_seconds
        is_encrypted = self._base.scheme == "https"
        self._tls = ssl.create_default_context() if is_encrypted else False

    def list_models(self) -> tuple[str, ...] | None:
        """Return the names of the models, None for a server without a list. Raises what
        `request_json` raises."""
        try:
            reply = self._request("GET", self._resolve("/models"))
        except RefusedRequest:
            return None
        models = parse_as(_ModelList, reply, where=f"{self.url}/models").data
        return tuple(model.id for model in models)

    def request_json(self, path: str, body: Json, *, is_below_url: bool = True) -> Json:
        """Send a JSON object to URL/path, or to /path of the host; return the one that comes back.

        Raises RefusedRequest for a request that the server does not take, InputError for a wrong
        key or a server of another kind, MachineError for one that cannot be reached or fails."""
        return self._request("POST", self._resolve(path, is_below_url), body)

    def fetch(self, path: str) -> tuple[int, bytes]:
        """Return the status and content of GET URL/path, whatever they are. Raises InputError or
        MachineError for a server that cannot be reached."""
        status, _, content = self._send("GET", self._resolve(path), None)
        return status, content

    def _resolve(self, path: str, is_below_url: bool = True) -> httpx.URL:
        prefix = self._base.path.rstrip("/") if is_below_url else ""
        return self._base.copy_with(path=prefix + path)

    def _request(self, method: str, url: httpx.URL, body: Json | None = None) -> Json:
        status, wait_seconds, content = self._send(method, url, body)
        for attempt in range(MAX_RETRIES):
            if status not in BUSY_STATUSES:
                break
            time.sleep(min(MAX_WAIT_SECONDS, 2**attempt if wait_seconds is None else wait_seconds))
            status, wait_seconds, content = self._send(method, url, body)
        if status != 200:
            raise self._make_error(status, content, str(url))
        return _parse_object(content, str(url))

    def _send(
        self, method: str, url: httpx.URL, body: Json | None
    ) -> tuple[int, float | None, bytes]:
        """Return the status, the seconds that a busy server asks to wait, and the content."""
        data = None if body is None else dump_json(body)
        request = httpx.Request(method, url, headers=self._build_headers(), content=data)
        where = str(url)
        try:
            return asyncio.run(self._exchange(request))
        except TimeoutError:
            message = f"no complete reply within {self._timeout_seconds:g} s"
            raise MachineError(message, where=where, fix=LOG_FIX) from None
        except httpx.ConnectError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                fix = "name the host of the certificate; SSL_CERT_FILE adds an authority"
                message = "its certificate is not trusted"
                raise InputError(f"{message}: {error}", where=where, fix=fix) from None
            fix = "start the server, or correct the URL"
            raise MachineError(f"nothing answers there: {error}", where=where, fix=fix) from None
        except httpx.TransportError as error:
            message = f"no complete HTTP reply: {error or type(error).__name__}"
            raise MachineError(message, where=where, fix=LOG_FIX) from None

    def _build_headers(self) -> dict[str, str]:
        headers = {
            "Accept": "application/json",
            "Accept-Encoding": "identity",  # a small reply cannot become a huge one
            "Content-Type": "application/json",
            "User-Agent": f"tunesmith/{__version__}",
        }
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return headers

    async def _exchange(self, request: httpx.Request) -> tuple[int, float | None, bytes]:
        """One deadline is for all of it, however slowly the bytes come: a timeout of httpx starts
        again with each of them."""
        content = bytearray()
        async with (
            asyncio.timeout(self._timeout_seconds),
            httpx.AsyncClient(verify=self._tls, trust_env=False, timeout=None) as client,
        ):
            response = await client.send(request, stream=True)
            async for part in response.aiter_raw():
                content += part
                if len(content) > MAX_REPLY_BYTES:
                    message = f"the reply is longer than {MAX_REPLY_BYTES // 2**20} MiB"
                    raise MachineError(message, where=str(request.url), fix=OPENAI_FIX)
        seconds = response.headers.get("Retry-After", "")
        wait_seconds = float(seconds) if seconds.isdecimal() else None
        return response.status_code, wait_seconds, bytes(content)

    def _make_error(self, status: int, content: bytes, where: str) -> TunesmithError:
        """Return the error of a status that is not 200."""
        quoted = _quote_error(content)
        if self._key:
            quoted = quoted.replace(self._key, "***")
        message = f"status {status}: {quoted}" if quoted else f"status {status}"
        if 300 <= status < 400:
            message = f"status {status}: redirects are not followed"
            fix = "name the address that it redirects to"
            return InputError(message, where=where, fix=fix)
        if status in (401, 403):
            fix = "name the environment variable that holds a valid key: --key-env NAME"
            return InputError(message, where=where, fix=fix)
        if status in (400, 404, 405, 415, 422, 501):
            return RefusedRequest(message, where=where, fix=OPENAI_FIX)
        if status == 429 or status >= 500:
            return MachineError(
                message, where=where, fix="see the log of the server, and try again"
            )
        return InputError(message, where=where, fix=OPENAI_FIX)


def _parse_url(url: str) -> httpx.URL:
    """Return the URL of a server. Raises InputError; one with a password is never quoted."""
    where = "--url"
    fix = "write it as http://localhost:8000/v1"
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        raise InputError("not a URL", where=where, fix=fix) from None
    if parsed.userinfo:
        fix = "leave it out; --key-env names the variable that holds a key"
        raise InputError("the URL holds a user or password", where=where, fix=fix)
    is_server = parsed.scheme in ("http", "https") and bool(parsed.host)
    has_port = parsed.port is None or 0 < parsed.port < 2**16
    if not is_server or not has_port or " " in url or parsed.query or parsed.fragment:
        raise InputError(f"not the URL of a server: {url!r:.100}", where=where, fix=fix)
    return parsed


def _check_key(key: str) -> str:
    """Raise InputError for a key that no header can hold; the error does not quote it."""
    if not key.isascii() or not key.isprintable() or " " in key:
        message = "the key has white space, control characters or characters beyond ASCII"
        raise InputError(message, where="--key-env", fix="set the variable to the key alone")
    return key


def _parse_object(content: bytes, where: str) -> Json:
    """Raises InputError for anything but a JSON object. A number that is not finite is null."""
    try:
        value = json.loads(content, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        message = "the reply is not JSON"
        raise InputError(message, where=where, fix=OPENAI_FIX) from None
    if not isinstance(value, dict):
        raise InputError("the reply is not a JSON object", where=where, fix=OPENAI_FIX)
    return cast("Json", value)


def _quote_error(content: bytes) -> str:
    """Return what a server says about an error, cut: as OpenAI words it, or as it is."""
    text = content[: 4 * MAX_QUOTED_CHARS].decode(errors="replace").strip()
    with suppress(ValueError, RecursionError):
        value: Any = json.loads(content)
        for key in ("error", "message", "detail"):
            value = value.get(key, value) if isinstance(value, dict) else value
        text = value if isinstance(value, str) else text
    if text.startswith("<"):  # a page of HTML says nothing
        return ""
    return " ".join(text.split())[:MAX_QUOTED_CHARS]


def choose_model(client: LiveClient, name: str | None) -> str:
    """Return the model to ask: the named one, or the only one that the server lists.

    Raises InputError if the server lists others."""
    listed = client.list_models()
    if listed is None:
        if name is None:
            message = "the server does not list its models"
            raise InputError(message, where=client.url, fix="name the one to verify: --model NAME")
        return name
    names = ", ".join(listed[:MAX_LISTED_MODELS])
    names += ", ..." if len(listed) > MAX_LISTED_MODELS else ""
    if name is None and len(listed) == 1:
        return listed[0]
    # Ray lists the base of BASE:ADAPTER alone, and Ollama lists NAME as NAME:latest.
    if name is not None and {name.partition(":")[0], f"{name}:latest"} & set(listed):
        return name
    if name is None or name not in listed:
        message = f"the server has no model {name!r:.80}"
        if name is None:
            message = "no model is named, but the server has several"
        if not listed:
            message = "the server lists no model"
        raise InputError(message, where=client.url, fix=f"--model takes one of: {names or 'none'}")
    return name
