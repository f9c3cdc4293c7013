"""The gate in front of the gRPC service."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from venturi.serve.errors import ServeError
from venturi.serve.security import Gate


class GateInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refused calls never reach the service."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        metadata = {k: v for k, v in details.invocation_metadata or () if isinstance(v, str)}
        handler = await continuation(details)
        try:
            self._gate.check_grpc(details.method, metadata)
        except ServeError as exc:
            return _refusal(handler, exc)
        return handler


def _refusal(handler: Any, error: ServeError) -> Any:
    """A handler of the same kind that aborts."""
    status = getattr(grpc.StatusCode, error.status.grpc)

    async def unary(request: Any, context: Any) -> None:
        await context.abort(status, error.message)

    async def stream(request: Any, context: Any) -> Any:
        await context.abort(status, error.message)
        yield  # makes this an async generator, as the stream's handler must be

    if handler is not None and handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(stream)
    return grpc.unary_unary_rpc_method_handler(unary)
