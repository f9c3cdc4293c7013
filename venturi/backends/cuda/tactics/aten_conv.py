"""Convolutions through torch's own cuDNN calls, channels last: heuristics instead of tuned plans, any channel count."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from venturi.backends.base import Config, Kernel, RegionView
from venturi.backends.cuda.codegen.element import FLOATS
from venturi.backends.cuda.rounding import products_of_fp32
from venturi.backends.cuda.tactics.conv import NHWC, matched_convolution, nhwc, read_convolution
from venturi.backends.cuda.tactics.reference import DeviceReference

T = torch.Tensor


class AtenCudnnConv:
    """Conv, Conv+Relu and Conv+Add+Relu, the latter two fused."""

    name = "aten-cudnn"

    def match(self, region: RegionView) -> list[Config] | str:
        conv = read_convolution(region, FLOATS)
        if isinstance(conv, str):
            return conv
        if conv.dtype not in FLOATS:
            return "not floating point"
        ops = [n.op_type for n in region.nodes[1:]]
        if ops not in ([], ["Relu"], ["Add", "Relu"]) or (ops[:1] == ["Add"] and not conv.tile.tiles):
            return f"torch has no fused call for {'+'.join(ops)}"
        if conv.geometry.pads[:2] != conv.geometry.pads[2:]:
            return "pads differ from side to side"
        if not torch.backends.cudnn.is_available():
            return "cuDNN is not available"
        return [{}]

    def bind(self, region: RegionView, config: Config) -> Kernel:
        conv = matched_convolution(region)
        g, ops = conv.geometry, [n.op_type for n in region.nodes[1:]]
        weight: T = region.constant(conv.weight).contiguous(memory_format=NHWC)
        own = len(region.anchor.inputs) > 2 and region.anchor.inputs[2] is not None
        bias = conv.tile.column_tensors(region)[0] if own else None
        place = (list(g.strides), list(g.pads[:2]), list(g.dilations), g.groups)
        residual = region.position(conv.tile.tiles[0]) if "Add" in ops else None
        fallback, tf32 = DeviceReference().bind(region, {}).run, conv.tf32

        def run(*args: Any) -> Any:
            x: T = args[conv.first]
            if not x.numel():
                return fallback(*args)
            x = nhwc(x)
            with products_of_fp32(tf32=tf32):
                if residual is not None:
                    return torch.cudnn_convolution_add_relu(x, weight, nhwc(args[residual]), 1.0, bias, *place)
                if ops:
                    return torch.cudnn_convolution_relu(x, weight, bias, *place)
                return F.conv2d(x, weight, bias, *place)

        return Kernel(run)
