"""Thousands of damaged requests over both protocols: each is answered with a client's error or a right answer, none with a
server's, and the server stays as it was."""

from __future__ import annotations

import http.client
import json
import random
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.http as http_client
from tritonclient.grpc import service_pb2 as pb

from tests.serve.running import add_engine, add_sub, scaled, serving
from tests.serve.test_python_models import ADD_SUB, add_python
from tests.serve.test_sequences import CONFIG, accumulator

HTTP_CASES, GRPC_CASES = 3500, 2500
WORDS = ["inputs", "outputs", "parameters", "shape", "data", "datatype", "FP32", "INT64", "BYTES", "binary_data_size", "x", "a", "b",
         "sequence_id", "priority", "timeout", "classification", "shared_memory_region", "triton_x", ""]  # fmt: skip
NUMBERS = [0, 1, -1, 4, 2**31, 2**63, 2**64, -(2**63), 1e308, 0.5, True, None]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    add_engine(root, "m", scaled(2.0))
    add_engine(root, "pair", add_sub("float32"), "max_batch_size: 8 dynamic_batching {}")
    add_engine(root, "sequence", accumulator(), CONFIG % "oldest { max_candidate_sequences: 4 }")
    add_python(root, "python", ADD_SUB)
    with serving(root) as running:
        yield running


def valid(rng: random.Random) -> tuple[str, dict, bytes]:
    """(model, JSON, binary tail) of a request that works."""
    model = rng.choice(["m", "pair", "python", "sequence"])
    names, width = {"m": (["x"], 4), "pair": (["a", "b"], 3), "python": (["a", "b"], 3), "sequence": (["x"], 1)}[model]
    rows = 1 if model == "sequence" else rng.randint(1, 3)
    inputs, tail = [], b""
    for name in names:
        item: dict = {"name": name, "datatype": "FP32", "shape": [rows, width]}
        if rng.random() < 0.5:
            tail += np.zeros((rows, width), np.float32).tobytes()
            item["parameters"] = {"binary_data_size": 4 * rows * width}
        else:
            item["data"] = [0.5] * (rows * width)
        inputs.append(item)
    body: dict = {"inputs": inputs}
    if model == "sequence":
        body["parameters"] = {
            "sequence_id": rng.randint(1, 50),
            "sequence_start": True,
            "sequence_end": rng.random() < 0.8,
        }
    return model, body, tail


def damaged_json(value, rng: random.Random):
    """A copy with one place changed: another type, a missing or extra key, a word or number from the lists."""
    if rng.random() < 0.25 or not isinstance(value, dict | list) or not value:
        return rng.choice(
            [
                rng.choice(WORDS),
                rng.choice(NUMBERS),
                [],
                {},
                [[[]]],
                {rng.choice(WORDS): rng.choice(NUMBERS)},
                "\ud7ff\x00",
            ]
        )
    if isinstance(value, list):
        out = list(value)
        at = rng.randrange(len(out))
        if rng.random() < 0.2:
            out.insert(at, rng.choice(NUMBERS))
        elif rng.random() < 0.2:
            del out[at]
        else:
            out[at] = damaged_json(out[at], rng)
        return out
    out = dict(value)
    key = rng.choice(list(out))
    if rng.random() < 0.15:
        out[rng.choice(WORDS)] = rng.choice(NUMBERS)
    elif rng.random() < 0.15:
        del out[key]
    else:
        out[key] = damaged_json(out[key], rng)
    return out


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        kind = rng.random()
        if kind < 0.4 and at < len(out):
            out[at] = rng.randrange(256)
        elif kind < 0.6:
            out[at:at] = rng.randbytes(rng.randint(1, 9))
        elif kind < 0.8:
            del out[at : at + rng.randint(1, 20)]
        else:
            del out[at:]
    return bytes(out)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def still_right(server) -> None:
    with http_client.InferenceServerClient(server.url("http")) as client:
        assert client.is_server_ready()
        x = http_client.InferInput("x", [2, 4], "FP32")
        x.set_data_from_numpy(np.ones((2, 4), np.float32))
        np.testing.assert_array_equal(client.infer("m", [x]).as_numpy("y"), np.full((2, 4), 2, np.float32))


def test_damaged_http_requests(server) -> None:
    rng = random.Random(20261122)
    host, port = server.url("http").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    statuses: dict[int, int] = {}
    sizes = []
    for case in range(HTTP_CASES):
        model, data, tail = valid(rng)
        kind = rng.random()
        if kind < 0.5:
            data = damaged_json(data, rng)
        head = json.dumps(data).encode()
        length = len(head)
        if 0.5 <= kind < 0.75:
            head = damaged_bytes(head, rng)
        if 0.75 <= kind < 0.9:
            tail = damaged_bytes(tail or b"1234", rng)
        headers = {"Inference-Header-Content-Length": str(length)} if tail or rng.random() < 0.2 else {}
        if kind >= 0.9:
            headers["Inference-Header-Content-Length"] = rng.choice(
                ["", "-1", "0", "x", "1e3", str(2**63), str(length + 1), str(length - 1)]
            )
        verb = "generate" if rng.random() < 0.1 else "infer"
        connection.request("POST", f"/v2/models/{model}/{verb}", head + tail, headers)
        reply = connection.getresponse()
        text = reply.read()
        statuses[reply.status] = statuses.get(reply.status, 0) + 1
        assert reply.status in (200, 400, 404, 501), (reply.status, text[:300], head[:500], headers)
        if reply.status != 200:
            assert json.loads(text)["error"], (head, headers)
        if case in (500, HTTP_CASES - 1):
            sizes.append(resident())
    connection.close()
    assert statuses[200] > 100
    assert statuses[400] > HTTP_CASES / 3
    assert sizes[1] < sizes[0] * 1.1
    still_right(server)


def test_damaged_grpc_messages(server) -> None:
    rng = random.Random(7)
    statuses: dict[str, int] = {}
    with grpc.insecure_channel(server.url("grpc")) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for _ in range(GRPC_CASES):
            model, data, _ = valid(rng)
            message = pb.ModelInferRequest(model_name=model)
            for item in data["inputs"]:
                shape = [rng.choice([-1, 0, 2**40, 7]) if rng.random() < 0.1 else d for d in item["shape"]]
                kind = rng.choice(["FP32"] * 8 + ["BYTES", "INT64", "BOOL", "XYZ"])
                message.inputs.add(name=item["name"], datatype=kind, shape=shape)
                message.raw_input_contents.append(
                    rng.randbytes(rng.choice([4 * item["shape"][0] * item["shape"][1]] * 8 + [0, 3, 100]))
                )
            for key, value in data.get("parameters", {}).items():
                if isinstance(value, bool):
                    message.parameters[key].bool_param = value
                else:
                    message.parameters[key].int64_param = value
            if rng.random() < 0.2:
                message.parameters[rng.choice(WORDS)].CopyFrom(
                    pb.InferParameter(int64_param=rng.choice([0, -1, 2**62]))
                )
            sent = message.SerializeToString()
            try:
                call(damaged_bytes(sent, rng) if rng.random() < 0.5 else sent, timeout=30)
                name = "OK"
            except grpc.RpcError as exc:
                name = exc.code().name
                assert exc.details()
            statuses[name] = statuses.get(name, 0) + 1
    assert set(statuses) <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"}, statuses
    assert statuses["OK"] > 100
    assert statuses["INVALID_ARGUMENT"] > GRPC_CASES / 10
    still_right(server)
