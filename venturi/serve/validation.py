"""Checks a request against its model: names, types, shapes, batch size. Words as clients of the protocol know them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from venturi.serve.config import ModelConfig, datatype
from venturi.serve.errors import ServeError, Status
from venturi.serve.request import InferRequest


@dataclass(frozen=True)
class Port:
    """An input or output. `dims` without the batch axis, -1 where any size is allowed."""

    name: str
    datatype: str
    dims: tuple[int, ...]
    optional: bool = False
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Signature:
    """What requests to a model must look like."""

    model: str
    max_batch: int
    inputs: dict[str, Port]
    outputs: dict[str, Port]
    required: int
    decoupled: bool = False

    def wire_shape(self, port: Port) -> list[int]:
        return [-1, *port.dims] if self.max_batch else list(port.dims)


def signature_of(config: ModelConfig, labels: dict[str, tuple[str, ...]]) -> Signature:
    inputs = {t.name: Port(t.name, datatype(t.data_type), tuple(t.dims), t.optional) for t in config.input}
    outputs = {
        t.name: Port(t.name, datatype(t.data_type), tuple(t.dims), False, labels.get(t.name, ())) for t in config.output
    }
    return Signature(
        config.name, config.max_batch_size, inputs, outputs, sum(not p.optional for p in inputs.values()),
        config.model_transaction_policy.decoupled,
    )  # fmt: skip


def check_request(s: Signature, request: InferRequest) -> None:
    """Sets `request.rows`. Raises ServeError INVALID_ARG that names the field."""
    inputs = request.inputs
    if not s.required <= len(inputs) <= len(s.inputs) or any(
        n not in inputs for n, p in s.inputs.items() if not p.optional
    ):
        _refuse_names(s, request)
    rows = -1
    for name, tensor in inputs.items():
        port = s.inputs.get(name)
        if port is None:
            _refuse_names(s, request)
            raise AssertionError("unknown inputs are refused")
        if tensor.datatype != port.datatype:
            raise _error(request, f"inference input '{name}' data-type is '{tensor.datatype}', but model '{s.model}' "
                                  f"expects '{port.datatype}'")  # fmt: skip
        shape = tensor.data.shape
        if s.max_batch:
            rows = _batch(s, request, name, shape, rows)
            shape = shape[1:]
        if len(shape) != len(port.dims) or any(d not in (-1, given) for d, given in zip(port.dims, shape)):
            raise _error(request, f"unexpected shape for input '{name}' for model '{s.model}'. Expected "
                                  f"{_list(s.wire_shape(port))}, got {_list(tensor.data.shape)}.")  # fmt: skip
    request.rows = max(rows, 1)
    seen = set()
    for output in request.outputs:
        if output.name not in s.outputs:
            raise _error(request, f"unexpected inference output '{output.name}' for model '{s.model}'")
        if output.name in seen:
            raise _error(request, f"output '{output.name}' already exists in request")
        seen.add(output.name)


def _batch(s: Signature, request: InferRequest, name: str, shape: tuple[int, ...], rows: int) -> int:
    if not shape:
        raise _error(request, f"input '{name}' has no batch axis, but model '{s.model}' batches: Expected "
                              f"{_list(s.wire_shape(s.inputs[name]))}, got [].")  # fmt: skip
    if rows not in (-1, shape[0]):
        raise _error(request, f"input '{name}' batch size does not match other inputs for '{s.model}'")
    if shape[0] < 1:
        raise _error(request, f"inference request batch-size must be >= 1 for '{s.model}', got {shape[0]}")
    if shape[0] > s.max_batch:
        raise _error(request, f"inference request batch-size must be <= {s.max_batch} for '{s.model}'")
    return shape[0]


def _refuse_names(s: Signature, request: InferRequest) -> None:
    got = list(request.inputs)
    for name in got:
        if name not in s.inputs:
            raise _error(request, f"unexpected inference input '{name}', allowed inputs are: {', '.join(s.inputs)}")
    missing = [n for n, p in s.inputs.items() if not p.optional and n not in request.inputs]
    expected = f"{s.required}" if s.required == len(s.inputs) else f"between {s.required} and {len(s.inputs)}"
    message = f"expected {expected} inputs but got {len(got)} inputs for model '{s.model}'. Got input(s) {got}, "
    missing_text = f"but missing required input(s) {missing}. Please provide all required input(s)."
    raise _error(request, message + missing_text)


def _list(shape: Any) -> str:
    return "[" + ",".join(str(int(d)) for d in shape) + "]"


def _error(request: InferRequest, message: str) -> ServeError:
    return ServeError(Status.INVALID_ARG, request.label + message)
