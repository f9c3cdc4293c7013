"""Ranges of steps, without a GPU: the loop over a CPU engine's steps with a made-up nvtx."""

from __future__ import annotations

import torch

import venturi as vt
from venturi.runtime.cuda_context import CudaContext


def steps_of(monkeypatch):
    """(names of the ranges in order, names of the steps)."""
    seen, depth = [], [0]

    def push(name):
        seen.append(name)
        depth[0] += 1

    def pop():
        depth[0] -= 1

    monkeypatch.setattr(torch.cuda.nvtx, "range_push", push)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", pop)
    net = vt.Network()
    net.output("y", net.softmax(net.relu(net.input("x", (4, 8))) @ torch.ones(8, 4).numpy()))
    engine = vt.build(net, device="cpu", opt_level=0)
    context = CudaContext.__new__(CudaContext)
    context._executable = engine._built.executable
    (got,) = context._eager([torch.ones(4, 8)])
    assert torch.allclose(got, torch.full((4, 4), 0.25))
    assert depth[0] == 0
    return seen, [f"{s.name} {s.tactic}" for s in engine.plan.steps]


def test_every_step_has_its_range(monkeypatch):
    monkeypatch.setenv("VENTURI_NVTX", "1")
    seen, steps = steps_of(monkeypatch)
    assert len(steps) > 1
    assert seen == steps


def test_there_are_none_unless_asked_for(monkeypatch):
    assert steps_of(monkeypatch)[0] == []
