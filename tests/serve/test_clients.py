"""tritonclient, unchanged, against a real server: every call that this server offers."""

from __future__ import annotations

import asyncio
import queue
import socket

import ml_dtypes
import numpy as np
import pytest
import torch
import tritonclient.grpc as grpc_client
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as http_client
import tritonclient.http.aio as http_aio
from tritonclient.utils import InferenceServerException

import venturi as vt
from tests.serve.running import DIGITS, add_engine, add_sub, scaled, serving
from venturi.serve.app import _bind
from venturi.serve.repository import Mode

CLIENTS = {"http": http_client, "grpc": grpc_client}
DTYPES = ["float32", "float64", "float16", "bfloat16", "int32", "int64", "int8", "uint8"]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    (root / "digits" / "1").mkdir(parents=True)
    (root / "digits" / "1" / "model.onnx").write_bytes(DIGITS.read_bytes())
    (root / "digits" / "labels.txt").write_text("\n".join(f"digit {i}" for i in range(10)))
    (root / "digits" / "config.pbtxt").write_text(
        'max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 200 } parameters { key: "opt_level" '
        'value { string_value: "0" } } input { name: "image" data_type: TYPE_FP32 dims: [1, 8, 8] } '
        'output { name: "logits" data_type: TYPE_FP32 dims: [10] label_filename: "labels.txt" }'
    )
    add_engine(root, "scaled", scaled(2.0))
    add_engine(root, "fixed", scaled(3.0, batch=2), "max_batch_size: 0")
    for dtype in DTYPES:
        add_engine(root, f"add_sub_{dtype}", add_sub(dtype))
    with serving(root) as running:
        yield running


def tensor(module, name, array, datatype="FP32", **how):
    made = module.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, **how)
    return made


def as_dict(message):
    from google.protobuf.json_format import MessageToDict

    return message if isinstance(message, dict) else MessageToDict(message, preserving_proto_field_name=True)


def test_health_and_metadata(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("digits", "1")
    server = as_dict(client.get_server_metadata())
    assert server["name"] == "venturi"
    assert "statistics" in server["extensions"]
    model = as_dict(client.get_model_metadata("digits"))
    assert model["versions"] == ["1"]
    assert [int(d) for d in model["inputs"][0]["shape"]] == [-1, 1, 8, 8]
    config = as_dict(client.get_model_config("digits"))
    config = config.get("config", config)
    assert config["max_batch_size"] == 8
    assert config["dynamic_batching"]["preferred_batch_size"] == [8]


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_answers_are_those_of_the_engine(client, rows):
    x = np.random.default_rng(rows).random((rows, 1, 8, 8), dtype=np.float32)
    got = client.infer("digits", [tensor(client.module, "image", x)], request_id="seven")
    want = vt.build(DIGITS, opt_level=0, device="cpu").run({"image": x})["logits"]
    np.testing.assert_allclose(got.as_numpy("logits"), want, rtol=1e-4, atol=1e-5)
    assert as_dict(got.get_response())["id"] == "seven"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type(client, dtype):
    names = {"float32": "FP32", "float64": "FP64", "float16": "FP16", "bfloat16": "BF16", "uint8": "UINT8"}
    name = names.get(dtype, dtype.upper())
    a, b = np.array([[5, 6, 7]]), np.array([[1, 2, 3]])
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    inputs = [tensor(client.module, n, v.astype(kind), name) for n, v in (("a", a), ("b", b))]
    got = client.infer(f"add_sub_{dtype}", inputs)
    np.testing.assert_array_equal(got.as_numpy("sum").astype(np.float64), a + b)
    np.testing.assert_array_equal(got.as_numpy("difference").astype(np.float64), a - b)


def test_only_the_wanted_outputs_come_in_the_wanted_order(client):
    a = np.ones((2, 3), np.float32)
    inputs = [tensor(client.module, n, a) for n in "ab"]
    wanted = [client.module.InferRequestedOutput("difference")]
    got = client.infer("add_sub_float32", inputs, outputs=wanted)
    assert got.as_numpy("sum") is None
    np.testing.assert_array_equal(got.as_numpy("difference"), a - a)


def test_classification_with_labels(client):
    x = np.random.default_rng(0).random((2, 1, 8, 8), dtype=np.float32)
    plain = client.infer("digits", [tensor(client.module, "image", x)]).as_numpy("logits")
    wanted = [client.module.InferRequestedOutput("logits", class_count=3)]
    best = client.infer("digits", [tensor(client.module, "image", x)], outputs=wanted).as_numpy("logits")
    assert best.shape == (2, 3)
    for row, strings in zip(plain, best):
        value, index, label = strings[0].decode().split(":")
        assert int(index) == row.argmax()
        assert label == f"digit {index}"
        assert abs(float(value) - row.max()) < 1e-4


def test_models_without_a_batch_axis(client):
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    assert [int(d) for d in as_dict(client.get_model_metadata("fixed"))["inputs"][0]["shape"]] == [2, 4]
    np.testing.assert_array_equal(client.infer("fixed", [tensor(client.module, "x", x)]).as_numpy("y"), 3 * x)


def test_json_tensors_and_compression(server):
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    with http_client.InferenceServerClient(server.url("http")) as client:
        given = tensor(http_client, "x", x, binary_data=False)
        wanted = [http_client.InferRequestedOutput("y", binary_data=False)]
        for algorithm in (None, "gzip", "deflate"):
            got = client.infer(
                "scaled", [given], outputs=wanted, request_compression_algorithm=algorithm,
                response_compression_algorithm=algorithm,
            )  # fmt: skip
            np.testing.assert_array_equal(got.as_numpy("y"), 2 * x)


def test_asynchronous_calls(server):
    x = np.arange(4, dtype=np.float32).reshape(1, 4)
    with http_client.InferenceServerClient(server.url("http"), concurrency=4) as client:
        waiting = [client.async_infer("scaled", [tensor(http_client, "x", x + i)]) for i in range(12)]
        for i, item in enumerate(waiting):
            np.testing.assert_array_equal(item.get_result().as_numpy("y"), 2 * (x + i))
    answers: queue.Queue = queue.Queue()
    with grpc_client.InferenceServerClient(server.url("grpc")) as client:
        for i in range(12):
            given = [tensor(grpc_client, "x", x + i)]
            client.async_infer("scaled", given, lambda result, error, i=i: answers.put((i, result, error)))
        for _ in range(12):
            i, result, error = answers.get(timeout=20)
            assert error is None
            np.testing.assert_array_equal(result.as_numpy("y"), 2 * (x + i))


def test_asyncio_clients(server):
    x = np.arange(4, dtype=np.float32).reshape(1, 4)

    async def main():
        async with http_aio.InferenceServerClient(server.url("http")) as client:
            assert await client.is_server_ready()
            many = [client.infer("scaled", [tensor(http_client, "x", x + i)]) for i in range(20)]
            for i, got in enumerate(await asyncio.gather(*many)):
                np.testing.assert_array_equal(got.as_numpy("y"), 2 * (x + i))
        async with grpc_aio.InferenceServerClient(server.url("grpc")) as client:
            assert await client.is_model_ready("scaled")
            many = [client.infer("scaled", [tensor(grpc_client, "x", x + i)]) for i in range(20)]
            for i, got in enumerate(await asyncio.gather(*many)):
                np.testing.assert_array_equal(got.as_numpy("y"), 2 * (x + i))

    asyncio.run(main())


def test_streams_answer_in_order_and_survive_errors(server):
    x = np.arange(4, dtype=np.float32).reshape(1, 4)
    answers: queue.Queue = queue.Queue()
    with grpc_client.InferenceServerClient(server.url("grpc")) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for i in range(30):
            name = "wrong" if i == 10 else "x"
            client.async_stream_infer("scaled", [tensor(grpc_client, name, x + i)], request_id=str(i))
        for i in range(30):
            result, error = answers.get(timeout=20)
            if i == 10:
                assert "unexpected inference input 'wrong'" in str(error)
                continue
            assert error is None
            assert result.get_response().id == str(i)
            np.testing.assert_array_equal(result.as_numpy("y"), 2 * (x + i))
        client.stop_stream()


def test_a_strict_stream_ends_with_its_first_error(server):
    x = np.ones((1, 4), np.float32)
    answers: queue.Queue = queue.Queue()
    with grpc_client.InferenceServerClient(server.url("grpc")) as client:
        client.start_stream(lambda result, error: answers.put(error), headers={"triton_grpc_error": "true"})
        client.async_stream_infer("scaled", [tensor(grpc_client, "x", x)])
        assert answers.get(timeout=20) is None
        client.async_stream_infer("scaled", [tensor(grpc_client, "wrong", x)])
        error = answers.get(timeout=20)
        assert error.status() == "StatusCode.INVALID_ARGUMENT"
        assert "unexpected inference input 'wrong'" in str(error)


def test_statistics_add_up(client):
    before = as_dict(client.get_inference_statistics("scaled"))["model_stats"][0]
    x = np.ones((3, 4), np.float32)
    for _ in range(4):
        client.infer("scaled", [tensor(client.module, "x", x)])
    with pytest.raises(InferenceServerException):
        client.infer("scaled", [tensor(client.module, "x", x[:, :2])])
    after = as_dict(client.get_inference_statistics("scaled"))["model_stats"][0]

    def gained(*path):
        a, b = after, before
        for key in path:
            a, b = a.get(key, {}), b.get(key, {})
        return int(a or 0) - int(b or 0)

    assert gained("inference_count") == 12
    assert gained("execution_count") == 4
    assert gained("inference_stats", "success", "count") == 4
    assert gained("inference_stats", "compute_infer", "count") == 4
    assert gained("inference_stats", "success", "ns") >= gained("inference_stats", "compute_infer", "ns") > 0


def test_unknown_models_and_versions(client):
    for call in (client.get_model_metadata, client.get_model_config):
        with pytest.raises(InferenceServerException, match="unknown model: 'nope' is not found"):
            call("nope")
        with pytest.raises(InferenceServerException, match="version 7 is not found"):
            call("digits", "7")
    with pytest.raises(InferenceServerException, match="requested model 'nope' is not available"):
        client.get_inference_statistics("nope")


def test_repository_calls_need_explicit_mode(client):
    with pytest.raises(InferenceServerException, match="not allowed"):
        client.load_model("scaled")
    index = client.get_model_repository_index()
    rows = index if isinstance(index, list) else as_dict(index)["models"]
    assert {r["name"]: r["state"] for r in rows}["digits"] == "READY"


def test_load_unload_and_configuration_override(tmp_path):
    add_engine(tmp_path, "scaled", scaled(2.0))
    x = np.ones((1, 4), np.float32)
    with serving(tmp_path, mode=Mode.EXPLICIT) as running, http_client.InferenceServerClient(running.url("http")) as c:
        assert c.get_model_repository_index() == [{"name": "scaled"}]
        assert not c.is_model_ready("scaled")
        c.load_model("scaled")
        np.testing.assert_array_equal(c.infer("scaled", [tensor(http_client, "x", x)]).as_numpy("y"), 2 * x)
        c.load_model("scaled", config='{"max_batch_size": 2}')
        assert c.get_model_config("scaled")["max_batch_size"] == 2
        with pytest.raises(InferenceServerException, match="batch-size must be <= 2"):
            c.infer("scaled", [tensor(http_client, "x", np.ones((3, 4), np.float32))])
        with pytest.raises(InferenceServerException, match="no such model"):
            c.load_model("scalde")
        c.unload_model("scaled")
        with pytest.raises(InferenceServerException, match="no available versions"):
            c.infer("scaled", [tensor(http_client, "x", x)])
        c.unload_model("never-heard-of")


def test_small_answers_do_not_wait_for_an_acknowledgement():
    with _bind("127.0.0.1", 0, "http") as bound:
        assert bound.proto == socket.IPPROTO_TCP, "asyncio leaves Nagle's algorithm on for other sockets"
        assert bound.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_an_exported_pytorch_program_is_served(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 3)).eval()
    program = torch.export.export(
        module, (torch.randn(2, 4),), dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},)
    )
    for name in ("mlp", "broken"):
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / "config.pbtxt").write_text('platform: "pytorch_libtorch"')
    torch.export.save(program, tmp_path / "mlp" / "1" / "model.pt2")
    (tmp_path / "broken" / "1" / "model.pt2").write_bytes(b"no archive")
    with (
        serving(tmp_path, exit_on_error=False) as server,
        http_client.InferenceServerClient(server.url("http")) as client,
    ):
        about = client.get_model_metadata("mlp")
        (port,) = about["inputs"]
        assert port["shape"] == [-1, 4]
        x = np.random.default_rng(0).random((3, 4), dtype=np.float32)
        got = client.infer("mlp", [tensor(http_client, port["name"], x)]).as_numpy(about["outputs"][0]["name"])
        np.testing.assert_allclose(got, module(torch.from_numpy(x)).detach().numpy(), rtol=1e-4, atol=1e-5)
        (broken,) = [m for m in client.get_model_repository_index() if m["name"] == "broken"]
        assert "is not a file of torch.export.save" in broken["reason"]
