"""Loading, reloading, draining, timeouts, disconnects: no request is lost or answered twice."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException

from tests.serve.running import DIGITS, add_engine, scaled, serving, wait_for
from venturi.serve.errors import ServeError
from venturi.serve.repository import Mode

X = np.ones((1, 4), np.float32)


def given(array=X):
    made = http_client.InferInput("x", list(array.shape), "FP32")
    made.set_data_from_numpy(array)
    return [made]


def test_a_poll_that_fails_does_not_end_polling(tmp_path):
    add_engine(tmp_path / "a", "scaled", scaled(2.0))
    (tmp_path / "b").mkdir()
    with serving(tmp_path / "a", tmp_path / "b", mode=Mode.POLL, poll_s=0.05) as running:
        c = http_client.InferenceServerClient(running.url("http"))
        (tmp_path / "b" / "scaled").mkdir()  # one name in two places
        time.sleep(0.3)
        (tmp_path / "b" / "scaled").rmdir()
        add_engine(tmp_path / "b", "other", scaled(7.0))
        wait_for(lambda: c.is_model_ready("other"))
        assert float(c.infer("scaled", given()).as_numpy("y")[0, 0]) == 2
        c.close()


def test_reloads_under_load_drop_nothing(tmp_path):
    add_engine(tmp_path, "scaled", scaled(2.0))
    stop, answers, failures = threading.Event(), [], []

    def client(url):
        with http_client.InferenceServerClient(url) as c:
            while not stop.is_set():
                try:
                    answers.append(float(c.infer("scaled", given()).as_numpy("y")[0, 0]))
                except InferenceServerException as exc:
                    failures.append(exc)

    with serving(tmp_path, mode=Mode.EXPLICIT, load=("*",)) as running:
        threads = [threading.Thread(target=client, args=(running.url("http"),)) for _ in range(3)]
        for t in threads:
            t.start()
        with http_client.InferenceServerClient(running.url("http")) as control:
            for factor in (3.0, 4.0, 5.0):
                add_engine(tmp_path, "scaled", scaled(factor))
                control.load_model("scaled")
                assert float(control.infer("scaled", given()).as_numpy("y")[0, 0]) == factor
        stop.set()
        for t in threads:
            t.join()
    assert not failures
    assert set(answers) <= {2.0, 3.0, 4.0, 5.0}
    assert len(answers) >= 3


def test_a_broken_version_leaves_the_old_one_in_service(tmp_path):
    folder = add_engine(tmp_path, "scaled", scaled(2.0))
    with (
        serving(tmp_path, mode=Mode.EXPLICIT, load=("scaled",)) as running,
        http_client.InferenceServerClient(running.url("http")) as c,
    ):
        (folder / "2").mkdir()
        (folder / "2" / "model.vt").write_bytes(b"no engine")
        with pytest.raises(InferenceServerException, match="failed to load 'scaled'"):
            c.load_model("scaled")
        assert float(c.infer("scaled", given()).as_numpy("y")[0, 0]) == 2
        states = {r.get("version"): r["state"] for r in c.get_model_repository_index()}
        assert states == {"1": "READY", "2": "UNAVAILABLE"}


def test_version_policies_and_the_newest_by_default(tmp_path):
    for version in (1, 2, 3):
        add_engine(tmp_path, "scaled", scaled(float(version)), version=version)
    (tmp_path / "scaled" / "007").mkdir()
    (tmp_path / "scaled" / "config.pbtxt").write_text("version_policy { specific { versions: [1, 3] } }")
    with serving(tmp_path) as running, grpc_client.InferenceServerClient(running.url("grpc")) as c:
        x = grpc_client.InferInput("x", [1, 4], "FP32")
        x.set_data_from_numpy(X)
        assert list(c.get_model_metadata("scaled").versions) == ["1", "3"]
        assert float(c.infer("scaled", [x]).as_numpy("y")[0, 0]) == 3
        assert float(c.infer("scaled", [x], model_version="1").as_numpy("y")[0, 0]) == 1
        with pytest.raises(InferenceServerException, match="not found"):
            c.infer("scaled", [x], model_version="2")


def test_polling_loads_changes_and_unloads_what_is_gone(tmp_path):
    folder = add_engine(tmp_path, "scaled", scaled(2.0))
    with serving(tmp_path, mode=Mode.POLL, poll_s=3600.0) as running:
        repository = running.running.core.repository
        with http_client.InferenceServerClient(running.url("http")) as c:
            add_engine(tmp_path, "other", scaled(7.0))
            add_engine(tmp_path, "scaled", scaled(5.0))
            running.call(repository.poll())
            assert float(c.infer("scaled", given()).as_numpy("y")[0, 0]) == 5
            assert float(c.infer("other", given()).as_numpy("y")[0, 0]) == 7
            folder.rename(tmp_path / ".hidden")
            running.call(repository.poll())
            assert not c.is_model_ready("scaled")
            assert c.is_model_ready("other")


def test_a_client_that_goes_away_cancels_its_request(tmp_path):
    add_engine(tmp_path, "scaled", scaled(2.0), "dynamic_batching { max_queue_delay_microseconds: 60000000 preferred_batch_size: 4 } max_batch_size: 4")  # fmt: skip
    body = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}).encode()
    with serving(tmp_path) as running:
        statistics = running.running.core.repository.find("scaled").statistics
        host, port = running.url("http").split(":")
        with socket.create_connection((host, int(port))) as raw:
            head = f"POST /v2/models/scaled/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            raw.sendall(head.encode() + body)
            wait_for(lambda: statistics.pending == 1)
            time.sleep(0.05)
        wait_for(lambda: statistics.failures["CANCELED"] == 1)
        assert statistics.pending == 0


def test_full_queues_answer_503_with_retry_after(tmp_path):
    add_engine(tmp_path, "scaled", scaled(2.0), "max_batch_size: 4 dynamic_batching { preferred_batch_size: 4 "
               "max_queue_delay_microseconds: 60000000 default_queue_policy { max_queue_size: 1 } }")  # fmt: skip
    body = json.dumps({"inputs": [{"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4]}]})
    with serving(tmp_path) as running:
        statistics = running.running.core.repository.find("scaled").statistics
        waiting = http.client.HTTPConnection(running.url("http"))
        waiting.request("POST", "/v2/models/scaled/infer", body)
        wait_for(lambda: statistics.pending == 1)
        second = http.client.HTTPConnection(running.url("http"))
        second.request("POST", "/v2/models/scaled/infer", body)
        answer = second.getresponse()
        assert answer.status == 503
        assert answer.headers["Retry-After"] == "1"
        assert "Exceeds maximum queue size" in json.loads(answer.read())["error"]
        waiting.close()
        wait_for(lambda: statistics.pending == 0)


def test_models_that_cannot_be_loaded_end_the_start(tmp_path):
    (tmp_path / "empty" / "1").mkdir(parents=True)
    with pytest.raises(ServeError, match="failed to load 'empty'"), serving(tmp_path):
        pass
    with serving(tmp_path, exit_on_error=False) as running:
        with urllib.request.urlopen(f"http://{running.url('http')}/v2/health/live") as answer:
            assert answer.status == 200
        with http_client.InferenceServerClient(running.url("http")) as c:
            assert not c.is_server_ready()


def test_the_command_serves_a_file_and_drains_on_sigterm(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "venturi", "serve", str(DIGITS), "--host", "127.0.0.1", "--http-port", "0",
         "--grpc-port", "0", "--metrics-port", "0", "--json"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        text = ""
        while not text.endswith("\n}\n"):
            line = process.stdout.readline()
            assert line, "the server ended before it was ready"
            text += line
        found = json.loads(text)
        ports = found["ports"]
        assert found["dashboard"] == f"http://127.0.0.1:{ports['http']}/"
        with urllib.request.urlopen(found["dashboard"]) as answer:
            assert b"<title>" in answer.read()
        x = http_client.InferInput("image", [1, 1, 8, 8], "FP32")
        x.set_data_from_numpy(np.zeros((1, 1, 8, 8), np.float32))
        with http_client.InferenceServerClient(f"127.0.0.1:{ports['http']}") as c:
            assert c.infer("digits", [x]).as_numpy("logits").shape == (1, 10)
        with urllib.request.urlopen(f"http://127.0.0.1:{ports['metrics']}/metrics") as answer:
            metrics = answer.read().decode()
        assert 'nv_inference_request_success{model="digits",version="1"} 1' in metrics
        assert 'nv_inference_request_failure{model="digits",reason="REJECTED",version="1"} 0' in metrics
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()


@pytest.mark.parametrize("arguments, text", [([], "no model repository"), (["nowhere"], "does not exist"),
                         ([str(Path(__file__))], "neither a repository folder"),
                         ([str(DIGITS), "--model-control-mode", "auto"], "none, poll or explicit")])  # fmt: skip
def test_wrong_arguments(arguments, text):
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--host", "127.0.0.1"]
    done = subprocess.run([sys.executable, "-m", "venturi", "serve", *arguments, *ports], capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 1
    assert text in " ".join((done.stdout + done.stderr).split())
