"""Products whose first operand is made bytes of by its range at run time (dynamic quantization)."""

from __future__ import annotations

import math

import onnx_ir as ir
import torch

from venturi.backends.base import Config, Kernel, RegionView, Routine
from venturi.backends.cpu.codegen.element import FLOAT, U8
from venturi.backends.cpu.codegen.isa import Isa, host
from venturi.backends.cpu.native.contraction import post_of
from venturi.backends.cpu.native.dynamic import DynamicMatrix
from venturi.backends.cpu.native.kernel import NativeKernel, Shapes
from venturi.backends.cpu.native.matrix import MOST_TAPS, Stored, matrix_configs
from venturi.backends.cpu.native.openmp import max_threads
from venturi.backends.cpu.tactics.native_quantized import Quantized, read_linear_of_bytes
from venturi.backends.cpu.tactics.reference import Reference
from venturi.backends.real_view import RealView
from venturi.ir.build import static_shape


class DynamicView(RealView):
    """A Region of kind "dynamic" seen as if its numbers were real: without the rounding in front, and without the
    DequantizeLinear behind that and of the weights."""

    def __init__(self, region: RegionView) -> None:
        super().__init__(region)
        self._rounds, self._back_again = self.nodes[:2]
        self.nodes = self.nodes[2:]

    def position(self, value: ir.Value | None) -> int | None:
        return super().position(self._rounds.inputs[0] if value is self._back_again.outputs[0] else value)


def read_dynamic(region: RegionView) -> tuple[Isa, Quantized] | str:
    isa = host()
    if isinstance(isa, str):
        return isa
    if region.kind != "dynamic":
        return "not a product of numbers that are rounded by their range"
    if not isa.unit(quantized=True):
        return "the CPU does not multiply bytes"
    found = read_linear_of_bytes(DynamicView(region), Stored(U8), Stored(FLOAT))
    if isinstance(found, str):
        return found
    post = post_of(found.epilogue)
    if isinstance(post, str):
        return post
    taps = found.weight[:1].numel()
    return (isa, found) if 0 < taps <= MOST_TAPS else f"{taps} products a result, more than {MOST_TAPS} or none"


class NativeDynamic:
    """Range, bytes and product in one call; the bytes live in scratch memory."""

    name = "native-dynamic"

    def match(self, region: RegionView) -> list[Config] | str:
        found = read_dynamic(region)
        if isinstance(found, str):
            return found
        size = static_shape(DynamicView(region).anchor.outputs[0])
        pixels = None if size is None else math.prod(size[:-1])
        return list(matrix_configs(found[1].weight.shape, pixels, max_threads(), found[0].unit(quantized=True)))

    def bind(self, region: RegionView, config: Config) -> Kernel:
        found = read_dynamic(region)
        assert not isinstance(found, str)
        isa, q = found
        matrix = DynamicMatrix(isa, q.weight, q.scales, q.bias, q.epilogue, config)

        def plan(shapes: Shapes) -> Routine | None:
            sizes = q.sizes(shapes)
            return None if sizes is None else matrix.routine(*sizes, [torch.contiguous_format] * len(shapes))

        return NativeKernel(plan, Reference().bind(region, {}).run).as_kernel()
