"""A model behind the sequence batcher: gives it the control tensors and the state of each request's sequence."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.grpc import model_config_pb2 as pb

from venturi.serve.config import ModelConfig, datatype
from venturi.serve.errors import invalid
from venturi.serve.models.base import Answer, LoadedModel
from venturi.serve.request import InferRequest, InferResponse, RequestedOutput, Tensor
from venturi.serve.schedulers.sequences import Sequence
from venturi.serve.tensors import BYTES, DATATYPES, from_bytes

_VALUES = {"int32_false_true": "INT32", "fp32_false_true": "FP32", "bool_false_true": "BOOL"}
_KIND = pb.ModelSequenceBatching.Control


@dataclass(frozen=True)
class Control:
    """A tensor of one value a row. `values`: for false and true; none for the correlation id."""

    name: str
    kind: int
    datatype: str
    values: tuple[Any, ...]

    def tensor(self, request: InferRequest, batched: bool) -> Tensor:
        if self.values:
            said = {
                _KIND.CONTROL_SEQUENCE_START: request.sequence_start,
                _KIND.CONTROL_SEQUENCE_END: request.sequence_end,
                _KIND.CONTROL_SEQUENCE_READY: not request.is_null,
            }
            value: Any = self.values[said[self.kind]]
        else:
            value = request.sequence
            if self.datatype == BYTES:
                value = str(value or "").encode()
            elif isinstance(value, str):
                raise invalid(f"{request.label}the model takes correlation ids as {self.datatype}, got {value!r}")
        shape = (1, 1) if batched else (1,)
        return Tensor(self.name, self.datatype, np.array(value, dtype=DATATYPES[self.datatype]).reshape(shape))


@dataclass(frozen=True)
class State:
    """An output of one request that is an input of the next. `initial`: without the batch axis."""

    input: str
    output: str
    initial: Tensor


class SequencedModel:
    """Wraps a model; requests come from a sequence policy and carry their `Sequence` in `slot`."""

    def __init__(self, model: LoadedModel, config: ModelConfig, folder: Path) -> None:
        self._model = model
        self._batched = config.max_batch_size > 0
        self.runs_inline = model.runs_inline
        self._controls = [_control(c) for c in config.sequence_batching.control_input]
        self._states = [_state(s, folder) for s in config.sequence_batching.state]
        self._public = {o.name for o in config.output}
        own = getattr(model, "replicas", {})
        self.replicas = {gpu: SequencedModel(r, config, folder) for gpu, r in own.items() if r is not model}

    def execute(self, requests: list[InferRequest]) -> Items[Answer]:
        real = next(r for r in requests if not r.is_null)
        for request in requests:
            if request.is_null:
                request.inputs = {n: _nothing(t) for n, t in real.inputs.items()}
                request.outputs = list(real.outputs)
            given = dict(request.inputs)
            for control in self._controls:
                given[control.name] = control.tensor(request, self._batched)
            for state in self._states:
                given[state.input] = self._state_of(request, state)
            request.inputs = given
            if request.outputs:
                named = {o.name for o in request.outputs}
                request.outputs += [RequestedOutput(s.output) for s in self._states if s.output not in named]
        answers = self._model.execute(requests)
        return [self._keep(r, a) for r, a in zip(requests, answers, strict=True)]

    def inspect(self) -> dict[str, Any]:
        return self._model.inspect()

    def close(self) -> None:
        self._model.close()

    def _state_of(self, request: InferRequest, state: State) -> Tensor:
        kept = request.slot.state.get(state.input) if isinstance(request.slot, Sequence) else None
        if kept is not None:
            return kept
        data = state.initial.data[None] if self._batched else state.initial.data
        return Tensor(state.input, state.initial.datatype, data)

    def _keep(self, request: InferRequest, answer: Answer) -> Answer:
        """Takes the new state out of the response."""
        if not self._states or not isinstance(answer, InferResponse):
            return answer
        outputs = dict(answer.outputs)
        for state in self._states:
            found = outputs.get(state.output)
            if found is None:
                continue
            if isinstance(request.slot, Sequence):
                request.slot.state[state.input] = Tensor(state.input, found.datatype, found.data.copy())
            if state.output not in self._public:
                del outputs[state.output]
        request.outputs = [o for o in request.outputs if o.name in outputs]
        return InferResponse(outputs, answer.parameters)


def _nothing(like: Tensor) -> Tensor:
    data = np.full(like.data.shape, b"", dtype=object) if like.datatype == BYTES else np.zeros_like(like.data)
    return Tensor(like.name, like.datatype, data)


def _control(given: Any) -> Control:
    if len(given.control) != 1:
        raise invalid(f"control input '{given.name}' must have exactly one control, got {len(given.control)}")
    control = given.control[0]
    if control.kind == _KIND.CONTROL_SEQUENCE_CORRID:
        if control.data_type == pb.TYPE_INVALID:
            raise invalid(f"control input '{given.name}' (CORRID) needs a data_type")
        return Control(given.name, control.kind, datatype(control.data_type), ())
    found = [(kind, tuple(getattr(control, field))) for field, kind in _VALUES.items() if len(getattr(control, field))]
    if len(found) != 1 or len(found[0][1]) != 2:
        raise invalid(f"control input '{given.name}' needs one of {', '.join(_VALUES)}, with two values")
    return Control(given.name, control.kind, *found[0])


def _state(given: Any, folder: Path) -> State:
    kind, dims = datatype(given.data_type), [max(d, 1) for d in given.dims]
    if not given.initial_state:
        return State(given.input_name, given.output_name, _zeros(given.input_name, kind, dims))
    first = given.initial_state[0]
    kind, dims = datatype(first.data_type), list(first.dims)
    if not first.data_file:
        return State(given.input_name, given.output_name, _zeros(given.input_name, kind, dims))
    root = folder.parent / "initial_state"
    path = root / first.data_file
    if root.resolve() not in path.resolve().parents:
        raise invalid(f"initial state file {first.data_file!r} of state '{given.input_name}' leaves {root}")
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise invalid(f"cannot read the initial state of '{given.input_name}': {exc}") from exc
    tensor = Tensor(given.input_name, kind, from_bytes(given.input_name, kind, dims, data))
    return State(given.input_name, given.output_name, tensor)


def _zeros(name: str, kind: str, dims: list[int]) -> Tensor:
    data = np.full(dims, b"", dtype=object) if kind == BYTES else np.zeros(dims, dtype=DATATYPES[kind])
    return Tensor(name, kind, data)
