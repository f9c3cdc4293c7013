"""Convolutions and products of bf16, by a matrix unit and in registers, against fp64: sizes that fill no tile, edges, strides, NaN, schedules."""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx_ir as ir
import pytest
import torch

from tests.backends.cpu.harness import isas, run
from tests.backends.cpu.test_native_clusters import Sketch, check
from tests.backends.cpu.test_native_conv import SHAPES, _problem
from venturi.backends.base import tolerance
from venturi.backends.cpu.codegen.activation import Post
from venturi.backends.cpu.codegen.element import BF16, S8, U8, Element
from venturi.backends.cpu.codegen.geometry import ConvGeometry
from venturi.backends.cpu.codegen.isa import AMX, DOTS, Isa
from venturi.backends.cpu.codegen.matrix import MatrixSpec, Schedule, emit_matrix, pack_matrix
from venturi.backends.cpu.native.jit import optimized
from venturi.backends.cpu.native.matrix import group_rows, matrix_configs, tile_rows
from venturi.backends.cpu.tactics.native_matrix import NativeMatrixConv, NativeMatrixLinear
from venturi.ops.table import find_op

T = torch.Tensor
HOST = isas()[0]
NEEDS_UNIT = pytest.mark.skipif(
    not isinstance(HOST, Isa) or not HOST.unit(quantized=False), reason="this CPU does not multiply bf16"
)


@pytest.fixture(params=["tiles", "dots"])
def isa(request: pytest.FixtureRequest) -> Isa:
    """The host, as if it had only one of the two."""
    if not isinstance(HOST, Isa) or not (HOST.tiles if request.param == "tiles" else HOST.rounds_bf16):
        pytest.skip("this CPU has no matrix unit" if request.param == "tiles" else "this CPU has no products of pairs")
    return HOST if request.param == "tiles" else dataclasses.replace(HOST, tiles=False)


SCHEDULES = [Schedule(1, 1, False), Schedule(3, 2, False), Schedule(2, 9, True), Schedule(99, 1, True)]


def compute(
    isa: Isa, shape: Any, schedule: Schedule, x: T, weight: T, bias: T | None, geometry: ConvGeometry, want: T,
    post: Post, residual: T | None = None,
) -> T:  # fmt: skip
    flat, count = geometry.flat(), x.shape[0]
    if flat.width == 0:
        count *= geometry.height * geometry.width
    pixels = want.numel() // want.shape[1]
    unit = isa.unit(quantized=False)
    spec = MatrixSpec(flat, *group_rows(pixels, unit), bias is not None, post, unit=unit)
    packed = pack_matrix(weight)
    room = 64
    memory = torch.full((want.numel() + 2 * room,), 7.0, dtype=torch.bfloat16)
    inner = memory[room : room + want.numel()]
    words = [
        x.data_ptr(), packed.data_ptr(), 0 if bias is None else bias.data_ptr(),
        0 if residual is None else residual.data_ptr(), inner.data_ptr(), count, *schedule.words(spec, count),
    ]  # fmt: skip
    run(isa, repr(spec), emit_matrix(isa, spec), words, schedule.tasks(spec, count))
    assert bool((memory[:room] == 7).all()), "written in front of the output"
    assert bool((memory[-room:] == 7).all()), "written behind the output"
    n, k, oh, ow = want.shape
    return inner.view(n, oh, ow, k).permute(0, 3, 1, 2)


def problem(shape: Any) -> tuple[ConvGeometry, T, T, T, T]:
    """The inputs rounded to bf16, the answer for these in fp64."""
    geometry, x, weight, bias, _ = _problem(shape)
    x, weight = x.bfloat16(), weight.bfloat16()
    top, left, bottom, right = geometry.pads
    padded = torch.nn.functional.pad(x.double(), (left, right, top, bottom))
    want = torch.nn.functional.conv2d(padded, weight.double(), bias.double(), geometry.strides, 0, geometry.dilations)
    return geometry, x, weight, bias, want


def close(got: T, want: T) -> None:
    op = find_op("", "Conv")
    assert op is not None
    assert torch.equal(torch.isfinite(got), torch.isfinite(want))
    assert torch.equal(torch.isnan(got), torch.isnan(want))
    finite = torch.isfinite(want)
    if bool(finite.any()):
        error = (got.double() - want)[finite].abs().max()
        assert error <= tolerance(op.ulps, torch.bfloat16) * want[finite].abs().max()


MORE = [
    (32, 64, 9, 9, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    (64, 40, 4, 4, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    (96, 33, 19, 17, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    (64, 32, 14, 14, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2),
    (40, 16, 8, 8, (3, 3), (2, 2), (0, 0, 1, 1), (1, 1), 3),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + MORE, ids=str)
def test_convolution(isa: Isa, shape: Any, schedule: Schedule) -> None:
    geometry, x, weight, bias, want = problem(shape)
    close(compute(isa, shape, schedule, x, weight, bias, geometry, want, Post()), want)


@pytest.mark.parametrize("shape", [SHAPES[0], MORE[2]], ids=str)
def test_schedules_agree_bit_for_bit(isa: Isa, shape: Any) -> None:
    geometry, x, weight, bias, want = problem(shape)
    results = [compute(isa, shape, s, x, weight, bias, geometry, want, Post("Relu")) for s in SCHEDULES]
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], MORE[0]], ids=str)
def test_epilogue(isa: Isa, shape: Any, first: bool) -> None:
    geometry, x, weight, _, want = problem(shape)
    want = want - problem(shape)[3].double()[:, None, None]
    residual = torch.randn(want.shape).bfloat16().contiguous(memory_format=torch.channels_last)
    post = Post("Relu", residual=True, activation_first=first)
    want = want.relu() + residual if first else (want + residual).relu()
    close(compute(isa, shape, SCHEDULES[1], x, weight, None, geometry, want, post, residual), want)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], MORE[0]], ids=str)
def test_what_is_not_finite_stays_where_it_belongs(isa: Isa, shape: Any, value: float) -> None:
    """The padding of pixels, of channels and of K multiplies none of it."""
    geometry, x, weight, bias, _ = problem(shape)
    x[0, 0, 0, 0] = x[-1, -1, -1, -1] = value
    top, left, bottom, right = geometry.pads
    padded = torch.nn.functional.pad(x.double(), (left, right, top, bottom))
    want = torch.nn.functional.conv2d(padded, weight.double(), bias.double(), geometry.strides, 0, geometry.dilations)
    close(compute(isa, shape, SCHEDULES[1], x, weight, bias, geometry, want, Post()), want)


@pytest.mark.parametrize(
    "geometry", [ConvGeometry(9, 9, 20, 40, (3, 3), (2, 2), (1, 1, 1, 1)), ConvGeometry(1, 0, 64, 48)]
)
def test_code_compiles_for_the_unit_anywhere(geometry: ConvGeometry) -> None:
    pytest.importorskip("llvmlite")
    spec = MatrixSpec(geometry, 16, 2, True, Post("Gelu", residual=True))
    module, machine = optimized(AMX, emit_matrix(AMX, spec))
    text = machine.emit_assembly(module)
    assert text.count("tdpbf16ps") == 6, "two tiles of pixels by two of weights, or by one where few channels are left"
    assert "vcvtneps2bf16" in text
    assert text.count("ldtilecfg") == text.count("tilerelease") == 1


@pytest.mark.parametrize("image, name", [(BF16, "vdpbf16ps"), (U8, "vpdpbusd"), (S8, "vpdpbusd")], ids=str)
def test_code_for_registers_compiles_anywhere(image: Element, name: str) -> None:
    pytest.importorskip("llvmlite")
    geometry = ConvGeometry(9, 9, 20, 40, (3, 3), (2, 2), (1, 1, 1, 1))
    spec = MatrixSpec(geometry, 14, 1, True, Post("Relu"), image, out=image, unit="dots")
    module, machine = optimized(DOTS, emit_matrix(DOTS, spec))
    text = machine.emit_assembly(module)
    assert text.count(name) == 4 * 14 * (2 + 1), "four groups at a time, and one half where few channels are left"
    loop = text[text.index(name) : text.rindex(name)]
    assert "(%rsp)" not in loop, "sums are spilled"


def test_what_a_group_touches_is_asked_for_while_it_is_multiplied() -> None:
    pytest.importorskip("llvmlite")

    def code(spec: MatrixSpec) -> str:
        module, machine = optimized(DOTS, emit_matrix(DOTS, spec))
        return str(machine.emit_assembly(module))

    def spec(channels: int, residual: bool, image: Element = BF16) -> MatrixSpec:
        flat = ConvGeometry(9, 9, channels, 64, (1, 1), (1, 1), (0, 0, 0, 0)).flat()
        return MatrixSpec(flat, 14, 1, True, Post("Relu", residual=residual), image, out=image, unit="dots")

    weights, pixels = 8, 4
    for channels, rows in ((64, 2), (512, 1), (1024, 1)):
        loops = 2 if channels > 64 else 1
        plain, added = code(spec(channels, False)), code(spec(channels, True))
        assert plain.count("prefetchw") == added.count("prefetchw") == rows
        assert plain.count("prefetcht0") == loops * (weights + pixels)
        assert added.count("prefetcht0") == loops * (weights + pixels) + rows, "the residual's lines"
    assert code(spec(2048, False)).count("prefetcht0") == 2 * weights, "gathered: they would meet in one set"
    assert not spec(2048, False, U8).gathers
    assert spec(4096, False, U8).gathers


def test_tiles_waste_little() -> None:
    for pixels in range(1, 600):
        rows, tiles = tile_rows(pixels)
        group = rows * tiles
        assert 1 <= rows <= 16
        assert group <= pixels
        computed = -(-pixels // group) * group
        assert computed <= pixels * 1.13 + 1, (pixels, rows, tiles)
        rows, _ = group_rows(pixels, "dots")
        assert 1 <= rows <= min(14, pixels)
        assert -(-pixels // rows) == -(-pixels // 14), "no more groups than needed"


@pytest.mark.parametrize("pixels, out", [(3136, 64), (49, 2048), (1, 1000), (128, 3072), (17, 8), (None, 64)])
@pytest.mark.parametrize("unit", ["tiles", "dots"])
def test_candidates_keep_all_threads_busy_where_they_can(unit: str, pixels: int | None, out: int) -> None:
    found = matrix_configs((out, 64, 1, 1), pixels, 2, unit)
    assert found
    assert len({tuple(c.items()) for c in found}) == len(found)
    for c in found:
        assert c["groups"] >= 1
        assert 1 <= c["blocks"] <= -(-out // 32)


def conv_view(kind: ir.DataType = ir.DataType.BFLOAT16, group: int = 1, channels: int = 20) -> Any:
    s = Sketch(kind)
    weight = s.weight((torch.randn(24, channels // group, 3, 3) / 9).to(torch.bfloat16))
    y = s.add(
        "Conv", [s.input((2, channels, 9, 7)), weight, s.weight(torch.randn(24).bfloat16())], (2, 24, 9, 7),
        group=group, kernel_shape=[3, 3], pads=[1, 1, 1, 1],
    )  # fmt: skip
    s.add("Relu", [y], (2, 24, 9, 7))
    return s.view("NHWC")


@NEEDS_UNIT
def test_tactics() -> None:
    x = torch.randn(2, 20, 9, 7).bfloat16().contiguous(memory_format=torch.channels_last)
    check(NativeMatrixConv(), conv_view(), x)
    s = Sketch(ir.DataType.BFLOAT16)
    y = s.add("MatMul", [s.input((3, 5, 40)), s.weight((torch.randn(40, 70) / 7).bfloat16())], (3, 5, 70))
    s.add("Gelu", [y], (3, 5, 70))
    check(NativeMatrixLinear(), s.view(), torch.randn(3, 5, 40).bfloat16())


@NEEDS_UNIT
def test_what_they_leave_to_others() -> None:
    assert NativeMatrixConv().match(conv_view(group=2)) == "grouped"
    s = Sketch()
    s.add("MatMul", [s.input((3, 40)), s.weight(torch.randn(40, 70))], (3, 70))
    assert NativeMatrixLinear().match(s.view()) == "not bf16"
    s = Sketch(ir.DataType.BFLOAT16)
    s.add("MatMul", [s.input((3, 40000)), s.weight(torch.zeros(40000, 8).bfloat16())], (3, 8))
    assert "more than 32768" in str(NativeMatrixLinear().match(s.view()))
