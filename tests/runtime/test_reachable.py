"""Memory behind an executable: tensors are found where kernels keep them, and counted once."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

import venturi as vt
from tests.passes.harness import rand
from venturi.core.errors import EngineError
from venturi.runtime.reachable import reachable_bytes

CPU = torch.device("cpu")


def test_tensors_are_found_in_what_functions_keep():
    a, b, c, d = (torch.zeros(n) for n in (10, 20, 40, 80))
    holder = {"list": [a, (b,)], "again": a.view(2, 5)}

    def kernel(x, default=c):
        return x + len(holder) + default.sum()

    assert reachable_bytes(kernel, CPU) == 4 * (10 + 20 + 40)
    assert reachable_bytes(partial(kernel, d), CPU) == 4 * (10 + 20 + 40 + 80)
    assert reachable_bytes(kernel, torch.device("meta")) == 0
    assert reachable_bytes([torch.zeros(3, device="meta"), a[2:3]], CPU) == 40


def engine(batch, profiles=()):
    net = vt.Network("memory")
    x = net.input("x", (batch, 64))
    net.output("y", net.softmax(net.relu(x @ rand(64, 256)) @ rand(256, 8)))
    return vt.build(net, device="cpu", opt_level=0, profiles=list(profiles))


def test_memory_of_an_engine_is_its_weights_and_a_context():
    weights = 4 * (64 * 256 + 256 * 8)
    small = engine(4)
    assert small.device_memory_bytes >= weights
    assert small.device_memory_bytes == small.device_memory_bytes
    with small.context() as ctx:
        ctx.run({"x": np.zeros((4, 64), np.float32)})
        held = ctx.arena_bytes
    assert small.device_memory_bytes - held == engine(1024).device_memory_bytes - 256 * held
    assert held >= 4 * 256 * 4


def test_the_largest_shapes_of_a_profile_count():
    wide = engine("n", [vt.Profile(x=((1, 64), (4, 64), (512, 64)))])
    assert wide.device_memory_bytes > engine(4).device_memory_bytes + 508 * 256 * 4


def test_shapes_that_nothing_says_are_asked_for():
    with pytest.raises(EngineError, match="build with a profile"):
        _ = engine("n").device_memory_bytes
