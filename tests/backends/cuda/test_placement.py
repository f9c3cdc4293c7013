"""Where values live: host shape arithmetic, device copies by content, scratch memory, candidates. The CPU stands in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import venturi as vt
from tests.passes.harness import optimize
from venturi.backends.base import RegionView
from venturi.backends.cpu.tactics.reference import Reference
from venturi.backends.cuda.codegen.element import Element
from venturi.backends.cuda.device import DeviceWeights, OfflineDevice
from venturi.backends.cuda.placement import Mover, OnDevice
from venturi.backends.cuda.scratch import Scratch, current_scratch, using
from venturi.backends.cuda.tactics.candidates import LIGHT, product_candidates
from venturi.backends.cuda.tactics.reference import DeviceReference
from venturi.core.errors import DeviceError
from venturi.engine.builder import stored_weights
from venturi.ir.dtypes import DT

CPU = torch.device("cpu")
META = torch.device("meta")


def test_copies_are_kept_by_content():
    move = Mover(META)
    first = move(torch.arange(4))
    assert first.device == META
    assert move(torch.arange(4)) is first
    assert move(torch.arange(5)) is not first
    assert move(torch.arange(4, dtype=torch.int32)) is not first
    assert move(torch.arange(4).reshape(2, 2)) is not first
    assert move(torch.tensor(True)) is move(torch.tensor(True))
    assert move(torch.zeros(0)).numel() == 0
    assert move(None) is None


def test_copies_that_a_graph_reads_are_never_dropped(monkeypatch):
    import venturi.backends.cuda.placement as placement

    move = Mover(META)
    monkeypatch.setattr(placement, "_capturing", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda self: id(self))
    held = move(torch.arange(3))
    monkeypatch.setattr(placement, "_capturing", lambda device: False)
    for i in range(100):
        move(torch.full((2,), i))
    assert len(move._copies) <= 64
    assert any(x is held for x in move._captured.values())
    assert not any(x is held for x in move._copies.values())


def test_kernels_see_only_device_tensors():
    class Spy:
        name = "spy"

        def match(self, region):
            return [{}]

        def bind(self, region, config):
            return type("K", (), {"run": staticmethod(lambda *args: [a.device for a in args])})

    kernel = OnDevice(Spy(), META).bind(None, {})
    assert kernel.run(torch.zeros(2, device="meta"), torch.arange(3)) == [META, META]
    assert OnDevice(Spy(), META).sources(None, {}) == []


def test_weights_move_once_and_only_while_held():
    host = {"a": torch.ones(3), "s": np.array(["x"], dtype=object)}
    weights = DeviceWeights(host, META)
    held = weights["a"]
    assert held.device == META
    assert weights["a"] is held
    assert weights["s"] is host["s"]
    assert set(weights) == {"a", "s"}
    assert "b" not in weights
    assert weights.get("b") is None
    assert weights.host["a"] is host["a"]


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 5, 4)])
def test_the_device_reference_means_what_the_reference_means(shape):
    net = vt.Network()
    x = net.input("x", ("a", "b", 4))
    s = net.shape(x)
    y = net.reshape(x, net.concat(s[1:2], s[0:1], np.array([-1], np.int64), axis=0))
    net.output("y", net.expand(y[:, 0:1], net.shape(y)) + net.cast(net.size(y), to=1))
    model = optimize(net)
    weights = stored_weights(model.graph)
    env = {model.graph.inputs[0]: torch.randn(shape)}
    env.update({v: weights[n] for n, v in model.graph.initializers.items()})
    for node in model.graph:
        region = RegionView(node, weights)
        args = [env[v] for v in node.inputs if v is not None and v.name not in weights]
        want, got = (t.bind(region, {}).run(*args) for t in (Reference(), DeviceReference()))
        torch.testing.assert_close(got, want)
        env.update(zip(node.outputs, want if isinstance(want, tuple) else (want,)))


def test_scratch_grows_and_keeps_what_graphs_point_at():
    scratch = Scratch(CPU)
    first = scratch.tickets(10)
    assert not first.any()
    assert scratch.tickets(5) is first
    second = scratch.tickets(first.numel() + 1)
    assert second.numel() > first.numel()
    assert not second.any()
    assert scratch.nbytes >= first.nbytes + second.nbytes
    assert scratch.sums(7).numel() >= 7


def test_each_context_has_scratch_of_its_own():
    mine, other = Scratch(CPU), Scratch(CPU)
    with using(mine):
        assert current_scratch(CPU) is mine
        with using(other):
            assert current_scratch(CPU) is other
        assert current_scratch(CPU) is mine
    assert current_scratch(CPU) not in (mine, other)


@pytest.mark.parametrize("m,n,k", [(1, 8, 8), (17, 1000, 2048), (4096, 3072, 768), (401408, 64, 64), (None, 768, 768)])
def test_candidates_fit_the_problem(m, n, k):
    found = product_candidates(m, n, k, 132, 12, splits=True, element=Element(DT.FLOAT16))
    assert found
    assert len(found) == len(set(found))
    for c in found:
        assert c.bm <= max(64, 2 * (m or 4096))
        assert c.bn <= max(16, 2 * n)
        assert c.split == 1 or (k // c.bk) // c.split >= 1
    if m == 401408:
        assert any((c.bm, c.bn, c.bk, c.stages, c.warps) in LIGHT for c in found)


def test_an_offline_device_loads_nothing():
    with pytest.raises(DeviceError, match="sm_90"):
        OfflineDevice(90).kernel(type("S", (), {"name": "k"})())
