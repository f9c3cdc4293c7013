"""Requests that must be refused: the status and a message that names the field, over raw HTTP and gRPC."""

from __future__ import annotations

import gzip
import http.client
import json
import socket

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from tests.serve.running import add_engine, scaled, serving


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    add_engine(root, "m", scaled(2.0))
    add_engine(root, "one", scaled(2.0, batch=1), "max_batch_size: 0")
    with serving(root, max_input_bytes=1 << 16) as running:
        yield running


def post(server, path, body, headers=None, method="POST"):
    connection = http.client.HTTPConnection(server.url("http"), timeout=20)
    connection.request(method, path, body, headers or {})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    is_json = answer.headers.get("Content-Type") == "application/json" and data
    return answer.status, json.loads(data) if is_json else data, answer


def infer(server, data, headers=None, path="/v2/models/m/infer"):
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    status, found, _ = post(server, path, body, headers)
    return status, found


def x(**changes):
    base = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}
    base.update(changes)
    return {"inputs": [{k: v for k, v in base.items() if v is not None}]}


BAD = {
    "no-json": (b"{", 400, "failed to parse"),
    "array": (b"[]", 400, "JSON object"),
    "empty": (b"", 400, "failed to parse"),
    "bad-utf8": (b'{"id": "\xff"}', 400, "failed to parse"),
    "deep": (b"[" * 5000 + b"]" * 5000, 400, "failed to parse"),
    "no-inputs": ({}, 400, "'inputs'"),
    "inputs-object": ({"inputs": {}}, 400, "'inputs'"),
    "input-number": ({"inputs": [1]}, 400, "'inputs'"),
    "id-number": ({**x(), "id": 5}, 400, "'id'"),
    "no-name": (x(name=None), 400, "'name'"),
    "wrong-name": (x(name="z"), 400, "unexpected inference input 'z', allowed inputs are: x"),
    "no-datatype": (x(datatype=None), 400, "datatype"),
    "wrong-datatype": (x(datatype="FP33"), 400, "FP33"),
    "other-datatype": (x(datatype="INT32"), 400, "data-type is 'INT32', but model 'm' expects 'FP32'"),
    "no-shape": (x(shape=None), 400, "'shape' of input 'x'"),
    "negative-shape": (x(shape=[-1, 4]), 400, "'shape' of input 'x'"),
    "float-shape": (x(shape=[1.5, 4]), 400, "'shape' of input 'x'"),
    "true-shape": (x(shape=[True, 4]), 400, "'shape' of input 'x'"),
    "huge-shape": (x(shape=[2**40, 2**40]), 400, "too large"),
    "overflowing-shape": (x(shape=[2**63, 2]), 400, "'shape' of input 'x'"),
    "wrong-shape": (x(shape=[1, 2, 2]), 400, "unexpected shape for input 'x' for model 'm'. Expected [-1,4], got [1,2,2]."),
    "no-batch-axis": (x(shape=[]), 400, "unexpected number of elements"),
    "big-batch": (x(shape=[9, 4], data=[0] * 36), 400, "batch-size must be <= 4 for 'm'"),
    "empty-batch": (x(shape=[0, 4], data=[]), 400, "batch-size must be >= 1"),
    "short-data": (x(data=[1, 2]), 400, "unexpected number of elements 2 for input 'x', expecting 4"),
    "string-data": (x(data=["a", "b", "c", "d"]), 400, "input 'x' is FP32"),
    "null-data": (x(data=[None] * 4), 400, "input 'x' is FP32"),
    "bool-data": (x(data=[True] * 4), 400, "input 'x' is FP32"),
    "object-data": (x(data={"a": 1}), 400, "unexpected number of elements"),
    "no-data": (x(data=None), 400, "must have 'data'"),
    "both-data": (x(parameters={"binary_data_size": 0}), 400, "only one of"),
    "binary-beyond": (x(data=None, parameters={"binary_data_size": 16}), 400, "unexpected size for input 'x'"),
    "binary-negative": (x(data=None, parameters={"binary_data_size": -1}), 400, "unexpected size for input 'x'"),
    "parameters-list": (x(parameters=[]), 400, "must have|'parameters'|"),
    "shared-memory": (x(data=None, parameters={"shared_memory_region": "r"}), 400, "shared_memory_byte_size"),
    "twice": ({"inputs": x()["inputs"] * 2}, 400, "input 'x' already exists"),
    "outputs-object": ({**x(), "outputs": {}}, 400, "'outputs'"),
    "wrong-output": ({**x(), "outputs": [{"name": "z"}]}, 400, "unexpected inference output 'z'"),
    "output-twice": ({**x(), "outputs": [{"name": "y"}] * 2}, 400, "output 'y' already exists in request"),
    "bad-classes": ({**x(), "outputs": [{"name": "y", "parameters": {"classification": -1}}]}, 400, "classification"),
    "bad-binary": ({**x(), "outputs": [{"name": "y", "parameters": {"binary_data": 1}}]}, 400, "binary_data"),
    "reserved": ({**x(), "parameters": {"triton_x": 1}}, 400, "reserved"),
    "nested-parameter": ({**x(), "parameters": {"a": {}}}, 400, "parameter 'a'"),
    "priority": ({**x(), "parameters": {"priority": -1}}, 400, "'priority'"),
    "timeout": ({**x(), "parameters": {"timeout": "soon"}}, 400, "'timeout'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_malformed_requests_name_the_field(server, case):
    data, status, text = BAD[case]
    if case == "parameters-list":
        data = x()
        data["inputs"][0]["parameters"] = [1]
        text = "'parameters' of input 'x'"
    got, answer = infer(server, data)
    assert got == status, answer
    assert text in answer["error"]


def test_good_requests_still_work(server):
    status, answer = infer(server, {**x(), "id": "a", "parameters": {"binary_data_output": False, "mine": 1.5}})
    assert status == 200
    assert answer["outputs"] == [{"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [2.0, 4.0, 6.0, 8.0]}]
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("a", "m", "1")
    nested = x(shape=[2, 4], data=[[1, 2, 3, 4], [5, 6, 7, 8]])
    assert infer(server, nested)[1]["outputs"][0]["data"] == [2.0 * i for i in range(1, 9)]


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", "/v2/models/m/infer", 405), ("POST", "/v2/health/live", 405), ("DELETE", "/v2/models/m", 405),
        ("GET", "/v2/nope", 404), ("POST", "/", 405), ("GET", "/nope", 404), ("POST", "/v2/models/m/versions/1/2/infer", 404),
        ("POST", "/v2/models/none/infer", 404), ("POST", "/v2/models/m/versions/9/infer", 404),
        ("POST", "/v2/models/m/versions/x/infer", 404), ("POST", "/v2/models/../m/infer", 404),
        ("POST", "/v2/repository/models/m/load", 503), ("POST", "/v2/models/m/other/1/infer", 404),
    ],
)  # fmt: skip
def test_paths_and_verbs(server, method, path, status):
    got, answer, _ = post(server, path, b"{}", method=method)
    assert got == status, answer
    assert answer["error"]


def binary(size=16, header=None, body=None, **changes):
    head = json.dumps(x(data=None, parameters={"binary_data_size": size}, **changes)).encode()
    rest = np.arange(4, dtype=np.float32).tobytes() if body is None else body
    return head + rest, {"Inference-Header-Content-Length": str(len(head)) if header is None else header}


@pytest.mark.parametrize(
    "data, text",
    [
        (binary(12), "unexpected size for input 'x'"),
        (binary(20), "unexpected size for input 'x'"),
        (binary(16, body=bytes(20)), "unexpected additional input data"),
        (binary(header="999999"), "Inference-Header-Content-Length"),
        (binary(header="-5"), "Inference-Header-Content-Length"),
        (binary(header="ten"), "Inference-Header-Content-Length"),
        (binary(header="3"), "failed to parse"),
        (binary(datatype="BYTES"), "string|data-type|incomplete"),
    ],
)
def test_binary_bodies(server, data, text):
    status, answer = infer(server, *data)
    assert status == 400
    assert any(t in answer["error"] for t in text.split("|")), answer


def test_raw_binary_requests(server):
    values = np.arange(4, dtype=np.float32)
    status, _, answer = post(server, "/v2/models/m/infer", values.tobytes(), {"Inference-Header-Content-Length": "0"})
    assert status == 200
    assert answer.headers["Inference-Header-Content-Length"]
    status, answer = infer(server, values.tobytes()[:10], {"Inference-Header-Content-Length": "0"})
    assert status == 400
    assert "unexpected size for input 'x'" in answer["error"]


def test_compression_that_lies_or_explodes(server):
    good = json.dumps(x()).encode()
    assert infer(server, gzip.compress(good), {"Content-Encoding": "gzip"})[0] == 200
    for body, status in ((good, 400), (gzip.compress(good)[:-6], 400), (gzip.compress(bytes(1 << 24)), 400)):
        got, answer = infer(server, body, {"Content-Encoding": "gzip"})
        assert got == status, answer
    status, answer, full = post(server, "/v2/models/m/infer", good, {"Content-Encoding": "br"})
    assert status == 501
    assert full.headers["Accept-Encoding"] == "gzip, deflate"


def test_large_json_is_refused_by_its_size(server):
    status, answer = infer(server, json.dumps({**x(), "id": "a" * (1 << 17)}).encode())
    assert status == 400
    assert "--http-max-input-size" in answer["error"]


def test_broken_connections_do_no_harm(server):
    host, port = server.url("http").split(":")
    for data in (b"", b"GET", b"POST /v2/models/m/infer HTTP/1.1\r\nContent-Length: 100\r\n\r\nabc", b"\x00" * 50):
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(data)
    assert infer(server, x())[0] == 200


@pytest.fixture(scope="module")
def stub(server):
    with grpc.insecure_channel(server.url("grpc")) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def message(**changes):
    made = pb.ModelInferRequest(model_name="m")
    made.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    made.raw_input_contents.append(np.arange(4, dtype=np.float32).tobytes())
    for key, value in changes.items():
        getattr(made.inputs[0], key)[:] = value if isinstance(value, list) else getattr(made.inputs[0], key)
    return made


def grpc_bad():
    yield "model", pb.ModelInferRequest(model_name="none"), "NOT_FOUND", "unknown model"
    yield "nothing", pb.ModelInferRequest(model_name="m"), "INVALID_ARGUMENT", "missing required input(s) ['x']"
    yield "negative", message(shape=[-1, 4]), "INVALID_ARGUMENT", "must not be negative"
    yield "huge", message(shape=[1 << 40, 1 << 40]), "INVALID_ARGUMENT", "too large"
    short = message()
    short.raw_input_contents[0] = bytes(3)
    yield "short", short, "INVALID_ARGUMENT", "unexpected size for input 'x'"
    mixed = message()
    mixed.inputs[0].contents.fp32_contents.append(1)
    yield "mixed", mixed, "INVALID_ARGUMENT", "contents field must not be specified"
    extra = message()
    extra.raw_input_contents.append(b"")
    yield "extra", extra, "INVALID_ARGUMENT", "raw_input_contents"
    reserved = message()
    reserved.parameters["triton_x"].bool_param = True
    yield "reserved", reserved, "INVALID_ARGUMENT", "reserved"
    few = message()
    del few.raw_input_contents[:]
    few.inputs[0].contents.fp32_contents.extend([1, 2])
    yield "few", few, "INVALID_ARGUMENT", "unexpected number of elements 2"


@pytest.mark.parametrize("made, code, text", [c[1:] for c in grpc_bad()], ids=[c[0] for c in grpc_bad()])
def test_malformed_messages(stub, made, code, text):
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(made)
    assert error.value.code().name == code
    assert text in error.value.details()


def test_typed_contents(stub):
    made = message()
    del made.raw_input_contents[:]
    made.inputs[0].contents.fp32_contents.extend([1, 2, 3, 4])
    assert np.frombuffer(stub.ModelInfer(made).raw_output_contents[0], np.float32).tolist() == [2, 4, 6, 8]


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([None, "0", "10", "50"]))
def test_random_bodies_are_answered(server, body, header):
    headers = {} if header is None else {"Inference-Header-Content-Length": header}
    status, answer = infer(server, body, headers)
    assert status in (200, 400)


@settings(max_examples=300, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda s: st.lists(s) | st.dictionaries(
    st.sampled_from(["inputs", "name", "shape", "datatype", "data", "parameters", "outputs", "id", "x"]), s), max_leaves=12))  # fmt: skip
def test_random_json_is_answered(server, data):
    body = json.dumps(data).encode()
    assert infer(server, body)[0] == 400
    patched = x()
    patched["inputs"][0]["data"] = data
    assert infer(server, json.dumps(patched).encode())[0] in (200, 400)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100))
def test_random_messages_are_answered(server, stub, data):
    made = message()
    made.raw_input_contents[0] = data
    with pytest.raises(grpc.RpcError) if len(data) != 16 else _nothing():
        stub.ModelInfer(made)


def _nothing():
    import contextlib

    return contextlib.nullcontext()


def test_the_server_is_healthy_after_all_this(server):
    assert post(server, "/v2/health/ready", b"", method="GET")[0] == 200
    assert infer(server, x())[0] == 200
