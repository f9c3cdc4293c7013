"""Convolutions and products in bf16 by generated code: on a matrix unit, or by products of pairs in registers."""

from __future__ import annotations

import math

import torch

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cpu.codegen.element import BF16
from venturi.backends.cpu.codegen.isa import Isa
from venturi.backends.cpu.native.matrix import MOST_TAPS, Matrix, matrix_configs
from venturi.backends.cpu.native.openmp import max_threads
from venturi.backends.cpu.tactics.conv import ConvSpec
from venturi.backends.cpu.tactics.gemm import LinearSpec
from venturi.backends.cpu.tactics.native_conv import bind_conv, read_native_conv
from venturi.backends.cpu.tactics.native_linear import bind_linear, read_native_linear
from venturi.ir.build import static_shape


def _suits(isa: Isa, weight: torch.Tensor) -> str:
    if not isa.unit(quantized=False):
        return "the CPU does not multiply bf16"
    if weight.dtype != torch.bfloat16:
        return "not bf16"
    taps = weight[0].numel()
    return f"{taps} products a result, more than {MOST_TAPS}" if taps > MOST_TAPS else ""


class NativeMatrixConv:
    """Convolution in NHWC, any kernel, stride, dilation and padding, with its epilogue."""

    name = "native-matrix-conv"

    def match(self, region: RegionView) -> list[Config] | str:
        found = self._read(region)
        if isinstance(found, str):
            return found
        size = static_shape(region.anchor.outputs[0])
        pixels = None if size is None else size[0] * size[2] * size[3]
        return list(matrix_configs(found[1].weight.shape, pixels, max_threads(), found[0].unit(quantized=False)))

    def _read(self, region: RegionView) -> tuple[Isa, ConvSpec] | str:
        found = read_native_conv(region, BF16)
        if isinstance(found, str):
            return found
        isa, spec = found
        return _suits(isa, spec.weight) or ("grouped" if spec.group != 1 else found)

    def bind(self, region: RegionView, config: Config) -> Kernel:
        return bind_conv(self._read(region), config, Matrix)


class NativeMatrixLinear:
    """A linear layer as a convolution of one row of pixels."""

    name = "native-matrix-linear"

    def match(self, region: RegionView) -> list[Config] | str:
        found = self._read(region)
        if isinstance(found, str):
            return found
        size = static_shape(region.anchor.outputs[0])
        pixels = None if size is None else math.prod(size[:-1])
        return list(
            matrix_configs((*found[1].weight.shape, 1, 1), pixels, max_threads(), found[0].unit(quantized=False))
        )

    def _read(self, region: RegionView) -> tuple[Isa, LinearSpec] | str:
        found = read_native_linear(region, BF16)
        return found if isinstance(found, str) else _suits(found[0], found[1].weight) or found

    def bind(self, region: RegionView, config: Config) -> Kernel:
        return bind_linear(self._read(region), config, Matrix)
