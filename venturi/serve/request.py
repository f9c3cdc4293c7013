"""One inference request and its answer, free of any protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from venturi.serve.errors import ServeError
from venturi.serve.tensors import Array

Parameter = str | int | float | bool


@dataclass(slots=True)
class Tensor:
    """`datatype` is the protocol's name; `data` has the type's numpy form and the given shape."""

    name: str
    datatype: str
    data: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a registered region of shared memory, in bytes."""

    region: str
    offset: int
    byte_size: int


@dataclass(slots=True)
class RequestedOutput:
    """`classes` > 0 asks for the best k as strings; `place` for the result in shared memory."""

    name: str
    binary: bool = False
    classes: int = 0
    place: Place | None = None


@dataclass(slots=True)
class Times:
    """Nanoseconds of time.perf_counter_ns at each turn of a request's way; 0 when it did not get there."""

    start: int = 0
    queued: int = 0
    compute: int = 0
    input_done: int = 0
    output: int = 0
    end: int = 0


@dataclass(slots=True, eq=False)
class InferRequest:
    """`rows` is the size along the batch axis (1 where there is none); `timeout_us` 0 means none.

    `emit` takes the responses of a decoupled model before the last, on any thread; None: the client wants exactly one.
    `finish` is set by the scheduler, for models that answer after `execute` has returned. `is_cancelled`: nobody waits.
    `is_null`: fills a row of a batch where a sequence has nothing to say. `slot`: the scheduler's own note.
    `trace_parent`: the W3C header that names the client's span. `window`: how many responses of a decoupled model may
    be under way, 0 for any number; a model that keeps to it sets `resume`, to be told how many more it may send.
    """

    model: str
    version: str
    inputs: dict[str, Tensor]
    id: str = ""
    outputs: list[RequestedOutput] = field(default_factory=list)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    priority: int = 0
    timeout_us: int = 0
    sequence: int | str = 0
    sequence_start: bool = False
    sequence_end: bool = False
    rows: int = 1
    times: Times = field(default_factory=Times)
    emit: Callable[[InferResponse], None] | None = None
    finish: Callable[[InferRequest, InferResponse | ServeError], None] | None = None
    is_cancelled: bool = False
    is_null: bool = False
    slot: object = None
    trace_parent: str = ""
    window: int = 0
    resume: Callable[[int], None] | None = None

    @property
    def label(self) -> str:
        """How messages name the request."""
        return f"[request id: {self.id or '<id_unknown>'}] "


@dataclass(slots=True)
class InferResponse:
    """`outputs` in the model's order; none in the last response of a decoupled model that had said everything."""

    outputs: Mapping[str, Tensor]
    parameters: Mapping[str, Any] = field(default_factory=dict)
