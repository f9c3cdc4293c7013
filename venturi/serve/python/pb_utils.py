"""What `import triton_python_backend_utils` gives a model: tensors, requests, responses, calls to other models.

Names and meanings are those of Triton's Python backend, so that its models run as they are.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from venturi.serve import request as wire
from venturi.serve.python.pb_metrics import MetricFamily as MetricFamily
from venturi.serve.python.pb_metrics import TritonModelException as TritonModelException
from venturi.serve.tensors import BYTES, DATATYPES, as_bytes, from_bytes, to_bytes

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
TRITONSERVER_REQUEST_FLAG_SEQUENCE_START = 1
TRITONSERVER_REQUEST_FLAG_SEQUENCE_END = 2
TRITONSERVER_REQUEST_RELEASE_ALL = 1
TRITONSERVER_REQUEST_RELEASE_RESCHEDULE = 2
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
_STRINGS = {f"TYPE_{'STRING' if n == BYTES else n}": d for n, d in DATATYPES.items()}


class TritonError(Exception):
    """An error for one request."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = (
        "UNKNOWN", "INTERNAL", "NOT_FOUND", "INVALID_ARG", "UNAVAILABLE", "UNSUPPORTED", "ALREADY_EXISTS", "CANCELLED",
    )  # fmt: skip

    def __init__(self, message: str, code: str = "INTERNAL") -> None:
        super().__init__(message)
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> str:
        return self._code


class ModelConfig:
    """Given to auto_complete_config; collects what the model says about itself."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config

    def as_dict(self) -> dict[str, Any]:
        return self._config

    def set_max_batch_size(self, size: int) -> None:
        self._config.setdefault("max_batch_size", 0)
        self._config["max_batch_size"] = size

    def set_dynamic_batching(self) -> None:
        self._config.setdefault("dynamic_batching", {})

    def set_model_transaction_policy(self, policy: dict[str, Any]) -> None:
        self._config["model_transaction_policy"] = {"decoupled": bool(policy.get("decoupled"))}

    def add_input(self, port: dict[str, Any]) -> None:
        self._add("input", port)

    def add_output(self, port: dict[str, Any]) -> None:
        self._add("output", port)

    def _add(self, kind: str, port: dict[str, Any]) -> None:
        listed = self._config.setdefault(kind, [])
        for known in listed:
            if known.get("name") == port["name"]:
                if known.get("data_type", port["data_type"]) != port["data_type"]:
                    raise ValueError(f"model {kind} '{port['name']}' is configured as {known['data_type']}, "
                                     f"the model says {port['data_type']}")  # fmt: skip
                known.update(port)
                return
        listed.append(dict(port))


class Tensor:
    """A named numpy array; strings are object arrays of bytes."""

    def __init__(self, name: str, array: np.ndarray[Any, Any]) -> None:
        self._name = name
        self._array = array if isinstance(array, np.ndarray) else np.asarray(array)

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray[Any, Any]:
        return self._array

    def shape(self) -> tuple[int, ...]:
        return tuple(self._array.shape)

    def triton_dtype(self) -> str:
        return "TYPE_" + self._wire().datatype.replace(BYTES, "STRING")

    def is_cpu(self) -> bool:
        return True

    def to_dlpack(self) -> Any:
        return self._array.__dlpack__()

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[Any, Any]:
        return self._array.__dlpack_device__()

    @staticmethod
    def from_dlpack(name: str, tensor: Any) -> Tensor:
        if type(tensor).__name__ == "PyCapsule":
            import torch

            return Tensor(name, torch.utils.dlpack.from_dlpack(tensor).numpy())
        return Tensor(name, np.from_dlpack(tensor))

    def _wire(self) -> wire.Tensor:
        array = self._array
        if array.dtype.kind in "SU":
            array = array.astype(object)
        datatype = BYTES if array.dtype == object else _NAMES.get(array.dtype.newbyteorder("<"))
        if datatype is None:
            raise TritonModelException(f"tensor '{self._name}' has type {array.dtype}, which the protocol cannot carry")
        return wire.Tensor(self._name, datatype, array)


class InferenceResponse:
    """Outputs, or an error."""

    def __init__(
        self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None,
        parameters: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self._outputs, self._error, self._parameters = list(output_tensors), error, parameters or {}

    def output_tensors(self) -> list[Tensor]:
        return self._outputs

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def parameters(self) -> str:
        return json.dumps(self._parameters)


class InferenceRequest:
    """A request to this model, or one that it makes to another (`exec`)."""

    caller: Callable[[InferenceRequest, bool], Iterator[InferenceResponse]]

    def __init__(
        self, request_id: str = "", correlation_id: int | str = 0, inputs: Sequence[Tensor] = (),
        requested_output_names: Sequence[str] = (), model_name: str = "", model_version: int = -1, flags: int = 0,
        timeout: int = 0, preferred_memory: Any = None, trace: Any = None, parameters: Any = None,
    ) -> None:  # fmt: skip
        self._id, self._correlation, self._flags, self._timeout = request_id, correlation_id, flags, timeout
        self._inputs, self._outputs = list(inputs), list(requested_output_names)
        self.model_name, self.model_version = model_name, model_version
        self._parameters = parameters if isinstance(parameters, dict) else json.loads(parameters or "{}")
        self._sender: ResponseSender | None = None
        self._cancelled = threading.Event()
        self._release = TRITONSERVER_REQUEST_RELEASE_ALL

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def request_id(self) -> str:
        return self._id

    def correlation_id(self) -> int | str:
        return self._correlation

    def requested_output_names(self) -> list[str]:
        return self._outputs

    def flags(self) -> int:
        return self._flags

    def set_flags(self, flags: int) -> None:
        self._flags = flags

    def set_release_flags(self, flags: int) -> None:
        """RELEASE_RESCHEDULE: run this request again (iterative sequences); its entry in the answers must be None."""
        if flags not in (TRITONSERVER_REQUEST_RELEASE_ALL, TRITONSERVER_REQUEST_RELEASE_RESCHEDULE):
            known = "RELEASE_ALL (1) or RELEASE_RESCHEDULE (2)"
            raise TritonModelException(f"release flags must be {known}, got {flags!r}")
        self._release = flags

    def timeout(self) -> int:
        return self._timeout

    def parameters(self) -> str:
        return json.dumps(self._parameters)

    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def get_response_sender(self) -> ResponseSender:
        if self._sender is None:
            raise TritonModelException("only requests that came from the server have a response sender")
        return self._sender

    def exec(self, decoupled: bool = False) -> Any:
        """Call the named model and wait: its response, or an iterator of them."""
        responses = InferenceRequest.caller(self, decoupled)
        return responses if decoupled else next(responses)

    async def async_exec(self, decoupled: bool = False) -> Any:
        import asyncio

        return await asyncio.to_thread(self.exec, decoupled)


class Window:
    """How many responses may still be sent; 0 at the start means any number. Thread-safe."""

    def __init__(self, size: int) -> None:
        self._left: float = size or float("inf")
        self._changed = threading.Condition()

    def take(self) -> None:
        """Waits until there is room."""
        with self._changed:
            self._changed.wait_for(lambda: self._left > 0)
            self._left -= 1

    def give(self, count: float) -> None:
        with self._changed:
            self._left += count
            self._changed.notify_all()

    def lift(self) -> None:
        """From now on nobody waits."""
        self.give(float("inf"))


class ResponseSender:
    """Sends any number of responses; the last carries the final flag. `send` waits while as many as the ensemble's
    `max_inflight_requests` are on their way through the steps behind."""

    def __init__(
        self, send: Callable[[InferenceResponse | None, bool], None], request: InferenceRequest, window: Window
    ) -> None:
        self._send, self._cancelled, self._is_over = send, request._cancelled, False
        self._lock, self.window = threading.Lock(), window

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        with self._lock:
            if self._is_over:
                raise TritonModelException("unable to send a response: the final one has been sent")
            final = bool(flags & TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            if response is None and not final:
                raise TritonModelException("a response is needed unless the final flag is given")
            if response is not None:
                self.window.take()
            self._is_over = final
            self._send(response, final)

    def is_cancelled(self) -> bool:
        return self._cancelled.is_set()

    def __del__(self) -> None:
        if not self._is_over:
            self._send(None, True)


class Logger:
    """Messages appear in the server's log."""

    @staticmethod
    def log(message: str, level: str = "info") -> None:
        Logger.sink(level, message)

    sink: Callable[[str, str], None]
    INFO, WARNING, ERROR, VERBOSE = "info", "warning", "error", "verbose"

    @staticmethod
    def log_info(message: str) -> None:
        Logger.sink("info", message)

    @staticmethod
    def log_warn(message: str) -> None:
        Logger.sink("warning", message)

    @staticmethod
    def log_error(message: str) -> None:
        Logger.sink("error", message)

    @staticmethod
    def log_verbose(message: str) -> None:
        Logger.sink("verbose", message)


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((t for t in request.inputs() if t.name() == name), None)


def get_output_tensor_by_name(response: InferenceResponse, name: str) -> Tensor | None:
    if response.has_error():
        raise TritonModelException(f"an error response has no tensor '{name}'")
    return next((t for t in response.output_tensors() if t.name() == name), None)


def get_input_config_by_name(config: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((p for p in config.get("input", []) if p["name"] == name), None)


def get_output_config_by_name(config: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((p for p in config.get("output", []) if p["name"] == name), None)


def using_decoupled_model_transaction_policy(config: dict[str, Any]) -> bool:
    return bool(config.get("model_transaction_policy", {}).get("decoupled", False))


def triton_string_to_numpy(name: str) -> Any:
    if name not in _STRINGS:
        raise TritonModelException(f"unknown type {name!r}, expected one of {', '.join(_STRINGS)}")
    dtype = _STRINGS[name]
    return dtype.type


def serialize_byte_tensor(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.frombuffer(to_bytes(array, BYTES), dtype=np.uint8)


def deserialize_bytes_tensor(data: bytes) -> np.ndarray[Any, Any]:
    count, at = 0, 0
    while at < len(data):
        at += 4 + int.from_bytes(data[at : at + 4], "little")
        count += 1
    return from_bytes("tensor", BYTES, [count], data)


def wire_tensor(tensor: Tensor) -> wire.Tensor:
    """As it travels; strings become bytes."""
    made = tensor._wire()
    if made.datatype == BYTES:
        flat = np.empty(made.data.size, dtype=object)
        flat[:] = [as_bytes(v) for v in made.data.reshape(-1)]
        made.data = flat.reshape(made.data.shape)
    return made
