"""generate and generate_stream: flat JSON in, flat JSON or server-sent events out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson

from venturi.serve.errors import ServeError, invalid
from venturi.serve.http.codec import read_parameters
from venturi.serve.request import InferRequest, InferResponse, Tensor
from venturi.serve.served import ServedVersion
from venturi.serve.tensors import count_elements, from_numbers, to_numbers
from venturi.serve.validation import Port


def decode_generate(given: dict[str, Any], served: ServedVersion, version: str) -> InferRequest:
    """Keys that name an input fill it, `id` is the request's, all others are parameters, also inside `parameters`."""
    s = served.signature
    request = InferRequest(s.model, version, {})
    own = given.pop("id", "")
    if not isinstance(own, str):
        raise invalid(f"'id' must be a string, got {type(own).__name__}")
    request.id = own
    nested = given.pop("parameters", {})
    if not isinstance(nested, dict):
        raise invalid(f"'parameters' must be an object, got {type(nested).__name__}")
    parameters: dict[str, Any] = {}
    for key, value in [*given.items(), *nested.items()]:
        if key in s.inputs:
            if key in request.inputs:
                raise invalid(f"input '{key}' is given twice")
            request.inputs[key] = _tensor(s.inputs[key], value, batched=s.max_batch > 0)
        elif isinstance(value, list | dict):
            raise invalid(f"'{key}' is no input of model '{s.model}', and a parameter must be a string, number or "
                          f"boolean; inputs are {', '.join(s.inputs)}")  # fmt: skip
        else:
            parameters[key] = value
    read_parameters(parameters, request)
    return request


def _tensor(port: Port, value: Any, *, batched: bool) -> Tensor:
    """A scalar or flat list; its shape follows from the port: the innermost free dimension takes what there is."""
    values = value if isinstance(value, list) else [value]
    if any(isinstance(v, list | dict) for v in values):
        raise invalid(f"input '{port.name}' must be a scalar or a flat list")
    free = [i for i, d in enumerate(port.dims) if d == -1]
    shape = [1 if d == -1 else d for d in port.dims]
    rest, odd = divmod(len(values), count_elements(shape))
    if odd or (not free and rest != 1):
        raise invalid(f"input '{port.name}' has {len(values)} values, which do not fill its dims {list(port.dims)}")
    if free:
        shape[free[-1]] = rest
    shape = [1, *shape] if batched else shape
    return Tensor(port.name, port.datatype, from_numbers(port.name, port.datatype, shape, values))


def encode_generate(response: InferResponse, request: InferRequest, served: ServedVersion) -> dict[str, Any]:
    """Outputs of one element become scalars."""
    out: dict[str, Any] = {"id": request.id} if request.id else {}
    out |= {"model_name": served.name, "model_version": str(served.version), **response.parameters}
    for name, tensor in response.outputs.items():
        values = to_numbers(tensor.data, tensor.datatype)
        out[name] = values[0] if len(values) == 1 else values
    return out


async def generate(served: ServedVersion, request: InferRequest) -> dict[str, Any]:
    """Raises ServeError, also when the model does not give exactly one response."""
    found = [r async for r, final in served.stream(request) if r.outputs or not final]
    if len(found) != 1:
        raise invalid(f"generate expects model to produce exactly 1 response, got {len(found)}; use generate_stream "
                      "for models that give more or fewer")  # fmt: skip
    return encode_generate(found[0], request, served)


async def events(served: ServedVersion, request: InferRequest) -> AsyncIterator[bytes]:
    """One event a response. The first step raises ServeError when nothing can be answered; later errors are events."""
    sent = False
    try:
        async for response, final in served.stream(request):
            if response.outputs or not final:
                sent = True
                yield b"data: " + orjson.dumps(encode_generate(response, request, served)) + b"\n\n"
    except ServeError as exc:
        if not sent:
            raise
        yield b"data: " + orjson.dumps({"error": exc.message}) + b"\n\n"
