"""Start, run and stop a server.

    prepared = prepare_server(settings);  code = asyncio.run(run_server(prepared))

In: settings. Out: the exit code: 0 after a drain that cut nothing, 143 (130 for Ctrl-C) if answers
were cut, 1 if the engine thread has died. The first signal stops new requests and waits for those
that run, at most `limits.drain`; the second ends at once. The model is loaded before the port
accepts connections. Left out: routes (app.py), the engine thread (scheduler.py)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from tunesmith.core.errors import InputError, MachineError
from tunesmith.core.hardware import measure_machine
from tunesmith.core.types import require
from tunesmith.model.adapter_bank import AdapterBank
from tunesmith.model.causal_lm import DTYPES, load_network
from tunesmith.model.generation.engine import DecodeBatch
from tunesmith.serve.app import build_app
from tunesmith.serve.errors import RequestError
from tunesmith.serve.exchange import Server
from tunesmith.serve.feedback import FeedbackStore
from tunesmith.serve.keys import KeyRing, add_key, find_keys_file, read_keys
from tunesmith.serve.metrics import ServerMetrics
from tunesmith.serve.registry import Registry, ServedModel
from tunesmith.serve.routes import RouteTable
from tunesmith.serve.scheduler import Scheduler
from tunesmith.serve.settings import BASE_NAME, ModelSource, ServeSettings
from tunesmith.serve.sources import BaseSource, find_base_name, find_dtype, open_adapter, open_base
from tunesmith.session.family_proof import wrap_proven

FIRST_KEY = "first"  # made at the first start on this machine
CUT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
DEAD_CODE = 1
HEAD_SECONDS = 30  # between looks at a connection that may be idle
CLOSE_SECONDS = 5  # for connections to take their last event
POLL_SECONDS = 0.05
LOADED_AT_START = 8  # adapters besides pinned ones, proven before the server is ready

logger = logging.getLogger("tunesmith.serve")


@dataclass(eq=False)
class PreparedServer:
    """Everything that is loaded before the event loop starts. `new_key` is shown once."""

    settings: ServeSettings
    socket: socket.socket
    keys: KeyRing
    new_key: str
    base: BaseSource
    models: tuple[ServedModel, ...]
    batch: DecodeBatch
    dtype: str
    feedback: FeedbackStore | None

    @property
    def url(self) -> str:
        host, port = self.socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def prepare_server(settings: ServeSettings) -> PreparedServer:
    """Bind the port, check the models and load the base. Raises InputError or MachineError."""
    keys, new_key = prepare_keys(settings)
    listener = bind_socket(settings.host, settings.port)
    with contextlib.ExitStack() as on_error:
        on_error.callback(listener.close)
        folder = settings.keep_content
        feedback = None if folder is None else FeedbackStore(folder)
        base = open_base(_choose_base(settings), datetime.now().replace(microsecond=0))
        on_error.callback(base.scratch.cleanup)
        models = [_open_model(name, source, base) for name, source in settings.models.items()]
        dtype = _choose_dtype(settings)
        batch = load_batch(base, dtype, settings)
        on_error.pop_all()
    settings = settings.model_copy(update={"port": listener.getsockname()[1]})
    return PreparedServer(
        settings, listener, keys, new_key, base, tuple(models), batch, dtype, feedback
    )


def load_batch(base: BaseSource, dtype: str, settings: ServeSettings) -> DecodeBatch:
    """Load the base model, with an empty bank of adapters."""
    network = load_network(base.path, DTYPES[dtype], measure_machine(base.path).device)
    model = wrap_proven(network, DTYPES[dtype])
    model.network.eval()
    return DecodeBatch(
        model,
        slots=settings.limits.rows + settings.limits.reserved_rows,
        decode=base.renderer.decode,
        end_ids=base.renderer.end_ids,
        cache_bytes=settings.limits.keys_and_values,
        bank=AdapterBank(model),
    )


def prepare_keys(settings: ServeSettings) -> tuple[KeyRing, str]:
    """Return the keys, and a new one if there is none and only this machine can connect.

    Raises InputError for a server that others could reach without a key."""
    if not settings.auth:
        return KeyRing(None), ""
    path = settings.keys or find_keys_file()
    new_key = ""
    if not read_keys(path):
        if not settings.is_loopback:
            message = f"others can reach {settings.host}, but there is no API key"
            fix = "make one first: tunesmith keys add NAME"
            raise InputError(message, where=str(path), fix=fix)
        new_key, _ = add_key(path, FIRST_KEY, scopes=("admin",))
    return KeyRing(path), new_key


def bind_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens: clients wait until the models are loaded. Raises MachineError
    if the port is taken or not allowed."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        listener.close()
        message = f"cannot listen on {host}:{port}: {error.strerror or error}"
        raise MachineError(message, where="--port", fix="use another --port") from None
    return listener


def _choose_base(settings: ServeSettings) -> str:
    """Return the base that is set, or that of the models. Raises InputError if they differ."""
    if settings.base is not None:
        return settings.base
    names = {name: find_base_name(model.source) for name, model in settings.models.items()}
    if not names:
        fix = "name it: --base MODEL"
        raise InputError("no model says which base to load", where="base", fix=fix)
    if len(set(names.values())) > 1:
        described = ", ".join(f"{name}: {base}" for name, base in names.items())
        fix = "start a server for each base"
        raise InputError(f"the models have different bases ({described})", where="base", fix=fix)
    return next(iter(names.values()))


def _choose_dtype(settings: ServeSettings) -> str:
    """Return the dtype that is set, else the first run's, else what this machine is fast in."""
    if settings.dtype != "auto":
        return settings.dtype
    for source in settings.models.values():
        if dtype := find_dtype(source.source):
            return dtype
    machine = measure_machine(Path.cwd())
    if machine.has_bf16_matmul:
        return "bf16"
    return "fp16" if machine.device == "cuda" else "fp32"


def _open_model(name: str, source: ModelSource, base: BaseSource) -> ServedModel:
    adapter = open_adapter(source.source, base, is_unproven_allowed=source.unproven)
    return ServedModel(
        name,
        base,
        adapter,
        scale=adapter.scale,
        is_constrained=source.constrain,
        is_pinned=source.pin,
    )


# ---------------------------------------------------------------- running


class WebServer(uvicorn.Server):
    """uvicorn without its signal handlers: those of `run_server` drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class TimedProtocol(H11Protocol):
    """uvicorn's, but a connection is closed that sends no whole request head for 30 to 60 s, or
    takes no byte of what is ready for it for 60 to 90 s. Idle clients would hold all connections
    that the system allows, and those that do not read the memory of their answers.

    It is looked at every HEAD_SECONDS. Two equal sizes of what is unsent may be chance, where a
    long stream fills up what a slow client takes; three in a row mean that nothing was taken."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._close_later(was_idle=True, was_stuck=False)

    def _close_later(self, *, was_idle: bool, was_stuck: bool) -> None:
        last = (self.cycle, self.transport.get_write_buffer_size())
        self.loop.call_later(HEAD_SECONDS, self._close_if_quiet, was_idle, was_stuck, *last)

    def _close_if_quiet(
        self, was_idle: bool, was_stuck: bool, last: RequestResponseCycle | None, last_unsent: int
    ) -> None:
        num_unsent = self.transport.get_write_buffer_size()
        is_stuck = bool(num_unsent) and num_unsent == last_unsent
        if is_stuck and was_stuck:
            self.transport.abort()  # closing would wait until all is sent
            return
        if self.transport.is_closing() and not num_unsent:
            return
        is_idle = self.cycle is None or self.cycle.response_complete
        if was_idle and is_idle and self.cycle is last:
            self.transport.close()
        self._close_later(was_idle=is_idle, was_stuck=is_stuck)


class StopSignals:
    """SIGTERM and Ctrl-C. `first` and `second` are set by the first and by any later one."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.code = 0
        for number in CUT_CODES:
            loop.add_signal_handler(number, self._note, number)

    def _note(self, number: signal.Signals) -> None:
        if self.first.is_set():
            self.second.set()
        self.first.set()
        self.code = CUT_CODES[number]


def build_server(prepared: PreparedServer) -> Server:
    """Put the parts together; the engine thread is not started."""
    settings = prepared.settings
    metrics = ServerMetrics()
    scheduler = Scheduler(prepared.batch, limits=settings.limits, metrics=metrics)
    registry = Registry(
        prepared.base,
        require(prepared.batch.bank),
        scheduler,
        metrics,
        budget_bytes=settings.limits.adapters,
    )
    for model in prepared.models:
        registry.register(model)
    return Server(
        scheduler,
        registry,
        metrics,
        RouteTable(settings.routes, registry, metrics),
        prepared.dtype,
        settings.limits.request,
        models_dir=settings.models_dir,
        feedback=prepared.feedback,
    )


async def run_server(prepared: PreparedServer) -> int:
    """Serve until a signal or the death of the engine. Returns the exit code."""
    loop = asyncio.get_running_loop()
    server = build_server(prepared)
    scheduler = server.scheduler
    signals = StopSignals(loop)
    scheduler.start(loop)
    await load_models(server.registry, prepared.models)
    web = make_web_server(server, prepared)
    serving = asyncio.ensure_future(web.serve(sockets=[prepared.socket]))
    routes = list(prepared.settings.routes)
    names = ", ".join([*routes, *(model.name for model in prepared.models), BASE_NAME])
    logger.info("serving %s at %s", names, prepared.url)
    await _wait_for_any(signals.first, scheduler.has_died)
    if scheduler.has_died.is_set():
        logger.error("the engine has stopped; its error is above")
        web.should_exit = True
        await serving
        await server.routes.close()
        return DEAD_CODE
    num_cut = await _drain(scheduler, signals, prepared.settings.limits.drain)
    web.should_exit = True
    await serving
    await server.routes.close()
    return signals.code if num_cut else 0


def make_web_server(server: Server, prepared: PreparedServer) -> WebServer:
    config = uvicorn.Config(
        build_app(server, prepared.settings, prepared.keys),
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        http=TimedProtocol,
        ws="none",
        loop="asyncio",
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )
    return WebServer(config)


async def load_models(registry: Registry, models: Sequence[ServedModel]) -> None:
    """Load the pinned adapters and LOADED_AT_START others, while there is memory for them. The rest
    is loaded when it is first asked for."""
    num_loaded = 0
    for model in sorted(models, key=lambda served: not served.is_pinned):
        assert model.source is not None
        is_wanted = model.is_pinned or num_loaded < LOADED_AT_START
        num_bytes = model.source.folder.weights_path.stat().st_size
        if registry.is_resident(model) or not is_wanted or not registry.has_room(num_bytes):
            continue
        try:
            lease = await registry.acquire(model)
        except RequestError as error:
            raise InputError(error.message, where=model.name) from None
        lease.release()
        num_loaded += not model.is_pinned


async def _wait_for_any(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


async def _drain(scheduler: Scheduler, signals: StopSignals, seconds: float) -> int:
    """Wait for running answers, cut those that are too slow, and return their number."""
    scheduler.is_draining = True
    logger.info("draining: %d answers are unfinished", scheduler.num_active)
    deadline = asyncio.get_running_loop().time() + seconds
    while scheduler.num_active and not signals.second.is_set():
        if asyncio.get_running_loop().time() > deadline:
            break
        await asyncio.sleep(POLL_SECONDS)
    num_cut = scheduler.num_active
    await scheduler.stop()
    return num_cut
