"""Generated pointwise and row kernels, run by Triton's interpreter, against the references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import venturi as vt
from tests.backends.cuda.interpreted import InterpretedDevice
from tests.passes.harness import optimize
from venturi.backends.base import RegionView, disagreement, region_ulps
from venturi.backends.cpu.tactics.reference import Reference
from venturi.backends.cuda.tactics.clusters import TritonPointwise, TritonRows
from venturi.engine.builder import stored_weights
from venturi.runtime.executable import reads_of

SHAPES = [(3, 5), (2, 3, 4, 5), (1, 7), (33,), (2, 0, 3)]
UNARY = [
    "relu", "leaky_relu", "elu", "sigmoid", "tanh", "exp", "sqrt", "reciprocal", "erf", "gelu", "swish", "hard_swish",
    "hard_sigmoid", "mish", "softplus", "floor", "ceil", "sin", "cos", "neg", "abs", "softsign",
]  # fmt: skip


def run_all(net, tactic, inputs, precision="model", poison=True):
    """Runs the optimized graph with `tactic` wherever it matches, checking each result; returns how often it did."""
    used = 0
    for region, args, want in walk(optimize(net, precision), inputs):
        found = tactic.match(region)
        if not isinstance(found, str):
            used += 1
            for config in found[:2]:
                kernel = tactic.bind(region, config)
                reason = disagreement(kernel.run(*args), want, region_ulps(region))
                assert reason is None, f"{region.name} {config}: {reason}"
    return used


def walk(model, inputs):
    """(Region, its arguments, the reference's result) in order."""
    weights = stored_weights(model.graph)
    env = {v: inputs[v.name] for v in model.graph.inputs}
    env.update({v: weights[n] for n, v in model.graph.initializers.items() if n in weights})
    for node in model.graph:
        region = RegionView(node, weights)
        args = [env[v] for v in reads_of(node, weights)]
        want = Reference().bind(region, {}).run(*args)
        yield region, args, want
        env.update(zip(node.outputs, want if isinstance(want, tuple) else (want,)))


def tensor(*shape, seed=0, dtype=torch.float32, special=True):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2
    if special and x.numel() > 8:
        x.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gelu_of_half_types_is_the_nearest_value_or_its_neighbour(dtype):
    """Every value against fp64; 2^-24 is what 1 + erf in fp32 cannot resolve. Infinities and NaN as the reference."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    net = vt.Network()
    net.output("y", net.gelu(net.input("x", (1 << 16,), "float16" if dtype == torch.float16 else "bfloat16")))
    model = optimize(net)
    region = RegionView(next(iter(model.graph)), {})
    tactic = TritonPointwise(InterpretedDevice())
    got = tactic.bind(region, tactic.match(region)[0]).run(x)
    wide = x.double()
    want = wide * torch.special.ndtr(wide)
    limit = torch.finfo(dtype)
    inside = torch.isfinite(wide) & (wide > -5.5)
    step = torch.clamp(want.abs() * limit.eps, min=2.0**-24)
    assert ((got.double() - want).abs() <= step)[inside].all()
    assert (got[torch.isfinite(wide) & (wide <= -5.5)].double().abs() < 3e-7).all()
    assert torch.equal(torch.isnan(got), torch.isnan(want))
    assert torch.equal(got[wide == float("inf")], x[wide == float("inf")])


@pytest.mark.parametrize("name", UNARY)
def test_unary_operators_keep_meaning_and_nan(name):
    net = vt.Network()
    x = net.input("x", (4, 9), "float32")
    net.output("y", getattr(net, name)(x))
    device = InterpretedDevice()
    assert run_all(net, TritonPointwise(device), {"x": tensor(4, 9)}) == 1
    assert device.launched


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chain_of_operators_on_odd_shapes(shape, dtype):
    net = vt.Network()
    x, y = net.input("x", shape, dtype), net.input("y", shape, dtype)
    net.output("z", net.relu(x * y + x) - net.sigmoid(y))
    kind = getattr(torch, dtype)
    inputs = {"x": tensor(*shape, dtype=kind), "y": tensor(*shape, seed=1, dtype=kind)}
    assert run_all(net, TritonPointwise(InterpretedDevice()), inputs) == 1


@pytest.mark.parametrize("other", [(4, 1, 1), (1,), (5,), (6, 5), (2, 1, 1, 1), (2, 4, 1, 1), (1, 4, 6, 1)], ids=str)
def test_broadcasting(other):
    net = vt.Network()
    x, y = net.input("x", (2, 4, 6, 5), "float32"), net.input("y", other, "float32")
    net.output("z", net.relu(x * y) + x)
    inputs = {"x": tensor(2, 4, 6, 5), "y": tensor(*other, seed=2)}
    assert run_all(net, TritonPointwise(InterpretedDevice()), inputs) == 1


def test_both_sides_broadcast():
    net = vt.Network()
    x, y = net.input("x", (3, 1, 5), "float32"), net.input("y", (4, 1), "float32")
    net.output("z", net.relu(x - y))
    assert run_all(net, TritonPointwise(InterpretedDevice()), {"x": tensor(3, 1, 5), "y": tensor(4, 1, seed=3)}) == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_a_free_batch_binds_at_run_time(batch):
    net = vt.Network()
    x, y = net.input("x", ("n", 6), "float32"), net.input("y", (6,), "float32")
    net.output("z", net.tanh(x + y))
    assert run_all(net, TritonPointwise(InterpretedDevice()), {"x": tensor(batch, 6), "y": tensor(6, seed=1)}) == 1


def test_non_contiguous_inputs():
    net = vt.Network()
    x, y = net.input("x", (4, 6), "float32"), net.input("y", (4, 6), "float32")
    net.output("z", net.relu(x - y))
    inputs = {"x": tensor(6, 4).T, "y": tensor(4, 12, seed=1)[:, ::2]}
    assert run_all(net, TritonPointwise(InterpretedDevice()), inputs) == 1


@pytest.mark.parametrize("width", [1, 7, 64, 300, 1500])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_softmax(width, dtype):
    net = vt.Network()
    x = net.input("x", (3, 2, width), dtype)
    net.output("y", net.softmax(x * 0.5, axis=-1))
    assert run_all(net, TritonRows(InterpretedDevice()), {"x": tensor(3, 2, width, dtype=getattr(torch, dtype))}) == 1


def test_softmax_of_masked_scores():
    net = vt.Network()
    x, mask = net.input("x", (2, 4, 5, 9), "float32"), net.input("mask", (2, 1, 1, 9), "float32")
    net.output("y", net.softmax(x * 0.125 + mask, axis=-1))
    inputs = {"x": tensor(2, 4, 5, 9), "mask": torch.where(tensor(2, 1, 1, 9, special=False) > 1, -torch.inf, 0.0)}
    assert run_all(net, TritonRows(InterpretedDevice()), inputs) == 1


@pytest.mark.parametrize("width", [5, 768, 1025])
def test_layer_norm_with_what_surrounds_it(width):
    net = vt.Network()
    x, skip = net.input("x", (2, 3, width), "float32"), net.input("skip", (2, 3, width), "float32")
    scale, bias = (np.random.default_rng(i).standard_normal(width).astype(np.float32) for i in range(2))
    net.output("y", net.gelu(net.layer_normalization(x + skip, scale, bias)))
    inputs = {"x": tensor(2, 3, width), "skip": tensor(2, 3, width, seed=1)}
    assert run_all(net, TritonRows(InterpretedDevice()), inputs) == 1


def test_rows_refuses_a_softmax_over_another_axis():
    net = vt.Network()
    x = net.input("x", (3, 4, 5), "float32")
    net.output("y", net.softmax(x, axis=1))
    assert run_all(net, TritonRows(InterpretedDevice()), {"x": tensor(3, 4, 5)}) == 0


@pytest.mark.parametrize("batch", [1, 2])
def test_channels_last_values_keep_their_layout(batch):
    net = vt.Network()
    x, gate = net.input("x", (batch, 8, 5, 6)), net.input("gate", (batch, 8, 1, 1))
    kernel = np.random.default_rng(0).standard_normal((8, 8, 1, 1)).astype(np.float32)
    scale = np.random.default_rng(1).standard_normal((8, 1, 1)).astype(np.float32)
    y = net.conv(x, kernel)
    y = net.conv(net.tanh(y * net.sigmoid(gate) + x) * scale, kernel)
    net.output("y", y)
    inputs = {"x": tensor(batch, 8, 5, 6).contiguous(memory_format=torch.channels_last), "gate": tensor(batch, 8, 1, 1)}
    model = optimize(net)
    marked = [n for n in model.graph if n.metadata_props.get("venturi.layout") == "NHWC"]
    assert len(marked) >= 3
    assert run_all(net, TritonPointwise(InterpretedDevice()), inputs) >= 1


def test_the_result_of_a_channels_last_kernel_is_channels_last():
    net = vt.Network()
    x = net.input("x", (2, 8, 5, 6))
    kernel = np.ones((8, 8, 1, 1), np.float32)
    y = net.conv(x, kernel)
    net.output("y", net.conv(net.tanh(y) * y, kernel))
    model = optimize(net)
    weights = stored_weights(model.graph)
    tactic = TritonPointwise(InterpretedDevice())
    (region,) = [r for n in model.graph if not isinstance(tactic.match(r := RegionView(n, weights)), str)]
    given = tensor(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)
    for x in (given, given.contiguous()):
        out = tactic.bind(region, tactic.match(region)[0]).run(*[x] * len(region.dynamic))
        assert out.is_contiguous(memory_format=torch.channels_last)
