"""Instances on GPUs: an engine each, `count` instances on each, and what cannot be. The GPUs are made up: engines run on
the CPU and note the device that they were opened for."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import venturi as vt
from tests.serve.running import add_engine, scaled
from venturi.core.errors import VenturiError
from venturi.serve.config import normalise, parse_config
from venturi.serve.errors import ServeError
from venturi.serve.models import engine as kind
from venturi.serve.models.onnx_runtime import OnnxRuntimeKind
from venturi.serve.models.sequenced import SequencedModel
from venturi.serve.request import InferRequest, Tensor
from venturi.serve.schedulers.rate_limit import instances_of


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """The model's version folder, with the devices of opened, closed and used engines."""
    add_engine(tmp_path, "m", scaled(2.0))
    real, found = vt.load, SimpleNamespace(folder=tmp_path / "m" / "1", opened=[], closed=[], used=[], broken=None)

    def load(path, *, intra_threads=None, device=None):
        if device == found.broken is not None:
            raise VenturiError("out of memory")
        engine = real(path, intra_threads=intra_threads)
        found.opened.append(device)
        run, close = engine.run, engine.close
        engine.run = lambda inputs: (found.used.append(device), run(inputs))[1]
        engine.close = lambda: (found.closed.append(device), close())[1]
        return engine

    monkeypatch.setattr(
        kind, "vt", SimpleNamespace(load=load, build=vt.build, Engine=vt.Engine, TensorSpec=vt.TensorSpec)
    )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    return found


def completed(machine, text):
    config = normalise(parse_config(text, "m"), "m", backend="venturi")
    kind.EngineKind().complete(config, machine.folder, 4)
    machine.opened.clear()
    return config


def ask(instance):
    x = np.ones((1, 4), np.float32)
    (answer,) = instance.run_here([InferRequest("m", "", {"x": Tensor("x", "FP32", x)})])
    np.testing.assert_array_equal(answer.outputs["y"].data, 2 * x)


@pytest.mark.parametrize(
    "text, opened, used",
    [
        (
            "instance_group { kind: KIND_GPU count: 2 gpus: [ 2, 0 ] }",
            ["cuda:0", "cuda:2"],
            ["cuda:2"] * 2 + ["cuda:0"] * 2,
        ),
        ("instance_group { gpus: 1 }", ["cuda:1"], ["cuda:1"]),
        ("instance_group { kind: KIND_GPU }", ["cuda:0", "cuda:1", "cuda:2"], ["cuda:0", "cuda:1", "cuda:2"]),
        ("instance_group { count: 1 } instance_group { gpus: 1 }", ["cuda:1", None], [None, "cuda:1"]),
        ("instance_group { count: 2 }", [None], [None, None]),
    ],
)
def test_every_gpu_has_its_engine_and_its_instances(machine, text, opened, used):
    config = completed(machine, text)
    model = kind.EngineKind().load(config, machine.folder)
    assert machine.opened == opened
    instances = instances_of(config.instance_group, model, None)
    for instance in instances:
        ask(instance)
        instance.close()
    assert machine.used == used
    assert len({i.name for i in instances}) == len(instances)
    model.close()
    assert sorted(map(str, machine.closed)) == sorted(map(str, opened))


def test_models_with_sequences_have_them_too(machine):
    config = completed(machine, "instance_group { gpus: [ 0, 1 ] } sequence_batching { }")
    model = SequencedModel(kind.EngineKind().load(config, machine.folder), config, machine.folder)
    for instance in instances_of(config.instance_group, model, None):
        ask(instance)
        instance.close()
    assert machine.used == ["cuda:0", "cuda:1"]
    model.close()
    assert sorted(machine.closed) == ["cuda:0", "cuda:1"]


def test_engines_are_closed_when_one_cannot_be_opened(machine):
    config = completed(machine, "instance_group { gpus: [ 0, 1, 2 ] }")
    machine.broken = "cuda:2"
    with pytest.raises(VenturiError, match="out of memory"):
        kind.EngineKind().load(config, machine.folder)
    assert sorted(machine.closed) == ["cuda:0", "cuda:1"]


def test_without_a_gpu(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ServeError, match="model m has an instance group of KIND_GPU, and this machine has no GPU"):
        completed(machine, "instance_group { kind: KIND_GPU }")


def test_engines_for_the_cpu_do_not_run_elsewhere(tmp_path):
    add_engine(tmp_path, "m", scaled(2.0))
    config = normalise(parse_config("instance_group { gpus: 0 }", "m"), "m", backend="venturi")
    with pytest.raises(VenturiError, match=re.compile("cpu", re.IGNORECASE)):
        kind.EngineKind().load(config, tmp_path / "m" / "1")
    with pytest.raises(ServeError, match="backend 'ort' is for the CPU"):
        OnnxRuntimeKind().load(config, tmp_path / "m" / "1")
