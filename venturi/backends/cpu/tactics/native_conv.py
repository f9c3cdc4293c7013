"""Convolutions with constant weights by generated code."""

from __future__ import annotations

from collections.abc import Callable

import torch

from venturi.backends.base import Config, Kernel, RegionView, Routine
from venturi.backends.cpu.codegen.element import FLOAT, OF_TORCH, Element
from venturi.backends.cpu.codegen.geometry import ConvGeometry
from venturi.backends.cpu.codegen.isa import Isa, host
from venturi.backends.cpu.native.contraction import Contraction, Direct, Winograd, direct_configs, post_of, rank_tiles
from venturi.backends.cpu.native.kernel import NativeKernel, Shapes
from venturi.backends.cpu.tactics.conv import ConvSpec, read_conv
from venturi.ir.build import static_shape

T = torch.Tensor
FEWEST_CHANNELS = 16
MOST_WEIGHTS = 300 * 300
SMALLEST_FOR_4 = 12


def read_native_conv(region: RegionView, *others: Element) -> tuple[Isa, ConvSpec] | str:
    """A 2-D convolution in fp32, or in one of the `others`, whose epilogue can be generated."""
    isa = host()
    if isinstance(isa, str):
        return isa
    spec = read_conv(region)
    if isinstance(spec, str):
        return spec
    element = OF_TORCH.get(spec.weight.dtype)
    if spec.weight.dim() != 4 or element not in (FLOAT, *others) or spec.weight.numel() == 0:
        return f"not a 2-D convolution in {' or '.join(map(repr, (FLOAT, *others)))}"
    post = post_of(spec.epilogue)
    if isinstance(post, str):
        return post
    image = region.anchor.inputs[0]
    if image is None or image.shape is None or not all(isinstance(d, int) for d in list(image.shape)[2:]):
        return "code would depend on the image's size, which is only known at run time"
    return isa, spec


def geometry_of(spec: ConvSpec, shapes: Shapes) -> tuple[ConvGeometry, int, tuple[int, ...]] | None:
    """(geometry, batch, output shape) at these input shapes; None for empty tensors and residuals that broadcast."""
    batch, channels, height, width = shapes[0]
    left, right, top, bottom = spec.before or (spec.pads[1], spec.pads[1], spec.pads[0], spec.pads[0])
    out_channels, _, kh, kw = spec.weight.shape
    geometry = ConvGeometry(
        height, width, channels, out_channels, (kh, kw), (spec.strides[0], spec.strides[1]),
        (top, left, bottom, right), (spec.dilations[0], spec.dilations[1]),
    )  # fmt: skip
    shape = (batch, out_channels, geometry.out_height, geometry.out_width)
    if min(shape) <= 0 or 0 in shapes[0] or min(left, right, top, bottom) < 0:
        return None
    residual = spec.epilogue.residual
    return None if residual is not None and shapes[residual] != shape else (geometry, batch, shape)


def aten_conv(spec: ConvSpec) -> Callable[..., T]:
    """The same by torch's own convolution, for what generated code does not take."""

    def run(*args: T) -> T:
        y = torch.nn.functional.conv2d(
            spec.pad(args[0]), spec.weight, spec.bias, spec.strides, spec.pads, spec.dilations, spec.group
        )
        return spec.epilogue.apply_(y, args)

    return run


def bind_conv(found: tuple[Isa, ConvSpec] | str, config: Config, contraction: Callable[..., Contraction]) -> Kernel:
    """The kernel that a way to convolve makes of a Region that its tactic has accepted."""
    assert not isinstance(found, str)
    isa, spec = found
    made = contraction(isa, spec.weight, spec.bias, spec.epilogue, config)

    def plan(shapes: Shapes) -> Routine | None:
        sizes = geometry_of(spec, shapes)
        return None if sizes is None else made.routine(*sizes, [torch.channels_last] * len(shapes))

    return NativeKernel(plan, aten_conv(spec)).as_kernel()


class NativeConv:
    """Direct convolution in NHWC on packed weights, with its epilogue."""

    name = "native-conv"

    def match(self, region: RegionView) -> list[Config] | str:
        found = read_native_conv(region)
        if isinstance(found, str):
            return found
        isa, spec = found
        if spec.group != 1:
            return "grouped"
        size = static_shape(region.anchor.outputs[0])
        if size is None:
            return list(direct_configs(isa, spec.weight.shape, None, None, tiles=1))
        pixels, width = size[0] * size[2] * size[3], size[3]
        flat = spec.weight.shape[2:] == (1, 1) and set(spec.strides) == {1} and not any(spec.pads)
        return list(direct_configs(isa, spec.weight.shape, pixels, size[2] * width if flat else width, tiles=1))

    def bind(self, region: RegionView, config: Config) -> Kernel:
        return bind_conv(read_native_conv(region), config, Direct)


class NativeWinograd:
    """3x3 convolutions of stride 1 with a quarter to a half of the products."""

    name = "native-winograd"

    def match(self, region: RegionView) -> list[Config] | str:
        found = read_native_conv(region)
        if isinstance(found, str):
            return found
        isa, spec = found
        out, channels, kh, kw = spec.weight.shape
        if spec.group != 1 or (kh, kw) != (3, 3) or {*spec.strides, *spec.dilations} != {1}:
            return "not a plain 3x3 convolution of stride 1"
        if min(out, channels) < FEWEST_CHANNELS:
            return f"fewer than {FEWEST_CHANNELS} channels"
        size = static_shape(region.anchor.outputs[0])
        small = size is not None and min(size[2:]) < SMALLEST_FOR_4
        m = 2 if small or out * channels > MOST_WEIGHTS else 4
        tiles = None if size is None else size[0] * -(-size[2] // m) * -(-size[3] // m)
        rows, vectors, unroll = rank_tiles(isa, out, tiles)[0]
        return [{"size": m, "rows": rows, "vectors": vectors, "unroll": unroll, "groups": 2}]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        return bind_conv(read_native_conv(region), config, Winograd)
