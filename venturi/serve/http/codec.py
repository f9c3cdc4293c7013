"""Inference requests and answers as HTTP bodies: JSON, then the binary tensors in the order of the inputs."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from venturi.serve.classification import classify
from venturi.serve.errors import ServeError, invalid, unsupported
from venturi.serve.request import InferRequest, InferResponse, Parameter, RequestedOutput, Tensor
from venturi.serve.shared_memory import Regions, read_place, write_place
from venturi.serve.tensors import BYTES, DATATYPES, from_bytes, from_numbers, to_bytes, to_numbers
from venturi.serve.validation import Signature

HEADER_LENGTH = b"inference-header-content-length"
MAX_JSON = 64 << 20
_OWN = {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "binary_data_output"}


@dataclass(slots=True)
class Decoded:
    """`binary_default`: outputs that the request does not name are sent as bytes."""

    request: InferRequest
    binary_default: bool


def decompress(body: bytes, encoding: bytes, limit: int) -> bytes:
    """gzip or zlib; stops at `limit` bytes, so a small body cannot grow without bound."""
    if encoding in (b"", b"identity"):
        return body
    if encoding not in (b"gzip", b"deflate"):
        raise unsupported(f"Unsupported content encoding {encoding.decode('latin-1')!r}, expected gzip or deflate")
    stream = zlib.decompressobj(31 if encoding == b"gzip" else 15)
    try:
        out = stream.decompress(body, limit + 1)
    except zlib.error as exc:
        raise invalid(f"cannot decompress the request: {exc}") from exc
    if len(out) > limit:
        raise invalid(f"the decompressed request exceeds the maximum allowed input size of {limit} bytes "
                      "(--http-max-input-size)")  # fmt: skip
    if not stream.eof:
        raise invalid("the compressed request is incomplete")
    return out


def parse_json(data: bytes | memoryview, limit: int = MAX_JSON) -> dict[str, Any]:
    if len(data) > limit:
        raise invalid(f"request JSON of {len(data)} bytes exceeds the maximum allowed input size of {limit} bytes "
                      "(--http-max-input-size)")  # fmt: skip
    try:
        found = orjson.loads(data)
    except orjson.JSONDecodeError as exc:
        raise invalid(f"failed to parse the request JSON buffer: {exc}") from exc
    if not isinstance(found, dict):
        raise invalid(f"the request must be a JSON object, got {type(found).__name__}")
    return found


def decode_infer(
    headers: Mapping[bytes, bytes],
    body: bytes,
    s: Signature,
    name: str,
    version: str,
    regions: Regions,
    limit: int = MAX_JSON,
) -> Decoded:
    """Raises ServeError that names the field."""
    given = headers.get(HEADER_LENGTH)
    if given is None:
        header, rest = parse_json(body, limit), memoryview(b"")
    else:
        length = _header_length(given, len(body))
        if length == 0:
            return Decoded(_raw_request(body, s, name, version), True)
        view = memoryview(body)
        header, rest = parse_json(view[:length], limit), view[length:]
    request = InferRequest(name, version, {}, id=_string(header, "id"))
    try:
        binary = read_parameters(header.get("parameters"), request)
        at = 0
        for item in _objects(header, "inputs"):
            tensor, used = _input(item, rest[at:], regions)
            at += used
            if tensor.name in request.inputs:
                raise invalid(f"input '{tensor.name}' already exists in request")
            request.inputs[tensor.name] = tensor
        if at != len(rest):
            raise invalid(f"unexpected additional input data: {len(rest) - at} bytes after the last input")
        if "outputs" in header:
            request.outputs = [_output(item) for item in _objects(header, "outputs")]
    except ServeError as exc:
        raise ServeError(exc.status, request.label + exc.message) from exc
    return Decoded(request, binary)


def encode_infer(
    response: InferResponse, decoded: Decoded, s: Signature, version: int, regions: Regions
) -> tuple[bytes, list[bytes]]:
    """(JSON, binary tensors); the body is all of them in a row."""
    request = decoded.request
    head: dict[str, Any] = {"model_name": s.model, "model_version": str(version)}
    if request.id:
        head["id"] = request.id
    if response.parameters:
        head["parameters"] = dict(response.parameters)
    wanted = request.outputs or [RequestedOutput(n, decoded.binary_default) for n in response.outputs]
    outputs, blobs = [], []
    for spec in wanted:
        tensor = response.outputs[spec.name]
        if spec.classes:
            tensor = classify(tensor, spec.classes, s.outputs[spec.name].labels, batched=s.max_batch > 0)
        item: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if spec.place is not None:
            write_place(regions, spec.place, tensor)
        elif spec.binary:
            blobs.append(to_bytes(tensor.data, tensor.datatype))
            item["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            item["data"] = to_numbers(tensor.data, tensor.datatype)
        outputs.append(item)
    head["outputs"] = outputs
    return orjson.dumps(head), blobs


def _header_length(given: bytes, size: int) -> int:
    text = given.decode("latin-1").strip()
    if not (text.isascii() and text.isdigit()) or int(text) > size:
        raise invalid(
            f"Inference-Header-Content-Length must be a number of bytes within the body of {size}, got {text!r}"
        )
    return int(text)


def _raw_request(body: bytes, s: Signature, name: str, version: str) -> InferRequest:
    """The body is the one input, of batch size 1; one free dimension takes what there is."""
    if len(s.inputs) != 1:
        raise invalid(f"raw binary requests need a model with one input, '{name}' has {len(s.inputs)}")
    (port,) = s.inputs.values()
    request = InferRequest(name, version, {})
    if port.datatype == BYTES:
        shape = [1]
        data = len(body).to_bytes(4, "little") + body
    else:
        shape, data = list(port.dims), body
        fixed = DATATYPES[port.datatype].itemsize
        for d in port.dims:
            fixed *= max(d, 1)
        if port.dims.count(-1) > 1:
            raise invalid(f"raw binary requests allow one free dimension, input '{port.name}' has {list(port.dims)}")
        shape = [len(body) // fixed if d == -1 else d for d in shape]
    if s.max_batch:
        shape = [1, *shape]
    request.inputs[port.name] = Tensor(port.name, port.datatype, from_bytes(port.name, port.datatype, shape, data))
    return request


def _objects(header: Mapping[str, Any], field: str) -> list[dict[str, Any]]:
    items = header.get(field)
    if not isinstance(items, list) or not all(isinstance(i, dict) for i in items):
        raise invalid(f"Unable to parse '{field}': expected an array of objects")
    return items


def _string(item: Mapping[str, Any], field: str) -> str:
    value = item.get(field, "")
    if not isinstance(value, str):
        raise invalid(f"Unable to parse '{field}': expected a string, got {type(value).__name__}")
    return value


def _input(item: dict[str, Any], rest: memoryview, regions: Regions) -> tuple[Tensor, int]:
    """(tensor, bytes of `rest` it took)."""
    name = _string(item, "name")
    if not name:
        raise invalid("Unable to parse 'inputs': an input has no 'name'")
    datatype = _string(item, "datatype")
    if datatype not in DATATYPES:
        raise invalid(f"input '{name}' has datatype {datatype!r}, expected one of {', '.join(DATATYPES)}")
    shape = _shape(name, item.get("shape"))
    parameters = item.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise invalid(f"Unable to parse 'parameters' of input '{name}': expected an object")
    place = read_place(parameters, f"input '{name}'")
    if place is not None:
        if "data" in item or "binary_data_size" in parameters:
            raise invalid(f"input '{name}' must have only one of 'data', 'binary_data_size' and a shared memory region")
        view = regions.read(place.region, place.offset, place.byte_size)
        return Tensor(name, datatype, from_bytes(name, datatype, shape, view)), 0
    size = parameters.get("binary_data_size")
    if size is None:
        if "data" not in item:
            raise invalid(f"input '{name}' must have 'data', 'binary_data_size' or a shared memory region")
        return Tensor(name, datatype, from_numbers(name, datatype, shape, item["data"])), 0
    if "data" in item:
        raise invalid(f"input '{name}' must have only one of 'data' and 'binary_data_size'")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(rest):
        raise invalid(f"unexpected size for input '{name}': binary_data_size is {size!r}, {len(rest)} bytes are left")
    return Tensor(name, datatype, from_bytes(name, datatype, shape, rest[:size])), size


def _shape(name: str, shape: object) -> list[int]:
    if not isinstance(shape, list) or not all(type(d) is int and 0 <= d < 1 << 63 for d in shape):
        raise invalid(f"Unable to parse 'shape' of input '{name}': expected an array of non-negative integers")
    total = 1
    for d in shape:
        total *= d
    if total >= 1 << 48:
        raise invalid(f"input '{name}' has shape {shape}, which is too large")
    return shape


def _output(item: dict[str, Any]) -> RequestedOutput:
    name = _string(item, "name")
    parameters = item.get("parameters") or {}
    if not name or not isinstance(parameters, dict):
        raise invalid("Unable to parse 'outputs': each needs a 'name', and 'parameters' must be an object")
    place = read_place(parameters, f"output '{name}'")
    classes = parameters.get("classification", 0)
    if type(classes) is not int or classes < 0:
        raise invalid(f"'classification' of output '{name}' must be a number of classes, got {classes!r}")
    binary = parameters.get("binary_data", False)
    if not isinstance(binary, bool):
        raise invalid(f"'binary_data' of output '{name}' must be true or false, got {binary!r}")
    if place is not None and (classes or binary):
        raise invalid(f"output '{name}' in shared memory can have neither 'classification' nor 'binary_data'")
    return RequestedOutput(name, binary, classes, place)


def read_parameters(given: object, request: InferRequest) -> bool:
    """Fills the request's own fields; returns binary_data_output."""
    if given is None:
        return False
    if not isinstance(given, dict):
        raise invalid("Unable to parse 'parameters': expected an object")
    for key, value in given.items():
        if key.startswith("triton_"):
            raise invalid(f"parameter keys starting with 'triton_' are reserved, got '{key}'")
        if key not in _OWN:
            if not isinstance(value, Parameter):
                raise invalid(f"parameter '{key}' must be a string, number or boolean, got {type(value).__name__}")
            request.parameters[key] = value
    request.priority = _number(given, "priority")
    request.timeout_us = _number(given, "timeout")
    sequence = given.get("sequence_id", 0)
    if not isinstance(sequence, str):
        sequence = _number(given, "sequence_id")
    request.sequence = sequence
    request.sequence_start = given.get("sequence_start") is True
    request.sequence_end = given.get("sequence_end") is True
    return given.get("binary_data_output") is True


def _number(given: Mapping[str, Any], key: str) -> int:
    value = given.get(key, 0)
    if type(value) is not int or not 0 <= value < 1 << 64:
        raise invalid(f"parameter '{key}' must be an unsigned 64-bit number, got {value!r}")
    return value
