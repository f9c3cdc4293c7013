"""The layout changes that are left in a Plan, and why; the kernels' own copies are what they are compared with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import venturi as vt
from venturi.cli.main import app
from venturi.engine.builder import compile_model, stored_weights
from venturi.engine.plan import Plan, Reorder
from venturi.frontends.sources import import_model
from venturi.runtime.executable import bind_plan
from venturi.runtime.reorders import find_reorders


def convolutions(flat: bool = False, strict_input: int = 3) -> vt.Network:
    rng = np.random.default_rng(0)
    net = vt.Network("convolutions")
    x = net.input("x", (1, strict_input, 8, 8))
    y = net.relu(net.conv(x, rng.standard_normal((16, strict_input, 3, 3)).astype(np.float32), pads=[1, 1, 1, 1]))
    y = net.relu(net.conv(y, rng.standard_normal((8, 16, 3, 3)).astype(np.float32), pads=[1, 1, 1, 1]))
    if flat:
        y = net.matmul(net.flatten(y), rng.standard_normal((512, 4)).astype(np.float32))
    net.output("y", y)
    return net


def products() -> vt.Network:
    net = vt.Network("products")
    x = net.input("x", (4, 16))
    net.output("y", net.relu(net.matmul(x, np.ones((16, 8), np.float32))))
    return net


def found_in(net: vt.Network, shape: tuple[int, ...]) -> tuple[Reorder, ...]:
    """With the tactics that come first, whatever a tuner would find."""
    built = compile_model(import_model(net), vt.BuildConfig(opt_level=0))
    return find_reorders(built.executable, [torch.randn(shape)], ["x"])


def test_only_the_callers_images_are_laid_out_anew():
    (found,) = found_in(convolutions(), (1, 3, 8, 8))
    assert (found.source, found.lies, found.wanted) == ("input 'x'", "row-major", "channels last")
    assert found.bytes == 3 * 8 * 8 * 4
    assert found.why == f"the caller's tensor is row-major, {found.tactic} reads it channels last"


def test_no_reorder_where_both_orders_are_the_same():
    assert found_in(convolutions(strict_input=1), (1, 1, 8, 8)) == ()
    assert found_in(products(), (4, 16)) == ()


def test_a_reshape_of_channels_last_is_one():
    _, found = found_in(convolutions(flat=True), (1, 3, 8, 8))
    assert (found.lies, found.wanted, found.bytes) == ("channels last", "row-major", 8 * 8 * 8 * 4)
    assert "mixes axes" in found.why


def test_a_build_looks_at_what_it_chose():
    """Whatever that is: the tuner may find kernels that read row-major images."""
    built = compile_model(import_model(convolutions()), vt.BuildConfig(opt_level=1))
    assert built.plan.reorders == find_reorders(built.executable, [torch.randn(1, 3, 8, 8)], ["x"])


@pytest.mark.parametrize("tactic", ["onednn-conv", "aten-conv-nhwc"])
def test_copies_inside_library_convolutions_are_seen(tactic):
    built = compile_model(import_model(convolutions()), vt.BuildConfig(opt_level=1))
    steps = [replace(s, tactic=tactic, config={}) if "Conv" in s.ops else s for s in built.plan.steps]
    graph = built.model.graph
    executable = bind_plan(graph, steps, stored_weights(graph), built.target.backend)
    (found,) = find_reorders(executable, [torch.randn(1, 3, 8, 8)], ["x"])
    assert (found.source, found.tactic) == ("input 'x'", tactic)


def test_in_a_file_and_in_the_table(tmp_path):
    config = vt.BuildConfig(opt_level=0)
    built = compile_model(import_model(convolutions()), config)
    left = found_in(convolutions(), (1, 3, 8, 8))
    assert len(left) == 1
    engine = vt.Engine(replace(built, plan=replace(built.plan, reorders=left)), config)
    assert Plan.from_json(engine.plan.to_json()).reorders == engine.plan.reorders
    older = engine.plan.to_json()
    del older["reorders"]
    assert Plan.from_json(older).reorders is None
    engine.save(tmp_path / "e.vt")
    text = " ".join(CliRunner().invoke(app, ["inspect", "plan", str(tmp_path / "e.vt")]).output.split())
    assert "reorders that are left" in text
    assert "the caller's tensor is row-major" in text
    products_file = tmp_path / "p.vt"
    vt.build(products(), opt_level=1).save(products_file)
    assert "no reorders are left" in CliRunner().invoke(app, ["inspect", "plan", str(products_file)]).output


def test_nobody_looked_without_values():
    assert vt.build(products(), opt_level=0).plan.reorders is None
