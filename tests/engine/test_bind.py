"""Inputs and outputs at fixed places."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import venturi as vt


def doubled():
    net = vt.Network()
    net.output("y", net.input("x", ("n", 3)) * 2.0)
    return vt.build(net, device="cpu", opt_level=0)


def test_runs_read_and_write_in_place():
    engine = doubled()
    bound = engine.bind({"x": np.ones((2, 3), np.float32)})
    y = bound.outputs["y"]
    assert torch.equal(y, torch.full((2, 3), 2.0))
    bound.inputs["x"].copy_(torch.arange(6.0).reshape(2, 3))
    bound.run()
    assert bound.outputs["y"] is y
    assert torch.equal(y, torch.arange(0.0, 12.0, 2.0).reshape(2, 3))


def test_two_do_not_share_memory_with_each_other_nor_with_the_engine():
    engine = doubled()
    given = torch.ones(2, 3)
    one, two = engine.bind({"x": given}), engine.bind({"x": given})
    one.inputs["x"].fill_(5.0)
    one.run()
    two.run()
    engine(torch.full((2, 3), 9.0))
    assert float(one.outputs["y"][0, 0]) == 10.0
    assert float(two.outputs["y"][0, 0]) == 2.0
    assert float(given[0, 0]) == 1.0


def test_bad_inputs_are_refused():
    engine = doubled()
    with pytest.raises(vt.ShapeError, match=r"must have shape \['n', 3\], got \[2, 4\]"):
        engine.bind({"x": np.ones((2, 4), np.float32)})
    with pytest.raises(vt.ShapeError, match=r"inputs must be \['x'\]; missing \['x'\], unknown \['z'\]"):
        engine.bind({"z": np.ones((2, 3), np.float32)})


def test_outputs_whose_shape_depends_on_values_are_told():
    net = vt.Network()
    net.output("y", net.nonzero(net.input("x", (4,))))
    bound = vt.build(net, device="cpu", opt_level=0).bind({"x": np.array([1, 0, 1, 0], np.float32)})
    assert bound.outputs["y"].shape == (1, 2)
    bound.inputs["x"].fill_(1.0)
    with pytest.raises(vt.RequestError, match="depends on values; use engine.run"):
        bound.run()
