"""Inference requests and answers as protocol buffers."""

from __future__ import annotations

from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2 as pb

from venturi.serve.classification import classify
from venturi.serve.errors import ServeError, invalid
from venturi.serve.request import InferRequest, InferResponse, Parameter, RequestedOutput, Tensor
from venturi.serve.shared_memory import Regions, read_place, write_place
from venturi.serve.tensors import BYTES, DATATYPES, from_bytes, to_bytes
from venturi.serve.validation import Signature

_CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
EMPTY_FINAL = "triton_enable_empty_final_response"
_OWN = {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout"}


def decode_infer(message: Any, regions: Regions) -> InferRequest:
    """Raises ServeError that names the field."""
    request = InferRequest(message.model_name, message.model_version, {}, id=message.id)
    try:
        _read_parameters(message.parameters, request)
        raw, inputs = message.raw_input_contents, message.inputs
        sent = [len(i.parameters) == 0 or "shared_memory_region" not in i.parameters for i in inputs]
        if raw and len(raw) != sum(sent):
            raise invalid(f"expected {sum(sent)} raw_input_contents, one an input, got {len(raw)}")
        left = iter(raw)
        for item, is_sent in zip(inputs, sent):
            if item.name in request.inputs:
                raise invalid(f"input '{item.name}' already exists in request")
            request.inputs[item.name] = _input(item, next(left) if raw and is_sent else None, regions)
        request.outputs = [_output(o) for o in message.outputs]
    except ServeError as exc:
        raise ServeError(exc.status, request.label + exc.message) from exc
    return request


def encode_infer(response: InferResponse, request: InferRequest, s: Signature, version: int, regions: Regions) -> Any:
    """Always as raw bytes; nothing for a tensor in shared memory."""
    out = pb.ModelInferResponse(model_name=s.model, model_version=str(version), id=request.id)
    for spec in request.outputs or [RequestedOutput(n) for n in response.outputs]:
        tensor = response.outputs[spec.name]
        if spec.classes:
            tensor = classify(tensor, spec.classes, s.outputs[spec.name].labels, batched=s.max_batch > 0)
        target = out.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        if spec.place is None:
            out.raw_output_contents.append(to_bytes(tensor.data, tensor.datatype))
            continue
        out.raw_output_contents.append(b"")
        for key, value in write_place(regions, spec.place, tensor).items():
            set_parameter(target.parameters[key], value)
    for key, value in response.parameters.items():
        set_parameter(out.parameters[key], value)
    return out


def set_parameter(target: Any, value: Parameter) -> None:
    if isinstance(value, bool):
        target.bool_param = value
    elif isinstance(value, int):
        target.int64_param = value
    elif isinstance(value, float):
        target.double_param = value
    else:
        target.string_param = value


def parameter_value(given: Any) -> Parameter:
    which = given.WhichOneof("parameter_choice")
    if which is None:
        raise invalid("a parameter has no value")
    value: Parameter = getattr(given, which)
    return value


def _input(item: Any, raw: bytes | None, regions: Regions) -> Tensor:
    name, datatype, shape = item.name, item.datatype, list(item.shape)
    if datatype not in DATATYPES:
        raise invalid(f"input '{name}' has datatype {datatype!r}, expected one of {', '.join(DATATYPES)}")
    total = 1
    for d in shape:
        total *= d
        if d < 0:
            raise invalid(f"input '{name}' has shape {shape}: dimensions must not be negative")
    if total >= 1 << 48:
        raise invalid(f"input '{name}' has shape {shape}, which is too large")
    place = read_place(_plain(item.parameters), f"input '{name}'") if len(item.parameters) else None
    if place is not None:
        view = regions.read(place.region, place.offset, place.byte_size)
        return Tensor(name, datatype, from_bytes(name, datatype, shape, view))
    if raw is not None:
        if item.HasField("contents"):
            raise invalid(f"contents field must not be specified when using raw_input_contents for '{name}'")
        return Tensor(name, datatype, from_bytes(name, datatype, shape, raw))
    return Tensor(name, datatype, _from_contents(item, shape))


def _from_contents(item: Any, shape: list[int]) -> np.ndarray[Any, Any]:
    field = _CONTENTS.get(item.datatype)
    if field is None:
        raise invalid(f"input '{item.name}' is {item.datatype}: it must come in raw_input_contents")
    values = getattr(item.contents, field)
    count = int(np.prod(shape, dtype=object))
    if len(values) != count:
        raise invalid(
            f"unexpected number of elements {len(values)} in {field} for input '{item.name}', expecting {count}"
        )
    if item.datatype == BYTES:
        out = np.empty(count, dtype=object)
        out[:] = list(values)
        return out.reshape(shape)
    dtype = DATATYPES[item.datatype]
    wide = np.array(values, dtype=dtype if dtype.kind in "bf" else np.uint64 if dtype.kind == "u" else np.int64)
    if dtype.kind in "iu" and wide.size:
        limit = np.iinfo(dtype)
        if wide.min() < limit.min or wide.max() > limit.max:
            raise invalid(f"input '{item.name}' is {item.datatype}: a number does not fit")
    return wide.astype(dtype).reshape(shape)


def _output(item: Any) -> RequestedOutput:
    if not len(item.parameters):
        return RequestedOutput(item.name, True)
    place = read_place(_plain(item.parameters), f"output '{item.name}'")
    classes = item.parameters["classification"].int64_param if "classification" in item.parameters else 0
    if classes < 0:
        raise invalid(f"'classification' of output '{item.name}' must be a number of classes, got {classes}")
    if place is not None and classes:
        raise invalid(f"output '{item.name}' in shared memory can not have 'classification'")
    return RequestedOutput(item.name, True, classes, place)


def _plain(parameters: Any) -> dict[str, Parameter]:
    return {k: parameter_value(v) for k, v in parameters.items()}


def _read_parameters(given: Any, request: InferRequest) -> None:
    if not len(given):
        return
    for key, parameter in given.items():
        if key.startswith("triton_"):
            if key != EMPTY_FINAL:
                raise invalid(f"parameter keys starting with 'triton_' are reserved, got '{key}'")
        elif key not in _OWN:
            request.parameters[key] = parameter_value(parameter)
    request.priority = _number(given, "priority")
    request.timeout_us = _number(given, "timeout")
    if "sequence_id" in given and given["sequence_id"].WhichOneof("parameter_choice") == "string_param":
        request.sequence = given["sequence_id"].string_param
    else:
        request.sequence = _number(given, "sequence_id")
    request.sequence_start = "sequence_start" in given and given["sequence_start"].bool_param
    request.sequence_end = "sequence_end" in given and given["sequence_end"].bool_param


def _number(given: Any, key: str) -> int:
    if key not in given:
        return 0
    value = parameter_value(given[key])
    if type(value) is not int or value < 0:
        raise invalid(f"parameter '{key}' must be an unsigned 64-bit number, got {value!r}")
    return value
