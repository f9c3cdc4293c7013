"""Pooling over images by generated code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from venturi.backends.base import OUT, Config, Kernel, Operand, Phase, RegionView, Routine
from venturi.backends.cpu.codegen.element import BYTES, OF_GRAPH, Element
from venturi.backends.cpu.codegen.geometry import ConvGeometry
from venturi.backends.cpu.codegen.isa import Isa, host
from venturi.backends.cpu.codegen.pool import PoolSpec, emit_global_mean, emit_pool
from venturi.backends.cpu.native.jit import host_jit
from venturi.backends.cpu.native.kernel import NativeKernel, Shapes
from venturi.backends.cpu.tactics.reference import Reference
from venturi.ir.build import rank
from venturi.ops.pool import Window

_ELEMENTS = OF_GRAPH | BYTES
Plan = Callable[[Isa, Element, Shapes], Routine | None]


class NativePool:
    """MaxPool, AveragePool, GlobalAveragePool and means over the image, in NHWC."""

    name = "native-pool"

    def match(self, region: RegionView) -> list[Config] | str:
        isa = host()
        if isinstance(isa, str):
            return isa
        plan = _read(region)
        return plan if isinstance(plan, str) else [{}]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        isa, plan = host(), _read(region)
        assert isinstance(isa, Isa)
        assert not isinstance(plan, str)
        element = _ELEMENTS[region.outputs[0].dtype]  # type: ignore[index]
        other = Reference().bind(region, {}).run
        return NativeKernel(lambda shapes: plan(isa, element, shapes), other).as_kernel()


def _read(region: RegionView) -> Plan | str:
    """How to plan the node's routine, or why there is none."""
    if len(region.nodes) != 1 or region.anchor.domain:
        return "not a single pooling"
    node = region.anchor
    source = node.inputs[0] if node.inputs else None
    if source is None or source.dtype not in _ELEMENTS or rank(source) != 4:
        return "not an image in fp32, bf16 or bytes"
    if source.dtype not in OF_GRAPH and node.op_type != "MaxPool":
        return "sums of bytes"
    if source.shape is None or not all(isinstance(d, int) for d in list(source.shape)[2:]):
        return "code would depend on the image's size, which is only known at run time"
    if region.is_constant(source) or any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return "a constant, or indices are read"
    attrs = region.attrs(node)
    if node.op_type == "GlobalAveragePool":
        return lambda isa, element, shapes: _global_mean(isa, element, shapes[0], (*shapes[0][:2], 1, 1))
    if node.op_type == "ReduceMean":
        return _read_mean(region, attrs)
    if node.op_type not in ("MaxPool", "AveragePool"):
        return "not pooling"
    if attrs.get("ceil_mode") and attrs.get("count_include_pad"):
        return "ceil_mode with count_include_pad"
    kind = "max" if node.op_type == "MaxPool" else "mean"
    return lambda isa, element, shapes: _window(isa, element, shapes[0], attrs, kind)


def _read_mean(region: RegionView, attrs: dict[str, Any]) -> Plan | str:
    axes = region.constant(region.node.inputs[1]) if len(region.node.inputs) > 1 else None
    if axes is None or sorted(int(a) % 4 for a in axes.reshape(-1)) != [2, 3]:
        return "not the mean over height and width"
    keep = bool(attrs.get("keepdims", 1))
    tail = (1, 1) if keep else ()
    return lambda isa, element, shapes: _global_mean(isa, element, shapes[0], (*shapes[0][:2], *tail))


def _global_mean(isa: Isa, element: Element, x: tuple[int, ...], shape: tuple[int, ...]) -> Routine | None:
    batch, channels, height, width = x
    if 0 in x:
        return None
    pixels = height * width
    key = f"mean {pixels} {channels} {element}"
    address = host_jit(isa).address(key, lambda: emit_global_mean(isa, pixels, channels, element))
    phase = Phase(address, (Operand(0), OUT), batch * -(-channels // isa.lanes))
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return Routine((phase,), shape, layout, (torch.channels_last,), dtype=element.dtype)


def _window(isa: Isa, element: Element, x: tuple[int, ...], attrs: dict[str, Any], kind: str) -> Routine | None:
    batch, channels, height, width = x
    kernel = list(attrs["kernel_shape"])
    w = Window(torch.empty(x, device="meta"), kernel, attrs)
    ends = [w.extent[i] - (height, width)[i] - w.pads[i] for i in range(2)]
    if min(x) == 0 or min(w.out) <= 0 or min(w.pads) < 0:
        return None
    if kind == "mean" and any(p >= k for p, k in zip(w.pads * 1, kernel * 2)):
        return None
    geometry = ConvGeometry(
        height, width, channels, channels, (kernel[0], kernel[1]), (w.strides[0], w.strides[1]),
        (w.pads[0], w.pads[1], max(ends[0], 0), max(ends[1], 0)), (w.dilations[0], w.dilations[1]),
    )  # fmt: skip
    if (geometry.out_height, geometry.out_width) != tuple(w.out):
        return None
    spec = PoolSpec(geometry, kind, bool(attrs.get("count_include_pad")), element)
    address = host_jit(isa).address(repr(spec), lambda: emit_pool(isa, spec))
    phase = Phase(address, (Operand(0), OUT), batch * w.out[0])
    layout, shape = torch.channels_last, (batch, channels, *w.out)
    return Routine((phase,), shape, layout, (layout,), dtype=element.dtype)
