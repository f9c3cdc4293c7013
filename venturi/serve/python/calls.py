"""Requests that a Python model makes to other models of its server."""

from __future__ import annotations

from collections.abc import Callable

from venturi.serve.errors import ServeError, invalid
from venturi.serve.python.wire import Channel, Closed, Head
from venturi.serve.request import InferRequest, InferResponse, RequestedOutput, Tensor

Result = InferResponse | ServeError
Submit = Callable[[InferRequest, Callable[[Result], None]], None]


def answer_call(submit: Submit, channel: Channel, head: Head, tensors: list[Tensor]) -> None:
    """Starts the request; every response goes back over the channel. Errors are answers."""
    number = head["call"]

    def send(result: Result, final: bool) -> None:
        answer: Head = {"op": "result", "call": number, "final": final}
        outputs: list[Tensor] = []
        if isinstance(result, ServeError):
            answer |= {"error": result.message, "code": result.status.name}
        else:
            answer["parameters"] = dict(result.parameters)
            outputs = list(result.outputs.values())
        try:
            channel.send(answer, outputs)
        except Closed:
            return  # the worker that asked has died; its own requests are answered elsewhere

    version = "" if head["version"] in (-1, "-1") else str(head["version"])
    request = InferRequest(
        head["model"], version, {t.name: t for t in tensors}, head["id"],
        [RequestedOutput(name) for name in head["outputs"]], head["parameters"], timeout_us=head["timeout"],
        sequence=head["correlation"], sequence_start=bool(head["flags"] & 1), sequence_end=bool(head["flags"] & 2),
    )  # fmt: skip
    if head["decoupled"]:
        request.emit = lambda response: send(response, False)
    try:
        if not head["model"]:
            raise invalid("a request to another model needs 'model_name'")
        submit(request, lambda result: send(result, True))
    except ServeError as exc:
        send(exc, True)
