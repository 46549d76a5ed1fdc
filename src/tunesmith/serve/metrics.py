"""What a server tells its operator: a line of JSON for every request, and Prometheus metrics.

    record = AccessRecord("req-...", "POST", "/v1/models");  ...;  write_record(record)
    metrics = ServerMetrics();  metrics.running.set(3);  metrics.render() -> text

In: what the guard, the handlers and the scheduler report. Out: lines of the logger
`tunesmith.access`, which the command line sends to stderr, and the text of /metrics. Counters carry
the name of the model; histograms the names of the first MAX_HISTOGRAM_MODELS, "other" beyond, so
that a thousand adapters do not make thirty thousand series. Left out: prompts, answers, keys, user
fields and query strings, which are never part of either."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

RECORD_FIELD = "tunesmith.record"  # in the ASGI scope
MAX_PATH_CHARS = 120

logger = logging.getLogger("tunesmith.access")
MAX_HISTOGRAM_MODELS = 50
OTHER_MODELS = "other"
FIRST_TOKEN_BUCKETS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60)
TOKEN_BUCKETS = (0.01, 0.02, 0.04, 0.06, 0.09, 0.13, 0.25, 0.5, 1, 3)
REQUEST_BUCKETS = (0.1, 0.3, 1, 3, 6, 12, 30, 60, 120, 300)
ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


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


class ServerMetrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        disable_created_metrics()  # a second series for each counter
        self.registry = CollectorRegistry()
        self._histogram_models: set[str] = set()

        def add_counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"tunesmith_{name}", text, labels, registry=self.registry)

        def add_gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"tunesmith_{name}", text, labels, registry=self.registry)

        def add_histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            label = ("model",)
            return Histogram(
                f"tunesmith_{name}", text, label, registry=self.registry, buckets=buckets
            )

        self.requests = add_counter("requests", "Requests that ended.", ("model", "code"))
        self.tokens = add_counter("tokens", "Tokens: prompt, cached, answer.", ("model", "kind"))
        self.refused = add_counter("refused", "Requests refused before a model saw them.", ("why",))
        self.cut_answers = add_counter("cut_answers", "Answers not completed.", ("model",))
        self.feedback = add_counter("feedback", "Verdicts of people.", ("model", "verdict"))
        arm = ("route", "model")
        self.route_share = add_gauge("route_share", "Percent of a route's requests.", arm)
        self.route_answers = add_counter("route_answers", "Answers by a route.", arm)
        self.route_checks = add_counter(
            "route_checks", "Checks of answers: ok or bad.", (*arm, "check", "result")
        )
        self.canaries_rolled_back = add_counter(
            "canaries_rolled_back", "Canaries that were taken away.", ("route",)
        )
        self.running = add_gauge("running", "Answers being made.")
        self.waiting = add_gauge("waiting", "Answers waiting for a row.")
        self.is_resident = add_gauge("adapter_resident", "1: in memory.", ("model",))
        self.adapter_bytes = add_gauge("adapter_bytes", "Bytes of all resident adapters.")
        self.adapter_loads = add_counter("adapter_loads", "Adapters loaded.", ("result",))
        self.adapter_evictions = add_counter("evictions", "Adapters dropped from memory.")
        self.first_token = add_histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN_BUCKETS
        )
        self.token_gap = add_histogram(
            "inter_token_seconds", "Mean time per later token.", TOKEN_BUCKETS
        )
        self.request_time = add_histogram(
            "request_seconds", "From arrival to the last token.", REQUEST_BUCKETS
        )
        self.step_time = Histogram(
            "tunesmith_step_seconds", "One step.", registry=self.registry, buckets=TOKEN_BUCKETS
        )
        self.step_rows = Histogram(
            "tunesmith_step_rows", "Rows of a step.", registry=self.registry, buckets=ROW_BUCKETS
        )

    def name_histogram(self, model: str) -> str:
        """Return the label of a model in histograms."""
        if model not in self._histogram_models:
            if len(self._histogram_models) >= MAX_HISTOGRAM_MODELS:
                return OTHER_MODELS
            self._histogram_models.add(model)
        return model

    def count_answers(self, record: AccessRecord, num_answers: int) -> None:
        """Count the tokens of a request, and its times if it has a first token."""
        self.tokens.labels(record.model, "prompt").inc(record.prompt_tokens)
        self.tokens.labels(record.model, "cached").inc(record.cached_tokens)
        self.tokens.labels(record.model, "answer").inc(record.answer_tokens)
        label = self.name_histogram(record.model)
        self.request_time.labels(label).observe(record.seconds)
        first_seconds = record.first_token_seconds
        if first_seconds is None:
            return
        self.first_token.labels(label).observe(first_seconds)
        num_later = record.answer_tokens - num_answers
        if num_later > 0:
            per_answer = num_later / num_answers
            self.token_gap.labels(label).observe((record.seconds - first_seconds) / per_answer)

    def render(self) -> bytes:
        return generate_latest(self.registry)
