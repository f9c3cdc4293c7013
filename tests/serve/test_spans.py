"""Requests as OpenTelemetry spans, read by a collector that speaks OTLP over HTTP."""

from __future__ import annotations

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.serve.running import add_engine, scaled, serving
from tests.serve.test_python_models import add_python
from venturi.serve.errors import ServeError
from venturi.serve.spans import Spans
from venturi.serve.tracing import TraceSettings, parse_trace_config

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
BROKEN = """
class TritonPythonModel:
    def execute(self, requests):
        raise RuntimeError("out of ideas")
"""


class Collector:
    def __init__(self) -> None:
        self.exports: list[Any] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                assert self.path == "/v1/traces"
                collector.exports.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"

    def spans(self) -> list[Any]:
        return [s for e in self.exports for r in e.resource_spans for scope in r.scope_spans for s in scope.spans]

    def resource(self) -> dict[str, str]:
        return {a.key: a.value.string_value for a in self.exports[0].resource_spans[0].resource.attributes}


@pytest.fixture
def collector() -> Any:
    made = Collector()
    yield made
    made.server.shutdown()


def settings(collector: Collector) -> TraceSettings:
    given = ["mode=opentelemetry", "level=TIMESTAMPS", "rate=1", f"opentelemetry,url={collector.url}",
             "opentelemetry,resource=deployment.environment=test"]  # fmt: skip
    return parse_trace_config(given)


def infer(client: Any, url: str, model: str, width: int, **more: Any) -> None:
    x = client.InferInput("x" if model == "m" else "a", [1, width], "FP32")
    x.set_data_from_numpy(np.zeros((1, width), np.float32))
    with client.InferenceServerClient(url) as c:
        c.infer(model, [x], **more)


def test_requests_are_spans_of_the_clients_trace(tmp_path: Any, collector: Collector) -> None:
    add_engine(tmp_path, "m", scaled(2.0))
    with serving(tmp_path, trace=settings(collector)) as server:
        infer(http_client, server.url("http"), "m", 4, headers=dict(HEADERS), request_id="over http")
        infer(grpc_client, server.url("grpc"), "m", 4, headers=dict(HEADERS), request_id="over grpc")
        infer(http_client, server.url("http"), "m", 4, request_id="alone")
    assert collector.resource().items() >= {("service.name", "venturi"), ("deployment.environment", "test")}
    spans = collector.spans()
    whole = {request_id(s): s for s in spans if s.name == "InferRequest"}
    assert set(whole) == {"over http", "over grpc", "alone"}
    for name, span in whole.items():
        below = {s.name: s for s in spans if s.parent_span_id == span.span_id}
        assert set(below) == {"queue", "compute"}
        assert {s.trace_id for s in below.values()} == {span.trace_id}
        queue, compute = below["queue"], below["compute"]
        order = [span.start_time_unix_nano, queue.start_time_unix_nano, queue.end_time_unix_nano,
                 compute.start_time_unix_nano, *(e.time_unix_nano for e in compute.events),
                 compute.end_time_unix_nano, span.end_time_unix_nano]  # fmt: skip
        assert order == sorted(order)
        assert [e.name for e in compute.events] == ["COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START"]
        assert (span.trace_id.hex() == TRACE) == (span.parent_span_id.hex() == PARENT) == (name != "alone")


def request_id(span: Any) -> str:
    return next(a.value.string_value for a in span.attributes if a.key == "triton.request_id")


def test_failures_say_so(tmp_path: Any, collector: Collector) -> None:
    config = """backend: "python"
        input { name: "a" data_type: TYPE_FP32 dims: [ -1, 3 ] } output { name: "b" data_type: TYPE_FP32 dims: [ 3 ] }"""
    add_python(tmp_path, "broken", BROKEN, config)
    with serving(tmp_path, trace=settings(collector)) as server, pytest.raises(Exception, match="out of ideas"):
        infer(http_client, server.url("http"), "broken", 3)
    (span,) = [s for s in collector.spans() if s.name == "InferRequest"]
    assert span.status.code == 2
    assert "out of ideas" in span.status.message


def test_a_header_that_names_no_trace_is_ignored(tmp_path: Any, collector: Collector) -> None:
    add_engine(tmp_path, "m", scaled(2.0))
    with serving(tmp_path, trace=settings(collector)) as server:
        infer(http_client, server.url("http"), "m", 4, headers={"traceparent": "00-zz-1-01"})
    assert [len(s.parent_span_id) for s in collector.spans() if s.name == "InferRequest"] == [0]


def test_a_collector_that_is_not_there_holds_nobody_up(tmp_path: Any) -> None:
    add_engine(tmp_path, "m", scaled(2.0))
    away = parse_trace_config(
        ["mode=opentelemetry", "level=TIMESTAMPS", "rate=1", "opentelemetry,url=http://127.0.0.1:9/"]
    )
    with serving(tmp_path, trace=away) as server:
        for _ in range(20):
            infer(http_client, server.url("http"), "m", 4)


def test_without_the_packages_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ServeError, match=r"pip install 'venturi\[otel\]'"):
        Spans()


@pytest.mark.parametrize("bad", ["mode=jaeger", "opentelemetry,resource=alone", "opentelemetry,sampler=x"])
def test_unknown_options_are_refused(bad: str) -> None:
    with pytest.raises(ServeError, match="unknown option"):
        parse_trace_config([bad])
