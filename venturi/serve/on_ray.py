"""Replicas of the server on a Ray cluster: Ray Serve's proxies on every node take KServe v2 over HTTP to one of them.

Each replica loads the whole repository, in a process of its own; Ray starts, restarts, scales and drains replicas.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from venturi.core.errors import DeviceError, ModelError, VenturiError
from venturi.serve.app import Running, ServeConfig, start
from venturi.serve.errors import invalid, unavailable
from venturi.serve.http.app import HttpApp

_DEPLOYMENT = "Replica"
_POLL_S = 0.2
_CONNECT_S = 5.0
_UPSCALE_DELAY_S = 5.0


@dataclass(frozen=True)
class RaySettings:
    """What to run where. `cpus` and `gpus` are reserved for each replica; `target_ongoing`: requests in a replica that
    autoscaling aims at, `max_ongoing`: those after which the proxies hold requests back. Without `max_replicas` above
    `min_replicas` the number stays as it is."""

    repositories: tuple[Path, ...]
    name: str = "venturi"
    route_prefix: str = "/"
    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing: float = 16.0
    max_ongoing: int = 256
    cpus: float = 1.0
    gpus: float = 0.0
    host: str = "0.0.0.0"
    port: int = 8000
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        """Raises ModelError for numbers that contradict each other."""
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ModelError(f"replicas must be 1 <= least <= most, got {self.min_replicas} and {self.max_replicas}")
        if not 0 < self.target_ongoing <= self.max_ongoing:
            raise ModelError(f"target_ongoing must be above 0 and at most max_ongoing ({self.max_ongoing}), "
                             f"got {self.target_ongoing:g}")  # fmt: skip
        if not self.route_prefix.startswith("/"):
            raise ModelError(f"the route prefix must start with '/', got {self.route_prefix!r}")


class ReplicaApp:
    """An ASGI application that is a server without listeners of its own; it starts and stops with the lifespan."""

    def __init__(self, settings: RaySettings) -> None:
        self._settings = settings
        self._running: Running | None = None
        self._http: HttpApp | None = None
        self._failure: VenturiError | None = None

    def check(self) -> None:
        """Raises what kept the models from loading, or ServeError when one of them is not ready any more."""
        if self._failure is not None:
            raise self._failure
        if self._running is None or not self._running.core.is_ready:
            raise unavailable("a model is not ready")

    async def __call__(self, scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if self._http is None:
            raise unavailable("the replica is not running")
        await self._http({**scope, "path": scope["path"].removeprefix(scope.get("root_path", ""))}, receive, send)

    async def _live(self, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        await receive()
        try:
            await self.start()
        except VenturiError as exc:
            self._failure = exc  # `check` tells it; of a lifespan that fails Ray would not give the reason
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def start(self) -> None:
        """Raises ServeError when a model cannot be loaded, or needs its requests to meet in one process."""
        running = await start(
            ServeConfig(self._settings.repositories, http_port=None, grpc_port=None, metrics_port=None)
        )
        for served in running.core.repository.served():
            if self._settings.max_replicas > 1 and served.config.HasField("sequence_batching"):
                await running.stop(self._settings.drain_s)
                raise invalid(f"model '{served.name}' keeps sequences in one process and cannot have several replicas")
        self._running, self._http = running, HttpApp(running.core)

    async def stop(self) -> None:
        if self._running is not None:
            await self._running.stop(self._settings.drain_s)


def bound(settings: RaySettings) -> Any:
    """The Ray Serve application."""
    from ray import serve

    def build() -> ReplicaApp:
        return ReplicaApp(settings)

    class Replica:
        async def check_health(self) -> None:
            self._asgi_app.check()  # type: ignore[attr-defined]

    scaling: dict[str, Any] = {"num_replicas": settings.min_replicas}
    if settings.max_replicas > settings.min_replicas:
        scaling = {"autoscaling_config": {
            "min_replicas": settings.min_replicas, "max_replicas": settings.max_replicas,
            "target_ongoing_requests": settings.target_ongoing, "upscale_delay_s": _UPSCALE_DELAY_S,
        }}  # fmt: skip
    deployment = serve.deployment(
        name=_DEPLOYMENT, max_ongoing_requests=settings.max_ongoing, graceful_shutdown_timeout_s=settings.drain_s,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus}, **scaling,
    )  # fmt: skip
    return deployment(serve.ingress(build)(Replica)).bind()


def connect(address: str) -> None:
    """To a cluster: "auto" finds the one of this machine, "local" starts one that ends with the process.

    Raises ModelError without Ray, DeviceError when there is no cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as exc:
        raise ModelError(f"replicas on Ray need {exc.name}: pip install 'venturi[serve,ray]'") from exc
    try:
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if colon and port.isdigit():  # Ray itself would knock for minutes
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
        ray.init(address=address, log_to_driver=False, logging_level="error", namespace="serve")
    except (OSError, ValueError, RuntimeError) as exc:
        raise DeviceError(f"no Ray cluster at {address!r}: {str(exc).splitlines()[0]}. Start one with "
                          "'ray start --head', or pass --address local") from exc  # fmt: skip


def deploy(settings: RaySettings, timeout_s: float = 600.0) -> list[dict[str, str]]:
    """Bring the cluster's application to these settings and wait for its replicas; see `replicas` for the result.

    A running application of the same name is replaced replica by replica. Raises ServeError with Ray's message,
    also for a route prefix that another application has.
    """
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.exceptions import RayServeException
    from ray.serve.schema import LoggingConfig

    serve.start(
        proxy_location="EveryNode", http_options=HTTPOptions(host=settings.host, port=settings.port),
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )  # fmt: skip
    target = serve.RunTarget(bound(settings), settings.name, settings.route_prefix)
    try:
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    except RayServeException as exc:
        raise invalid(f"Ray refuses application {settings.name!r}: {exc}") from exc
    end = time.monotonic() + timeout_s
    while True:
        state = serve.status().applications.get(settings.name)
        if state is not None and state.status == "RUNNING":
            return replicas(settings.name)
        if state is not None and state.status == "DEPLOY_FAILED":
            raise unavailable(f"the replicas do not start: {_reason(state)}")
        if time.monotonic() > end:
            raise unavailable(f"the replicas are not running after {timeout_s:g} s: {_reason(state)}")
        time.sleep(_POLL_S)


def remove(name: str) -> None:
    """Drain and end an application's replicas. Raises ServeError when there is none of that name."""
    from ray import serve

    known = sorted(serve.status().applications)
    if name not in known:
        raise invalid(f"the cluster runs no application {name!r}, it has {known}")
    serve.delete(name)


def replicas(name: str) -> list[dict[str, str]]:
    """id, node, state and pid of every replica, as Ray Serve's controller sees them; "" for what is not known yet."""
    import ray

    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    details: dict[str, Any] = ray.get(controller.get_serve_instance_details.remote())
    application = details["applications"].get(name, {"deployments": {}})
    found = [r for d in application["deployments"].values() for r in d["replicas"]]
    return [
        {
            "replica": r["replica_id"], "node": r.get("node_id") or "",
            "state": str(getattr(r["state"], "value", r["state"])), "pid": str(r.get("pid") or ""),
        }
        for r in sorted(found, key=lambda r: str(r["replica_id"]))
    ]  # fmt: skip


def _reason(state: Any) -> str:
    """The last line that says something: Ray wraps a replica's exception in its own tracebacks."""
    if state is None:
        return "Ray knows nothing of the application"
    texts = [state.message, *(d.message for d in state.deployments.values())]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    told = [line for line in lines if "Error" in line and not line.startswith(("File", "raise", "ray::"))]
    return str((told or lines or ["no reason given"])[-1])
