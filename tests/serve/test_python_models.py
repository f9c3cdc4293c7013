"""Triton's Python models as they are: batches, errors, calls to other models, decoupled answers, crashes."""

from __future__ import annotations

import json
import queue
import textwrap
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException

from tests.serve.running import add_engine, scaled, serving

ADD_SUB = """
    import json
    import numpy as np
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        @staticmethod
        def auto_complete_config(config):
            config.set_max_batch_size(8)
            config.set_dynamic_batching()
            for name in ("a", "b"):
                config.add_input({"name": name, "data_type": "TYPE_FP32", "dims": [3]})
            for name in ("sum", "difference"):
                config.add_output({"name": name, "data_type": "TYPE_FP32", "dims": [3]})
            return config

        def initialize(self, args):
            config = json.loads(args["model_config"])
            kind = pb_utils.get_output_config_by_name(config, "sum")["data_type"]
            self.dtype = pb_utils.triton_string_to_numpy(kind)
            pb_utils.Logger.log_info("version " + args["model_version"])

        def execute(self, requests):
            responses = []
            for request in requests:
                a = pb_utils.get_input_tensor_by_name(request, "a").as_numpy()
                b = pb_utils.get_input_tensor_by_name(request, "b").as_numpy()
                if (a == 666).any():
                    responses.append(pb_utils.InferenceResponse(
                        error=pb_utils.TritonError("no such number", pb_utils.TritonError.INVALID_ARG)))
                    continue
                tensors = [pb_utils.Tensor("sum", (a + b).astype(self.dtype)),
                           pb_utils.Tensor("difference", (a - b).astype(self.dtype))]
                responses.append(pb_utils.InferenceResponse(output_tensors=tensors, parameters={"seen": request.request_id()}))
            return responses
"""
REPEAT = """
    import numpy as np
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        @staticmethod
        def auto_complete_config(config):
            config.set_model_transaction_policy({"decoupled": True})
            config.add_input({"name": "count", "data_type": "TYPE_INT32", "dims": [1]})
            config.add_output({"name": "index", "data_type": "TYPE_INT32", "dims": [1]})
            return config

        def execute(self, requests):
            for request in requests:
                sender = request.get_response_sender()
                count = int(pb_utils.get_input_tensor_by_name(request, "count").as_numpy()[0])
                for i in range(abs(count)):
                    sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("index", np.array([i], np.int32))]))
                if count < 0:
                    error = pb_utils.TritonError("counted down")
                    sender.send(pb_utils.InferenceResponse(error=error), pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                else:
                    sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            return None
"""
CALLER = """
    import numpy as np
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        @staticmethod
        def auto_complete_config(config):
            config.add_input({"name": "text", "data_type": "TYPE_STRING", "dims": [-1]})
            config.add_output({"name": "text", "data_type": "TYPE_STRING", "dims": [-1]})
            return config

        def execute(self, requests):
            return [self.one(r) for r in requests]

        def one(self, request):
            words = pb_utils.get_input_tensor_by_name(request, "text").as_numpy()
            said = []
            for word in words:
                if word == b"die":
                    import os
                    os.kill(os.getpid(), 9)
                if word == b"raise":
                    raise ValueError("as asked")
                model, number = word.decode().split(":")
                if model == "repeat":
                    call = pb_utils.InferenceRequest(model_name=model, requested_output_names=["index"],
                        inputs=[pb_utils.Tensor("count", np.array([int(number)], np.int32))])
                    found = [int(pb_utils.get_output_tensor_by_name(r, "index").as_numpy()[0]) for r in call.exec(decoupled=True)]
                    said.append(str(found))
                    continue
                call = pb_utils.InferenceRequest(model_name=model, requested_output_names=["y"],
                    inputs=[pb_utils.Tensor("x", np.full((1, 4), float(number), np.float32))])
                answer = call.exec()
                if answer.has_error():
                    said.append("error: " + answer.error().message())
                else:
                    said.append(str(float(pb_utils.get_output_tensor_by_name(answer, "y").as_numpy()[0, 0])))
            return pb_utils.InferenceResponse([pb_utils.Tensor("text", np.array(said, dtype=object))])
"""


def add_python(root: Path, name: str, source: str, config: str = 'backend: "python"') -> None:
    (root / name / "1").mkdir(parents=True)
    (root / name / "1" / "model.py").write_text(textwrap.dedent(source))
    (root / name / "config.pbtxt").write_text(config)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("python")
    add_python(root, "add_sub", ADD_SUB, 'backend: "python" instance_group { count: 2 kind: KIND_CPU }')
    add_python(root, "repeat", REPEAT)
    add_python(root, "caller", CALLER)
    add_engine(root, "scaled", scaled(2.0))
    with serving(root) as running:
        yield running


def ask(client, model: str, arrays: dict, **options):
    kinds = {"f": "FP32", "i": "INT32", "O": "BYTES"}
    inputs = []
    for name, array in arrays.items():
        inputs.append(client.module.InferInput(name, list(array.shape), kinds[array.dtype.kind]))
        inputs[-1].set_data_from_numpy(array)
    return client.infer(model, inputs, **options)


def words(*given: str) -> dict:
    return {"text": np.array([w.encode() for w in given], dtype=object)}


def test_a_model_describes_itself_and_answers(client) -> None:
    a, b = np.random.rand(2, 3).astype(np.float32), np.random.rand(2, 3).astype(np.float32)
    got = ask(client, "add_sub", {"a": a, "b": b}, request_id="nine")
    np.testing.assert_array_equal(got.as_numpy("sum"), a + b)
    np.testing.assert_array_equal(got.as_numpy("difference"), a - b)
    assert "nine" in str(got.get_response())


def test_one_bad_request_fails_alone(client) -> None:
    bad = np.full((1, 3), 666, np.float32)
    with pytest.raises(InferenceServerException, match="no such number"):
        ask(client, "add_sub", {"a": bad, "b": bad})
    fine = np.ones((1, 3), np.float32)
    assert ask(client, "add_sub", {"a": fine, "b": fine}).as_numpy("sum")[0, 0] == 2


def test_calls_to_other_models(client) -> None:
    got = ask(client, "caller", words("scaled:21", "repeat:3", "nothing:1", "scaled:2"))
    said = [w.decode() for w in got.as_numpy("text")]
    assert said[:2] == ["42.0", "[0, 1, 2]"]
    assert "unknown model: 'nothing'" in said[2]
    assert said[3] == "4.0"


def test_an_exception_is_the_answer(client) -> None:
    with pytest.raises(InferenceServerException, match="ValueError: as asked"):
        ask(client, "caller", words("raise"))
    assert ask(client, "caller", words("scaled:1")).as_numpy("text")[0] == b"2.0"


def test_a_worker_that_dies_is_started_again(client) -> None:
    with pytest.raises(InferenceServerException, match="died .signal 9"):
        ask(client, "caller", words("die"))
    assert ask(client, "caller", words("scaled:1")).as_numpy("text")[0] == b"2.0"
    assert client.is_server_ready()


def stream(server, counts: list[int], **options) -> list[tuple]:
    """(id, index, is_final, error) of every answer on one stream."""
    found: queue.Queue = queue.Queue()
    with grpc_client.InferenceServerClient(server.url("grpc")) as client:
        client.start_stream(lambda result, error: found.put((result, error)))
        for i, count in enumerate(counts):
            given = grpc_client.InferInput("count", [1], "INT32")
            given.set_data_from_numpy(np.array([count], np.int32))
            client.async_stream_infer("repeat", [given], request_id=str(i), **options)
        time.sleep(0.3)
        client.stop_stream()
    answers = []
    while not found.empty():
        result, error = found.get()
        if error is not None:
            answers.append(("", None, True, error.message()))
            continue
        response = result.get_response()
        index = None if not response.outputs else int(result.as_numpy("index")[0])
        answers.append((response.id, index, response.parameters["triton_final_response"].bool_param, None))
    return answers


def test_decoupled_answers_on_a_stream(server) -> None:
    found = stream(server, [3, 0, 2])
    assert [a[1] for a in found if a[0] == "0"] == [0, 1, 2]
    assert [a[1] for a in found if a[0] == "2"] == [0, 1]
    assert not any(a[0] == "1" for a in found)
    ends = stream(server, [2, 0], enable_empty_final_response=True)
    assert [a[1:3] for a in ends if a[0] == "0"] == [(0, False), (1, False), (None, True)]
    assert [a[1:3] for a in ends if a[0] == "1"] == [(None, True)]


def test_what_became_of_the_responses(server) -> None:
    def counts() -> list[dict[str, int]]:
        with http_client.InferenceServerClient(server.url("http")) as http:
            (found,) = http.get_inference_statistics("repeat")["model_stats"]
        with grpc_client.InferenceServerClient(server.url("grpc")) as grpc:
            same = grpc.get_inference_statistics("repeat", as_json=True)["model_stats"][0]
        stats = found["response_stats"]
        assert stats.keys() == same.get("response_stats", {}).keys()
        return [{k: v["count"] for k, v in stats.get(str(i), {}).items()} for i in range(4)]

    def more(field: str) -> list[int]:
        return [b.get(field, 0) - a.get(field, 0) for a, b in zip(before, after)]

    before = counts()
    stream(server, [3, 0, -1])
    after = counts()
    assert more("success") == [2, 1, 1, 0]
    assert more("empty_response") == [1, 0, 0, 1]
    assert more("fail") == [0, 1, 0, 0]
    assert more("compute_infer") == [3, 1, 1, 1]
    with urllib.request.urlopen(f"http://{server.url('metrics')}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    bucket = 'nv_inference_first_response_histogram_ms_bucket{model="repeat",version="1",le="+Inf"} '
    assert int(next(line for line in lines if line.startswith(bucket)).removeprefix(bucket)) >= 3


def test_an_error_after_answers_keeps_the_stream(server) -> None:
    found = stream(server, [-2, 1])
    assert [a[3] for a in found if a[3]] == ["[request id: 0] counted down"]
    assert [a[1] for a in found if a[0] == "1"] == [0]


def test_decoupled_models_refuse_single_answers(client) -> None:
    with pytest.raises(InferenceServerException, match="decoupled"):
        ask(client, "repeat", {"count": np.array([1], np.int32)})


@dataclass
class Got:
    status_code: int
    headers: Message
    text: str

    def json(self) -> dict:
        return json.loads(self.text)


def generate(server, model: str, body: dict, streams: bool = False) -> Got:
    url = f"http://{server.url('http')}/v2/models/{model}/generate{'_stream' if streams else ''}"
    request = urllib.request.Request(url, json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return Got(reply.status, reply.headers, reply.read().decode())
    except urllib.error.HTTPError as exc:
        return Got(exc.code, exc.headers, exc.read().decode())


def test_generate(server) -> None:
    got = generate(server, "scaled", {"id": "x", "x": [1, 2, 3, 4]})
    assert got.json() == {"id": "x", "model_name": "scaled", "model_version": "1", "y": [2.0, 4.0, 6.0, 8.0]}
    assert generate(server, "repeat", {"count": 1}).json()["index"] == 0
    three = generate(server, "repeat", {"count": 3})
    assert three.status_code == 400
    assert "exactly 1 response" in three.json()["error"]


def test_generate_stream(server) -> None:
    got = generate(server, "repeat", {"count": 3}, streams=True)
    assert got.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = [json.loads(e.removeprefix("data: ")) for e in got.text.strip().split("\n\n")]
    assert [e["index"] for e in events] == [0, 1, 2]
    failing = generate(server, "repeat", {"count": -1}, streams=True).text.strip().split("\n\n")
    assert json.loads(failing[-1].removeprefix("data: "))["error"].endswith("counted down")
    assert generate(server, "scaled", {"x": [1, 2, 3, 4]}, streams=True).text.count("data: ") == 1


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"count": [1, 2]}, "do not fill its dims"),
        ({"count": "one"}, "is INT32"),
        ({"count": 1, "other": [1]}, "'other' is no input"),
        ({}, "missing required input"),
        ({"count": 1, "parameters": {"count": 2}}, "given twice"),
        ({"count": 1, "id": 7}, "'id' must be a string"),
        ({"count": [[1]]}, "flat list"),
    ],
)
def test_bad_generate_requests(server, body: dict, says: str) -> None:
    for streams in (False, True):
        got = generate(server, "repeat", body, streams)
        assert got.status_code == 400
        assert says in got.json()["error"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("class Other: pass", "has no class TritonPythonModel"),
        ("import nowhere", "No module named 'nowhere'"),
        ("class TritonPythonModel:\n  def initialize(self, args): raise RuntimeError('not today')", "not today"),
        ("import os; os._exit(3)", "exit code 3"),
    ],
)
def test_models_that_cannot_be_loaded(tmp_path: Path, source: str, says: str) -> None:
    config = 'backend: "python" input { name: "x" data_type: TYPE_FP32 dims: [1] } output { name: "y" data_type: TYPE_FP32 dims: [1] }'
    add_python(tmp_path, "broken", source, config)
    add_engine(tmp_path, "scaled", scaled(2.0))
    with serving(tmp_path, exit_on_error=False) as server:
        states = {m["name"]: m for m in server.running.core.repository.index()}
        assert states["scaled"]["state"] == "READY"
        assert says in states["broken"]["reason"]
