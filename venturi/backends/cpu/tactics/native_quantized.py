"""Convolutions and products of bytes that stand for numbers (Q/DQ models), on a matrix unit or in vector registers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
import torch

from venturi.backends.base import Config, Kernel, RegionView, Routine
from venturi.backends.cpu.codegen.element import BYTES, OF_GRAPH
from venturi.backends.cpu.codegen.geometry import ConvGeometry
from venturi.backends.cpu.codegen.isa import Isa, host
from venturi.backends.cpu.epilogue import Epilogue
from venturi.backends.cpu.native.contraction import post_of
from venturi.backends.cpu.native.kernel import NativeKernel, Shapes
from venturi.backends.cpu.native.matrix import MOST_TAPS, Matrix, Stored, matrix_configs
from venturi.backends.cpu.native.walker import max_threads
from venturi.backends.cpu.tactics.conv import read_conv
from venturi.backends.cpu.tactics.gemm import read_linear
from venturi.backends.cpu.tactics.native_conv import geometry_of
from venturi.backends.cpu.tactics.native_linear import linear_sizes
from venturi.backends.cpu.tactics.reference import Reference
from venturi.ir.build import get_attr, static_shape
from venturi.ir.dtypes import DT
from venturi.ops.quantize import dequantize_linear

T = torch.Tensor
_ENDS = ("DequantizeLinear", "QuantizeLinear")


class RealView(RegionView):
    """A quantized Region as if all its numbers were real: without its ends, what is dequantized in it being its
    inputs and constants."""

    def __init__(self, region: RegionView) -> None:
        self._back = {n.outputs[0]: n for n in region.nodes if n.op_type == "DequantizeLinear"}
        super().__init__(region.node, region.weights)
        self.end = self.nodes[-1] if self.nodes[-1].op_type == "QuantizeLinear" else None
        self.nodes = [n for n in self.nodes if n.op_type not in _ENDS]

    def dequantizer(self, value: ir.Value | None) -> ir.Node | None:
        return None if value is None else self._back.get(value)

    def reader(self, value: ir.Value) -> ir.Node | None:
        """The node that dequantizes an input."""
        return next((n for n in self._back.values() if n.inputs[0] is value), None)

    def stored(self, value: ir.Value | None) -> Any:
        """The integers behind a dequantized constant."""
        back = self.dequantizer(value)
        return None if back is None else super().constant(back.inputs[0])

    def constant(self, value: ir.Value | None) -> Any:
        back = self.dequantizer(value)
        if back is None:
            return super().constant(value)
        parts = [super(RealView, self).constant(v) for v in back.inputs]
        return None if any(p is None for p in parts) else dequantize_linear(*parts, axis=int(get_attr(back, "axis", 1)))

    def is_constant(self, value: ir.Value | None) -> bool:
        back = self.dequantizer(value)
        return super().is_constant(value if back is None else back.inputs[0])

    def position(self, value: ir.Value | None) -> int | None:
        back = self.dequantizer(value)
        return super().position(value if back is None else back.inputs[0])

    def numbers(self, node: ir.Node | None, value: ir.Value | None) -> Stored | None:
        """How `value` is stored, when `node` (de)quantizes it with one scale; as it is where there is no node."""
        kind = None if value is None else value.dtype
        if node is None:
            return Stored(OF_GRAPH[kind]) if kind in OF_GRAPH else None  # type: ignore[index]
        scale = super().constant(node.inputs[1])
        zero = super().constant(node.inputs[2]) if len(node.inputs) > 2 else torch.zeros(1)
        if kind not in BYTES or scale is None or zero is None or scale.numel() != 1 or zero.numel() != 1:
            return None
        return Stored(BYTES[kind], float(scale), int(zero))  # type: ignore[index]


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


def read_quantized(region: RegionView) -> Quantized | str:
    if region.kind != "quantized" or len(region.outputs) != 1:
        return "not a quantized contraction"
    real = RealView(region)
    node, end = real.anchor, real.end
    back = real.dequantizer(node.inputs[0])
    image = None if back is None else real.numbers(back, back.inputs[0])
    out = real.numbers(end, region.outputs[0])
    if image is None or out is None or (end is None and region.outputs[0].dtype != DT.FLOAT):
        return "inputs or outputs have more than one scale"
    if node.op_type == "Conv":
        return _read_conv(real, image, out)
    return _read_linear(real, image, out)


def _read_conv(real: RealView, image: Stored, out: Stored) -> Quantized | str:
    spec = read_conv(real)
    if isinstance(spec, str):
        return spec
    if spec.weight.dim() != 4:
        return "not a 2-D convolution"
    scales = _scales(real, 0, spec.weight.shape[0])
    residual = _residual(real, spec.epilogue)
    if isinstance(scales, str) or residual is None:
        return scales if isinstance(scales, str) else "the residual has more than one scale"
    weight = real.stored(real.anchor.inputs[1])
    return Quantized(
        weight, scales, spec.bias, spec.epilogue, image, residual, out, partial(geometry_of, spec),
        torch.channels_last, spec.group,
    )  # fmt: skip


def _read_linear(real: RealView, image: Stored, out: Stored) -> Quantized | str:
    spec = read_linear(real)
    if isinstance(spec, str):
        return spec
    width, depth = spec.weight.shape
    across = real.anchor.op_type == "MatMul" or not get_attr(real.anchor, "transB", 0)
    scales = _scales(real, 1 if across else 0, width)
    residual = _residual(real, spec.epilogue)
    if isinstance(scales, str) or residual is None:
        return scales if isinstance(scales, str) else "the residual has more than one scale"
    stored = real.stored(real.anchor.inputs[1])
    weight = (stored.T if across else stored).contiguous()[:, :, None, None]
    sizes = partial(linear_sizes, width, depth, spec.epilogue.residual)
    layout = torch.contiguous_format
    return Quantized(weight, scales, spec.bias, spec.epilogue, image, residual, out, sizes, layout)


def _scales(real: RealView, axis: int, count: int) -> T | str:
    """[count] from the weights' DequantizeLinear: symmetric, one scale or one an output channel."""
    back = real.dequantizer(real.anchor.inputs[1])
    stored = real.stored(real.anchor.inputs[1])
    if back is None or stored is None or stored.dtype != torch.int8 or get_attr(back, "block_size", 0):
        return "weights are not int8"
    scale = RegionView.constant(real, back.inputs[1])
    zero = RegionView.constant(real, back.inputs[2]) if len(back.inputs) > 2 else None
    if scale is None or scale.dtype != torch.float32 or (zero is not None and bool((zero != 0).any())):
        return "weights are not symmetric, or their scale is not a constant in fp32"
    if scale.numel() == 1:
        return torch.full((count,), float(scale))
    if scale.numel() != count or int(get_attr(back, "axis", 1)) % stored.dim() != axis:
        return "weights have scales along another axis than the output's"
    found: T = scale.reshape(-1)
    return found


def _residual(real: RealView, epilogue: Epilogue) -> Stored | None:
    if epilogue.residual is None:
        return Stored(OF_GRAPH[DT.FLOAT])
    value = real.dynamic[epilogue.residual]
    return real.numbers(real.reader(value), value)


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
        matrix = Matrix(isa, q.weight, q.bias, q.epilogue, config, q.image, q.out, q.residual, q.scales)

        def plan(shapes: Shapes) -> Routine | None:
            sizes = q.sizes(shapes)
            return None if sizes is None else matrix.routine(*sizes, [q.layout] * len(shapes))

        return NativeKernel(plan, Reference().bind(region, {}).run).as_kernel()
