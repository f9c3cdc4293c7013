"""Convolutions and products of bytes that stand for numbers (Q/DQ models), on a matrix unit or in vector registers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from venturi.backends.base import Config, Kernel, RegionView, Routine
from venturi.backends.cpu.codegen.element import BYTES, OF_GRAPH
from venturi.backends.cpu.codegen.geometry import ConvGeometry
from venturi.backends.cpu.codegen.isa import Isa, host
from venturi.backends.cpu.epilogue import Epilogue
from venturi.backends.cpu.native.contraction import post_of
from venturi.backends.cpu.native.kernel import NativeKernel, Shapes
from venturi.backends.cpu.native.matrix import MOST_TAPS, Matrix, Stored, matrix_configs
from venturi.backends.cpu.native.openmp import max_threads
from venturi.backends.cpu.tactics.conv import read_conv
from venturi.backends.cpu.tactics.gemm import read_linear
from venturi.backends.cpu.tactics.native_conv import geometry_of
from venturi.backends.cpu.tactics.native_linear import linear_sizes
from venturi.backends.cpu.tactics.reference import Reference
from venturi.backends.real_view import Numbers, RealView
from venturi.ir.build import get_attr, static_shape
from venturi.ir.dtypes import DT

T = torch.Tensor


@dataclass(frozen=True)
class Quantized:
    """What a kernel needs: weights [out, in, kh, kw] in bytes, a scale for each output channel, the three tensors'
    numbers, the sizes at given input shapes, how tensors lie, and the number of groups of channels."""

    weight: T
    scales: T
    bias: T | None
    epilogue: Epilogue
    image: Stored
    residual: Stored
    out: Stored
    sizes: Callable[[Shapes], tuple[ConvGeometry, int, tuple[int, ...]] | None]
    layout: torch.memory_format
    group: int = 1
    within: Stored | None = None


def read_quantized(region: RegionView) -> Quantized | str:
    if region.kind != "quantized" or len(region.outputs) != 1:
        return "not a quantized contraction"
    real = RealView(region)
    node, end = real.anchor, real.end
    back = real.dequantizer(node.inputs[0])
    image = None if back is None else _stored(real.numbers(back, back.inputs[0]))
    out = _stored(real.numbers(end, region.outputs[0]))
    if image is None or out is None or (end is None and region.outputs[0].dtype != DT.FLOAT):
        return "inputs or outputs have more than one scale"
    within = _within(real)
    if isinstance(within, str):
        return within
    found = _read_conv(real, image, out) if node.op_type == "Conv" else read_linear_of_bytes(real, image, out)
    return found if isinstance(found, str) else replace(found, within=within)


def _within(real: RealView) -> Stored | str | None:
    """How sums are rounded before the rest of the epilogue, if they are."""
    ops = [n.op_type for n in real.nodes[1:]]
    if "QuantizeLinear" not in ops:
        return None
    if ops[:2] != ["QuantizeLinear", "DequantizeLinear"] or "QuantizeLinear" in ops[2:]:
        return "rounds elsewhere than right behind the sums"
    return _stored(real.numbers(real.nodes[1], real.nodes[1].outputs[0])) or "a rounding with more than one scale"


def _read_conv(real: RealView, image: Stored, out: Stored) -> Quantized | str:
    spec = read_conv(real)
    if isinstance(spec, str):
        return spec
    if spec.weight.dim() != 4:
        return "not a 2-D convolution"
    scales = real.weight_scales(0, spec.weight.shape[0])
    residual = _residual(real, spec.epilogue)
    if isinstance(scales, str) or residual is None:
        return scales if isinstance(scales, str) else "the residual has more than one scale"
    weight = real.stored(real.anchor.inputs[1])
    return Quantized(
        weight, scales, spec.bias, spec.epilogue, image, residual, out, partial(geometry_of, spec),
        torch.channels_last, spec.group,
    )  # fmt: skip


def read_linear_of_bytes(real: RealView, image: Stored, out: Stored) -> Quantized | str:
    """A product with int8 weights."""
    spec = read_linear(real)
    if isinstance(spec, str):
        return spec
    width, depth = spec.weight.shape
    across = real.anchor.op_type == "MatMul" or not get_attr(real.anchor, "transB", 0)
    scales = real.weight_scales(1 if across else 0, width)
    residual = _residual(real, spec.epilogue)
    if isinstance(scales, str) or residual is None:
        return scales if isinstance(scales, str) else "the residual has more than one scale"
    stored = real.stored(real.anchor.inputs[1])
    weight = (stored.T if across else stored).contiguous()[:, :, None, None]
    sizes = partial(linear_sizes, width, depth, spec.epilogue.residual)
    layout = torch.contiguous_format
    return Quantized(weight, scales, spec.bias, spec.epilogue, image, residual, out, sizes, layout)


def _stored(numbers: Numbers | None) -> Stored | None:
    known = None if numbers is None else (BYTES | OF_GRAPH).get(numbers.dtype)
    return None if known is None or numbers is None else Stored(known, numbers.scale, numbers.zero)


def _residual(real: RealView, epilogue: Epilogue) -> Stored | None:
    if epilogue.residual is None:
        return Stored(OF_GRAPH[DT.FLOAT])
    value = real.dynamic[epilogue.residual]
    return _stored(real.numbers(real.reader(value), value))


def read_generated(region: RegionView) -> tuple[Isa, Quantized] | str:
    """A quantized contraction that code can be generated for."""
    isa = host()
    if isinstance(isa, str):
        return isa
    spec = read_quantized(region)
    if isinstance(spec, str):
        return spec
    post = post_of(spec.epilogue)
    if isinstance(post, str):
        return post
    taps = spec.weight[:1].numel()
    image = RealView(region).anchor.inputs[0]
    if not 0 < taps <= MOST_TAPS:
        return f"{taps} products a result, more than {MOST_TAPS} or none"
    fixed = image is not None and image.shape is not None and all(isinstance(d, int) for d in list(image.shape)[2:])
    if spec.layout == torch.channels_last and not fixed:
        return "code would depend on the image's size, which is only known at run time"
    return isa, spec


class NativeQuantized:
    """Bytes in, sums in 32 bits, one rounding at the end."""

    name = "native-quantized"

    def match(self, region: RegionView) -> list[Config] | str:
        found = read_generated(region)
        if isinstance(found, str):
            return found
        unit = found[0].unit(quantized=True)
        if not unit or found[1].group != 1:
            return "grouped" if unit else "the CPU does not multiply bytes"
        real = RealView(region)
        size = static_shape(real.anchor.outputs[0])
        pixels = None
        if size is not None:
            pixels = math.prod(size[:-1]) if found[1].layout == torch.contiguous_format else math.prod(size) // size[1]
        return list(matrix_configs(found[1].weight.shape, pixels, max_threads(), unit))

    def bind(self, region: RegionView, config: Config) -> Kernel:
        found = read_generated(region)
        assert not isinstance(found, str)
        isa, q = found
        matrix = Matrix(isa, q.weight, q.bias, q.epilogue, config, q.image, q.out, q.residual, q.scales, q.within)

        def plan(shapes: Shapes) -> Routine | None:
            sizes = q.sizes(shapes)
            return None if sizes is None else matrix.routine(*sizes, [q.layout] * len(shapes))

        return NativeKernel(plan, Reference().bind(region, {}).run).as_kernel()
