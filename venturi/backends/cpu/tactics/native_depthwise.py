"""Depthwise convolutions with constant weights by generated code."""

from __future__ import annotations

import torch

from venturi.backends.base import OUT, Config, Kernel, Operand, Phase, RegionView, Routine
from venturi.backends.cpu.codegen.activation import Post
from venturi.backends.cpu.codegen.depthwise import DepthwiseSpec, emit_depthwise, pack_depthwise
from venturi.backends.cpu.codegen.element import BF16, OF_TORCH
from venturi.backends.cpu.native.contraction import post_of
from venturi.backends.cpu.native.jit import host_jit
from venturi.backends.cpu.native.kernel import NativeKernel, Shapes
from venturi.backends.cpu.native.memory import packed_copy
from venturi.backends.cpu.tactics.native_conv import aten_conv, geometry_of, read_native_conv
from venturi.backends.cpu.tactics.native_quantized import read_generated
from venturi.backends.cpu.tactics.reference import Reference

LARGEST_KERNEL = 49
CONFIGS = ({"rows": 7, "vectors": 2}, {"rows": 4, "vectors": 4})


class NativeDepthwise:
    """One filter a channel; `rows` pixels by `vectors` vectors of channels are computed together."""

    name = "native-depthwise"

    def match(self, region: RegionView) -> list[Config] | str:
        found = read_native_conv(region, BF16)
        if isinstance(found, str):
            return found
        _, spec = found
        channels, own, kh, kw = spec.weight.shape
        if own != 1 or spec.group != channels or channels == 1:
            return "not one filter a channel"
        if kh * kw > LARGEST_KERNEL:
            return f"the kernel has {kh * kw} positions, more than {LARGEST_KERNEL}"
        return list(CONFIGS)

    def bind(self, region: RegionView, config: Config) -> Kernel:
        found = read_native_conv(region, BF16)
        assert not isinstance(found, str)
        isa, spec = found
        post = post_of(spec.epilogue)
        assert isinstance(post, Post)
        element = OF_TORCH[spec.weight.dtype]
        weight = packed_copy(pack_depthwise(spec.weight.float(), config["vectors"] * isa.lanes))
        bias = None if spec.bias is None else spec.bias.float().contiguous()
        residual = spec.epilogue.residual

        def plan(shapes: Shapes) -> Routine | None:
            sizes = geometry_of(spec, shapes)
            if sizes is None:
                return None
            geometry, batch, shape = sizes
            made = DepthwiseSpec(
                geometry, min(config["rows"], geometry.out_width), config["vectors"], bias is not None, post, element
            )
            address = host_jit(isa).address(repr(made), lambda: emit_depthwise(isa, made))
            words = (
                Operand(0), weight.data_ptr(), 0 if bias is None else bias.data_ptr(),
                0 if residual is None else Operand(residual), OUT, batch,
            )  # fmt: skip
            layout = torch.channels_last
            phase = Phase(address, words, batch * geometry.out_height)
            return Routine((phase,), shape, layout, (layout,) * len(shapes), dtype=element.dtype)

        return NativeKernel(plan, aten_conv(spec)).as_kernel()


class NativeQuantizedDepthwise:
    """The same on bytes that stand for numbers, by fp32."""

    name = "native-quantized-depthwise"

    def match(self, region: RegionView) -> list[Config] | str:
        found = read_generated(region)
        if isinstance(found, str):
            return found
        q = found[1]
        channels, own, kh, kw = q.weight.shape
        if own != 1 or q.group != channels or channels == 1 or kh * kw > LARGEST_KERNEL:
            return "not one small filter a channel"
        return "a residual" if q.epilogue.residual is not None else list(CONFIGS)

    def bind(self, region: RegionView, config: Config) -> Kernel:
        found = read_generated(region)
        assert not isinstance(found, str)
        isa, q = found
        post = post_of(q.epilogue)
        assert isinstance(post, Post)
        real = q.weight.float() * (q.scales * q.image.scale)[:, None, None, None]
        weight = packed_copy(pack_depthwise(real, config["vectors"] * isa.lanes))
        bias = None if q.bias is None else q.bias.float().contiguous()
        numbers = torch.tensor([float(q.image.zero), 1 / q.out.scale, float(q.out.zero)])

        def plan(shapes: Shapes) -> Routine | None:
            sizes = q.sizes(shapes)
            if sizes is None:
                return None
            geometry, batch, shape = sizes
            rows = min(config["rows"], geometry.out_width)
            made = DepthwiseSpec(
                geometry, rows, config["vectors"], bias is not None, post, q.image.element, q.out.element
            )
            address = host_jit(isa).address(repr(made), lambda: emit_depthwise(isa, made))
            words = (
                Operand(0), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), 0, OUT, batch, numbers.data_ptr()
            )  # fmt: skip
            phase = Phase(address, words, batch * geometry.out_height)
            return Routine((phase,), shape, q.layout, (q.layout,) * len(shapes), dtype=q.out.element.dtype)

        return NativeKernel(plan, Reference().bind(region, {}).run).as_kernel()
