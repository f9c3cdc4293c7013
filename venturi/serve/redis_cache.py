"""Answers kept in Redis: servers that serve the same files share them, and they outlive a server."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import orjson

from venturi.core.errors import DeviceError, ModelError, VenturiError
from venturi.core.log import logger
from venturi.serve.errors import unavailable
from venturi.serve.request import InferResponse, Tensor
from venturi.serve.schedulers.driver import MAX_OPEN
from venturi.serve.tensors import from_bytes, to_bytes

_PREFIX = b"venturi:1:"
_TIMEOUT_S = 0.5
_THREADS = 4
_REST_S = 5.0
_SETTINGS = ("host", "port", "user", "password", "ttl")


class LookupThreads(ThreadPoolExecutor):
    """Refuses work beyond `MAX_OPEN` pieces that wait: a slow Redis must not fill the memory."""

    def __init__(self) -> None:
        super().__init__(_THREADS, thread_name_prefix="venturi-redis")
        self._lock, self._open = threading.Lock(), 0

    def submit(self, work: Any, /, *args: Any, **named: Any) -> Future[Any]:
        """Raises ServeError UNAVAILABLE when too much waits."""
        with self._lock:
            if self._open >= MAX_OPEN:
                raise unavailable(f"Exceeds maximum queue size: {MAX_OPEN} lookups in the response cache are open")
            self._open += 1
        future = super().submit(work, *args, **named)
        future.add_done_callback(self._ended)
        return future

    def _ended(self, future: Future[Any]) -> None:
        with self._lock:
            self._open -= 1


class RedisCache:
    """Thread-safe. Lookups belong on `threads`. When Redis fails, nothing is found for a while and models compute."""

    def __init__(self, client: Any, ttl_s: int = 0) -> None:
        self._client, self._ttl_s = client, ttl_s
        self._resting_until = 0.0
        self.threads: Executor | None = LookupThreads()

    def get(self, key: bytes) -> InferResponse | None:
        found = self._call(lambda: self._client.get(_PREFIX + key))
        return None if found is None else unpacked(found)

    def put(self, key: bytes, response: InferResponse) -> None:
        self._call(lambda: self._client.set(_PREFIX + key, packed(response), ex=self._ttl_s or None))

    def close(self) -> None:
        assert self.threads is not None
        self.threads.shutdown(wait=True)
        self._client.close()

    def _call(self, work: Any) -> Any:
        if time.monotonic() < self._resting_until:
            return None
        import redis

        try:
            return work()
        except redis.RedisError as exc:
            self._resting_until = time.monotonic() + _REST_S
            logger.warning("Redis does not answer, models compute for %g s without it: %s", _REST_S, exc)
            return None


def open_redis(settings: Mapping[str, str]) -> RedisCache:
    """host, port, user, password, ttl (seconds; 0 keeps answers until Redis drops them). The user and the password may
    also come from TRITONCACHE_REDIS_USERNAME and TRITONCACHE_REDIS_PASSWORD.

    Raises ModelError for unknown settings or without the client, DeviceError when Redis does not answer.
    """
    try:
        import redis
    except ImportError as exc:
        raise ModelError("the Redis cache needs its client: pip install 'venturi[redis]'") from exc
    unknown = sorted(set(settings) - set(_SETTINGS))
    if unknown:
        raise ModelError(f"the Redis cache has no setting {unknown[0]!r}, expected {', '.join(_SETTINGS)}")
    host = settings.get("host", "localhost")
    numbers = {name: settings.get(name, default) for name, default in (("port", "6379"), ("ttl", "0"))}
    for name, value in numbers.items():
        if not (value.isascii() and value.isdigit()):
            raise ModelError(f"{name} of the Redis cache must be a number, got {value!r}")
    client = redis.Redis(
        host, int(numbers["port"]), username=settings.get("user") or os.environ.get("TRITONCACHE_REDIS_USERNAME"),
        password=settings.get("password") or os.environ.get("TRITONCACHE_REDIS_PASSWORD"),
        socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S,
    )  # fmt: skip
    try:
        client.ping()
    except redis.RedisError as exc:
        raise DeviceError(f"no Redis at {host}:{numbers['port']}: {exc}") from exc
    return RedisCache(client, int(numbers["ttl"]))


def packed(response: InferResponse) -> bytes:
    """The length of a head in JSON, the head, the tensors one behind the other."""
    blobs = [to_bytes(t.data, t.datatype) for t in response.outputs.values()]
    outputs = [[n, t.datatype, list(t.shape), len(b)] for (n, t), b in zip(response.outputs.items(), blobs)]
    head = orjson.dumps({"outputs": outputs, "parameters": dict(response.parameters)})
    return b"".join((len(head).to_bytes(4, "little"), head, *blobs))


def unpacked(data: bytes) -> InferResponse | None:
    """None for what this version has not written."""
    try:
        at = 4 + int.from_bytes(data[:4], "little")
        head = orjson.loads(data[4:at])
        outputs = {}
        for name, datatype, shape, size in head["outputs"]:
            outputs[name] = Tensor(name, datatype, from_bytes(name, datatype, shape, data[at : at + size]))
            at += size
        return InferResponse(outputs, head["parameters"])
    except (ValueError, KeyError, TypeError, VenturiError):
        return None
