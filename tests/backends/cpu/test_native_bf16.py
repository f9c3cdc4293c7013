"""Generated code on bf16: conversions bit for bit, then every kind of kernel against the reference."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch

from tests.backends.cpu.harness import isas, run
from tests.backends.cpu.test_native_clusters import Sketch, check, sample
from venturi.backends.cpu.codegen.element import BF16, FLOAT
from venturi.backends.cpu.codegen.emit import Emitter
from venturi.backends.cpu.tactics.native_cluster import NativePointwise, NativeRows
from venturi.backends.cpu.tactics.native_depthwise import NativeDepthwise
from venturi.backends.cpu.tactics.native_pool import NativePool

ISAS = pytest.mark.parametrize("isa", isas(), ids=lambda i: getattr(i, "name", "none"))
pytestmark = pytest.mark.skipif(isas()[0] is None or not hasattr(isas()[0], "name"), reason="no code generation here")
DT = ir.DataType
T = torch.Tensor
SMALLEST_NORMAL = 2.0**-126


def convert(isa: Any, x: T, to: torch.dtype) -> T:
    """Through a vector register, whole vectors and a masked rest."""
    e = Emitter(isa)
    kinds = {torch.float32: FLOAT, torch.bfloat16: BF16}
    source, out = e.pointer(0, kinds[x.dtype]), e.pointer(1, kinds[to])
    whole = len(x) - len(x) % isa.lanes
    e.each(0, whole, isa.lanes, lambda i: e.store(e.load(e.at(source, i)), e.at(out, i)))
    if whole < len(x):
        e.store(e.load(e.at(source, whole), len(x) - whole), e.at(out, whole), len(x) - whole)
    y = torch.full((len(x) + isa.lanes,), 7.0, dtype=to)
    run(isa, f"convert {x.dtype} {to} {len(x)}", e.finish(), [x.data_ptr(), y.data_ptr()], 1)
    assert bool((y[len(x) :] == 7).all()), "written beyond the end"
    return y[: len(x)]


@ISAS
def test_every_bf16_number_widens(isa: Any) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    assert torch.equal(convert(isa, every, torch.float32).view(torch.int32), every.float().view(torch.int32))


@ISAS
def test_fp32_rounds_to_nearest_even(isa: Any) -> None:
    """Ties, their neighbours and random bits, NaN aside; numbers below 2^-126 may become 0."""
    torch.manual_seed(0)
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    bits = [upper | low for low in (0x7FFF, 0x8000, 0x8001, 0)] + [torch.randint(-(2**31), 2**31 - 1, (100003,))]
    x = torch.cat([b.to(torch.int32) for b in bits]).view(torch.float32)
    got, want = convert(isa, x, torch.bfloat16), x.bfloat16()
    assert torch.equal(got.isnan(), x.isnan())
    tiny = x.abs() < SMALLEST_NORMAL
    same = got.view(torch.int16) == want.view(torch.int16)
    assert bool((same | x.isnan() | (tiny & ((got == 0) | same))).all())


def bf16(*shape: int) -> T:
    return sample(*shape).bfloat16()


@pytest.mark.parametrize("op", ["Relu", "Sigmoid", "Gelu", "HardSwish", "Exp", "Sqrt"])
@pytest.mark.parametrize("shape", [(1,), (2, 16, 33), (9001,)], ids=str)
def test_unary(op: str, shape: Any) -> None:
    s = Sketch(DT.BFLOAT16)
    s.add(op, [s.input(shape)], shape)
    check(NativePointwise(), s.view(), torch.randn(shape).abs().bfloat16() if op == "Sqrt" else bf16(*shape))


def test_a_cluster_that_broadcasts_and_casts() -> None:
    """fp32 in, bf16 within and beside, fp32 out."""
    s = Sketch(DT.BFLOAT16)
    x, y = s.input((3, 5, 20), DT.FLOAT), s.input((5, 1))
    narrow = s.add("Cast", [x], (3, 5, 20), to=int(DT.BFLOAT16))
    total = s.add("Add", [narrow, y], (3, 5, 20))
    scaled = s.add("Mul", [total, s.weight(torch.randn(20).bfloat16())], (3, 5, 20))
    s.add("Cast", [scaled], (3, 5, 20), DT.FLOAT, to=int(DT.FLOAT))
    check(NativePointwise(), s.view(), sample(3, 5, 20), bf16(5, 1))


@pytest.mark.parametrize("columns", [1, 16, 33, 197, 1000])
def test_softmax_and_norm(columns: int) -> None:
    s = Sketch(DT.BFLOAT16)
    s.add("Softmax", [s.input((3, 4, columns))], (3, 4, columns), axis=-1)
    check(NativeRows(), s.view(), torch.randn(3, 4, columns).bfloat16())
    s = Sketch(DT.BFLOAT16)
    x, skip, shape = s.input((6, columns)), s.input((6, columns)), (6, columns)
    total = s.add("Add", [x, skip], shape)
    scale, bias = s.weight(torch.randn(columns).bfloat16()), s.weight(torch.randn(columns).bfloat16())
    s.add("LayerNormalization", [total, scale, bias], shape, axis=-1)
    check(NativeRows(), s.view(), torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16())


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "GlobalAveragePool"])
@pytest.mark.parametrize("channels", [3, 16, 70])
def test_pooling(op: str, channels: int) -> None:
    s = Sketch(DT.BFLOAT16)
    shape = (2, channels, 9, 11)
    out = (2, channels, 1, 1) if op.startswith("Global") else (2, channels, 5, 6)
    attrs = {} if op.startswith("Global") else {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    s.add(op, [s.input(shape)], out, **attrs)
    check(NativePool(), s.view("NHWC"), torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("channels", [5, 32, 70])
def test_depthwise(channels: int) -> None:
    s = Sketch(DT.BFLOAT16)
    shape = (2, channels, 9, 11)
    weight = s.weight(torch.randn(channels, 1, 3, 3).bfloat16())
    y = s.add(
        "Conv", [s.input(shape), weight, s.weight(torch.randn(channels).bfloat16())], shape, group=channels,
        kernel_shape=[3, 3], pads=[1, 1, 1, 1],
    )  # fmt: skip
    s.add("HardSwish", [y], shape)
    check(
        NativeDepthwise(), s.view("NHWC"), torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last)
    )
