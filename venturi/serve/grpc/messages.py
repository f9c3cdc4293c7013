"""Messages that are no protocol buffers: answered as the client's mistake, where grpc would log a failure of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError


@dataclass(frozen=True)
class Malformed:
    """Stands where a request would be."""

    reason: str


class Handlers:
    """Takes the generated service's handlers as a server would, and makes their parsing safe."""

    def __init__(self) -> None:
        self.made: list[Any] = []

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """The older of the generated code's two calls; the newer one says the same."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        safe = {n: h._replace(request_deserializer=_safe(h.request_deserializer)) for n, h in handlers.items()}
        self.made.append(grpc.method_handlers_generic_handler(service, safe))


def _safe(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parsed(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError as exc:
            return Malformed(f"the request is not the protocol's message: {exc}")

    return parsed
