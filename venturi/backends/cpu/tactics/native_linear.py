"""Products with constant weights by generated code."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from venturi.backends.base import Config, Kernel, RegionView, Routine
from venturi.backends.cpu.codegen.element import FLOAT, OF_TORCH, Element
from venturi.backends.cpu.codegen.geometry import ConvGeometry
from venturi.backends.cpu.codegen.isa import Isa, host
from venturi.backends.cpu.native.contraction import Contraction, Direct, direct_configs, post_of
from venturi.backends.cpu.native.kernel import NativeKernel, Shapes
from venturi.backends.cpu.tactics.gemm import LinearSpec, aten_linear, read_linear
from venturi.ir.build import static_shape


def read_native_linear(region: RegionView, *others: Element) -> tuple[Isa, LinearSpec] | str:
    """A product with constant weights in fp32, or in one of the `others`, whose epilogue can be generated."""
    isa = host()
    if isinstance(isa, str):
        return isa
    spec = read_linear(region)
    if isinstance(spec, str):
        return spec
    if OF_TORCH.get(spec.weight.dtype) not in (FLOAT, *others) or spec.weight.numel() == 0:
        return f"not {' or '.join(map(repr, (FLOAT, *others)))}"
    post = post_of(spec.epilogue)
    return post if isinstance(post, str) else (isa, spec)


def linear_sizes(
    width: int, depth: int, residual: int | None, shapes: Shapes
) -> tuple[ConvGeometry, int, tuple[int, ...]] | None:
    """A product [..., depth] to [..., width] as a convolution of one row of pixels: (geometry, images, output shape).
    None for empty inputs and residuals (number `residual` among the inputs) that broadcast."""
    shape, rows = (*shapes[0][:-1], width), math.prod(shapes[0][:-1])
    if rows == 0 or shapes[0][-1] != depth or (residual is not None and shapes[residual] != shape):
        return None
    return ConvGeometry(1, rows, depth, width), 1, shape


def bind_linear(found: tuple[Isa, LinearSpec] | str, config: Config, contraction: Callable[..., Contraction]) -> Kernel:
    """The kernel that a way to convolve makes of a product that its tactic has accepted."""
    assert not isinstance(found, str)
    isa, spec = found
    width, depth = spec.weight.shape
    made = contraction(isa, spec.weight[:, :, None, None], spec.bias, spec.epilogue, config)
    residual = spec.epilogue.residual

    def plan(shapes: Shapes) -> Routine | None:
        sizes = linear_sizes(width, depth, residual, shapes)
        return None if sizes is None else made.routine(*sizes, [torch.contiguous_format] * len(shapes))

    return NativeKernel(plan, aten_linear(spec)).as_kernel()


class NativeLinear:
    """A linear layer as a convolution of one row of pixels."""

    name = "native-linear"

    def match(self, region: RegionView) -> list[Config] | str:
        found = read_native_linear(region)
        if isinstance(found, str):
            return found
        isa, spec = found
        size = static_shape(region.anchor.outputs[0])
        rows = None if size is None else math.prod(size[:-1])
        return list(direct_configs(isa, (*spec.weight.shape, 1, 1), rows, rows, tiles=2))

    def bind(self, region: RegionView, config: Config) -> Kernel:
        return bind_linear(read_native_linear(region), config, Direct)
