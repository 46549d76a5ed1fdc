"""Which models there are: a name is a pointer, an adapter is its content.

    registry.register(model);  registry.remove("json")
    registry.find("json", key) -> ServedModel;  lease = await registry.acquire(model)

In: opened sources. Out: models by name, and leases on their adapters. A request holds its lease
until it ends, so a replaced adapter answers what it has begun and is dropped after that. Adapters
are loaded when they are asked for, once for all that wait, and dropped by last use beyond the
memory budget. All state belongs to the event loop; packing runs on a worker, dropping between two
steps of the engine. Left out: opening folders (sources.py), HTTP (handlers.py)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from tunesmith.core.errors import InputError
from tunesmith.core.types import Json
from tunesmith.data.chat_template.renderer import Renderer
from tunesmith.model.adapter_bank import AdapterBank
from tunesmith.serve.errors import RequestError
from tunesmith.serve.keys import ApiKey
from tunesmith.serve.metrics import ServerMetrics
from tunesmith.serve.scheduler import Scheduler
from tunesmith.serve.settings import BASE_NAME
from tunesmith.serve.sources import AdapterSource, BaseSource


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model under a name. Without a source it is the base."""

    name: str
    base: BaseSource
    source: AdapterSource | None = None
    scale: float = 1.0
    is_constrained: bool = False
    is_pinned: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        """Raise InputError for a schema to follow that is not there."""
        if self.is_constrained and self.schema is None:
            message = "constrain is true, but the run has no response_schema"
            raise InputError(message, where=f"models.{self.name}", fix="leave constrain out")

    @property
    def renderer(self) -> Renderer:
        return self.base.renderer if self.source is None else self.source.renderer

    @property
    def digest(self) -> str:
        """The sha256 of all that decides the model's answers, but for its scale."""
        return self.base.sha256 if self.source is None else self.source.digest

    @property
    def adapter_key(self) -> str:
        """The key in the bank; empty for the base."""
        return "" if self.source is None else self.source.digest

    @property
    def schema(self) -> Json | None:
        """The schema that answers follow if the request names none."""
        return self.source.schema if self.source is not None and self.is_constrained else None

    @property
    def version(self) -> str:
        """Name, scale and the beginning of the digest, for headers and logs."""
        return f"{self.name}@{self.scale:g}#{self.digest[:12]}"


@dataclass(eq=False)
class Resident:
    """An adapter in memory."""

    num_bytes: int
    num_leases: int = 0
    last_used: float = 0.0


class Lease:
    """The right to use an adapter; it stays in memory until `release`."""

    def __init__(self, registry: Registry, digest: str) -> None:
        self._registry = registry
        self._digest = digest

    def release(self) -> None:
        """Give the adapter back, once."""
        if self._digest:
            self._registry.end_lease(self._digest)
            self._digest = ""


class Registry:
    """The models of a server."""

    def __init__(
        self,
        base: BaseSource,
        bank: AdapterBank,
        scheduler: Scheduler,
        metrics: ServerMetrics,
        *,
        budget_bytes: int,
    ) -> None:
        self.base = base
        self._bank = bank
        self._scheduler = scheduler
        self._metrics = metrics
        self._budget_bytes = budget_bytes
        self._models: dict[str, ServedModel] = {BASE_NAME: ServedModel(BASE_NAME, base)}
        self._residents: dict[str, Resident] = {}
        self._loads: dict[AdapterSource, asyncio.Task[None]] = {}
        self._removals: set[str] = set()  # digests that the engine thread has yet to remove
        self._load_lock = asyncio.Lock()  # one at a time, so that the budget holds

    # ---- names

    def list_models(self, key: ApiKey) -> Iterator[ServedModel]:
        """Yield the models that a key may use."""
        for model in self._models.values():
            if key.can_use_model(model.name):
                yield model

    def find(self, name: str, key: ApiKey) -> ServedModel:
        """Return the model that a request names. Raises RequestError 404 for one that is not there,
        or that the key may not know of."""
        if name not in self._models or not key.can_use_model(name):
            message = f"there is no model {name!r:.100}"
            if "@" in name:
                message += "; a scale gets a name by serve.yaml or PUT /admin/models"
            raise RequestError(404, message, code="model_not_found", param="model")
        return self._models[name]

    def get(self, name: str) -> ServedModel:
        """Return a model that is there, whoever may use it by its name."""
        return self._models[name]

    def is_resident(self, model: ServedModel) -> bool:
        return model.source is None or model.digest in self._residents

    # ---- memory

    async def acquire(self, model: ServedModel) -> Lease:
        """Return a lease on the adapter of a model, which is loaded if it is not in memory.

        Raises RequestError 503 if it cannot be loaded."""
        if model.source is None or not model.scale:
            return Lease(self, "")
        source = model.source
        digest = source.digest
        while digest not in self._residents:
            await self._load_once(source)
        resident = self._residents[digest]
        resident.num_leases += 1
        resident.last_used = time.monotonic()
        return Lease(self, digest)

    def end_lease(self, digest: str) -> None:
        resident = self._residents[digest]
        resident.num_leases -= 1
        resident.last_used = time.monotonic()
        if not resident.num_leases and digest not in self._list_digests():
            self._drop(digest)

    async def _load_once(self, source: AdapterSource) -> None:
        """Load an adapter; all that wait for it share one load."""
        task = self._loads.get(source)
        if task is None:
            task = asyncio.ensure_future(self._load(source))
            self._loads[source] = task
            task.add_done_callback(lambda _: self._loads.pop(source))
        try:
            await asyncio.shield(task)
        except (InputError, OSError) as error:
            self._metrics.adapter_loads.labels("failed").inc()
            reason = error.message if isinstance(error, InputError) else "its files cannot be read"
            message = f"{source.label} cannot be loaded: {reason}"
            raise RequestError(503, message, code="model_not_loaded", param="model") from None

    async def _load(self, source: AdapterSource) -> None:
        async with self._load_lock:
            if source.digest in self._residents:  # from another folder with the same content
                return
            self._make_room(source.folder.weights_path.stat().st_size)
            if source.digest in self._removals:  # that still wait for the end of a step
                await self._scheduler.run_between_steps(lambda: None)
            num_bytes = await asyncio.to_thread(self._bank.load, source.digest, source.folder)
            self._residents[source.digest] = Resident(num_bytes, last_used=time.monotonic())
        self._metrics.adapter_loads.labels("ok").inc()
        self._show_residents()

    def _make_room(self, num_bytes: int) -> None:
        """Drop adapters by last use until `num_bytes` fit. Raises RequestError if they cannot."""
        pinned = {model.digest for model in self._models.values() if model.is_pinned}
        by_use = sorted(self._residents.items(), key=lambda entry: entry[1].last_used)
        for digest, resident in by_use:
            if self.has_room(num_bytes):
                return
            if digest not in pinned and not resident.num_leases:
                self._drop(digest)
                self._metrics.adapter_evictions.inc()
        if self._residents and not self.has_room(num_bytes):
            message = "the memory for adapters is full of adapters in use"
            raise RequestError(503, message, code="adapters_full", retry_seconds=1)

    def has_room(self, num_bytes: int) -> bool:
        return self.count_bytes() + num_bytes <= self._budget_bytes

    def count_bytes(self) -> int:
        return sum(resident.num_bytes for resident in self._residents.values())

    def _drop(self, digest: str) -> None:
        """Forget an adapter that nobody uses. The rows of its last request are cancelled by an
        earlier command."""
        del self._residents[digest]
        self._remove_from_bank(digest)
        self._show_residents()

    def _remove_from_bank(self, digest: str) -> None:
        def remove() -> None:
            self._bank.remove(digest)
            self._removals.discard(digest)

        self._removals.add(digest)
        self._scheduler.put_command(remove)

    def _list_digests(self) -> set[str]:
        return {model.digest for model in self._models.values()}

    def _show_residents(self) -> None:
        self._metrics.adapter_bytes.set(self.count_bytes())
        for model in self._models.values():
            self._metrics.is_resident.labels(model.name).set(self.is_resident(model))

    # ---- changes

    def check_match(self, name: str, if_match: str | None) -> None:
        """Raise RequestError 412 unless the name has the digest that the client expects."""
        if if_match is None:
            return
        model = self._models.get(name)
        if model is None or if_match.strip().strip('"') != model.digest:
            now = "no model" if model is None else model.digest
            message = f"the digest is not as expected; now it is {now}"
            raise RequestError(412, message, code="digest_changed", param="If-Match")

    def register(self, model: ServedModel) -> None:
        """Let a name point to a model, which is loaded when it is first asked for."""
        old = self._models.get(model.name)
        self._models[model.name] = model
        self._drop_unused(old)
        self._metrics.is_resident.labels(model.name).set(self.is_resident(model))

    def remove(self, name: str) -> None:
        """Forget a name. Raises RequestError 404 if it is not there."""
        if name not in self._models or name == BASE_NAME:
            raise RequestError(404, f"there is no model {name!r:.100}", code="model_not_found")
        self._drop_unused(self._models.pop(name))
        self._metrics.is_resident.remove(name)

    def _drop_unused(self, old: ServedModel | None) -> None:
        if old is None or old.digest in self._list_digests():
            return
        resident = self._residents.get(old.digest)
        if resident is not None and not resident.num_leases:
            self._drop(old.digest)
