"""Starts the listeners, loads the models, and takes everything down in order."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from venturi.core.errors import DeviceError, VenturiError
from venturi.core.log import logger
from venturi.serve.core import Core
from venturi.serve.custom_metrics import CustomMetrics
from venturi.serve.errors import unavailable
from venturi.serve.grpc.service import make_server
from venturi.serve.grpc.settings import GrpcSettings
from venturi.serve.http.app import HttpApp, MetricsApp
from venturi.serve.logs import LogSettings, ServerLog
from venturi.serve.models.base import ModelKind
from venturi.serve.models.engine import EngineKind
from venturi.serve.models.ensemble import EnsembleKind
from venturi.serve.models.onnx_runtime import OnnxRuntimeKind
from venturi.serve.models.python import PythonKind
from venturi.serve.on_demand import OnDemand
from venturi.serve.repository import Mode, Repository
from venturi.serve.response_cache import Cache
from venturi.serve.schedulers.rate_limit import RateLimiter
from venturi.serve.security import Gate
from venturi.serve.tls import Tls
from venturi.serve.tracing import Tracer, TraceSettings


@dataclass(frozen=True)
class ServeConfig:
    """Ports: 0 takes a free one, None switches the listener off. `load` names models in explicit mode ("*" is all).

    `cache`: keeps answers, for models that enable it. `limiter`: shares resources among all instances.
    `hosts`: instead of `host`, by listener (http, grpc, metrics). `strict_readiness`: ready only when every model is.
    `load_on_demand`: models are loaded when first asked for (nothing at the start but `load`); the files of those in
    service amount to at most `model_memory_budget` bytes, 0 for no bound.
    """

    repositories: tuple[Path, ...]
    host: str = "0.0.0.0"
    http_port: int | None = 8000
    grpc_port: int | None = 8001
    metrics_port: int | None = 8002
    mode: Mode = Mode.NONE
    load: tuple[str, ...] = ()
    poll_s: float = 15.0
    name: str = "venturi"
    exit_on_error: bool = True
    exit_timeout_s: float = 30.0
    complete_config: bool = True
    default_max_batch: int = 4
    max_input_bytes: int = 64 << 20
    allow_shared_memory: bool = False
    cache: Cache | None = None
    gate: Gate = field(default_factory=Gate)
    tls: Tls | None = None
    trace: TraceSettings = field(default_factory=TraceSettings)
    log: LogSettings = field(default_factory=LogSettings)
    limiter: RateLimiter | None = None
    load_on_demand: bool = False
    model_memory_budget: int = 0
    hosts: Mapping[str, str] = field(default_factory=dict)
    strict_readiness: bool = True
    load_retries: int = 0
    grpc: GrpcSettings = field(default_factory=GrpcSettings)

    def address(self, listener: str) -> str:
        return self.hosts.get(listener, self.host)


@dataclass
class Running:
    """Bound ports (0 where there is no listener) and the server's core; `stop` drains and ends it."""

    core: Core
    ports: dict[str, int] = field(default_factory=dict)
    _stops: list[Callable[[], Any]] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def stop(self, timeout_s: float) -> bool:
        """Refuses new requests, answers accepted ones, closes. False when that took longer than `timeout_s`."""
        self.core.exiting = True
        for task in self._tasks:
            task.cancel()
        finished = True
        try:
            await asyncio.wait_for(self.core.repository.close(), timeout_s)
        except TimeoutError:
            finished = False
        for stop in self._stops:
            await stop()
        self.core.tracer.close()
        self.core.log.stop()
        return finished


class _Listener(uvicorn.Server):  # type: ignore[misc]
    """Signals are ours to handle."""

    def capture_signals(self) -> Any:
        return contextlib.nullcontext()


async def start(config: ServeConfig) -> Running:
    """Binds, listens, loads. Raises ServeError or DeviceError when a port is taken or a model cannot be served."""
    tracer, log = Tracer(config.trace), ServerLog(config.log)
    log.start()
    kinds: dict[str, ModelKind] = {"venturi": EngineKind(), "ort": OnnxRuntimeKind()}
    repository = Repository(
        config.repositories, kinds, config.mode,
        complete=config.complete_config, default_max_batch=config.default_max_batch,
        cache=config.cache, tracer=tracer, limiter=config.limiter, retries=config.load_retries,
    )  # fmt: skip
    metrics = CustomMetrics()
    kinds["python"] = PythonKind(repository.submit, metrics)
    kinds["ensemble"] = EnsembleKind(repository.find, repository.submit)
    core = Core(
        repository, config.name, allow_shared_memory=config.allow_shared_memory, tracer=tracer, log=log,
        custom_metrics=metrics, strict_readiness=config.strict_readiness,
    )  # fmt: skip
    if config.load_on_demand:
        core.on_demand = OnDemand(repository, config.model_memory_budget)
    running = Running(core)
    await _listen_http(
        running,
        "http",
        config.address("http"),
        config.http_port,
        HttpApp(core, config.max_input_bytes, gate=config.gate),
        config.tls,
    )
    await _listen_http(running, "metrics", config.address("metrics"), config.metrics_port, MetricsApp(core), config.tls)
    await _listen_grpc(running, config)
    named_only = config.mode == Mode.EXPLICIT or config.load_on_demand
    names = config.load if named_only and config.load != ("*",) else None
    failures = await repository.load_all(names)
    for failure in failures:
        logger.error("%s", failure)
    if failures and config.exit_on_error:
        await running.stop(config.exit_timeout_s)
        raise unavailable("; ".join(failures))
    core.started = True
    if config.mode == Mode.POLL:
        running._tasks.append(asyncio.ensure_future(_poll(repository, config.poll_s)))
    return running


async def run_until_signal(config: ServeConfig, ready: Callable[[Running], None]) -> bool:
    """Serves until SIGINT or SIGTERM; False when draining took too long."""
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    running = await start(config)
    ready(running)
    await stop.wait()
    return await running.stop(config.exit_timeout_s)


async def _poll(repository: Repository, seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await repository.poll()
        except (VenturiError, OSError) as exc:
            logger.error("the repository cannot be polled: %s", exc)


async def _listen_http(
    running: Running, name: str, host: str, port: int | None, app: Any, tls: Tls | None
) -> None:  # fmt: skip
    if port is None:
        return
    bound = _bind(host, port, name)
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", timeout_keep_alive=75, server_header=False,
        date_header=False, proxy_headers=False, timeout_graceful_shutdown=5, **({} if tls is None else tls.uvicorn()),
    )  # fmt: skip
    listener = _Listener(settings)
    task = asyncio.ensure_future(listener.serve(sockets=[bound]))
    while not listener.started and not task.done():
        await asyncio.sleep(0.01)
    running.ports[name] = bound.getsockname()[1]

    async def stop() -> None:
        listener.should_exit = True
        await task

    running._stops.append(stop)


def _bind(host: str, port: int, name: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's delay off only for sockets that name their protocol; accepted ones inherit both.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        bound.bind((host, port))
    except OSError as exc:
        bound.close()
        raise DeviceError(f"cannot listen on {host}:{port} for {name}: {exc}; choose another --{name}-port") from exc
    return bound


async def _listen_grpc(running: Running, config: ServeConfig) -> None:
    if config.grpc_port is None:
        return
    server = make_server(running.core, config.gate, config.grpc)
    given = config.address("grpc")
    host = f"[{given}]" if ":" in given else given
    try:
        address = f"{host}:{config.grpc_port}"
        if config.tls is None:
            running.ports["grpc"] = server.add_insecure_port(address)
        else:
            running.ports["grpc"] = server.add_secure_port(address, config.tls.grpc())
    except RuntimeError as exc:
        raise DeviceError(f"cannot listen on {given}:{config.grpc_port}: {exc}; choose another --grpc-port") from exc
    await server.start()
    running._stops.append(lambda: server.stop(1.0))
