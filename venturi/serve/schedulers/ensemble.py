"""Ensembles: a request flows through several models; a step runs as soon as its tensors are there.

The steps are requests to the other models' own schedulers. Semantics are those of Triton's ensemble scheduler. Every
response of a decoupled step is a part of the request: the steps behind run once for each, and the ensemble gives a
response for each, in their order.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

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
    axis. `decoupled`: it may have any number of responses."""

    model: str
    version: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    batches: bool
    decoupled: bool = False


@dataclass(frozen=True)
class Plan:
    """What an ensemble does. `batches`: its own tensors have a batch axis. Steps may be listed in any order.

    max_inflight: how many responses of a decoupled step may be on their way through the steps behind it, 0 for any
    number. A model that knows of it waits before it sends more.
    """

    name: str
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    batches: bool
    max_inflight: int = 0

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
    """A request on its way, or the part of it behind one response of a decoupled step. Guarded by the root's `lock`.

    `parts` are in the order of those responses and leave it when they are over; `behind` has the steps of the parts to
    come, by the id of the decoupled step; `splits`: it has no outputs of its own, its parts have. `source`: the request
    whose response a part is.
    """

    waiting: list[Step]
    tensors: dict[str, Tensor]
    parent: Flow | None = None
    running: list[InferRequest] = field(default_factory=list)
    parts: list[Flow] = field(default_factory=list)
    behind: dict[int, list[Step]] = field(default_factory=dict)
    splits: bool = False
    source: InferRequest | None = None

    def find(self, name: str) -> Tensor | None:
        found = self.tensors.get(name)
        return self.parent.find(name) if found is None and self.parent is not None else found

    def coming(self) -> set[str]:
        """Tensors that steps of this flow or of those around it may still bring."""
        names = {o for s in self.waiting for o in s.outputs.values()}
        names |= {o for r in self.running if not _step(r).decoupled for o in _step(r).outputs.values()}
        return names | self.parent.coming() if self.parent is not None else names

    def is_idle(self) -> bool:
        """Nothing runs that could bring this flow further: what decoupled steps give goes to parts of their own."""
        return all(_step(r).decoupled for f in self.upwards() for r in f.running)

    def upwards(self) -> Iterator[Flow]:
        flow: Flow | None = self
        while flow is not None:
            yield flow
            flow = flow.parent

    def everywhere(self) -> Iterator[Flow]:
        """This flow and all below it."""
        yield self
        for part in self.parts:
            yield from part.everywhere()

    def split_off(self, step: Step) -> None:
        """`step` starts: what reads its outputs, directly or through other steps, runs once a response."""
        names, found = set(step.outputs.values()), list[Step]()
        grown = True
        while grown:
            more = [s for s in self.waiting if s not in found and names & set(s.inputs.values())]
            found += more
            names |= {o for s in more for o in s.outputs.values()}
            grown = bool(more)
        self.behind[id(step)] = found
        self.waiting = [s for s in self.waiting if s not in found]
        self.splits = True


@dataclass(eq=False)
class Root(Flow):
    """The whole request."""

    request: InferRequest = field(kw_only=True)
    done: Done = field(kw_only=True)
    wanted: list[str] = field(kw_only=True)
    error: ServeError | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    outbox: deque[Callable[[], None]] = field(default_factory=deque)
    delivering: threading.Lock = field(default_factory=threading.Lock)


class EnsembleDriver:
    """Stands where other models have a Driver. Thread-safe; steps' answers may come on any thread."""

    def __init__(self, plan: Plan, submit: Submit, statistics: ModelStatistics) -> None:
        self._plan, self._submit, self._statistics = plan, submit, statistics
        self._lock = threading.Lock()
        self._flows: dict[InferRequest, Root] = {}
        self._closing = False

    @property
    def num_open(self) -> int:
        return len(self._flows)

    def submit(self, request: InferRequest, done: Done) -> None:
        """`done` is called once, on any thread. Raises ServeError UNAVAILABLE while the version is being unloaded."""
        wanted = [o.name for o in request.outputs] or list(self._plan.outputs)
        root = Root(self._plan.steps_for(set(wanted)), dict(request.inputs), request=request, done=done, wanted=wanted)
        t = request.times
        t.queued = t.compute = t.input_done = time.perf_counter_ns()
        with self._lock:
            if self._closing:
                raise unavailable(request.label + "the model version is being unloaded")
            self._flows[request] = root
        self._advance(root)

    def together(self) -> AbstractContextManager[object]:
        """Steps of different requests meet in their own models' lines."""
        return nullcontext()

    def cancel(self, request: InferRequest) -> None:
        """No further step starts; the request is answered CANCELLED when those that run have ended."""
        root = self._flows.get(request)
        if root is not None:
            self._fail(root, ServeError(Status.CANCELLED, "request cancelled"))
            with root.lock:
                for flow in root.everywhere():
                    for running in flow.running:
                        running.is_cancelled = True
            self._advance(root)

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

    def _fail(self, root: Root, error: ServeError) -> None:
        with root.lock:
            root.error = root.error or error

    def _advance(self, root: Root) -> None:
        """Start what can start, send what is complete, end when nothing runs and nothing can."""
        with root.lock:
            started: list[tuple[Flow, Step, InferRequest]] = []
            if root.error is None:
                for flow in list(root.everywhere()):
                    started += self._startable(root, flow)
            for flow, _, request in started:
                flow.running.append(request)
            for part in self._complete(root, root):
                response = InferResponse({n: t for n in root.wanted if (t := part.find(n)) is not None})
                assert root.request.emit is not None, "a request to a decoupled model can take more than one response"
                root.outbox.append(partial(root.request.emit, response))
            if not root.running and not root.parts:
                self._end(root)
        self._deliver(root)
        for flow, step, request in started:
            self._start(root, flow, step, request)

    def _startable(self, root: Root, flow: Flow) -> list[tuple[Flow, Step, InferRequest]]:
        ready = [s for s in flow.waiting if self._is_ready(s, flow)]
        flow.waiting = [s for s in flow.waiting if s not in ready]
        try:
            requests = [(flow, s, self._request(root, flow, s)) for s in ready]
        except ServeError as exc:
            root.error = root.error or exc
            return []
        for step in ready:
            if step.decoupled:
                flow.split_off(step)
        return requests

    def _complete(self, root: Root, flow: Flow) -> list[Flow]:
        """Take out the parts that are over, in order; returns those with a response to send."""
        found: list[Flow] = []
        while flow.parts:
            head = flow.parts[0]
            found += self._complete(root, head)
            if head.running or head.parts:
                break
            missing = [] if head.splits else [n for n in root.wanted if head.find(n) is None]
            if root.error is None and (head.waiting or missing) and not head.is_idle():
                break
            if missing:
                root.error = root.error or _deadlock(missing)
            elif not head.splits and root.error is None:
                found.append(head)
            root.outbox.append(partial(_resume, head.source))
            del flow.parts[0]
        return found

    def _start(self, root: Root, flow: Flow, step: Step, request: InferRequest) -> None:
        def take(response: InferResponse) -> None:
            try:
                found = self._outputs(step, response)
            except ServeError as exc:
                self._fail(root, exc)
                found = {}
            with root.lock:
                if not step.decoupled:
                    flow.tensors.update(found)
                elif found and root.error is None:
                    flow.parts.append(Flow(list(flow.behind[id(step)]), found, flow, source=request))
                else:
                    root.outbox.append(partial(_resume, request))

        def emit(response: InferResponse) -> None:
            take(response)
            self._advance(root)

        def done(result: Result) -> None:
            if isinstance(result, ServeError):
                self._fail(root, result)
            else:
                take(result)
            with root.lock:
                flow.running.remove(request)
            self._advance(root)

        request.emit = emit if step.decoupled else None
        request.window = self._plan.max_inflight if step.decoupled else 0
        try:
            self._submit(request, done)
        except ServeError as exc:
            done(exc)

    def _is_ready(self, step: Step, flow: Flow) -> bool:
        """Everything that it reads is there, or will never be: an optional input that nobody gave."""
        coming, read = flow.coming(), list(step.inputs.values())
        there = [n for n in read if flow.find(n) is not None]
        return bool(there) and all(n in there or n not in coming for n in read)

    def _request(self, root: Root, flow: Flow, step: Step) -> InferRequest:
        given = root.request
        inputs = {
            theirs: self._adapted(tensor, theirs, self._plan.batches, step.batches)
            for theirs, ours in step.inputs.items()
            if (tensor := flow.find(ours)) is not None
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

    def _end(self, root: Root) -> None:
        request, t = root.request, root.request.times
        with self._lock:
            if self._flows.pop(request, None) is None:
                return
            t.output = t.end = time.perf_counter_ns()
            wanted = [] if root.splits else root.wanted
            missing = [n for n in wanted if n not in root.tensors]
            error = root.error or (_deadlock(missing) if missing else None)
            if error is None:
                self._statistics.record_batch([request])
            else:
                self._statistics.record_failure(request, "CANCELED" if error.status == Status.CANCELLED else "OTHER")
        if error is None:
            answer: Result = InferResponse({n: root.tensors[n] for n in wanted})
        else:
            prefix = f"{request.label}in ensemble '{self._plan.name}', "
            answer = ServeError(error.status, prefix + error.message.removeprefix(request.label), where=error.where)
        root.outbox.append(partial(root.done, answer))

    def _deliver(self, root: Root) -> None:
        """Outside the lock; one thread at a time, so in order."""
        while root.outbox and root.delivering.acquire(blocking=False):
            try:
                while root.outbox:
                    root.outbox.popleft()()
            finally:
                root.delivering.release()


def _resume(source: InferRequest | None) -> None:
    """A response of `source` is over: it may send another."""
    if source is not None and source.resume is not None:
        source.resume(1)


def _step(request: InferRequest) -> Step:
    assert isinstance(request.slot, Step), "an ensemble's requests note their steps"
    return request.slot


def _deadlock(missing: list[str]) -> ServeError:
    return invalid("unexpected deadlock, at least one output is not set while no more ensemble steps can be made: "
                   f"{', '.join(missing)}")  # fmt: skip
