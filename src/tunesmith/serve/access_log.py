"""One line of JSON for every request, without a word of its content.

    record = AccessRecord("req-...", "POST", "/v1/models");  ...;  write_record(record)

In: what guard, handlers and answers note while a request runs. Out: a line of the logger
`tunesmith.access`, which the command line sends to stderr. Prompts, answers, keys, user fields and
query strings are never part of it. Left out: counters (metrics.py)."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RECORD_FIELD = "tunesmith.record"  # in the ASGI scope
MAX_PATH_CHARS = 120

logger = logging.getLogger("tunesmith.access")


@dataclass
class AccessRecord:
    """A request, as far as it is known; the fields of the model stay empty where none was asked."""

    id: str
    method: str
    path: str
    key: str = ""  # the name of the API key
    model: str = ""
    version: str = ""  # name, scale and digest of the model
    route: str = ""  # that has chosen the model
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    finish_reasons: tuple[str, ...] = ()
    is_schema_valid: bool | None = None  # None without a schema
    status: int = 0
    started: float = field(default_factory=time.perf_counter)
    first_token: float | None = None  # as `started`
    has_disconnected: bool = False  # the client, before the end

    def note_first_token(self) -> None:
        if self.first_token is None:
            self.first_token = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def first_token_seconds(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.started

    def to_line(self) -> Mapping[str, Any]:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": self.id,
            "method": self.method,
            "path": self.path[:MAX_PATH_CHARS],
            "status": self.status,
            "key": self.key,
            "ms": round(1000 * self.seconds),
        }
        if self.route:
            line["route"] = self.route
        if self.model:
            line["model"] = self.version
            line["tokens"] = [self.prompt_tokens, self.cached_tokens, self.answer_tokens]
            line["finish"] = list(self.finish_reasons)
            if self.first_token_seconds is not None:
                line["first_ms"] = round(1000 * self.first_token_seconds)
            if self.is_schema_valid is not None:
                line["schema_valid"] = self.is_schema_valid
        if self.has_disconnected:
            line["disconnected"] = True
        return line


def write_record(record: AccessRecord) -> None:
    """Write the line; characters beyond ASCII are escaped."""
    logger.info(json.dumps(record.to_line()))
