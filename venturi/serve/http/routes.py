"""From method and path to the answer: a handler takes the core, the names in the path and the body."""

from __future__ import annotations

import base64
import binascii
import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from venturi.serve.core import Core
from venturi.serve.errors import ServeError, Status, invalid, not_found
from venturi.serve.http.codec import parse_json
from venturi.serve.http.openapi import document
from venturi.serve.shared_memory import Kind


@dataclass(frozen=True)
class Reply:
    """`body` None is an empty body; `page` is HTML in its place."""

    status: int = 200
    body: Any = None
    page: bytes | None = None


Handler = Callable[[Core, tuple[str, ...], bytes], Awaitable[Reply]]


@dataclass(frozen=True)
class Route:
    """`path` parts: literals, or None for a name."""

    methods: tuple[str, ...]
    path: tuple[str | None, ...]
    handle: Handler


async def _live(core: Core, names: tuple[str, ...], body: bytes) -> Reply:
    return Reply(503, {"error": "Server exiting"}) if core.exiting else Reply()


async def _ready(core: Core, names: tuple[str, ...], body: bytes) -> Reply:
    if core.exiting:
        return Reply(503, {"error": "Server exiting"})
    return Reply() if core.is_ready else Reply(400)


async def _dashboard(core: Core, names: tuple[str, ...], body: bytes) -> Reply:
    return Reply(page=_page())


@functools.cache
def _page() -> bytes:
    return Path(__file__).with_name("dashboard.html").read_bytes()


async def _openapi(core: Core, names: tuple[str, ...], body: bytes) -> Reply:
    return Reply(body=document(ROUTES))


async def _inspect(core: Core, names: tuple[str, ...], body: bytes) -> Reply:
    return Reply(body=core.find(*names).model.inspect())


async def _server(core: Core, names: tuple[str, ...], body: bytes) -> Reply:
    return Reply(body=core.metadata())


async def _model_ready(core: Core, names: tuple[str, ...], body: bytes) -> Reply:
    core.find(*names)
    return Reply()


async def _model(core: Core, names: tuple[str, ...], body: bytes) -> Reply:
    return Reply(body=core.model_metadata(*names))


async def _config(core: Core, names: tuple[str, ...], body: bytes) -> Reply:
    return Reply(body=core.model_config(*names))


async def _stats(core: Core, names: tuple[str, ...], body: bytes) -> Reply:
    return Reply(body=core.statistics(*names))


async def _index(core: Core, names: tuple[str, ...], body: bytes) -> Reply:
    given = parse_json(body) if body else {}
    ready = given.get("ready", False)
    if not isinstance(ready, bool):
        raise invalid(f"'ready' must be true or false, got {ready!r}")
    return Reply(body=core.repository.index(ready))


async def _load(core: Core, names: tuple[str, ...], body: bytes) -> Reply:
    given = (parse_json(body) if body else {}).get("parameters") or {}
    if not isinstance(given, dict):
        raise invalid("Unable to parse 'parameters': expected an object")
    files = {k.removeprefix("file:"): _decoded(k, v) for k, v in given.items() if k.startswith("file:")}
    for key in given:
        if key != "config" and not key.startswith("file:"):
            raise invalid(f"unrecognized load parameter '{key}', expected 'config' or 'file:<version>/<name>'")
    config = given.get("config")
    try:
        data = None if config is None else orjson.loads(config)
    except (orjson.JSONDecodeError, TypeError) as exc:
        raise invalid(f"load parameter 'config' must be a string of JSON: {exc}") from exc
    await core.load(names[0], data, files)
    return Reply()


def _decoded(key: str, value: object) -> bytes:
    try:
        return base64.b64decode(value, validate=True)  # type: ignore[arg-type]
    except (binascii.Error, TypeError, ValueError) as exc:
        raise invalid(f"load parameter '{key}' must be base64 text: {exc}") from exc


async def _unload(core: Core, names: tuple[str, ...], body: bytes) -> Reply:
    given = (parse_json(body) if body else {}).get("parameters") or {}
    dependents = given.get("unload_dependents", False) if isinstance(given, dict) else None
    if not isinstance(dependents, bool):
        raise invalid(f"unload parameter 'unload_dependents' must be true or false, got {dependents!r}")
    await core.unload(names[0], dependents=dependents)
    return Reply()


async def _trace(core: Core, names: tuple[str, ...], body: bytes) -> Reply:
    return Reply(body=core.trace_settings(names[0] if names else "", parse_json(body) if body else None))


async def _logging(core: Core, names: tuple[str, ...], body: bytes) -> Reply:
    if body:
        core.log.update(parse_json(body))
    return Reply(body=core.log.to_json())


async def _register(core: Core, names: tuple[str, ...], body: bytes) -> Reply:
    given = parse_json(body)
    key, offset, size = given.get("key"), given.get("offset", 0), given.get("byte_size")
    if not isinstance(key, str) or type(offset) is not int or type(size) is not int:
        raise invalid(f"registering region '{names[0]}' needs 'key', a string, and 'byte_size', a number")
    core.regions.register(names[0], key, offset, size)
    return Reply()


async def _register_cuda(core: Core, names: tuple[str, ...], body: bytes) -> Reply:
    given = parse_json(body)
    handle, device, size = given.get("raw_handle"), given.get("device_id"), given.get("byte_size")
    text = handle.get("b64") if isinstance(handle, dict) else None
    if not isinstance(text, str) or type(device) is not int or type(size) is not int:
        raise invalid(f"registering region '{names[0]}' needs 'raw_handle', an object with 'b64', a string, and "
                      "'device_id' and 'byte_size', numbers")  # fmt: skip
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as exc:
        raise invalid(
            f"failed to register CUDA shared memory region '{names[0]}': 'b64' of 'raw_handle': {exc}"
        ) from exc
    core.regions.register_cuda(names[0], raw, device, size)
    return Reply()


def _unregister(kind: Kind) -> Handler:
    async def unregister(core: Core, names: tuple[str, ...], body: bytes) -> Reply:
        core.regions.unregister(kind, *names)
        return Reply()

    return unregister


def _regions(kind: Kind) -> Handler:
    async def regions(core: Core, names: tuple[str, ...], body: bytes) -> Reply:
        return Reply(body=core.regions.status(kind, *names))

    return regions


_M = ("v2", "models", None)
_MV = (*_M, "versions", None)
_R = ("v2", "repository")
_SHM, _CUDA = ("v2", "systemsharedmemory"), ("v2", "cudasharedmemory")
_KINDS = ((_SHM, Kind.SYSTEM), (_CUDA, Kind.CUDA))
GET, POST = ("GET",), ("POST",)
ROUTES = (
    Route(GET, ("v2", "health", "live"), _live),
    Route(GET, ("v2", "health", "ready"), _ready),
    *(Route(GET, (name,), _dashboard) for name in ("", "dashboard")),
    Route(GET, ("openapi.json",), _openapi),
    Route(GET, ("v2",), _server),
    Route(GET, ("v2", "models", "stats"), _stats),
    *(Route(GET, (*base, "ready"), _model_ready) for base in (_M, _MV)),
    *(Route(GET, (*base, "config"), _config) for base in (_M, _MV)),
    *(Route(GET, (*base, "stats"), _stats) for base in (_M, _MV)),
    *(Route(GET, (*base, "inspect"), _inspect) for base in (_M, _MV)),
    *(Route(GET, base, _model) for base in (_M, _MV)),
    *(Route((*GET, *POST), (*base, "trace", "setting"), _trace) for base in (("v2",), _M)),
    Route((*GET, *POST), ("v2", "logging"), _logging),
    *(Route(POST, (*base, "index"), _index) for base in (_R, (*_R, None))),
    Route(POST, (*_R, "models", None, "load"), _load),
    Route(POST, (*_R, "models", None, "unload"), _unload),
    Route(POST, (*_SHM, "region", None, "register"), _register),
    Route(POST, (*_CUDA, "region", None, "register"), _register_cuda),
    *(
        Route(POST, (*base, *end, "unregister"), _unregister(kind))
        for base, kind in _KINDS
        for end in ((), ("region", None))
    ),
    *(Route(GET, (*base, *end, "status"), _regions(kind)) for base, kind in _KINDS for end in ((), ("region", None))),
)


def find_route(method: str, parts: tuple[str, ...]) -> tuple[Handler, tuple[str, ...]]:
    """Raises ServeError NOT_FOUND, or MethodNotAllowed when the path exists for another verb."""
    wrong_verb = False
    for route in ROUTES:
        if len(route.path) == len(parts) and all(p is None or p == given for p, given in zip(route.path, parts)):
            if method in route.methods:
                return route.handle, tuple(given for p, given in zip(route.path, parts) if p is None)
            wrong_verb = True
    if wrong_verb:
        raise MethodNotAllowed
    raise not_found("Not Found")


class MethodNotAllowed(ServeError):
    def __init__(self) -> None:
        super().__init__(Status.INVALID_ARG, "Method Not Allowed")
