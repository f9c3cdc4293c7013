"""Ensembles: a request flows through several models; a step runs as soon as its tensors are there.

The steps are requests to the other models' own schedulers. Semantics are those of Triton's ensemble scheduler.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from venturi.serve.errors import ServeError, Status, invalid, unavailable
from venturi.serve.request import InferRequest, InferResponse, RequestedOutput, Tensor
from venturi.serve.statistics import ModelStatistics

Result = InferResponse | ServeError
Done = Callable[[Result], None]
Submit = Callable[[InferRequest, Done], None]
_DRAIN_POLL_S = 0.005


@dataclass(frozen=True)
class Step:
    """inputs: the step model's input -> the ensemble's tensor; outputs likewise. `batches`: its tensors have a batch
    axis."""

    model: str
    version: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    batches: bool


@dataclass(frozen=True)
class Plan:
    """What an ensemble does. `batches`: its own tensors have a batch axis. Steps may be listed in any order."""

    name: str
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    batches: bool

    def steps_for(self, wanted: set[str]) -> list[Step]:
        """The steps that the wanted tensors need, found backwards."""
        needed, chosen = set(wanted), set[int]()
        grown = True
        while grown:
            grown = False
            for i, step in enumerate(self.steps):
                if i not in chosen and needed & set(step.outputs.values()):
                    chosen.add(i)
                    needed |= set(step.inputs.values())
                    grown = True
        return [self.steps[i] for i in sorted(chosen)]


@dataclass(eq=False)
class Flow:
    """One request on its way. Guarded by `lock`."""

    request: InferRequest
    done: Done
    waiting: list[Step]
    tensors: dict[str, Tensor]
    running: list[InferRequest] = field(default_factory=list)
    error: ServeError | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class EnsembleDriver:
    """Stands where other models have a Driver. Thread-safe; steps' answers may come on any thread."""

    def __init__(self, plan: Plan, submit: Submit, statistics: ModelStatistics) -> None:
        self._plan, self._submit, self._statistics = plan, submit, statistics
        self._lock = threading.Lock()
        self._flows: dict[InferRequest, Flow] = {}
        self._closing = False

    @property
    def num_open(self) -> int:
        return len(self._flows)

    def submit(self, request: InferRequest, done: Done) -> None:
        """`done` is called once, on any thread. Raises ServeError UNAVAILABLE while the version is being unloaded."""
        wanted = {o.name for o in request.outputs} or set(self._plan.outputs)
        flow = Flow(request, done, self._plan.steps_for(wanted), dict(request.inputs))
        t = request.times
        t.queued = t.compute = t.input_done = time.perf_counter_ns()
        with self._lock:
            if self._closing:
                raise unavailable(request.label + "the model version is being unloaded")
            self._flows[request] = flow
        self._advance(flow)

    def cancel(self, request: InferRequest) -> None:
        """No further step starts; the request is answered CANCELLED when those that run have ended."""
        flow = self._flows.get(request)
        if flow is not None:
            self._fail(flow, ServeError(Status.CANCELLED, "request cancelled"))
            self._advance(flow)

    def record_hit(self, request: InferRequest, lookup_ns: int) -> None:
        """A request that a cache has answered counts as a success."""
        with self._lock:
            self._statistics.record_hit(request, lookup_ns)

    def record_miss(self, spent_ns: int) -> None:
        """Looking an answer up in vain and keeping the one that was computed."""
        with self._lock:
            self._statistics.cache_miss.add(spent_ns)

    async def drain(self) -> None:
        with self._lock:
            self._closing = True
        while self._flows:
            await asyncio.sleep(_DRAIN_POLL_S)

    def _fail(self, flow: Flow, error: ServeError) -> None:
        with flow.lock:
            flow.error = flow.error or error

    def _advance(self, flow: Flow) -> None:
        """Start what can start; answer when nothing runs and nothing can."""
        with flow.lock:
            ready = [] if flow.error else [s for s in flow.waiting if self._is_ready(s, flow)]
            flow.waiting = [s for s in flow.waiting if s not in ready]
            requests: list[tuple[Step, InferRequest]] = []
            try:
                requests = [(s, self._request(flow, s)) for s in ready]
            except ServeError as exc:
                flow.error = exc
            flow.running += [r for _, r in requests]
            over = not flow.running
        if over:
            self._end(flow)
        for step, request in requests:
            self._start(flow, step, request)

    def _start(self, flow: Flow, step: Step, request: InferRequest) -> None:
        def done(result: Result) -> None:
            try:
                if isinstance(result, ServeError):
                    raise result
                found = self._outputs(step, result)
            except ServeError as exc:
                self._fail(flow, exc)
                found = {}
            with flow.lock:
                flow.running.remove(request)
                flow.tensors.update(found)
            self._advance(flow)

        try:
            self._submit(request, done)
        except ServeError as exc:
            done(exc)

    def _is_ready(self, step: Step, flow: Flow) -> bool:
        """Everything that it reads is there, or will never be: an optional input that nobody gave."""
        coming = {o for s in flow.waiting for o in s.outputs.values()}
        coming |= {o for r in flow.running for o in (r.slot.outputs.values() if isinstance(r.slot, Step) else ())}
        read = step.inputs.values()
        return all(n in flow.tensors or n not in coming for n in read) and any(n in flow.tensors for n in read)

    def _request(self, flow: Flow, step: Step) -> InferRequest:
        given = flow.request
        inputs = {
            theirs: self._adapted(flow.tensors[ours], theirs, self._plan.batches, step.batches)
            for theirs, ours in step.inputs.items()
            if ours in flow.tensors
        }
        made = InferRequest(
            step.model, step.version, inputs, given.id, [RequestedOutput(n) for n in step.outputs],
            dict(given.parameters), given.priority, given.timeout_us, given.sequence, given.sequence_start,
            given.sequence_end,
        )  # fmt: skip
        made.slot = step
        return made

    def _outputs(self, step: Step, response: InferResponse) -> dict[str, Tensor]:
        """A step's outputs under the ensemble's names."""
        return {
            ours: self._adapted(response.outputs[theirs], ours, step.batches, self._plan.batches)
            for theirs, ours in step.outputs.items()
            if theirs in response.outputs
        }

    def _adapted(self, tensor: Tensor, name: str, has: bool, wants: bool) -> Tensor:
        """Between models with and without a batch axis: one in front is added or taken away."""
        data = tensor.data
        if has and not wants:
            if not data.shape or data.shape[0] != 1:
                raise invalid(f"tensor '{tensor.name}' of shape {list(data.shape)} has to lose its batch axis, "
                              "which must be of size 1")  # fmt: skip
            data = data[0]
        elif wants and not has:
            data = data[None]
        return Tensor(name, tensor.datatype, data)

    def _end(self, flow: Flow) -> None:
        request, t = flow.request, flow.request.times
        with self._lock:
            if self._flows.pop(request, None) is None:
                return
            t.output = t.end = time.perf_counter_ns()
            wanted = [o.name for o in request.outputs] or list(self._plan.outputs)
            missing = [n for n in wanted if n not in flow.tensors]
            error = flow.error
            if error is None and missing:
                error = invalid(
                    f"unexpected deadlock, at least one output is not set while no more ensemble steps can be made: "
                    f"{', '.join(missing)}"
                )
            if error is None:
                self._statistics.record_batch([request])
            else:
                self._statistics.record_failure(request, "CANCELED" if error.status == Status.CANCELLED else "OTHER")
        if error is None:
            flow.done(InferResponse({n: flow.tensors[n] for n in wanted}))
        else:
            prefix = f"{request.label}in ensemble '{self._plan.name}', "
            flow.done(ServeError(error.status, prefix + error.message.removeprefix(request.label), where=error.where))
