"""One model version in service: its configuration, scheduler, instances and statistics."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tritonclient.grpc import model_config_pb2 as pb

from venturi.serve.config import ModelConfig, latency_target_us
from venturi.serve.errors import ServeError, Status, as_serve_error, unsupported
from venturi.serve.models.base import LoadedModel
from venturi.serve.request import InferRequest, InferResponse
from venturi.serve.response_cache import Cache, request_key
from venturi.serve.response_statistics import ResponseStatistics
from venturi.serve.schedulers.batcher import BatchingRules, DynamicBatcher, OneByOne
from venturi.serve.schedulers.deadline import DeadlineBatcher
from venturi.serve.schedulers.driver import Done, Driver, Result
from venturi.serve.schedulers.ensemble import EnsembleDriver
from venturi.serve.schedulers.policy import Policy
from venturi.serve.schedulers.queues import QueuePolicy, WaitingLine
from venturi.serve.schedulers.rate_limit import RateLimiter, instances_of
from venturi.serve.schedulers.sequences import DirectSequences, OldestSequences, SequenceRules
from venturi.serve.statistics import ModelStatistics
from venturi.serve.tracing import Tracer
from venturi.serve.validation import Signature, check_request, signature_of


@dataclass
class ServedVersion:
    """Thread-safe; `infer` needs a running event loop."""

    config: ModelConfig
    version: int
    model: LoadedModel
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    cache: Cache | None = None
    tracer: Tracer | None = None
    limiter: RateLimiter | None = None
    files_stamp: str = ""
    statistics: ModelStatistics = field(default_factory=ModelStatistics)
    responses: ResponseStatistics = field(default_factory=ResponseStatistics)
    signature: Signature = field(init=False)
    driver: Driver | EnsembleDriver = field(init=False)

    def __post_init__(self) -> None:
        self.signature = signature_of(self.config, self.labels)
        plan, submit = getattr(self.model, "plan", None), getattr(self.model, "submit", None)
        if plan is not None and submit is not None:
            self.driver = EnsembleDriver(plan, submit, self.statistics)
            return
        instances = instances_of(self.config.instance_group, self.model, self.limiter)
        ordered = self.config.dynamic_batching.preserve_ordering or (
            self.config.sequence_batching.oldest.preserve_ordering
        )
        policy = make_policy(self.config, len(instances))
        self.driver = Driver(policy, instances, self.statistics, preserve_order=ordered)

    @property
    def name(self) -> str:
        return str(self.config.name)

    @property
    def stamp(self) -> str:
        """Changes with what the version computes: its own files and, of an ensemble, those of its steps."""
        return self.files_stamp + str(getattr(self.model, "stamp", ""))

    def submit(self, request: InferRequest, done: Done) -> None:
        """`done` gets the answer, on any thread. Raises ServeError for what does not fit, or when the queue is full."""
        request.times.start = request.times.start or time.perf_counter_ns()
        check_request(self.signature, request)
        if self.signature.decoupled and request.emit is None:
            raise unsupported(f"{request.label}model '{self.name}' has a decoupled transaction policy: use a stream "
                              "of gRPC or generate_stream")  # fmt: skip
        if self.signature.decoupled:
            request.emit, done = self.responses.watched(request, done)
        if self.tracer is not None and self.tracer.is_on and self.tracer.takes(self.name):
            done = self._traced(self.tracer, request, done)
        if self.cache is not None and self.config.response_cache.enable:
            if self.cache.threads is None:
                self._submit_cached(self.cache, request, done)
            else:
                self.cache.threads.submit(self._submit_looked_up, self.cache, request, done)
        else:
            self.driver.submit(request, done)

    def _traced(self, tracer: Tracer, request: InferRequest, done: Done) -> Done:
        def record(result: Result) -> None:
            request.times.end = request.times.end or time.perf_counter_ns()
            error = str(result) if isinstance(result, ServeError) else ""
            tracer.record(request, self.name, self.version, error)
            done(result)

        return record

    def _submit_looked_up(self, cache: Cache, request: InferRequest, done: Done) -> None:
        """On a thread of the cache: a refusal is an answer here."""
        try:
            if request.is_cancelled:
                raise ServeError(Status.CANCELLED, request.label + "request cancelled")
            self._submit_cached(cache, request, done)
        except ServeError as exc:
            done(exc)
        except Exception as exc:
            done(as_serve_error(exc))

    def _submit_cached(self, cache: Cache, request: InferRequest, done: Done) -> None:
        """A kept answer is given at once; a new one is kept."""
        started = time.perf_counter_ns()
        key = request_key(self.name, self.version, self.stamp, request)
        kept = cache.get(key)
        looked_up = time.perf_counter_ns() - started
        if kept is not None:
            request.times.queued = started
            self.driver.record_hit(request, looked_up)
            done(kept)
            return

        def put(response: InferResponse) -> None:
            start = time.perf_counter_ns()
            cache.put(key, response)
            self.driver.record_miss(looked_up + time.perf_counter_ns() - start)

        def keep(result: Result) -> None:
            if isinstance(result, InferResponse):
                if cache.threads is not None:
                    done(result)  # first: the answer does not depend on whether it can be kept
                    with suppress(ServeError, RuntimeError):  # too much waits, or the cache is closed
                        cache.threads.submit(put, result)
                    return
                put(result)
            done(result)

        self.driver.submit(request, keep)

    def infer(self, request: InferRequest) -> asyncio.Future[InferResponse]:
        """The answer as a future of the running event loop; cancelling it cancels a request that still waits."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[InferResponse] = loop.create_future()
        own = threading.get_ident()

        def done(result: Result) -> None:
            if threading.get_ident() == own:
                _settle(answer, result)
            elif not loop.is_closed():
                loop.call_soon_threadsafe(_settle, answer, result)

        self.submit(request, done)
        if not answer.done():
            answer.add_done_callback(lambda a: self.driver.cancel(request) if a.cancelled() else None)
        return answer

    async def stream(self, request: InferRequest) -> AsyncIterator[tuple[InferResponse, bool]]:
        """Responses as they come, with whether each is the last. Ending early cancels the request.

        The last one of a decoupled model may have no outputs. Raises ServeError.
        """
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[tuple[Result, bool]] = asyncio.Queue()

        def put(result: Result, final: bool) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(arrived.put_nowait, (result, final))

        request.emit = lambda response: put(response, False)
        self.submit(request, lambda result: put(result, True))
        final = False
        try:
            while not final:
                result, final = await arrived.get()
                if isinstance(result, ServeError):
                    final = True
                    raise result
                yield result, final
        finally:
            if not final:
                self.driver.cancel(request)

    async def retire(self) -> None:
        """Answer everything accepted, then give the model back."""
        await self.driver.drain()
        await asyncio.to_thread(self.model.close)

    def metadata(self, versions: list[str]) -> dict[str, Any]:
        """The model metadata of the protocol."""

        def ports(found: Any) -> list[dict[str, Any]]:
            return [{"name": p.name, "datatype": p.datatype, "shape": self.signature.wire_shape(p)} for p in found]

        return {
            "name": self.name,
            "versions": versions,
            "platform": self.config.platform or self.config.backend,
            "inputs": ports(self.signature.inputs.values()),
            "outputs": ports(self.signature.outputs.values()),
        }


def _settle(answer: asyncio.Future[InferResponse], result: Result) -> None:
    if answer.done():
        return
    if isinstance(result, ServeError):
        answer.set_exception(result)
    else:
        answer.set_result(result)


def make_policy(config: ModelConfig, instances: int = 1) -> Policy:
    """The scheduler that the configuration asks for."""
    if config.HasField("sequence_batching"):
        return _sequence_policy(config, instances)
    if not config.HasField("dynamic_batching"):
        return OneByOne()
    batching = config.dynamic_batching
    line = WaitingLine(
        batching.priority_levels,
        batching.default_priority_level,
        _queue_policy(batching.default_queue_policy),
        {int(level): _queue_policy(p) for level, p in batching.priority_queue_policy.items()},
    )
    if config.max_batch_size < 2:
        return OneByOne(line)
    target = latency_target_us(config)
    if target is not None:
        return DeadlineBatcher(config.max_batch_size, target, line)
    preferred = tuple(sorted(batching.preferred_batch_size))
    return DynamicBatcher(BatchingRules(config.max_batch_size, preferred, batching.max_queue_delay_microseconds), line)


def _sequence_policy(config: ModelConfig, instances: int) -> Policy:
    given, batch = config.sequence_batching, max(config.max_batch_size, 1)
    idle = given.max_sequence_idle_microseconds
    if given.HasField("oldest"):
        oldest = given.oldest
        slots = oldest.max_candidate_sequences * instances
        rules = SequenceRules(config.name, 1, slots, idle, iterative=given.iterative_sequence)
        preferred = tuple(sorted(oldest.preferred_batch_size)) or (batch,)
        return OldestSequences(rules, BatchingRules(batch, preferred, oldest.max_queue_delay_microseconds))
    direct = given.direct
    rules = SequenceRules(
        config.name,
        instances,
        batch,
        idle,
        direct.max_queue_delay_microseconds,
        direct.minimum_slot_utilization,
        given.iterative_sequence,
    )
    return DirectSequences(rules)


def _queue_policy(p: Any) -> QueuePolicy:
    return QueuePolicy(
        p.timeout_action == pb.ModelQueuePolicy.DELAY,
        p.default_timeout_microseconds,
        p.allow_timeout_override,
        p.max_queue_size,
    )
