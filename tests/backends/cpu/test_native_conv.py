"""Generated convolutions against fp64: sizes that fill no vector, edges, strides, epilogues, NaN."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.backends.cpu.harness import isas, run
from venturi.backends.base import tolerance
from venturi.backends.cpu.codegen.activation import ACTIVATIONS, Post
from venturi.backends.cpu.codegen.depthwise import DepthwiseSpec, emit_depthwise, pack_depthwise
from venturi.backends.cpu.codegen.direct import DirectSpec, emit_direct, pack_weights
from venturi.backends.cpu.codegen.geometry import ConvGeometry
from venturi.backends.cpu.codegen.winograd import WinogradSpec, emit_patches, emit_products, pack_winograd
from venturi.ops.table import find_op

T = torch.Tensor
PLAIN = Post()
ISAS = pytest.mark.parametrize("isa", isas(), ids=lambda i: getattr(i, "name", "none"))
# in, out, height, width, kernel, stride, pads (top, left, bottom, right), dilation, batch
SHAPES = [
    (5, 19, 9, 11, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2),
    (3, 33, 17, 17, (7, 7), (2, 2), (3, 3, 3, 3), (1, 1), 1),
    (16, 64, 7, 7, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 3),
    (33, 100, 6, 9, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 1),
    (4, 16, 12, 10, (3, 2), (1, 2), (2, 0, 1, 1), (2, 1), 1),
    (7, 8, 5, 5, (5, 5), (1, 1), (2, 2, 2, 2), (1, 1), 2),
    (9, 17, 20, 6, (3, 3), (1, 1), (1, 1, 1, 1), (1, 3), 1),
    (2, 1, 1, 1, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
]


def _problem(shape: Any, groups: int = 1) -> tuple[ConvGeometry, T, T, T, T]:
    c, k, h, w, kernel, stride, pads, dilation, batch = shape
    g = torch.Generator().manual_seed(1)
    geometry = ConvGeometry(h, w, c, k, kernel, stride, pads, dilation)
    x = torch.randn(batch, c, h, w, generator=g).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(k, c // groups, *kernel, generator=g) * 0.3
    bias = torch.randn(k, generator=g)
    top, left, bottom, right = pads
    padded = F.pad(x.double(), (left, right, top, bottom))
    want = F.conv2d(padded, weight.double(), bias.double(), stride, 0, dilation, groups)
    assert (geometry.out_height, geometry.out_width) == tuple(want.shape[2:])
    return geometry, x, weight, bias, want


def _close(got: T, want: T, ulps: float | None = None) -> None:
    op = find_op("", "Conv")
    assert op is not None
    assert torch.equal(torch.isfinite(got), torch.isfinite(want))
    finite = torch.isfinite(want)
    error = (got.double() - want)[finite].abs().max() if bool(finite.any()) else torch.tensor(0.0)
    assert error <= tolerance(ulps or op.ulps, torch.float32) * want[finite].abs().max()


def _output(want: T) -> T:
    return torch.full(want.shape, float("nan")).contiguous(memory_format=torch.channels_last)


def _direct(
    isa: Any,
    shape: Any,
    rows: int,
    vectors: int,
    depth: int,
    first: bool,
    unroll: int = 2,
    post: Post = PLAIN,
    residual: T | None = None,
    block: int = 3,
) -> tuple[T, T]:
    geometry, x, weight, bias, want = _problem(shape)
    flat, count = geometry.flat(), x.shape[0]
    if flat.width == 0:
        count *= geometry.height * geometry.width
    spec = DirectSpec(
        flat, min(rows, flat.out_width if flat.width else count), vectors, block, unroll, depth, first, True, post
    )
    packed = pack_weights(weight, vectors * isa.lanes)
    out = _output(want)
    other = 0 if residual is None else residual.data_ptr()
    words = [x.data_ptr(), packed.data_ptr(), bias.data_ptr(), other, out.data_ptr(), count, 0]
    run(isa, repr(spec), emit_direct(isa, spec), words, spec.tasks(isa, count))
    return out, want


@ISAS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("depth,first", [(0, False), (4, True)])
def test_direct(shape: Any, depth: int, first: bool, isa: Any) -> None:
    rows, vectors = (7, 4) if isa.registers == 32 else (4, 2)
    _close(*_direct(isa, shape, rows, vectors, depth, first))


@ISAS
@pytest.mark.parametrize("rows,vectors,unroll", [(1, 1, 1), (6, 2, 4), (8, 3, 3), (3, 1, 2)])
def test_direct_tiles(rows: int, vectors: int, unroll: int, isa: Any) -> None:
    for depth in (0, 8):
        _close(
            *_direct(isa, (10, 70, 5, 13, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1), rows, vectors, depth, False, unroll)
        )


@pytest.mark.parametrize("isa", isas()[:1], ids=lambda i: getattr(i, "name", "none"))
@pytest.mark.parametrize("name", ["", *ACTIVATIONS])
def test_epilogues(name: str, isa: Any) -> None:
    shape = (8, 20, 4, 6, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    for residual, before in itertools.product((False, True), repeat=2):
        _, _, _, _, want = _problem(shape)
        other = torch.randn(want.shape).contiguous(memory_format=torch.channels_last)
        post = Post(name, 0.3, 0.6, -0.5, 0.7, residual=residual, activation_first=before)
        got, plain = _direct(isa, shape, 6, 2, 0, False, post=post, residual=other if residual else None)
        expected = plain if not residual or before else plain + other
        expected = _activate(name, expected)
        _close(got, expected + other if residual and before else expected)


def _activate(name: str, x: T) -> T:
    return {
        "": lambda: x,
        "Relu": lambda: x.relu(),
        "Clip": lambda: x.clamp(-0.5, 0.7),
        "LeakyRelu": lambda: F.leaky_relu(x, 0.3),
        "Elu": lambda: F.elu(x, 0.3),
        "Sigmoid": lambda: x.sigmoid(),
        "Tanh": lambda: x.tanh(),
        "HardSigmoid": lambda: (x * 0.3 + 0.6).clamp(0, 1),
        "HardSwish": lambda: F.hardswish(x),
        "Swish": lambda: x * torch.sigmoid(0.3 * x),
        "Gelu": lambda: F.gelu(x),
        "Mish": lambda: F.mish(x),
    }[name]()


@ISAS
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("shape", [(16, 16, 8, 8, 1), (5, 19, 9, 11, 2), (20, 70, 3, 2, 1), (8, 8, 1, 1, 3)], ids=str)
@pytest.mark.parametrize("pads", [(1, 1, 1, 1), (2, 1, 1, 2)], ids=str)
def test_winograd(size: int, shape: Any, pads: Any, isa: Any) -> None:
    c, k, h, w, batch = shape
    geometry, x, weight, bias, want = _problem((c, k, h, w, (3, 3), (1, 1), pads, (1, 1), batch))
    got, flag = _winograd(isa, geometry, size, x, weight, bias, want)
    _close(got, want)
    assert flag == 0


def _winograd(isa: Any, geometry: ConvGeometry, size: int, x: T, weight: T, bias: T, want: T) -> tuple[T, int]:
    batch = x.shape[0]
    spec = WinogradSpec(geometry, size, 2, 2, 1, 2, True, Post())
    tiles = spec.tiles(batch)
    spec = dataclasses.replace(spec, rows=min(2, tiles), groups=1 if tiles < 4 else 2)
    packed = pack_winograd(weight, size, 2 * isa.lanes)
    scratch, zeros, out = torch.full((spec.scratch(batch) // 4,), 7.0), torch.zeros(geometry.channels), _output(want)
    run(
        isa,
        f"patches {spec}",
        emit_patches(isa, spec),
        [x.data_ptr(), zeros.data_ptr(), scratch.data_ptr(), tiles],
        tiles,
    )
    words = [scratch.data_ptr(), packed.data_ptr(), bias.data_ptr(), 0, out.data_ptr(), tiles]
    run(isa, f"products {spec}", emit_products(isa, spec), words, spec.product_tasks(isa, batch))
    return out, int(scratch[:2].view(torch.int64)[0])


@ISAS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [(0, 0, 0, 0), (1, 4, 8, 10), (0, 2, 5, 5)], ids=str)
def test_winograd_reports_what_is_not_finite(value: float, at: Any, isa: Any) -> None:
    geometry, x, weight, bias, want = _problem((5, 19, 9, 11, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2))
    x[at] = value
    assert _winograd(isa, geometry, 4, x, weight, bias, want)[1] == 1


@ISAS
@pytest.mark.parametrize("raised", [0, 1])
def test_guarded_kernel_obeys_its_flag(raised: int, isa: Any) -> None:
    geometry, x, weight, bias, want = _problem(SHAPES[0])
    spec = DirectSpec(geometry, 4, 2, 4, 1, 0, False, True, Post())
    packed, out = pack_weights(weight, 2 * isa.lanes), torch.zeros_like(_output(want))
    flag = torch.tensor([raised])
    words = [x.data_ptr(), packed.data_ptr(), bias.data_ptr(), 0, out.data_ptr(), 2, flag.data_ptr()]
    run(isa, repr(spec), emit_direct(isa, spec), words, spec.tasks(isa, 2))
    _close(out, want if raised else torch.zeros_like(want))


@ISAS
@pytest.mark.parametrize("rows,vectors", [(4, 2), (7, 1), (1, 3)])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[4] != (1, 1)], ids=str)
def test_depthwise(shape: Any, rows: int, vectors: int, isa: Any) -> None:
    c = shape[1]
    geometry, x, weight, bias, want = _problem((c, c, *shape[2:]), groups=c)
    spec = DepthwiseSpec(geometry, min(rows, geometry.out_width), vectors, True, Post("Relu"))
    packed, out = pack_depthwise(weight, vectors * isa.lanes), _output(want)
    words = [x.data_ptr(), packed.data_ptr(), bias.data_ptr(), 0, out.data_ptr(), x.shape[0]]
    run(isa, repr(spec), emit_depthwise(isa, spec), words, x.shape[0] * geometry.out_height)
    _close(out, want.relu())
