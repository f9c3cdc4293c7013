"""From a message to its answer, for unary calls and for streams."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from venturi.serve.core import Core
from venturi.serve.errors import ServeError
from venturi.serve.grpc.codec import EMPTY_FINAL, decode_infer, encode_infer
from venturi.serve.grpc.streams import Pending
from venturi.serve.request import InferRequest, InferResponse
from venturi.serve.served import ServedVersion


def begin(core: Core, message: Any, trace_parent: str) -> Pending:
    """Submit a request of one answer. Raises ServeError; `core.prepare` comes first."""
    served, request = _decoded(core, message, trace_parent)
    return Pending(
        served.infer(request),
        lambda response: encode_infer(response, request, served.signature, served.version, core.regions),
    )


def _decoded(core: Core, message: Any, trace_parent: str) -> tuple[ServedVersion, InferRequest]:
    started = time.perf_counter_ns()
    served = core.find(message.model_name, message.model_version)
    request = decode_infer(message, core.regions)
    request.times.start, request.trace_parent = started, trace_parent
    return served, request


@dataclass(frozen=True)
class StreamExchange:
    """Answers in a stream say whether they are a request's last. `count` may refuse a message."""

    core: Core
    trace_parent: str
    count: Callable[[], None]

    def is_decoupled(self, message: Any) -> bool:
        try:
            return self.core.find(message.model_name, message.model_version).signature.decoupled
        except ServeError:
            return False

    async def prepare(self, message: Any) -> None:
        self.count()
        await self.core.prepare(message.model_name)

    def begin(self, message: Any) -> Pending:
        pending = begin(self.core, message, self.trace_parent)

        def encode(response: InferResponse) -> Any:
            out = pending.encode(response)
            out.parameters["triton_final_response"].bool_param = True
            return out

        return Pending(pending.future, encode)

    def together(self, messages: list[Any]) -> AbstractContextManager[object]:
        """Not where models are loaded on demand: that takes its time."""
        stack = ExitStack()
        if self.core.on_demand is None:
            for key in {(m.model_name, m.model_version) for m in messages}:
                with suppress(ServeError):  # told when the message begins
                    stack.enter_context(self.core.find(*key).driver.together())
        return stack

    async def answers(self, message: Any) -> AsyncIterator[Any]:
        served, request = _decoded(self.core, message, self.trace_parent)
        wants_end = message.parameters[EMPTY_FINAL].bool_param if EMPTY_FINAL in message.parameters else False
        async for part, final in served.stream(request):
            if part.outputs or not final or wants_end:
                response = encode_infer(part, request, served.signature, served.version, self.core.regions)
                response.parameters["triton_final_response"].bool_param = final
                yield response
