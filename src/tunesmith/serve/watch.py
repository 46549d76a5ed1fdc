"""What a running server does, read from outside: its metrics, and its routes where the key may.

    monitor = ServerMonitor("http://127.0.0.1:8000", key);  activity = monitor.read()

In: the text of /metrics, /ready and /admin/routes of a server of this kind. Out: a ServerActivity;
rates are of the time between two reads. It loads no model. Left out: how it looks
(cli/views/server.py)."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.types import Json
from tunesmith.evaluate.verify.server_client import LiveClient

KEY_VARIABLE = "TUNESMITH_API_KEY"
TIMEOUT_SECONDS = 10.0
OPENAI_PATH = "/v1"

Labels = tuple[tuple[str, str], ...]


@dataclass
class ModelActivity:
    """One model. Rates are tokens per second, None at the first read."""

    name: str
    requests: int = 0
    errors: int = 0  # answered with 4xx or 5xx
    answer_rate: float | None = None
    prompt_rate: float | None = None
    first_token_seconds: float | None = None  # mean since the start
    is_resident: bool = True


@dataclass(frozen=True)
class ServerActivity:
    """The activity of a server at one moment. `routes` is None where the key may not see them."""

    state: str
    running: int
    waiting: int
    answer_rate: float | None
    step_seconds: float | None  # mean since the last read
    step_rows: float | None
    adapter_bytes: int
    models: tuple[ModelActivity, ...]
    routes: tuple[Json, ...] | None
    metrics: Metrics


@dataclass(frozen=True)
class Metrics:
    """The samples of /metrics: name -> labels -> value."""

    samples: Mapping[str, Mapping[Labels, float]] = field(default_factory=dict)

    def get(self, name: str, **labels: str) -> float:
        """Return the sum over all series with these labels."""
        total = 0.0
        for names, value in self.samples.get(f"tunesmith_{name}", {}).items():
            if labels.items() <= dict(names).items():
                total += value
        return total

    def list_labels(self, name: str, label: str) -> list[str]:
        """Return the values of a label, in the order of the server."""
        values: dict[str, None] = {}
        for names in self.samples.get(f"tunesmith_{name}", {}):
            values[dict(names).get(label, "")] = None
        return list(values)


def parse_metrics(text: str) -> Metrics:
    """Parse Prometheus' text format. Raises InputError for another text."""
    samples: dict[str, dict[Labels, float]] = defaultdict(dict)
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                samples[sample.name][tuple(sample.labels.items())] = sample.value
    except ValueError:
        raise InputError("its /metrics are not Prometheus' text") from None
    return Metrics(samples)


class ServerMonitor:
    """Reads one server again and again."""

    def __init__(self, url: str, key: str = "") -> None:
        """Raises InputError for what is no URL."""
        root = url.rstrip("/").removesuffix(OPENAI_PATH)
        try:
            self._client = LiveClient(root, key, timeout_seconds=TIMEOUT_SECONDS)
        except InputError as error:
            fix = "write it as http://127.0.0.1:8000"
            raise InputError(error.message, where="--watch", fix=fix) from None
        self.url = root
        self._metrics = Metrics()
        self._read_time = 0.0

    def read(self) -> ServerActivity:
        """Return what the server does now. Raises InputError for another kind of server or a key
        that may not watch it, MachineError for a server that cannot be reached."""
        _, ready = self._fetch("/ready", 503)
        _, text = self._fetch("/metrics")
        status, routes = self._fetch("/admin/routes", 401, 403)
        metrics = parse_metrics(text.decode(errors="replace"))
        now = time.monotonic()
        seconds = now - self._read_time if self._read_time else None
        activity = describe_activity(
            metrics,
            self._metrics,
            seconds,
            state=str(_parse_object(ready).get("state", "")),
            routes=tuple(_parse_object(routes)["data"]) if status == 200 else None,
        )
        self._metrics = metrics
        self._read_time = now
        return activity

    def _fetch(self, path: str, *accepted: int) -> tuple[int, bytes]:
        status, content = self._client.fetch(path)
        if status == 200 or status in accepted:
            return status, content
        where = self.url + path
        if status in (401, 403):
            fix = f"set {KEY_VARIABLE} to a key with the scope metrics, or admin for routes"
            raise InputError(f"status {status}: the key may not read this", where=where, fix=fix)
        if status >= 500:
            raise MachineError(f"status {status}", where=where, fix="see the log of the server")
        fix = "name the address of a server that `tunesmith serve` has started"
        raise InputError(f"status {status}: not a server of this kind", where=where, fix=fix)


def describe_activity(
    now: Metrics,
    before: Metrics,
    seconds: float | None,
    *,
    state: str = "",
    routes: tuple[Json, ...] | None = None,
) -> ServerActivity:
    """Return what two reads of the metrics, so many seconds apart, say of a server."""

    def compute_rate(**labels: str) -> float | None:
        if not seconds:
            return None
        total = now.get("tokens_total", **labels)
        gained = total - before.get("tokens_total", **labels)
        return (gained if gained >= 0 else total) / seconds  # less: the server was started again

    models: list[ModelActivity] = []
    names = now.list_labels("adapter_resident", "model")
    others = [name for name in now.list_labels("requests_total", "model") if name]
    for name in dict.fromkeys([*names, *others]):
        models.append(
            ModelActivity(
                name=name,
                requests=round(now.get("requests_total", model=name)),
                errors=_count_errors(now, name),
                answer_rate=compute_rate(model=name, kind="answer"),
                prompt_rate=compute_rate(model=name, kind="prompt"),
                first_token_seconds=_compute_mean(now, "time_to_first_token_seconds", model=name),
                is_resident=name not in names or bool(now.get("adapter_resident", model=name)),
            )
        )
    return ServerActivity(
        state=state,
        running=round(now.get("running")),
        waiting=round(now.get("waiting")),
        answer_rate=compute_rate(kind="answer"),
        step_seconds=_compute_recent_mean(now, before, "step_seconds"),
        step_rows=_compute_recent_mean(now, before, "step_rows"),
        adapter_bytes=round(now.get("adapter_bytes")),
        models=tuple(models),
        routes=routes,
        metrics=now,
    )


def _count_errors(metrics: Metrics, model: str) -> int:
    codes = metrics.list_labels("requests_total", "code")
    errors = [code for code in codes if code.startswith(("4", "5"))]
    return round(sum(metrics.get("requests_total", model=model, code=code) for code in errors))


def _compute_mean(metrics: Metrics, name: str, **labels: str) -> float | None:
    count = metrics.get(f"{name}_count", **labels)
    return metrics.get(f"{name}_sum", **labels) / count if count else None


def _compute_recent_mean(now: Metrics, before: Metrics, name: str) -> float | None:
    """Return the mean of a histogram's values since the last read."""
    count = now.get(f"{name}_count") - before.get(f"{name}_count")
    total = now.get(f"{name}_sum") - before.get(f"{name}_sum")
    return total / count if count > 0 else None


def _parse_object(content: bytes) -> Json:
    """Return a JSON object. Raises InputError for anything else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError("a reply that is no JSON object", fix="name a server of `tunesmith serve`")
    return value
