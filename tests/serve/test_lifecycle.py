"""Loading, reloading, draining, timeouts, disconnects: no request is lost or answered twice."""

from __future__ import annotations

import asyncio
import http.client
import json
import queue
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

from tests.serve.running import DIGITS, add_engine, scaled, serving
from venturi.serve import instance as instance_module
from venturi.serve.errors import ServeError
from venturi.serve.instance import Instance
from venturi.serve.repository import Mode
from venturi.serve.request import InferRequest, InferResponse, Tensor
from venturi.serve.schedulers.batcher import BatchingRules, DynamicBatcher, OneByOne
from venturi.serve.schedulers.driver import Driver
from venturi.serve.schedulers.queues import QueuePolicy, WaitingLine
from venturi.serve.served import ServedVersion
from venturi.serve.statistics import ModelStatistics

X = np.ones((1, 4), np.float32)


def given(array=X):
    made = http_client.InferInput("x", list(array.shape), "FP32")
    made.set_data_from_numpy(array)
    return [made]


class Slow:
    """A model that waits for `gate`, then answers with its batch's size; `fails` makes it raise."""

    def __init__(self, fails=False):
        self.gate = threading.Event()
        self.fails = fails
        self.batches = []
        self.closed = False

    runs_inline = True

    def execute(self, requests):
        assert self.gate.wait(20)
        self.batches.append(requests)
        if self.fails:
            raise RuntimeError("the model is broken")
        for r in requests:
            r.times.end = time.perf_counter_ns()
        return [InferResponse({"n": Tensor("n", "INT32", np.array([len(requests)], np.int32))}) for _ in requests]

    def close(self):
        self.closed = True


def request(name="r"):
    return InferRequest("m", "", {"x": Tensor("x", "FP32", X)}, id=name)


class Loop(Driver):
    """A driver whose answers are futures of the running loop, as ServedVersion gives them."""

    def ask(self, asked):
        version = ServedVersion.__new__(ServedVersion)
        version.driver = self
        version.submit = self.submit
        return version.infer(asked)


def run(main):
    return asyncio.run(asyncio.wait_for(main, 30))


def test_requests_that_wait_run_together_and_each_gets_its_answer():
    async def main():
        model, statistics = Slow(), ModelStatistics()
        driver = Loop(DynamicBatcher(BatchingRules(8)), [Instance("i", model)], statistics)
        answers = [driver.ask(request(str(i))) for i in range(6)]
        wait_for(lambda: statistics.pending == 5)
        model.gate.set()
        sizes = [int((await a).outputs["n"].data[0]) for a in answers]
        assert sizes == [1, 5, 5, 5, 5, 5]
        assert (statistics.executions, statistics.pending, driver.num_open) == (2, 0, 0)
        await driver.drain()

    run(main())


def test_a_failing_model_fails_its_batch_and_serves_on():
    async def main():
        model = Slow(fails=True)
        model.gate.set()
        statistics = ModelStatistics()
        driver = Loop(OneByOne(), [Instance("i", model)], statistics)
        with pytest.raises(ServeError, match=r"\[request id: a\] RuntimeError: the model is broken"):
            await driver.ask(request("a"))
        model.fails = False
        assert (await driver.ask(request("b"))).outputs
        assert statistics.failures["BACKEND"] == 1
        await driver.drain()

    run(main())


def test_timeouts_answer_while_the_instance_is_busy():
    async def main():
        model, statistics = Slow(), ModelStatistics()
        line = WaitingLine(default=QueuePolicy(timeout_us=20_000))
        driver = Loop(OneByOne(line), [Instance("i", model)], statistics)
        first, second = driver.ask(request()), driver.ask(request())
        start = time.perf_counter()
        with pytest.raises(ServeError, match="Request timeout expired"):
            await second
        assert time.perf_counter() - start < 5
        model.gate.set()
        await first
        assert statistics.failures["REJECTED"] == 1
        assert len(model.batches) == 1
        await driver.drain()

    run(main())


def test_an_abandoned_request_never_runs():
    async def main():
        model, statistics = Slow(), ModelStatistics()
        driver = Loop(OneByOne(), [Instance("i", model)], statistics)
        first, second, third = (driver.ask(request(n)) for n in "abc")
        second.cancel()
        await asyncio.sleep(0.01)
        model.gate.set()
        await asyncio.gather(first, third)
        assert [b[0].id for b in model.batches] == ["a", "c"]
        assert statistics.failures["CANCELED"] == 1
        await driver.drain()

    run(main())


def test_order_is_preserved_over_instances():
    async def main():
        slow, fast = Slow(), Slow()
        fast.gate.set()
        driver = Loop(OneByOne(), [Instance("s", slow), Instance("f", fast)], ModelStatistics(), preserve_order=True)
        order = []
        answers = []
        for i in range(4):
            answers.append(driver.ask(request(str(i))))
            answers[-1].add_done_callback(lambda done, i=i: order.append(i))
        await asyncio.sleep(0.05)
        assert order == []
        slow.gate.set()
        await asyncio.gather(*answers)
        assert order == [0, 1, 2, 3]
        await driver.drain()

    run(main())


def test_draining_answers_what_was_accepted_and_refuses_the_rest():
    async def main():
        model = Slow()
        driver = Loop(OneByOne(), [Instance("i", model)], ModelStatistics())
        answers = [driver.ask(request(str(i))) for i in range(3)]
        draining = asyncio.ensure_future(driver.drain())
        await asyncio.sleep(0)
        with pytest.raises(ServeError, match="being unloaded"):
            driver.ask(request())
        model.gate.set()
        await draining
        assert all(a.done() and not a.exception() for a in answers)

    run(main())


def test_giving_up_on_a_stuck_model_ends_the_loop():
    model = Slow()

    async def main():
        driver = Loop(OneByOne(), [Instance("i", model)], ModelStatistics())
        driver.ask(request())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(driver.drain(), 0.1)

    start = time.perf_counter()
    run(main())
    assert time.perf_counter() - start < 5
    model.gate.set()


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


def wait_for(condition, seconds=10):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it did not happen"
        time.sleep(0.01)


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
        ports = json.loads(text)["ports"]
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


class Clock:
    """Stands for the time module; a run takes `run_us` of wall time and as much of its thread's."""

    def __init__(self):
        self.now, self.run_us = 0, 10

    def perf_counter_ns(self):
        return self.now

    def thread_time_ns(self):
        return self.now

    runs_inline = True

    def execute(self, requests):
        self.now += self.run_us * 1000
        return []

    def close(self):
        return


def test_fast_models_run_where_the_request_is_until_they_are_slow(monkeypatch):
    clock, reports = Clock(), queue.SimpleQueue()
    monkeypatch.setattr(instance_module, "time", clock)
    instance = Instance("i", clock)

    def on_its_thread(times):
        for _ in range(times):
            instance.run([], lambda *report: reports.put(report))
            reports.get(timeout=20)

    on_its_thread(19)
    assert not instance.is_fast
    on_its_thread(1)
    assert instance.is_fast
    clock.run_us = 5000
    for fast in (True, True, False):
        instance.run_here([])
        assert instance.is_fast is fast
    clock.run_us = 10
    on_its_thread(999)
    assert not instance.is_fast
    on_its_thread(1)
    assert instance.is_fast
    instance.close()


def test_slow_models_keep_their_thread(monkeypatch):
    clock, reports = Clock(), queue.SimpleQueue()
    monkeypatch.setattr(instance_module, "time", clock)
    clock.run_us = 200
    instance = Instance("i", clock)
    for _ in range(60):
        instance.run([], lambda *report: reports.put(report))
        reports.get(timeout=20)
    assert not instance.is_fast
    instance.close()
