"""Products with constant weights by generated code."""

from __future__ import annotations

import math

import torch

from venturi.backends.base import Config, Kernel, RegionView, Routine
from venturi.backends.cpu.codegen.geometry import ConvGeometry
from venturi.backends.cpu.codegen.isa import Isa, host
from venturi.backends.cpu.native.contraction import Direct, direct_configs, post_of
from venturi.backends.cpu.native.kernel import NativeKernel, Shapes
from venturi.backends.cpu.tactics.gemm import LinearSpec, aten_linear, read_linear
from venturi.ir.build import static_shape


def _read(region: RegionView) -> tuple[Isa, LinearSpec] | str:
    isa = host()
    if isinstance(isa, str):
        return isa
    spec = read_linear(region)
    if isinstance(spec, str):
        return spec
    if spec.weight.dtype != torch.float32 or spec.weight.numel() == 0:
        return "not fp32"
    post = post_of(spec.epilogue)
    return post if isinstance(post, str) else (isa, spec)


class NativeLinear:
    """A linear layer as a convolution of one row of pixels."""

    name = "native-linear"

    def match(self, region: RegionView) -> list[Config] | str:
        found = _read(region)
        if isinstance(found, str):
            return found
        isa, spec = found
        size = static_shape(region.anchor.outputs[0])
        rows = None if size is None else math.prod(size[:-1])
        return list(direct_configs(isa, (*spec.weight.shape, 1, 1), rows, rows, tiles=2))

    def bind(self, region: RegionView, config: Config) -> Kernel:
        found = _read(region)
        assert not isinstance(found, str)
        isa, spec = found
        width, depth = spec.weight.shape
        direct = Direct(isa, spec.weight[:, :, None, None], spec.bias, spec.epilogue, config)
        residual = spec.epilogue.residual

        def plan(shapes: Shapes) -> Routine | None:
            shape = (*shapes[0][:-1], width)
            rows = math.prod(shapes[0][:-1])
            if rows == 0 or shapes[0][-1] != depth or (residual is not None and shapes[residual] != shape):
                return None
            return direct.routine(
                ConvGeometry(1, rows, depth, width), 1, shape, [torch.contiguous_format] * len(shapes)
            )

        return NativeKernel(plan, aten_linear(spec)).as_kernel()
