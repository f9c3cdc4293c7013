"""Replicas on a Ray cluster of two nodes on this machine, asked by tritonclient."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException

from tests.serve.running import add_engine, scaled, wait_for
from venturi.core.errors import DeviceError, ModelError
from venturi.serve import on_ray
from venturi.serve.errors import ServeError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
SLOW = """
import time
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        time.sleep(0.2)
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", pb_utils.get_input_tensor_by_name(r, "x").as_numpy())])
                for r in requests]
"""
PYTHON_CONFIG = """backend: "python"
input { name: "x" data_type: TYPE_FP32 dims: [4] }
output { name: "y" data_type: TYPE_FP32 dims: [4] }
"""


def add_slow(root: Path, extra: str = "") -> Path:
    (root / "slow" / "1").mkdir(parents=True)
    (root / "slow" / "1" / "model.py").write_text(SLOW)
    (root / "slow" / "config.pbtxt").write_text(PYTHON_CONFIG + extra)
    return root


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    made.add_node(num_cpus=1)
    on_ray.connect(made.address)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def deployed(cluster: Any, port: int) -> Iterator[Any]:
    """Deploys and returns what `deploy` returns; all is removed after the test."""
    names = set()

    def deploy(root: Path, name: str = "venturi", **settings: Any) -> list[dict[str, str]]:
        names.add(name)
        return on_ray.deploy(on_ray.RaySettings((root,), name, host="127.0.0.1", port=port, **settings), 240)

    yield deploy
    for name in names:
        on_ray.remove(name)


def running() -> set[str]:
    """Processes of the replicas that answer."""
    return {r["pid"] for r in on_ray.replicas("venturi") if r["state"] == "RUNNING"}


def infer(port: int, model: str = "scaled") -> np.ndarray[Any, Any]:
    x = np.ones((1, 4) if model == "scaled" else 4, np.float32)
    with http_client.InferenceServerClient(f"127.0.0.1:{port}") as client:
        given = http_client.InferInput("x", list(x.shape), "FP32")
        given.set_data_from_numpy(x)
        return client.infer(model, [given]).as_numpy("y")


def test_replicas_on_both_nodes_answer_survive_and_are_replaced(tmp_path: Path, deployed: Any, port: int) -> None:
    add_engine(tmp_path / "old", "scaled", scaled(2.0))
    add_engine(tmp_path / "new", "scaled", scaled(3.0))
    found = deployed(tmp_path / "old", min_replicas=2, max_replicas=2)
    assert len({r["node"] for r in found}) == 2
    with http_client.InferenceServerClient(f"127.0.0.1:{port}") as client:
        assert client.is_server_ready()
        assert client.get_model_metadata("scaled")["inputs"][0]["shape"] == [-1, 4]
        with pytest.raises(InferenceServerException, match="unknown model: 'absent'"):
            client.get_model_metadata("absent")
    assert all((infer(port) == 2).all() for _ in range(20))

    os.kill(int(found[0]["pid"]), signal.SIGKILL)
    wait_for(lambda: (infer(port) == 2).all(), 30)
    wait_for(lambda: len(running() - {found[0]["pid"]}) == 2, 60)

    answers: list[float] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answers.append(float(infer(port)[0, 0]))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        deployed(tmp_path / "new", min_replicas=2, max_replicas=2)
    finally:
        stop.set()
        asking.join()
    assert set(answers) <= {2.0, 3.0}
    assert (infer(port) == 3).all()


def test_load_brings_replicas(tmp_path: Path, deployed: Any, port: int) -> None:
    found = deployed(add_slow(tmp_path), max_replicas=2, target_ongoing=2)
    assert len(found) == 1
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            assert (infer(port, "slow") == 1).all()

    asking = [threading.Thread(target=ask) for _ in range(8)]
    for thread in asking:
        thread.start()
    try:
        wait_for(lambda: len(running()) == 2, 90)
    finally:
        stop.set()
        for thread in asking:
            thread.join()


def test_sequences_want_one_replica(tmp_path: Path, deployed: Any) -> None:
    add_slow(tmp_path, "sequence_batching { direct { } }")
    with pytest.raises(ServeError, match="model 'slow' keeps sequences in one process"):
        deployed(tmp_path, min_replicas=2, max_replicas=2)


def test_the_command(tmp_path: Path, cluster: Any, port: int) -> None:
    add_engine(tmp_path, "scaled", scaled(5.0))

    def venturi(*arguments: str, expect: int = 0) -> str:
        command = [sys.executable, "-m", "venturi", "deploy", "ray", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == expect, done.stderr
        return done.stdout + done.stderr

    where = ["--address", cluster.address, "--name", "other"]
    out = venturi(str(tmp_path), *where, "--route-prefix", "/other", "--json", "--port", str(port))
    answer = json.loads(out[out.index("{") : out.rindex("}") + 1])
    assert answer["url"] == f"http://127.0.0.1:{port}/other/v2"
    assert len(answer["replicas"]) == 1
    assert (infer_below(port, "other") == 5).all()
    taken = venturi(str(tmp_path), "--address", cluster.address, "--route-prefix", "/other", expect=1)
    assert "Prefix /other is being used" in " ".join(taken.split())
    assert "removed other" in venturi(*where, "--down")
    assert "no application 'other'" in " ".join(venturi(*where, "--down", expect=1).split())
    assert "no such model repository" in venturi(str(tmp_path / "absent"), *where, expect=1)
    assert "no Ray cluster at '127.0.0.1:1'" in " ".join(
        venturi(str(tmp_path), "--address", "127.0.0.1:1", expect=1).split()
    )


def infer_below(port: int, prefix: str) -> np.ndarray[Any, Any]:
    with http_client.InferenceServerClient(f"127.0.0.1:{port}/{prefix}") as client:
        given = http_client.InferInput("x", [1, 4], "FP32")
        given.set_data_from_numpy(np.ones((1, 4), np.float32))
        return client.infer("scaled", [given]).as_numpy("y")


@pytest.mark.parametrize(
    "settings", [{"min_replicas": 3, "max_replicas": 2}, {"min_replicas": 0}, {"target_ongoing": 0.0},
                 {"target_ongoing": 300.0}, {"route_prefix": "v2"}]
)  # fmt: skip
def test_settings_that_contradict_each_other(settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        on_ray.RaySettings((Path("."),), **settings)


def test_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refuse(**options: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(DeviceError, match="ray start --head"):
        on_ray.connect("auto")
