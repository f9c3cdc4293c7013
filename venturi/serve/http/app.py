"""The ASGI application. Inference has a way of its own, all else goes through the routes."""

from __future__ import annotations

import asyncio
import gzip
import math
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeVar

import orjson

from venturi.core.log import logger
from venturi.serve.core import Core
from venturi.serve.errors import ServeError, invalid
from venturi.serve.http.codec import HEADER_LENGTH, decode_infer, decompress, encode_infer, parse_json
from venturi.serve.http.generate import decode_generate, events, generate
from venturi.serve.http.routes import MethodNotAllowed, find_route
from venturi.serve.machine import Machine
from venturi.serve.metrics import CONTENT_TYPE, render
from venturi.serve.quota import OverQuota
from venturi.serve.security import Gate

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = Mapping[bytes, bytes]
_JSON = (b"content-type", b"application/json")
_PAGE = (
    (b"content-type", b"text/html; charset=utf-8"),
    (b"x-content-type-options", b"nosniff"),
    (
        b"content-security-policy",
        b"default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        b"frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    ),
)
_EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
Answer = TypeVar("Answer")
_WATCH_AFTER_S = 0.01


class Disconnected(Exception):
    """The client went away; nobody reads the answer."""


class HttpApp:
    """KServe v2. `max_input_bytes` bounds JSON, raw and decompressed bodies; `max_body_bytes` bounds everything."""

    def __init__(
        self, core: Core, max_input_bytes: int = 64 << 20, max_body_bytes: int = (1 << 31) - 1, gate: Gate | None = None
    ) -> None:
        self._gate = gate or Gate()
        self._core = core
        self._max_input_bytes = max_input_bytes
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            await self._serve(scope, receive, send)
        except Disconnected:
            return
        except ServeError as exc:
            if isinstance(exc, MethodNotAllowed):
                await _send_json(send, 405, {"error": exc.message})
                return
            extra = [(b"retry-after", b"1")] if exc.status.http == 503 else []
            if isinstance(exc, OverQuota):
                extra.append((b"retry-after", str(math.ceil(exc.retry_s)).encode()))
            if exc.status.http == 401:
                extra.append((b"www-authenticate", b"Bearer"))
            if exc.status.http == 501 and "content encoding" in exc.message:
                extra.append((b"accept-encoding", b"gzip, deflate"))
            await _send_json(send, exc.status.http, {"error": exc.message}, extra)
        except Exception as exc:
            logger.exception("a request to %s failed", scope.get("path"))
            await _send_json(send, 500, {"error": f"{type(exc).__name__}: {exc}"})

    async def _serve(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        started = time.perf_counter_ns()
        parts = tuple(scope["path"].strip("/").split("/"))
        headers = dict(scope["headers"])
        if not self._gate.is_open:
            self._gate.check_http(parts, headers, str((scope.get("client") or ("",))[0]))
        body = await self._body(headers, receive)
        if parts[-1] == "infer" and parts[:2] == ("v2", "models") and len(parts) in (4, 6):
            if scope["method"] != "POST":
                raise MethodNotAllowed
            if len(parts) == 6 and parts[3] != "versions":
                find_route("POST", parts)
            await self._infer(parts[2], parts[4] if len(parts) == 6 else "", headers, body, started, receive, send)
            return
        if parts[-1] in ("generate", "generate_stream") and parts[:2] == ("v2", "models") and len(parts) in (4, 6):
            if scope["method"] != "POST":
                raise MethodNotAllowed
            await self._generate(parts, headers, body, started, receive, send)
            return
        handle, names = find_route(scope["method"], parts)
        reply = await handle(self._core, names, body)
        if reply.page is not None:
            await _send(send, 200, reply.page, list(_PAGE))
        else:
            await _send_json(send, reply.status, reply.body)

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        chunks, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._max_body_bytes:
                raise invalid(f"the request exceeds {self._max_body_bytes} bytes")
            chunks.append(chunk)
            if not message.get("more_body"):
                break
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        encoding = headers.get(b"content-encoding", b"")
        return decompress(body, encoding, self._max_input_bytes) if encoding else body

    def _trace_parent(self, headers: Headers) -> str:
        return headers.get(b"traceparent", b"").decode("latin-1") if self._core.tracer.is_on else ""

    async def _generate(
        self, parts: tuple[str, ...], headers: Headers, body: bytes, started: int, receive: Receive, send: Send
    ) -> None:  # fmt: skip
        version = parts[4] if len(parts) == 6 else ""
        await self._core.prepare(parts[2])
        served = self._core.find(parts[2], version)
        request = decode_generate(parse_json(body, self._max_input_bytes), served, version)
        request.times.start = started
        request.trace_parent = self._trace_parent(headers)
        if parts[-1] == "generate":
            await _send_json(send, 200, await _answered(asyncio.ensure_future(generate(served, request)), receive))
            return
        stream = events(served, request)
        first = await _answered(asyncio.ensure_future(anext(stream, b"")), receive)
        await send({"type": "http.response.start", "status": 200, "headers": [_EVENTS]})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        sending = asyncio.ensure_future(_send_events(stream, send))
        await _answered(sending, receive)

    async def _infer(
        self, name: str, version: str, headers: Headers, body: bytes, started: int, receive: Receive, send: Send
    ) -> None:  # fmt: skip
        await self._core.prepare(name)
        served = self._core.find(name, version)
        decoded = decode_infer(
            headers, body, served.signature, name, version, self._core.regions, self._max_input_bytes
        )
        decoded.request.times.start = started
        decoded.request.trace_parent = self._trace_parent(headers)
        answer = served.infer(decoded.request)
        response = await _answered(answer, receive)
        encoded = encode_infer(response, decoded, served.signature, served.version, self._core.regions)
        await _send_infer(send, *encoded, headers.get(b"accept-encoding", b""))


async def _send_events(stream: AsyncIterator[bytes], send: Send) -> None:
    async for event in stream:
        await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _answered(answer: asyncio.Future[Answer], receive: Receive) -> Answer:
    """The answer; when it takes long, a client that goes away cancels the request."""
    if answer.done():
        return answer.result()
    watching: list[asyncio.Task[None]] = []

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        answer.cancel()

    loop = asyncio.get_running_loop()
    timer = loop.call_later(_WATCH_AFTER_S, lambda: watching.append(loop.create_task(watch())))
    try:
        return await answer
    except asyncio.CancelledError:
        if answer.cancelled() and watching and watching[0].done():
            raise Disconnected from None
        raise
    finally:
        timer.cancel()
        for task in watching:
            task.cancel()


async def _send_infer(send: Send, head: bytes, blobs: list[bytes], accepted: bytes) -> None:
    headers = [_JSON]
    if blobs:
        headers = [(b"content-type", b"application/octet-stream"), (HEADER_LENGTH, b"%d" % len(head))]
    body = b"".join((head, *blobs)) if blobs else head
    encoding = _chosen_encoding(accepted) if accepted else b""
    if encoding:
        body = gzip.compress(body, 1) if encoding == b"gzip" else zlib.compress(body, 1)
        headers.append((b"content-encoding", encoding))
    await _send(send, 200, body, headers)


def _chosen_encoding(accepted: bytes) -> bytes:
    """gzip or deflate by the largest weight, nothing when neither is named or identity is preferred."""
    weights: dict[bytes, float] = {}
    for item in accepted.lower().split(b","):
        name, _, parameter = item.strip().partition(b";")
        try:
            weights[name.strip()] = float(parameter.strip().removeprefix(b"q=") or 1)
        except ValueError:
            continue
    best = max((b"gzip", b"deflate"), key=lambda n: weights.get(n, 0.0))
    return best if weights.get(best, 0.0) > weights.get(b"identity", 0.0) else b""


async def _send_json(send: Send, status: int, body: Any, extra: list[tuple[bytes, bytes]] | None = None) -> None:
    data = b"" if body is None else orjson.dumps(body)
    await _send(send, status, data, [_JSON, *(extra or [])])


async def _send(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class MetricsApp:
    """GET /metrics, on its own port."""

    def __init__(self, core: Core) -> None:
        self._core, self._machine = core, Machine()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] != "/metrics" or scope["method"] != "GET":
            await _send_json(send, 404, {"error": "Not Found"})
            return
        machine = await asyncio.to_thread(lambda: list(self._machine.families()))
        models = render(self._core.repository.served(), machine)
        text = (models + self._core.custom_metrics.render()).encode()
        await _send(send, 200, text, [(b"content-type", CONTENT_TYPE.encode())])
