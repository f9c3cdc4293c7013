"""Regions joined by the time of the whole engine, with kernels that compute right and a made-up clock."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import venturi as vt
from tests.passes.harness import optimize
from venturi.backends.base import Backend, RegionView
from venturi.backends.cpu.tactics.reference import Reference
from venturi.backends.part_view import PAIR, parts_of
from venturi.core.errors import TuningError
from venturi.engine.builder import _flops, stored_weights
from venturi.engine.in_place import Settled
from venturi.engine.pairing import Pairing, rejoin
from venturi.engine.plan import Step
from venturi.ir.verify import verify
from venturi.runtime.context import Context
from venturi.runtime.executable import link
from venturi.tuning.cache import TimingCache
from venturi.tuning.timer import CpuTimer
from venturi.tuning.tuner import Tuner


class PairTactic:
    """Takes 1x1 after 1x1."""

    name = "pair"

    def match(self, region):
        parts = parts_of(region)
        if parts is None or any(p.constant(p.anchor.inputs[1]).shape[2] != 1 for p in parts):
            return "not two 1x1 convolutions"
        return [{"size": 1}, {"size": 2}]

    def bind(self, region, config):
        return Reference().bind(region, {})


def w(*shape):
    return np.random.default_rng(len(shape) + shape[0]).standard_normal(shape).astype(np.float32) * 0.2


def blocks(count=3):
    """[1x1 with residual -> 1x1 -> 3x3] repeated: pairs overlap with nothing."""
    net = vt.Network()
    x = y = net.relu(net.conv(net.input("x", (2, 4, 6, 6)), w(8, 4, 1, 1), w(8)))
    for _ in range(count):
        z = net.relu(net.conv(y, w(4, 8, 1, 1), w(4)))
        z = net.relu(net.conv(z, w(4, 4, 3, 3), w(4), pads=[1] * 4))
        y = net.relu(net.conv(z, w(8, 4, 1, 1), w(8)) + y)
    assert x is not y
    net.output("y", y)
    return net


class Bench:
    """An engine takes 100 us less `gain` for every joined pair of size 2, and half of that for one of size 1."""

    def __init__(self, net, gain, cache=None, pinned=False, tactic=None, faster=0.0):
        self.graph = optimize(net).graph
        self.weights = stored_weights(self.graph)
        self.backend = Backend("fake", (tactic or PairTactic(), Reference()), joins_pairs=True)
        views = [RegionView(n, self.weights) for n in self.graph]
        steps = [
            Step(v.name, v.kind, tuple(n.op_type for n in v.nodes), "reference", {}, tuple(v.sources), (), 2.0, 1000)
            for v in views
        ]
        kernels = [Reference().bind(v, {}) for v in views]
        self.plan = Settled(steps, kernels, [v.signature() for v in views])
        self.cache = TimingCache() if cache is None else cache
        self.runs = 0

        def measure(executable, hopeless):
            self.runs += 1
            return (
                100.0
                - faster * self.runs
                - sum(gain * c.step.config["size"] / 2 for c in executable.calls if c.step.kind == PAIR)
            )

        target = SimpleNamespace(device=torch.device("cpu"), prepare=lambda expected, progress: list(expected))
        tuner = Tuner(self.backend, self.cache, 1, pinned=pinned, timer=CpuTimer())
        self.before = self.run(np.ones((2, 4, 6, 6), np.float32))
        Pairing(self.graph, self.weights, target, tuner, measure, pinned).settle(self.plan)

    def run(self, x):
        executable = link(self.graph, self.plan.steps, self.plan.kernels, self.weights)
        return Context(executable, 1).run([torch.from_numpy(x)])[0]

    @property
    def pairs(self):
        return [s for s in self.plan.steps if s.kind == PAIR]


def test_all_pairs_are_joined_where_it_pays():
    bench = Bench(blocks(), 10.0)
    verify(bench.graph)
    assert [(s.tactic, s.config) for s in bench.pairs] == [("pair", {"size": 2})] * 3
    assert [s.name for s in bench.plan.steps] == [n.name for n in bench.graph]
    assert len(list(bench.graph)) == 10 - 3
    assert bench.pairs[1].ops == ("Conv", "Add", "Relu", "Conv", "Relu")
    assert bench.pairs[1].flops == 4.0
    assert bench.pairs[1].bytes == 2000 - 2 * 8 * 6 * 6 * 4, "the wide tensor is read once less"
    assert bench.pairs[1].measurements
    torch.testing.assert_close(bench.run(np.ones((2, 4, 6, 6), np.float32)), bench.before)


def test_the_same_pairs_are_found_in_a_graph_with_other_weights():
    """What a refit does: its steps keep their tactics."""
    bench = Bench(blocks(), 10.0)
    fresh = optimize(blocks()).graph
    assert len(list(fresh)) == 10
    rejoin(fresh, bench.plan.steps)
    verify(fresh)
    assert [n.name for n in fresh] == [s.name for s in bench.plan.steps]
    assert [RegionView(n, bench.weights).signature() for n in fresh] == [
        RegionView(n, bench.weights).signature() for n in bench.graph
    ]
    other = optimize(blocks(1)).graph
    rejoin(other, bench.plan.steps)
    verify(other)
    assert len(list(other)) == 4 - 1, "what is not there is passed over"


def test_planned_again_a_pair_has_the_work_of_both():
    """As `venturi tune` does with an engine's own graph."""
    bench = Bench(blocks(1), 10.0)
    (pair,) = [n for n in bench.graph if n.name == bench.pairs[0].name]
    x, wide, narrow = 2 * 6 * 6, 8, 4
    assert _flops(RegionView(pair, bench.weights), [torch.ones(1)], (torch.ones(1),)) == 2 * x * (
        4 * wide + wide * narrow
    )


def test_nothing_is_joined_where_it_costs():
    bench = Bench(blocks(), -1.0)
    assert not bench.pairs
    assert len(list(bench.graph)) == 10
    assert bench.runs


def test_a_pair_that_cannot_be_bound_is_not_joined():
    """Not even when the engine without it happens to be faster the next time."""

    class Once(PairTactic):
        left = 2  # the tuner's own

        def bind(self, region, config):
            self.left -= 1
            if self.left < 0:
                raise TuningError("no registers")
            return super().bind(region, config)

    bench = Bench(blocks(1), 10.0, tactic=Once(), faster=1.0)
    assert not bench.pairs
    assert bench.runs == 1, "only the engine as it was"


def test_what_was_measured_is_remembered():
    for gain, joined in ((10.0, 3), (-1.0, 0)):
        first = Bench(blocks(), gain)
        again = Bench(blocks(), -gain, first.cache, pinned=True)
        assert again.runs == 0
        assert len(again.pairs) == joined
        assert [s.config for s in again.plan.steps] == [s.config for s in first.plan.steps]
        assert [v.name for n in again.graph for v in n.outputs] == [v.name for n in first.graph for v in n.outputs]


def test_a_deterministic_build_does_not_measure():
    with pytest.raises(TuningError, match="does not know this engine's pairs"):
        Bench(blocks(), 10.0, pinned=True)


def test_a_region_is_in_one_pair_only():
    net = vt.Network()
    y = net.input("x", (2, 4, 6, 6))
    for i in range(4):
        y = net.relu(net.conv(y, w(4, 4, 1, 1) + i, w(4)))
    net.output("y", y)
    bench = Bench(net, 10.0)
    verify(bench.graph)
    assert len(bench.pairs) in (1, 2)
    torch.testing.assert_close(bench.run(np.ones((2, 4, 6, 6), np.float32)), bench.before)


def test_a_reader_between_the_two_comes_after_the_pair():
    net = vt.Network()
    wide = net.relu(net.conv(net.input("x", (2, 4, 6, 6)), w(8, 4, 1, 1), w(8)))
    aside = net.softmax(wide)
    net.output("aside", aside)
    net.output("y", net.relu(net.conv(wide, w(4, 8, 1, 1), w(4))))
    bench = Bench(net, 10.0)
    verify(bench.graph)
    assert bench.plan.steps[0].kind == PAIR
    torch.testing.assert_close(bench.run(np.ones((2, 4, 6, 6), np.float32)), bench.before)


def test_the_second_may_read_what_does_not_come_from_the_first():
    net = vt.Network()
    x = net.input("x", (2, 4, 6, 6))
    wide = net.relu(net.conv(x, w(8, 4, 1, 1), w(8)))
    net.output("y", net.relu(net.conv(wide, w(4, 8, 1, 1), w(4)) + net.softmax(x)))
    bench = Bench(net, 10.0)
    verify(bench.graph)
    assert len(bench.pairs) == 1
    torch.testing.assert_close(bench.run(np.ones((2, 4, 6, 6), np.float32)), bench.before)


def test_what_would_be_a_cycle_stays_apart():
    """Between the first and the second there is another node."""
    net = vt.Network()
    wide = net.relu(net.conv(net.input("x", (2, 4, 6, 6)), w(8, 4, 1, 1), w(8)))
    net.output("y", net.relu(net.conv(wide, w(8, 8, 1, 1), w(8)) + net.softmax(wide)))
    assert not Bench(net, 10.0).pairs
