"""Generated pointwise clusters, softmax, norms and pooling against the reference, through RegionViews."""

from __future__ import annotations

import itertools
from typing import Any

import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.backends.cpu.harness import isas
from venturi.backends.base import RegionView, disagreement, region_ulps
from venturi.backends.cpu.codegen.axes import axes_of
from venturi.backends.cpu.tactics.native_cluster import NativePointwise, NativeRows
from venturi.backends.cpu.tactics.native_pool import NativePool
from venturi.backends.cpu.tactics.reference import Reference
from venturi.ir.region import form_region

pytestmark = pytest.mark.skipif(isas()[0] is None or not hasattr(isas()[0], "name"), reason="no code generation here")
T = torch.Tensor
NASTY = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, 1e30, -1e30])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Sketch:
    """A small graph of `kind`: `add` appends nodes, `view` makes one Region of them."""

    def __init__(self, kind: ir.DataType = ir.DataType.FLOAT) -> None:
        self.kind = kind
        self.weights: dict[str, T] = {}
        self.inputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []

    def input(self, shape: Any, dtype: ir.DataType | None = None) -> ir.Value:
        v = ir.Value(name=f"x{len(self.inputs)}", shape=ir.Shape(shape), type=ir.TensorType(dtype or self.kind))
        self.inputs.append(v)
        return v

    def weight(self, x: T) -> ir.Value:
        v = ir.Value(
            name=f"w{len(self.weights)}",
            shape=ir.Shape(x.shape),
            type=ir.TensorType(self.kind),
            const_value=ir.tensor(x.float().numpy()),
        )
        self.weights[v.name or ""] = x
        return v

    def add(self, op: str, inputs: list[Any], shape: Any, dtype: ir.DataType | None = None, **attrs: Any) -> ir.Value:
        node = ir.Node(
            "",
            op,
            inputs,
            [ir.convenience.convert_attribute(k, v) for k, v in attrs.items()],
            name=f"{op}{len(self.nodes)}",
        )
        node.outputs[0].shape, node.outputs[0].type, node.outputs[0].name = (
            ir.Shape(shape),
            ir.TensorType(dtype or self.kind),
            f"{op}{len(self.nodes)}_out",
        )
        self.nodes.append(node)
        return node.outputs[0]

    def view(self, layout: str = "") -> RegionView:
        outputs = [self.nodes[-1].outputs[0]]
        values = [v for n in self.nodes for v in n.inputs if v is not None and (v.name or "") in self.weights]
        graph = ir.Graph(
            self.inputs, outputs, nodes=self.nodes, initializers=list(dict.fromkeys(values)), opset_imports={"": 23}
        )
        node = form_region("pointwise", self.nodes) if len(self.nodes) > 1 else next(iter(graph))
        if layout:
            node.metadata_props["venturi.layout"] = layout
        self.graph = graph
        return RegionView(node, self.weights)


def check(tactic: Any, view: RegionView, *args: T) -> None:
    found = tactic.match(view)
    assert not isinstance(found, str), found
    want = Reference().bind(view, {}).run(*args)
    kernel = tactic.bind(view, found[0])
    assert kernel.parallel.routine(tuple(tuple(a.shape) for a in args)) is not None
    for _ in range(2):
        assert disagreement(kernel.run(*args), want, region_ulps(view)) is None
    out = torch.empty_like(kernel.run(*args))
    kernel.run_out(*args, out=out)
    assert disagreement(out, want, region_ulps(view)) is None


def sample(*shape: int) -> T:
    x = torch.randn(shape)
    flat = x.view(-1)
    flat[: min(len(flat), len(NASTY))] = NASTY[: len(flat)]
    return x


UNARY = [
    "Relu",
    "Sigmoid",
    "Tanh",
    "Exp",
    "Erf",
    "Gelu",
    "HardSwish",
    "HardSigmoid",
    "Elu",
    "LeakyRelu",
    "Mish",
    "Softplus",
    "Abs",
    "Neg",
    "Sqrt",
    "Floor",
    "Ceil",
    "Round",
    "Reciprocal",
    "Log",
    "Swish",
]


@pytest.mark.parametrize("op", UNARY)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 16, 33), (9001,)], ids=str)
def test_unary(op: str, shape: Any) -> None:
    s = Sketch()
    s.add(op, [s.input(shape)], shape)
    x = torch.randn(shape) * 3
    check(NativePointwise(), s.view(), x.abs() if op in ("Sqrt", "Log") else x)


@pytest.mark.parametrize(
    "op", ["Relu", "Sigmoid", "Tanh", "Exp", "Erf", "HardSwish", "HardSigmoid", "LeakyRelu", "Abs", "Log", "Clip"]
)
def test_values_that_are_not_finite(op: str) -> None:
    s = Sketch()
    inputs = [s.input((70,))] + ([s.weight(torch.tensor(-1.0)), s.weight(torch.tensor(2.0))] if op == "Clip" else [])
    s.add(op, inputs, (70,))
    check(NativePointwise(), s.view(), sample(70))


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max", "Min"])
@pytest.mark.parametrize(
    "a,b",
    [((4, 7), (7,)), ((4, 7), (4, 1)), ((2, 1, 9), (5, 1)), ((3, 1), (1, 40)), ((6,), ()), ((2, 3, 4), (2, 3, 4))],
    ids=str,
)
def test_broadcasting(op: str, a: Any, b: Any) -> None:
    s = Sketch()
    shape = tuple(torch.broadcast_shapes(a, b))
    s.add(op, [s.input(a), s.input(b)], shape)
    x, y = sample(*a), torch.randn(b) + 3
    view = s.view()
    check(NativePointwise(), view, x, y)
    if x.dim() > 1:
        check(
            NativePointwise(),
            view,
            x.t().contiguous().t() if x.dim() == 2 else x.transpose(0, 1).contiguous().transpose(0, 1),
            y,
        )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.lists(st.integers(0, 31), min_size=1, max_size=3),
    st.randoms(),
)
def test_axes_read_what_broadcasting_reads(shape: list[int], masks: list[int], random: Any) -> None:
    """Walking the axes in order visits, for every output element, the element that broadcasting gives."""
    inputs = [tuple(1 if m >> i & 1 else n for i, n in enumerate(shape)) for m in masks]
    order = list(range(len(shape)))
    random.shuffle(order)
    axes = axes_of(shape, inputs, order)
    assert axes is not None
    for own, strides in zip(inputs, axes.strides):
        x = torch.arange(torch.Size(own).numel()).reshape(own)
        memory = x.permute(order).reshape(-1)
        walked = [
            int(memory[sum(i * s for i, s in zip(at, strides))])
            for at in itertools.product(*(range(n) for n in axes.sizes))
        ]
        assert walked == x.expand(shape).permute(order).reshape(-1).tolist()


def test_a_cluster_in_nhwc() -> None:
    s = Sketch()
    x, y = s.input((2, 19, 5, 6)), s.input((2, 19, 1, 1))
    scaled = s.add("Mul", [x, s.add("Sigmoid", [y], (2, 19, 1, 1))], (2, 19, 5, 6))
    s.add("Add", [scaled, s.weight(torch.randn(19, 1, 1))], (2, 19, 5, 6))
    view = s.view("NHWC")
    nhwc = torch.randn(2, 19, 5, 6).contiguous(memory_format=torch.channels_last)
    check(NativePointwise(), view, nhwc, torch.randn(2, 19, 1, 1))
    check(NativePointwise(), view, nhwc.contiguous(), torch.randn(2, 19, 1, 1))


def test_masks_and_where() -> None:
    s = Sketch()
    x, y = s.input((4, 33)), s.input((33,))
    less = s.add("Less", [x, y], (4, 33), ir.DataType.BOOL)
    both = s.add(
        "And",
        [less, s.add("Not", [s.add("Equal", [x, y], (4, 33), ir.DataType.BOOL)], (4, 33), ir.DataType.BOOL)],
        (4, 33),
        ir.DataType.BOOL,
    )
    s.add("Where", [both, x, y], (4, 33))
    check(NativePointwise(), s.view(), sample(4, 33), torch.zeros(33))


@pytest.mark.parametrize("make", ["string", "int", "output"])
def test_types_without_code_are_refused(make: str) -> None:
    s = Sketch()
    if make == "output":
        s.add("Less", [s.input((4,)), s.input((4,))], (4,), ir.DataType.BOOL)
    else:
        s.add("Add", [s.input((4,), ir.DataType.INT64), s.input((4,), ir.DataType.INT64)], (4,), ir.DataType.INT64)
    assert isinstance(NativePointwise().match(s.view()), str)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 4, 64), (7, 33), (2, 1000)], ids=str)
def test_rows(op: str, shape: Any) -> None:
    s = Sketch()
    x = s.input(shape)
    n = shape[-1]
    extra = [s.weight(torch.randn(n))] if "Norm" in op else []
    extra += [s.weight(torch.randn(n))] if op == "LayerNormalization" else []
    s.add(op, [x, *extra], shape, axis=-1)
    check(NativeRows(), s.view(), torch.randn(shape) * 2 + 1)


def test_rows_with_neighbours_and_nan() -> None:
    s = Sketch()
    x, y, mask = s.input((2, 3, 40)), s.input((2, 3, 40)), s.input((2, 1, 40))
    total = s.add("Add", [x, y], (2, 3, 40))
    masked = s.add("Add", [total, mask], (2, 3, 40))
    soft = s.add("Softmax", [masked], (2, 3, 40), axis=-1)
    s.add("Mul", [soft, s.weight(torch.tensor(3.0))], (2, 3, 40))
    bad = torch.randn(2, 3, 40)
    bad[0, 1, 7] = float("nan")
    hidden = torch.zeros(2, 1, 40)
    hidden[:, :, 30:] = -float("inf")
    check(NativeRows(), s.view(), bad, torch.randn(2, 3, 40), hidden)


def test_norm_over_two_dimensions() -> None:
    s = Sketch()
    s.add(
        "LayerNormalization",
        [s.input((3, 4, 5)), s.weight(torch.randn(4, 5)), s.weight(torch.randn(4, 5))],
        (3, 4, 5),
        axis=1,
    )
    check(NativeRows(), s.view(), torch.randn(3, 4, 5))


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(
    "attrs",
    [
        dict(kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        dict(kernel_shape=[2, 3]),
        dict(kernel_shape=[3, 2], strides=[2, 2], ceil_mode=1),
        dict(kernel_shape=[2, 2], dilations=[2, 1], auto_pad="SAME_UPPER"),
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [1, 16, 35])
def test_pool(op: str, attrs: dict[str, Any], channels: int) -> None:
    s = Sketch()
    s.add(op, [s.input((2, channels, 9, 8))], ("n", channels, "h", "w"), **attrs)
    view = s.view()
    x = torch.randn(2, channels, 9, 8)
    x[0, 0, 3, 3] = float("nan")
    check(NativePool(), view, x)
    check(NativePool(), view, x.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("shape", [(2, 35, 7, 7), (1, 16, 1, 1), (3, 5, 2, 9)], ids=str)
def test_means_over_the_image(shape: Any) -> None:
    s = Sketch()
    s.add("GlobalAveragePool", [s.input(shape)], (*shape[:2], 1, 1))
    check(NativePool(), s.view(), torch.randn(shape))
    s = Sketch()
    axes = ir.Value(
        name="axes", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.INT64), const_value=ir.tensor([-1, 2])
    )
    s.weights["axes"] = torch.tensor([-1, 2])
    s.add("ReduceMean", [s.input(shape), axes], shape[:2], keepdims=0)
    check(NativePool(), s.view(), torch.randn(shape))


def test_empty_inputs_go_to_the_reference() -> None:
    s = Sketch()
    s.add("Add", [s.input((0, 3)), s.input((3,))], (0, 3))
    kernel = NativePointwise().bind(s.view(), {})
    assert kernel.run(torch.empty(0, 3), torch.randn(3)).shape == (0, 3)
