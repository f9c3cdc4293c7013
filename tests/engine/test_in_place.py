"""Settling close choices by the time of the whole engine, with made-up kernels and a made-up clock."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import venturi as vt
from tests.passes.harness import optimize
from venturi.backends.base import Backend, Kernel
from venturi.core.errors import TuningError
from venturi.engine.in_place import InPlace, Settled
from venturi.engine.plan import Step
from venturi.tuning.cache import Measurement, TimingCache


@dataclass
class FakeTactic:
    name: str
    fails: bool = False

    def match(self, region):
        return [{}]

    def bind(self, region, config):
        if self.fails:
            raise TuningError("no")
        kernel = Kernel(lambda *args: args)
        LABELS[id(kernel)] = (self.name, kernel)
        return kernel


LABELS = {}


def label(kernel):
    return LABELS[id(kernel)][0]


class Bench:
    """Three steps: two of problem A, one of problem B. `cost` maps the three kernels' names to microseconds."""

    def __init__(self, cost, times, cache=None, fails=()):
        net = vt.Network()
        x = net.input("x", (4,))
        net.output("y", net.softmax(net.softmax(net.softmax(x))))
        self.graph = optimize(net).graph
        assert len(list(self.graph)) == 3
        self.tactics = {n: FakeTactic(n, n in fails) for n in ("early", "late", "far")}
        backend = Backend("fake", tuple(self.tactics.values()))
        measurements = tuple(Measurement(n, {}, t) for n, t in sorted(times.items(), key=lambda i: i[1]))
        first = measurements[0]
        steps = [
            Step(
                n.name,
                "region",
                ("Softmax",),
                first.tactic,
                {},
                (),
                (*measurements, Measurement("bad", {}, reason="no")),
            )
            for n in self.graph
        ]
        kernels = [self.tactics[first.tactic].bind(None, {}) for _ in steps]
        self.plan = Settled(steps, kernels, ["A", "A", "B"])
        self.cost, self.measured = cost, 0
        self.cache = cache if cache is not None else TimingCache()
        self.in_place = InPlace(self.graph, {}, backend, self.measure, self.cache)

    def measure(self, executable, hopeless):
        self.measured += 1
        return self.cost(*(label(c.kernel) for c in executable.calls))

    def names(self):
        assert [label(k) for k in self.plan.kernels] == [s.tactic for s in self.plan.steps]
        return [s.tactic for s in self.plan.steps]


def neighbours_matter(a, b, c):
    """Two `late` kernels in a row overlap."""
    return 100.0 - 10.0 * sum(x == y == "late" for x, y in ((a, b), (b, c)))


CLOSE = {"early": 5.0, "late": 6.0, "far": 50.0}


def test_what_is_slower_alone_wins_where_it_makes_the_engine_faster():
    bench = Bench(neighbours_matter, CLOSE)
    bench.in_place.settle(bench.plan, 2)
    assert bench.names() == ["late", "late", "late"]


def test_candidates_far_behind_alone_are_not_tried():
    bench = Bench(lambda *names: 100.0 - 50.0 * ("far" in names), CLOSE)
    bench.in_place.settle(bench.plan, 2)
    assert "far" not in bench.names()


@pytest.mark.parametrize("cost", [lambda *n: 100.0, lambda *n: 100.0 + n.count("late"), lambda *n: None])
def test_nothing_changes_without_a_gain_or_a_clock(cost):
    bench = Bench(cost, CLOSE)
    bench.in_place.settle(bench.plan, 3)
    assert bench.names() == ["early"] * 3


def test_a_gain_that_does_not_come_twice_is_noise():
    times = iter([100.0, 90.0, 100.0, 101.0] + [101.0] * 50)
    bench = Bench(lambda *names: next(times), CLOSE)
    bench.in_place.settle(bench.plan, 1)
    assert bench.names() == ["early"] * 3


def test_what_cannot_be_bound_or_run_is_passed_over():
    bench = Bench(neighbours_matter, CLOSE, fails={"late"})
    bench.in_place.settle(bench.plan, 1)
    assert bench.names() == ["early"] * 3

    def faults(*names):
        if "late" in names:
            raise RuntimeError("fault")
        return 100.0

    bench = Bench(faults, CLOSE)
    bench.in_place.settle(bench.plan, 1)
    assert bench.names() == ["early"] * 3


def test_a_second_build_recalls_without_timing():
    first = Bench(neighbours_matter, CLOSE)
    first.in_place.settle(first.plan, 2)
    again = Bench(neighbours_matter, CLOSE, cache=first.cache)
    again.in_place.settle(again.plan, 2)
    assert again.names() == ["late", "late", "late"]
    assert again.measured == 0


def test_no_passes_and_no_time_change_nothing():
    bench = Bench(neighbours_matter, CLOSE)
    bench.in_place.settle(bench.plan, 0)
    assert bench.measured == 0
    bench.in_place.deadline = 0.0
    bench.in_place.settle(bench.plan, 2)
    assert bench.names() == ["early"] * 3
    kept = Bench(neighbours_matter, CLOSE, cache=bench.cache)
    kept.in_place.settle(kept.plan, 2)
    assert kept.measured > 0, "an unfinished search must not be remembered"
