"""Ensembles on whole servers: dataflow, pruning, batch axes, errors, loading in order."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException

import venturi as vt
from tests.serve.running import add_engine, scaled, serving
from tests.serve.test_python_models import add_python
from venturi.serve.errors import ServeError
from venturi.serve.repository import Mode

FAILING = """
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        def execute(self, requests):
            said = [pb_utils.get_input_tensor_by_name(r, "x").as_numpy() for r in requests]
            return [pb_utils.InferenceResponse(error=pb_utils.TritonError("too small")) if (x < 10).any()
                    else pb_utils.InferenceResponse([pb_utils.Tensor("y", x)]) for x in said]
"""


def fixed(width: int) -> vt.Network:
    """y = x + 1 without a batch axis."""
    net = vt.Network("fixed")
    net.output("y", net.input("x", (width,)) + np.float32(1.0))
    return net


def port(name: str, kind: str = "FP32", dims: str = "[4]") -> str:
    return f'{{ name: "{name}" data_type: TYPE_{kind} dims: {dims} }}'


def ensemble(steps: str, inputs: str = "", outputs: str = "", batch: int = 4) -> str:
    inputs, outputs = inputs or "input " + port("in"), outputs or "output " + port("out")
    return f'platform: "ensemble" max_batch_size: {batch} {inputs} {outputs} ensemble_scheduling {{ {steps} }}'


def step(model: str, read: dict[str, str], write: dict[str, str]) -> str:
    maps = "".join(f'input_map {{ key: "{k}" value: "{v}" }} ' for k, v in read.items())
    maps += "".join(f'output_map {{ key: "{k}" value: "{v}" }} ' for k, v in write.items())
    return f'step {{ model_name: "{model}" model_version: -1 {maps} }} '


def add_ensemble(root: Path, name: str, config: str) -> None:
    (root / name / "1").mkdir(parents=True)
    (root / name / "config.pbtxt").write_text(config)


CHAIN = step("double", {"x": "in"}, {"y": "doubled"}) + step("triple", {"x": "doubled"}, {"y": "out"})


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("ensembles")
    add_engine(root, "double", scaled(2.0))
    add_engine(root, "triple", scaled(3.0))
    add_engine(root, "plus", fixed(4), "max_batch_size: 0")
    add_python(root, "picky", FAILING, f'backend: "python" max_batch_size: 4 input {port("x")} output {port("y")}')
    add_ensemble(root, "chain", ensemble(CHAIN))
    add_ensemble(
        root,
        "a_nested",
        ensemble(step("chain", {"in": "in"}, {"out": "six"}) + step("double", {"x": "six"}, {"y": "out"})),
    )
    both = "output " + port("left") + " output " + port("right")
    fork = step("double", {"x": "in"}, {"y": "left"}) + step("picky", {"x": "in"}, {"y": "right"})
    add_ensemble(root, "fork", ensemble(fork, outputs=both))
    same = "".join(step("double", {"x": a}, {"y": b}) for a, b in (("c", "out"), ("in", "b"), ("b", "c")))
    add_ensemble(root, "thrice", ensemble(same))
    mixed = step("double", {"x": "in"}, {"y": "b"}) + step("plus", {"x": "b"}, {"y": "out"})
    add_ensemble(root, "mixed", ensemble(mixed))
    with serving(root) as running:
        yield running


def ask(client, model: str, x: np.ndarray, outputs=None, **options):
    given = client.module.InferInput("in", list(x.shape), "FP32")
    given.set_data_from_numpy(x)
    wanted = outputs and [client.module.InferRequestedOutput(n) for n in outputs]
    return client.infer(model, [given], outputs=wanted, **options)


def rows(n: int) -> np.ndarray:
    return np.random.rand(n, 4).astype(np.float32) + 20


@pytest.mark.parametrize(("model", "factor"), [("chain", 6), ("a_nested", 12), ("thrice", 8)])
def test_steps_follow_their_tensors(client, model, factor) -> None:
    x = rows(3)
    got = ask(client, model, x, request_id="five")
    np.testing.assert_allclose(got.as_numpy("out"), x * factor, rtol=1e-6)
    assert "five" in str(got.get_response())


def test_batch_axes_come_and_go(client) -> None:
    x = rows(1)
    np.testing.assert_allclose(ask(client, "mixed", x).as_numpy("out"), 2 * x + 1, rtol=1e-6)
    with pytest.raises(InferenceServerException, match="in ensemble 'mixed', .*lose its batch axis"):
        ask(client, "mixed", rows(2))


def test_steps_that_nobody_asks_for_do_not_run(client) -> None:
    small = np.zeros((1, 4), np.float32)
    assert ask(client, "fork", small, ["left"]).as_numpy("left").shape == (1, 4)
    with pytest.raises(InferenceServerException, match="in ensemble 'fork', too small"):
        ask(client, "fork", small)
    got = ask(client, "fork", rows(2))
    assert {got.get_output(n) is not None for n in ("left", "right")} == {True}


def test_statistics_count_the_ensemble_and_its_steps(server, client) -> None:
    def count(model: str) -> int:
        return server.running.core.statistics(model)["model_stats"][0]["inference_stats"]["success"]["count"]

    before = {m: count(m) for m in ("chain", "double", "triple")}
    ask(client, "chain", rows(1))
    assert {m: count(m) - before[m] for m in before} == {"chain": 1, "double": 1, "triple": 1}


def test_many_at_once(server) -> None:
    def one(seed: int) -> None:
        with grpc_client.InferenceServerClient(server.url("grpc")) as own:
            own.module = grpc_client
            x = np.random.default_rng(seed).random((1 + seed % 4, 4), dtype=np.float32)
            for model, factor in (("chain", 6), ("thrice", 8), ("a_nested", 12)):
                np.testing.assert_allclose(ask(own, model, x).as_numpy("out"), x * factor, rtol=1e-6)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(60)))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (ensemble(""), "must specify 'step'"),
        (ensemble(step("nobody", {"x": "in"}, {"y": "out"})), "depends on 'nobody'"),
        (ensemble(step("double", {"z": "in"}, {"y": "out"})), "has no input 'z'"),
        (ensemble(step("double", {"x": "in"}, {"z": "out"})), "has no output 'z'"),
        (ensemble(step("double", {"x": "other"}, {"y": "out"})), "no step produces 'other'"),
        (ensemble(step("double", {"x": "in"}, {"y": "else"})), "not produced by any step"),
        (ensemble(CHAIN + step("double", {"x": "in"}, {"y": "out"})), "produced more than once"),
        (ensemble(CHAIN, inputs="input " + port("in", "INT32")), "is INT32, but input 'x'"),
        (ensemble(step("double", {}, {"y": "out"})), "not mapped"),
        (ensemble(CHAIN) + " instance_group { count: 2 kind: KIND_CPU }", "instance group should not be specified"),
        (ensemble(step("it", {"in": "in"}, {"out": "out"})), "circular dependency"),
    ],
)  # fmt: skip
def test_ensembles_that_cannot_be(tmp_path, config, says) -> None:
    add_engine(tmp_path, "double", scaled(2.0))
    add_engine(tmp_path, "triple", scaled(3.0))
    add_ensemble(tmp_path, "it", config)
    with pytest.raises(ServeError, match=re.escape(says)), serving(tmp_path):
        pass


def test_loading_an_ensemble_loads_its_models(tmp_path) -> None:
    add_engine(tmp_path, "double", scaled(2.0))
    add_engine(tmp_path, "triple", scaled(3.0))
    add_ensemble(tmp_path, "chain", ensemble(CHAIN))
    with (
        serving(tmp_path, mode=Mode.EXPLICIT) as server,
        http_client.InferenceServerClient(server.url("http")) as client,
    ):
        client.module = http_client
        client.load_model("chain")
        assert client.is_model_ready("double")
        x = rows(1)
        np.testing.assert_allclose(ask(client, "chain", x).as_numpy("out"), 6 * x, rtol=1e-6)
        client.unload_model("triple")
        with pytest.raises(InferenceServerException, match="in ensemble 'chain', .*triple"):
            ask(client, "chain", x)
        assert client.is_model_ready("chain")
