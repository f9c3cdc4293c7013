"""Traced requests as OpenTelemetry spans: sent over OTLP/HTTP, in batches, by a thread of OpenTelemetry's SDK."""

from __future__ import annotations

import time
from collections.abc import Mapping

from venturi.serve.errors import unsupported
from venturi.serve.request import InferRequest

DEFAULT_URL = "http://localhost:4318/v1/traces"
_STAGES = (("queue", "queued", "compute"), ("compute", "compute", "end"))
_EVENTS = (("COMPUTE_INPUT_END", "input_done"), ("COMPUTE_OUTPUT_START", "output"))


class Spans:
    """A span a request, below it the queue and the computation. Raises ServeError without OpenTelemetry's packages.

    Spans wait in a bounded queue; when the collector does not answer, they are dropped there, not in the requests' way.
    """

    def __init__(self, url: str = "", resource: Mapping[str, str] | None = None) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as exc:
            raise unsupported(f"trace mode opentelemetry needs {exc.name}: pip install 'venturi[otel]'") from exc
        about = Resource.create({"service.name": "venturi", **(resource or {})})
        self._provider = TracerProvider(resource=about, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url or DEFAULT_URL)))
        self._tracer = self._provider.get_tracer("venturi.serve")
        self._parents = TraceContextTextMapPropagator()
        self._shift = time.time_ns() - time.perf_counter_ns()

    def record(self, request: InferRequest, model: str, version: int, error: str = "") -> None:
        """The request has been answered; `error` is what the client reads where it failed."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        t, shift = request.times, self._shift
        parent = self._parents.extract({"traceparent": request.trace_parent}) if request.trace_parent else None
        about: dict[str, str | int] = {
            "triton.model_name": model,
            "triton.model_version": version,
            "triton.request_id": request.id,
        }
        whole = self._tracer.start_span("InferRequest", parent, attributes=about, start_time=t.start + shift)
        inside = set_span_in_context(whole)
        for name, begin, end in _STAGES:
            times = getattr(t, begin), getattr(t, end)
            if not all(times):
                continue
            span = self._tracer.start_span(name, inside, start_time=times[0] + shift)
            for event, moment in _EVENTS if name == "compute" else ():
                if getattr(t, moment):
                    span.add_event(event, timestamp=getattr(t, moment) + shift)
            span.end(times[1] + shift)
        if error:
            whole.set_status(Status(StatusCode.ERROR, error))
        whole.end(t.end + shift)

    def close(self) -> None:
        """Sends what is left, waiting a bounded time for the collector."""
        self._provider.shutdown()
